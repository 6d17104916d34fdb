"""Random operations on the cells of a patched llama.cpp never abort, and do what a NumPy twin of the cache does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cell_walk
import pytest
from hybrid_shapes import SMALL
from model_files import write_architecture, write_model
from tiny_models import ARCHITECTURES

from kvcompose_local.llama_ffi.cells import library_is_patched

STEPS = 150
RUNS = [
    ("llama", "f16"),
    ("gemma2", "q8_0/q4_0"),
    ("qwen2", "q4_0"),
    ("gemma3", "f16"),
    ("phi3", "q8_0/q4_0"),
    ("llama", "bf16"),
    ("qwen3", "f32"),
    ("gemma2", "f16"),
    ("falcon-h1", "q8_0/q4_0"),
    ("lfm2", "f16"),
    ("qwen3next", "q8_0/q4_0"),
    ("jamba", "f32"),
    ("mistral4", "q8_0"),
    ("deepseek2", "f16"),
    ("qwen2vl", "q8_0/q4_0"),
    ("gemma4", "f16"),
    ("grok", "q4_0"),
    ("kimi-linear", "q8_0"),
]


@pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")
@pytest.mark.parametrize(("seed", "arch", "cache_type"), [(i, *run) for i, run in enumerate(RUNS)])
def test_no_operation_aborts(
    tiny_model: Callable[..., Path], tmp_path: Path, seed: int, arch: str, cache_type: str
) -> None:
    if arch in SMALL:
        model = write_model(replace(SMALL[arch], speaks=True), tmp_path / "model.gguf")
    elif arch not in ARCHITECTURES:
        model = write_architecture(arch, tmp_path / "model.gguf")
    else:
        model = tiny_model(arch, n_layers=7 if arch == "gemma3" else 4)
    command = [sys.executable, cell_walk.__file__, str(model), cache_type, str(seed), str(STEPS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{STEPS} steps" in done.stdout
