"""LongRoPE: long or short factors go by the positions of a chat, whatever its cells."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvcompose_local.engines import open_engine
from kvcompose_local.errors import ModelError
from kvcompose_local.interfaces import FloatArray
from kvcompose_local.llama_ffi import context as context_module
from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.llama_ffi.context import Context
from kvcompose_local.llama_ffi.model import Model

TOKENS = np.random.default_rng(6).integers(3, 259, 120).tolist()
#: Positions that the short factors are for: between the cells of a budget and those of --ctx.
ORIGINAL = 1024
patched_only = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")


def answer(path: Path, n_ctx: int, budget: float, engine_name: str | None = None) -> tuple[str, FloatArray]:
    engine, _ = open_engine(path, n_ctx=n_ctx, budget=budget, n_threads=1, cache_type="f16", engine_name=engine_name)
    with engine:
        engine.decode(TOKENS)
        return engine.shape.rope_factors, engine.logits()


@patched_only
@pytest.mark.parametrize("arch", ["phi3", "llama"])
@pytest.mark.parametrize("engine_name", ["patched", "stock"])
def test_a_budget_does_not_change_the_factors(tiny_model: Callable[..., Path], arch: str, engine_name: str) -> None:
    path = tiny_model(arch, longrope=ORIGINAL)
    kind, whole = answer(path, 2048, 1, engine_name)
    assert kind == "long"
    for budget in (0.5, 0.25):
        kind, logits = answer(path, 2048, budget, engine_name)
        assert kind == "long"
        np.testing.assert_allclose(logits, whole, atol=2e-2)
    for n_ctx in (ORIGINAL, 512):
        kind, short = answer(path, n_ctx, 1, engine_name)
        assert kind == "short"
        assert np.abs(short - whole).max() > 0.1
    assert answer(path, ORIGINAL + 1, 1, engine_name)[0] == "long"


def test_other_models_have_no_factors(tiny_model: Callable[..., Path]) -> None:
    assert answer(tiny_model("llama"), 1024, 1)[0] == ""


def test_an_unpatched_library_refuses_what_it_cannot_be_told(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_module, "_kvc_set_span", None)
    path = tiny_model("phi3", longrope=ORIGINAL)
    for n_ctx, kind in ((512, "short"), (2048, "long")):
        assert answer(path, n_ctx, 1, "stock")[0] == kind
    assert answer(path, ORIGINAL, 0.5, "stock")[0] == "short"
    assert answer(path, 4096, 0.5, "stock")[0] == "long"  # 2048 cells, too
    with pytest.raises(ModelError, match=r"takes the short RoPE factors .* 512 cells, and 2048 .* long .*--budget 1"):
        answer(path, 2048, 0.25, "stock")


@patched_only
def test_the_span_is_told_before_the_first_token(tiny_model: Callable[..., Path]) -> None:
    model = Model(tiny_model("phi3", longrope=ORIGINAL))
    set_span = context_module._kvc_set_span
    with Context(model, n_ctx=256, n_ubatch=64, n_threads=1, flash_attention=True, n_positions=2048) as context:
        assert context.rope_factors == "long"
        assert set_span(context._ctx, 0) == set_span(context._ctx, -5) == set_span(None, 256) == -1
        context.decode(TOKENS[:10])
        assert set_span(context._ctx, 256) == -4
        chosen = ctypes.c_int32()
        assert context_module._kvc_get_rope_factors(context._ctx, ctypes.byref(chosen)) == 0
        assert chosen.value == 2
        assert context_module._kvc_get_rope_factors(context._ctx, None) == -1
        context.clear()
        assert set_span(context._ctx, 256) == 0
    model.close()


@patched_only
def test_a_session_of_the_other_factors_is_refused_in_one_line(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_model("phi3", longrope=ORIGINAL)

    def run(n_ctx: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kvcompose_local", "run", path, "--session", tmp_path / "chat.kvc"]
        command += ["--ctx", n_ctx, "--budget", 0.5, "--threads", 1, "-p", "A word?", "--max-tokens", 2]
        return subprocess.run(
            [*map(str, command)], capture_output=True, text=True, errors="replace", timeout=120, check=False
        )

    assert run(2048).returncode == 0
    refused = run(ORIGINAL)
    assert refused.returncode == 1
    assert "the session was made with the model's long RoPE factors" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert run(3072).returncode == 0
