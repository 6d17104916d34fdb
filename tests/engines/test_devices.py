"""Cells that the host cannot reach: their place, their bytes, attention, answers, chats.

Runs on whatever GPU the library of this run knows, all layers and some of them on it, and skips where it knows none:
``scripts/gpu-tests`` builds one for what a machine has, and takes a Vulkan that computes on the CPU where there is no
GPU. Heads are of 64 and 128 numbers: smaller ones have no kernels, and would be computed on the host.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from random_models import N_VOCAB, RandomModel, Shape
from real_shapes import SHAPES, try_shape

from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.composing.cell_scores import by_layer
from kvcompose_local.composing.scorer import products
from kvcompose_local.engines import open_engine
from kvcompose_local.engines.patched import DEVICE_ROWS, PatchedEngine
from kvcompose_local.interfaces import Sampling
from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.llama_ffi.context import _kvc_host_data
from kvcompose_local.llama_ffi.devices import gpus
from kvcompose_local.llama_ffi.library import bind

pytestmark = [
    pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series"),
    pytest.mark.skipif(not gpus(), reason="the library of this run knows no GPU"),
]
_op_desc = bind("ggml_op_desc", ctypes.c_char_p, ctypes.c_void_p)
N_LAYERS, N_CTX = 3, 2048
TOKENS = np.random.default_rng(1).integers(0, N_VOCAB, 1100).tolist()
KINDS = [(64, "f16"), (64, "q8_0"), (128, "f16"), (128, "q8_0"), (128, "q8_0/q4_0")]


@contextmanager
def opened(head: int, cache_type: str, gpu_layers: int) -> Iterator[PatchedEngine]:
    engine, _ = open_engine(
        Path("random"),
        n_ctx=N_CTX,
        budget=0.5,
        n_threads=1,
        gpu_layers=gpu_layers,
        cache_type=cache_type,
        sampling=Sampling(temperature=0),
        load=lambda _path, **loading: RandomModel(Shape("random", "llama", N_LAYERS, 4, 2, head), **loading),
    )
    with engine:
        assert isinstance(engine, PatchedEngine)
        yield engine


def attention_on_host(engine: PatchedEngine, token: int) -> list[bool]:
    """Of each layer whether flash attention was computed where the host can read it, while a token is decoded."""
    seen: list[bool] = []

    def on_tensor(tensor: int, ask: bool, _user_data: object) -> bool:
        is_attention = _op_desc(tensor) == b"FLASH_ATTN_EXT"
        if is_attention and not ask:
            seen.append(_kvc_host_data(tensor) is not None)
        return is_attention or not ask

    callback = type(engine._context._callback)(on_tensor)
    engine._cells._call("set_eval_callback", ctypes.cast(callback, ctypes.c_void_p), None)
    try:
        engine.decode([token])
    finally:
        engine._cells._call("set_eval_callback", None, None)
    return seen


@pytest.mark.parametrize("gpu_layers", [0, 2, 999])
@pytest.mark.parametrize(("head", "cache_type"), KINDS)
def test_place_bytes_and_attention(head: int, cache_type: str, gpu_layers: int) -> None:
    rng = np.random.default_rng(2)
    with opened(head, cache_type, gpu_layers) as engine:
        arenas = [engine._cells.arena(layer.device).name.decode() for layer in engine.shape.layers]
        n_on_host = max(N_LAYERS + 1 - gpu_layers, 0)  # llama.cpp counts the output as a layer, and takes the last ones
        assert [name == "CPU" for name in arenas] == [i < n_on_host for i in range(N_LAYERS)]
        engine.decode(TOKENS[:700])
        # layers on the host are multiplied on a device, too, where many tokens come: then rows cross to the host
        turns = [engine._cells.turn(i) for i in range(N_LAYERS)]
        if cache_type != "q8_0/q4_0":  # for which some backends have no kernel
            assert attention_on_host(engine, 1) == [i < n_on_host for i in range(N_LAYERS)]
        else:
            engine.decode([1])

        weights = [rng.standard_normal((2, 2 * head)).astype(np.float32) for _ in range(N_LAYERS)]
        for n in (640, 301):  # devices may take another kernel for numbers that are not round
            rows = engine.live_rows(n)
            for i, sums in enumerate(by_layer(engine.live_products(weights, n), engine.shape.layers)):
                wanted = products(weights[i], *rows[i])
                assert np.abs(sums - wanted).max() < 0.003 * wanted.std()

        for _ in range(2):  # from a uniform layout, and from a composed one
            layout, before = engine.layout(), engine.snapshot()
            selection = [
                np.stack([rng.permutation(k + layout.n_live - 9)[: 256 * (1 + i) - 128] for _ in range(2)])
                for i, k in enumerate(layout.composed)
            ]
            engine.rewrite(selection, 9)
            after = engine.snapshot()
            for i, chosen in enumerate(selection):
                for old, new in ((before.keys[i], after.keys[i]), (before.values[i], after.values[i])):
                    old_heads, new_heads = (x.reshape(len(x), 2, -1) for x in (old, new))
                    for h in range(2):
                        assert np.array_equal(new_heads[: chosen.shape[1], h], old_heads[chosen[h], h])
                    assert np.array_equal(new[chosen.shape[1] :], old[-9:])
            n_rows = [engine._cells.layer(i).n_rows for i in range(N_LAYERS)]
            assert all(n % DEVICE_ROWS == 0 for n, name in zip(n_rows, arenas, strict=True) if name != "CPU")
            engine.decode(TOKENS[700:720])

        cells = engine.snapshot()
        engine.decode(TOKENS[720:723])
        found = engine.logits()
    with opened(head, cache_type, 0) as host:
        host.restore(cells)
        host.decode(TOKENS[720:723])
        wanted = host.logits()
        assert turns == [host._cells.turn(i) for i in range(N_LAYERS)]
        assert all(turn.rope.n_rotated for turn in turns)
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() < 0.05 * wanted.std()


@pytest.mark.parametrize("head", [64, 128])
def test_compactions_keep_rows_in_steps(head: int) -> None:
    with opened(head, "f16", 999) as engine:
        memory = CacheMemory(engine, N_CTX)
        memory.feed(TOKENS)
        memory.feed(TOKENS[:500])
        assert len(memory.reports) >= 2
        assert {engine._cells.layer(i).n_rows % DEVICE_ROWS for i in range(N_LAYERS)} == {0}
        assert sum(engine._cells.layer(i).n_rows for i in range(N_LAYERS)) <= N_CTX // 2 * N_LAYERS


@pytest.mark.parametrize("gpu_layers", [0, 8, 999])
@pytest.mark.parametrize("name", ["Llama 3.2 1B", "Qwen3 0.6B, 1.7B", "Gemma 3 1B"])
def test_a_chat_of_a_real_shape(name: str, gpu_layers: int) -> None:
    assert try_shape(next(shape for shape in SHAPES if shape.name == name), gpu_layers)
