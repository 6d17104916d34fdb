"""Every architecture of the pinned llama.cpp: composed below budget 1, or refused for a reason."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from exact_trials import opened

from kvcompose_local.architectures import table
from kvcompose_local.architectures.fixtures import NOT_MADE, tiny
from kvcompose_local.architectures.table import Row
from kvcompose_local.commands.cli import cli
from kvcompose_local.errors import EngineError
from kvcompose_local.install.threads import default_threads
from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.llama_ffi.library import lib
from kvcompose_local.llama_ffi.memory import architectures

pytestmark = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")
NAMES = [name for name in architectures() if name not in NOT_MADE]
EXACT = (sys.executable, str(Path(__file__).parents[1] / "helpers" / "exact_trials.py"))
#: Why an architecture may be refused, whatever its memory.
REFUSED = ("no language model", "attention biased by distance")


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Row]]]:
    """What was found of each architecture that this run wants, as many at a time as there are cores."""
    items = request.session.items
    wanted = {item.callspec.params["name"] for item in items if getattr(item, "obj", None) is test_architecture}
    names = [name for name in NAMES if name in wanted]
    rows: dict[str, Future[Row]] = {name: Future() for name in names}

    def tried(part: list[str]) -> None:
        left = [*part]
        try:
            for row in table.trials(part, EXACT):
                rows[row.architecture].set_result(row)
                left.remove(row.architecture)
        except BaseException as error:
            for name in left:
                rows[name].set_exception(error)

    with ThreadPoolExecutor(default_threads()) as pool:
        for i in range(0, len(names), 8):
            pool.submit(tried, names[i : i + 8])
        yield rows
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", NAMES)
def test_architecture(found: dict[str, Future[Row]], name: str) -> None:
    """Five compactions, undo, a saved state; and exactly what heads keep, in bytes and in what attention sees."""
    row = found[name].result()
    if not row.why:
        assert "5 compactions" in row.tried or "6 compactions" in row.tried
        assert row.tried.endswith("bytes of a gather, logits of masked attention")
    elif row.memory.startswith("attention"):
        assert row.why.startswith(REFUSED), row.why
    else:
        assert not row.failed, row.why
        assert row.memory.split(",")[0] in ("none", "recurrent", "hybrid", "indexed"), row.memory


def test_page(found: dict[str, Future[Row]]) -> None:
    """docs/models.md ends with what scripts/shapes would write; not where a part of them runs."""
    if set(found) != set(NAMES):
        pytest.skip("only some architectures are tried")
    rows = [
        Row(name, "", f"not made: {NOT_MADE[name]}", "") if name in NOT_MADE else found[name].result()
        for name in architectures()
    ]
    assert (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8").endswith(table.page(rows))


def test_what_has_no_model_says_why() -> None:
    assert set(NOT_MADE) <= set(architectures())
    assert all(NOT_MADE.values())


def decode_embeddings(engine_context: object, n_embd: int, positions: list[tuple[int, int, int, int]]) -> int:
    """llama_decode's code for what an image would be: numbers in place of tokens, with a position for each section."""
    n = len(positions)
    batch = lib.llama_batch_init(n, n_embd, 1)
    own = ctypes.cast(batch.pos, ctypes.c_void_p).value  # the pointer itself would follow the field
    numbers = np.random.default_rng(0).standard_normal((n, n_embd)).astype(np.float32)
    ctypes.memmove(batch.embd, numbers.ctypes.data, numbers.nbytes)
    by_section = np.ascontiguousarray(np.array(positions, np.int32).T)  # of all tokens the first, then the second
    batch.pos = by_section.ctypes.data_as(type(batch.pos))
    for i in range(n):
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 0
    batch.n_tokens = n
    try:
        return int(lib.llama_decode(engine_context, batch))
    finally:
        batch.pos = ctypes.cast(own, type(batch.pos))
        lib.llama_batch_free(batch)


@pytest.mark.parametrize(
    ("positions", "reason"),
    [
        ([(30, 30, 30, 0)] * 3, "two live cells have position 30"),
        ([(30, 30, 31, 0), (31, 31, 32, 0)], "the cell at position 30 is not of text"),
    ],
)
def test_cells_of_an_image_are_refused(positions: list[tuple[int, int, int, int]], reason: str) -> None:
    model = tiny("qwen2vl")
    try:
        with opened(model) as engine:
            engine.decode(list(range(30)))
            assert decode_embeddings(engine._context._ctx, model.n_embd, positions) == 0
            before = engine.snapshot()
            rows = [np.zeros((layer.n_kv_heads, 1), np.int64) for layer in engine.shape.layers]
            with pytest.raises(EngineError, match=reason):
                engine.rewrite(rows, 1)
            after = engine.snapshot()
            for one, two in zip((*before.keys, *before.values), (*after.keys, *after.values), strict=True):
                assert np.array_equal(one, two)
    finally:
        model.close()


def test_positions_that_were_never_learned_are_refused() -> None:
    model = tiny("gpt2")
    try:
        with opened(model) as engine:
            engine.decode(list(range(100)))
            assert engine.layout().n_free == 156
            object.__setattr__(engine.shape, "n_ctx_train", 110)
            assert engine.layout().n_free == 10
    finally:
        model.close()


def test_the_command_prints_a_line_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["clip", "llama", "mistral4", "bloom", "mamba", "deepseek4", "bert"]
    monkeypatch.setattr(table, "architectures", lambda: iter(names))
    done = CliRunner().invoke(cli, ["doctor", "--models"])
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if line]
    assert [line.split()[0] for line in lines[1:-1]] == names
    told = dict(zip(names, lines[1:-1], strict=True))
    assert "no: not made: it reads images" in told["clip"]
    assert re.search(r"attention +composed: . compactions of q8_0/q4_0 cells", told["llama"])
    assert re.search(r"attention, MLA +composed: . compactions of q8_0 cells", told["mistral4"])
    assert "no: attention biased by distance" in told["bloom"]
    assert "no: it is recurrent" in told["mamba"]
    assert "no: an index of its own" in told["deepseek4"]
    assert lines[-1].startswith("2 of 7 architectures are composed. Memory of the others: ")


def test_an_abort_takes_no_other_trial_with_it(tmp_path: Path) -> None:
    script = tmp_path / "trial.py"
    script.write_text(
        "import os, sys\n"
        "from kvcompose_local.architectures import trial\n"
        "def tried(name):\n"
        "    if name == 'qwen2':\n"
        "        print('error: llama.cpp stopped: here', file=sys.stderr, flush=True)\n"
        "        os._exit(1)\n"
        "    return {'architecture': name, 'memory': 'attention', 'why': '', 'tried': 'this'}\n"
        "trial.main(sys.argv[1:], tried)\n"
    )
    rows = list(table.trials(["llama", "qwen2", "phi2"], (sys.executable, str(script))))
    assert [row.architecture for row in rows] == ["llama", "qwen2", "phi2"]
    assert [row.why for row in rows] == ["", "FAILED: error: llama.cpp stopped: here", ""]
    assert [row.failed for row in rows] == [False, True, False]
