"""Random models of the shapes that people run, under a budget, and docs/models.md that tells of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import RandomModel, Shape
from real_shapes import PAGE, SHAPES, page, try_shape

from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.engines import open_engine
from kvcompose_local.engines.base import LlamaEngine
from kvcompose_local.errors import ModelError
from kvcompose_local.install.threads import default_threads
from kvcompose_local.llama_ffi.cells import library_is_patched

pytestmark = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")
NAMES = [shape.name for shape in SHAPES]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[str]]]:
    """What was done with each shape that this run wants, as many at a time as there are cores."""
    wanted = {
        item.callspec.params["name"] for item in request.session.items if getattr(item, "obj", None) is test_shape
    }
    if any(getattr(item, "obj", None) is test_page for item in request.session.items):
        wanted |= set(NAMES)
    with ThreadPoolExecutor(default_threads()) as pool:
        yield {shape.name: pool.submit(try_shape, shape) for shape in SHAPES if shape.name in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", NAMES)
def test_shape(outcomes: dict[str, Future[str]], name: str) -> None:
    assert outcomes[name].result()


def test_page(outcomes: dict[str, Future[str]]) -> None:
    """docs/models.md begins with what scripts/shapes would write."""
    assert PAGE.read_text(encoding="utf-8").startswith(page([outcomes[name].result() for name in NAMES]))


#: As GGUF files, which have the tensors of the real ones alone: architecture, layers, heads, KV heads, head size.
#: The graphs of all but the last outgrew llama.cpp's bound while they were watched; that one's while it was replayed.
FILES = {
    "Llama 3.2 1B": ("llama", 16, 32, 8, 64),
    "Qwen3 0.6B": ("qwen3", 28, 16, 8, 128),
    "SmolLM2 1.7B": ("llama", 24, 32, 32, 64),
    "Phi 3 mini": ("phi3", 32, 4, 4, 32),
}
TEXT = (
    "The harbour office opens at nine. The keeper of the light has seven keys, and the blue one is for the boat. " * 2
)


def program(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvcompose_local", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, check=False)


@pytest.mark.parametrize("name", FILES)
def test_a_file_through_the_command_line(tiny_model: Callable[..., Path], tmp_path: Path, name: str) -> None:
    arch, n_layers, n_heads, n_kv_heads, head = FILES[name]
    path = tiny_model(arch, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, head=head, name=name)
    text, session = tmp_path / "text.txt", tmp_path / "chat.kvc"
    text.write_text(TEXT)

    told = program("inspect", path)
    assert told.returncode == 0, told.stderr
    expected = f"{name} ({arch}): {n_layers} layers, {n_heads} query heads, {n_kv_heads} KV heads, trained for 4096"
    assert told.stdout.startswith(expected)

    def asked(*more: object) -> dict[str, Any]:
        options = ("--threads", 1, "--ctx", 512, "--budget", 0.25, "--temp", 0, "--max-tokens", 4, "--json")
        done = program("run", path, *options, "--session", session, "-p", "Which key?", *more)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    first = asked("-f", text)
    assert first["compactions"] > 1
    assert first["kv_bytes"] <= first["kv_bytes_full"] / 4
    second = asked()
    assert second["positions"] > first["positions"] > len(TEXT)
    assert second["prompt_tokens"] < 100, "the text was read again"


@pytest.mark.parametrize("arch", ["gpt2", "starcoder", "bloom"])
def test_models_without_rope(arch: str) -> None:
    """Learned positions end with the trained length; a bias by distance wants the true positions of composed cells."""
    more = {"attention.layer_norm_epsilon": 1e-5, "context_length": 512}
    shape = Shape(arch, arch, 2, 2, 2, 32, more, n_embd=64)

    def opened(budget: float) -> LlamaEngine:
        load = lambda _path, **loading: RandomModel(shape, **loading)  # noqa: E731
        return open_engine(Path(arch), n_ctx=512, budget=budget, n_threads=1, load=load)[0]

    with opened(1) as engine:
        engine.decode(list(range(200)))
        assert np.isfinite(engine.logits()).all()
    if arch == "bloom":
        with pytest.raises(ModelError, match="--budget 1 only: attention biased by distance"):
            opened(0.25)
        return
    for replay in (False, True):
        with opened(0.25) as engine:
            memory = CacheMemory(engine, 512, replay=replay)
            memory.feed([i % 200 for i in range(512)])
            assert memory.position == 512
            assert len(memory.reports) > 4
            assert np.isfinite(engine.logits()).all()
