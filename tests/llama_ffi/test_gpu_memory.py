"""How many layers go to a GPU by its free memory; what it holds is tried where there is one (tests/engines)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvcompose_local.llama_ffi import devices
from kvcompose_local.llama_ffi.devices import Gpu, layers_to_offload


def test_layers_go_by_free_memory_with_their_cells(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model("llama", n_layers=4, head=64)
    weights = path.stat().st_size / 4

    def fitting(free: float, n_ctx: int, budget: float = 1.0, n_gpus: int = 1) -> int:
        gpu = Gpu("GPU0", "a GPU", int(free) + devices._SPARED, 1 << 40)
        monkeypatch.setattr(devices, "gpus", lambda: [gpu] * n_gpus)
        return layers_to_offload(path, None, n_ctx=n_ctx, budget=budget)

    with path.open("rb") as file:
        token = devices._token_bytes(devices.read_header(file))
    assert token % (2 * 2 * 64) == 0
    cells = 100 * token
    assert fitting(0, 100) == 0
    assert fitting(2 * (weights + cells) + 8, 100) == 2
    assert fitting(2 * (weights + cells) + 8, 200) == 2 * (weights + cells) // (weights + 2 * cells)
    assert fitting(2 * (weights + cells) + 8, 200, 0.5) == 2
    assert fitting((weights + cells) + 8, 100, n_gpus=2) == 2
    assert fitting(4 * (weights + cells) + 8, 100) == 999
    assert layers_to_offload(path, 3, n_ctx=100, budget=1) == 3


def test_workers_hold_all_layers_and_no_gpu_none(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model("llama", n_layers=4)
    monkeypatch.setattr(devices, "gpus", list)
    assert layers_to_offload(path, None, n_ctx=None, budget=0.5, workers=["one:1"]) == 999
    assert layers_to_offload(path, None, n_ctx=None, budget=0.5) == 0


def test_gpus_are_told_with_their_memory() -> None:
    for gpu in devices.gpus():
        assert gpu.name
        assert 0 <= gpu.free <= gpu.total
