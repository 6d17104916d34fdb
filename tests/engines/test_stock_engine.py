"""The stock engine on real llama.cpp with tiny F32 models: bytes, logits, attention, errors from the callback."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_models import replayed

from kvcompose_local.arena import TokenShape, cells_for
from kvcompose_local.engines import open_engine
from kvcompose_local.engines.base import softmax_queries
from kvcompose_local.engines.state_format import parse_state, write_state
from kvcompose_local.engines.stock import StockEngine
from kvcompose_local.errors import ContextFull, EngineError, InvalidInput, ModelError
from kvcompose_local.interfaces import Sampling
from kvcompose_local.llama_ffi.context import Context
from kvcompose_local.llama_ffi.loading import Loading
from kvcompose_local.llama_ffi.model import Model

GREEDY = Sampling(temperature=0)
ATTENTION_ONLY = ("llama", "qwen2", "qwen3", "phi3")
RNG = np.random.default_rng(7)
TOKENS = RNG.integers(3, 259, 120).tolist()


def engine_of(path: Path, *, n_cells: int = 256, **options: object) -> StockEngine:
    return StockEngine(Model(path), n_cells=n_cells, n_threads=1, sampling=GREEDY, **options)  # type: ignore[arg-type]


@pytest.fixture
def llama(tiny_model: Callable[..., Path]) -> Iterator[StockEngine]:
    with engine_of(tiny_model("llama")) as engine:
        yield engine


def selection_of(engine: StockEngine, rows: np.ndarray) -> list[np.ndarray]:
    return [np.tile(rows, (layer.n_kv_heads, 1)) for layer in engine.shape.layers]


@pytest.mark.parametrize("arch", ATTENTION_ONLY)
def test_an_identity_rewrite_keeps_every_byte_and_the_future(tiny_model: Callable[..., Path], arch: str) -> None:
    with engine_of(tiny_model(arch)) as engine, engine_of(tiny_model(arch)) as untouched:
        for e in (engine, untouched):
            e.decode(TOKENS[:100])
        before = parse_state(engine._context.state())
        engine.rewrite(selection_of(engine, np.arange(92)), 8)
        after = parse_state(engine._context.state())
        assert (before.positions == after.positions).all()
        for a, b in zip(before.keys + before.values, after.keys + after.values, strict=True):
            assert (a.data == b.data).all()
        assert engine.layout() == type(engine.layout())((92,) * 3, 8, 156, 100)
        for e in (engine, untouched):
            e.decode(TOKENS[100:])
        np.testing.assert_allclose(engine.logits(), untouched.logits(), atol=1e-4)
        assert engine.sample() == untouched.sample()


@pytest.mark.parametrize("arch", ATTENTION_ONLY)
def test_dropped_cells_are_as_if_masked(tiny_model: Callable[..., Path], arch: str) -> None:
    """Independent path: the reference never rewrites; it removes the same cells' positions before the next token."""
    kept = np.array([0, 5, 17, 40, 41, 42, 77])
    with engine_of(tiny_model(arch)) as engine, engine_of(tiny_model(arch)) as reference:
        for e in (engine, reference):
            e.decode(TOKENS[:100])
        engine.rewrite(selection_of(engine, kept), 4)
        for position in set(range(96)) - set(kept.tolist()):
            reference._context.remove(position, position + 1)
        for e in (engine, reference):
            e._context.decode(TOKENS[100:101])
        np.testing.assert_allclose(engine.logits(), reference.logits(), atol=1e-4)
        assert engine.layout().position == reference._context.next_position == 101


def test_each_head_gets_its_own_cells(llama: StockEngine) -> None:
    llama.decode(TOKENS[:50])
    before = parse_state(llama._context.state())
    selection = [np.stack([RNG.permutation(46)[:9] for _ in range(2)]) for _ in range(3)]
    llama.rewrite(selection, 4)
    after = parse_state(llama._context.state())
    head = before.keys[0].data.shape[1] // 2
    for layer in range(3):
        for h in range(2):
            part = slice(h * head, (h + 1) * head)
            rows = selection[layer][h]
            assert (after.keys[layer].data[:9, part] == before.keys[layer].data[rows, part]).all()
            values = slice(h * 32, (h + 1) * 32)
            assert (after.values[layer].data[values, :9] == before.values[layer].data[values][:, rows]).all()
    # and once more, out of composed and live cells
    llama.decode(TOKENS[50:60])
    again = [np.tile(np.array([3, 9, 12]), (2, 1))] * 3
    middle = parse_state(llama._context.state())
    llama.rewrite(again, 2)
    last = parse_state(llama._context.state())
    assert (last.keys[1].data[:3] == middle.keys[1].data[[3, 9, 12]]).all()
    assert last.positions.tolist() == [55, 56, 57, 58, 59]


def test_replay_sees_what_attention_saw_and_leaves_no_trace(llama: StockEngine) -> None:
    llama.decode(TOKENS[:40])
    before = llama._context.state()
    tapped: list[np.ndarray] = []
    whole = replayed(llama, TOKENS[:30])
    assert (llama._context.state() == before).all()
    assert [a.shape for a in whole] == [(4, 40)] * 3
    # Oracle: the full softmax of a single micro-batch, copied, whose rows must sum to 1.
    llama._context.tap = lambda layer, w: tapped.append(w.copy())
    llama._context.decode(TOKENS[:30])
    llama._context.tap = None
    llama._context.remove(40)
    assert len(tapped) == 3
    for layer in range(3):
        assert tapped[layer].shape[:2] == (4, 30)
        np.testing.assert_allclose(tapped[layer].sum(axis=2), 1, atol=1e-5)
        np.testing.assert_allclose(whole[layer], tapped[layer][:, :, :40].max(axis=1), atol=1e-6)


def test_the_maximum_does_not_depend_on_the_micro_batch(tiny_model: Callable[..., Path]) -> None:
    results = []
    for n_ubatch in (8, 64):
        with engine_of(tiny_model("llama"), n_ubatch=n_ubatch) as engine:
            engine.decode(TOKENS[:100])
            results.append(replayed(engine, TOKENS[:50]))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_an_error_in_the_callback_reaches_the_caller_and_the_chat_goes_on(llama: StockEngine) -> None:
    llama.decode(TOKENS[:20])

    def broken(layer: int, weights: np.ndarray) -> None:
        raise ZeroDivisionError("in the callback")

    llama._context.tap = broken
    with pytest.raises(ZeroDivisionError, match="in the callback"):
        llama.decode(TOKENS[20:30])
    llama._context.tap = None
    assert llama.layout().position == 20
    with pytest.raises(EngineError, match="no logits"):
        llama.sample()
    llama.decode(TOKENS[20:30])
    assert llama.sample() >= 0


def test_wrong_calls_change_nothing(llama: StockEngine) -> None:
    llama.decode(TOKENS[:100])
    before = llama._context.state()
    with pytest.raises(ContextFull):
        llama.decode(list(range(3, 259)))
    with pytest.raises(ContextFull):
        replayed(llama, list(range(3, 259)))
    with pytest.raises(InvalidInput):
        llama.rewrite(selection_of(llama, np.arange(3)), 101)
    with pytest.raises(EngineError):
        llama.rewrite(selection_of(llama, np.array([100])), 0)
    with pytest.raises(InvalidInput):
        llama.drop_tail(101)
    assert (llama._context.state() == before).all()
    llama.drop_tail(100)
    assert llama.layout().position == 0
    llama.clear()
    llama.decode(TOKENS[:10])
    assert llama.layout().n_live == 10


@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q8_0/q4_0"])
def test_a_plain_cache_of_any_type_is_rewritten(tiny_model: Callable[..., Path], cache_type: str) -> None:
    """With flash attention V is not transposed and may be quantized."""
    model = Model(tiny_model("llama"))
    with Context(model, n_ctx=256, n_ubatch=64, n_threads=1, flash_attention=True, cache_type=cache_type) as context:
        context.decode(TOKENS[:50])
        cells = parse_state(context.state())
        assert not cells.values[0].transposed
        rows = [np.stack([RNG.permutation(46)[:9] for _ in range(2)]) for _ in range(3)]
        gathered = cells.gather(rows, 4)
        blob = write_state(gathered)
        context.remove(0)
        context.set_state(blob)
        assert (context.state() == blob).all()
        assert context.next_position == 50
        context.decode(TOKENS[50:60])
        with pytest.raises(EngineError, match="set_data"):
            context.set_state(blob[:-5])
    model.close()


def test_sampling_is_repeatable_and_follows_its_parameters(llama: StockEngine) -> None:
    llama.decode(TOKENS[:20])
    best = int(llama.logits().argmax())
    assert llama.sample() == best
    draws = []
    for seed in (1, 1, 2):
        llama.set_sampling(Sampling(temperature=5.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed))
        draws.append([llama.sample() for _ in range(20)])
    assert draws[0] == draws[1] != draws[2]
    llama.set_sampling(Sampling(temperature=5.0, top_k=1))
    assert {llama.sample() for _ in range(5)} == {best}


def test_sliding_windows_and_odd_caches_are_refused_below_budget_one(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"sliding-window.*--budget 1.*kvcompose-local build"):
        engine_of(tiny_model("gemma3"))
    with pytest.raises(InvalidInput, match="F16"):
        engine_of(tiny_model("llama"), cache_type="q8_0")
    with engine_of(tiny_model("gemma3"), scoring=False) as engine:
        engine.decode(TOKENS)
        assert engine.sample() >= 0


def test_numbers_are_checked_before_weights_are_read(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    missing = tmp_path / "missing.gguf"
    for budget in (0.0, -1.0, 1.5, float("nan"), float("inf")):
        with pytest.raises(InvalidInput, match="budget"):
            open_engine(missing, n_ctx=512, budget=budget)
    with pytest.raises(InvalidInput, match="ctx"):
        open_engine(missing, n_ctx=0, budget=0.5)
    with pytest.raises(InvalidInput, match="256 cells"):
        open_engine(missing, n_ctx=200, budget=0.4)
    with pytest.raises(InvalidInput, match="4096 positions"):
        open_engine(tiny_model("llama"), n_ctx=4097, budget=0.5)
    engine, positions = open_engine(tiny_model("llama"), n_ctx=None, budget=0.5, engine_name="stock")
    with engine:
        assert positions == 4096
        assert engine.arena_bytes == (2048 * engine.shape.row_bytes,)


def test_cells_are_bought_exactly() -> None:
    assert cells_for(2048, 0.5) == 1024
    assert cells_for(1000, 1.0) == 1024
    assert cells_for(2560, 0.3) == 768  # 0.3 as a decimal, not as the float below it
    assert cells_for(1000, 0.5, "q8_0") == 768
    assert cells_for(1000, 0.55, "q8_0") == 1024  # all positions, and no more
    assert cells_for(2048, 0.5, "f32") == 512


def test_what_compacting_takes_is_bought_too_where_cells_are_many() -> None:
    assert cells_for(8192, 0.25) == 2048  # 1,841 with it
    # a head's key and value 256 bytes, 24 of softmax and 5 beside; 104, 9.75 and 5; 208, 19.5 and 5
    assert cells_for(16384, 0.25) == int(4096 * 256 / 285) // 256 * 256 == 3584
    assert cells_for(32768, 0.25, "q8_0/q4_0") == int(8192 * 256 / 118.75) // 256 * 256 == 17408
    assert cells_for(32768, 0.25, "q8_0/q4_0", TokenShape(128, 128, 8)) == int(8192 * 512 / 232.5) // 256 * 256 == 17920
    assert cells_for(32768, 0.9) == 26368  # of 29,491
    # 128 KiB a token: no softmax takes more than 32 MiB, and 16 to work in
    assert cells_for(131072, 0.25, "f16", TokenShape(128, 128, 256)) == int((32768 - 384) / (517 / 512)) // 256 * 256


@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q8_0/q4_0"])
def test_more_budget_never_buys_fewer_cells(cache_type: str) -> None:
    for n_ctx in (2048, 8192, 131072):
        for token in (TokenShape(64, 64, 48), TokenShape(128, 128, 256)):
            cells = [cells_for(n_ctx, thousandth / 1000, cache_type, token) for thousandth in range(200, 1001)]
            assert cells == sorted(cells)
    assert [cells_for(n, 0.25, cache_type) for n in range(2048, 9000, 8)] == sorted(
        cells_for(n, 0.25, cache_type) for n in range(2048, 9000, 8)
    )


def test_the_softmax_tensor_stays_bounded() -> None:
    for n_cells in (256, 8192, 131072):
        for n_heads in (4, 14, 64):
            for wanted, limit in ((1 << 20, 4 << 20), (6 << 20, 6 << 20), (1 << 40, 32 << 20)):
                n = softmax_queries(n_cells, n_heads, wanted)
                assert n == 4 or n * n_cells * n_heads * 4 <= limit
                assert n % 4 == 0


def test_a_file_llama_cpp_refuses_gets_its_reason(tmp_path: Path) -> None:
    from tiny_models import write_tiny_model

    path = write_tiny_model(tmp_path / "cut.gguf")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ModelError, match=r"cannot load cut.gguf \(.+\)"):
        Model(path)


def test_a_start_needs_only_the_bindings_of_llama_cpp_python(tmp_path: Path) -> None:
    """Its high-level classes take as long to import as all of ours, and llama.cpp's log."""
    from tiny_models import write_tiny_model

    whole = write_tiny_model(tmp_path / "whole.gguf")
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:-2000])
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from kvcompose_local.errors import ModelError\n"
        "from kvcompose_local.llama_ffi.model import Model\n"
        "assert 'numpy' not in sys.modules\n"
        "whole, cut = map(Path, sys.argv[1:])\n"
        "Model(whole).render_chat([{'role': 'user', 'content': 'x'}], add_generation_prompt=True)\n"
        "try: Model(cut)\n"
        "except ModelError as error: print(error)\n"
        "assert {name for name in sys.modules if name.startswith('llama_cpp')} <= "
        "{'llama_cpp.llama_cpp', 'llama_cpp._ctypes_extensions'}\n"
    )
    command = [sys.executable, "-c", code, str(whole), str(tmp_path / "cut.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert re.fullmatch(r"llama.cpp cannot load cut.gguf \(.+\): the file is cut off or damaged, .*\n", done.stdout)
    assert done.stderr == ""


def test_a_native_abort_ends_in_one_line() -> None:
    code = (
        "from kvcompose_local.llama_ffi import library\n"
        "library.on_abort.append(lambda reason: print('saved', flush=True))\n"
        "library._native.ggml_abort(b'x.c', 7, b'tensor\\nboom')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "saved\n")
    assert done.stderr == "\nerror: llama.cpp stopped: x.c:7: tensor boom\n"


def test_loading_can_be_stopped(tiny_model: Callable[..., Path]) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Model(tiny_model("llama"), progress=stop)


def test_a_model_loads_while_its_user_gets_ready(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_model()
    loading = Loading(path)
    seen: list[int] = []
    model = loading(path, progress=lambda percent, _total: seen.append(percent))
    assert model.n_vocab == 259
    loading.close()  # does not touch a model that was taken
    assert model.tokenize("a")
    model.close()
    with pytest.raises(EngineError, match="in use already"):
        loading(path)
    for other in (Loading(path), Loading(tmp_path / "none.gguf")):
        other.close()
    with pytest.raises(ModelError, match=r"cannot load none\.gguf"):
        Loading(tmp_path / "none.gguf")(tmp_path / "none.gguf")
    begun_for_another = Loading(tmp_path / "none.gguf")
    begun_for_another(path).close()
