"""Rows as the model made them: RoPE and Hadamard undone, against what llama.cpp had before it did them."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompose_local.composing.rotation import Rope, unjoined
from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.interfaces import FloatArray
from kvcompose_local.llama_ffi import context as context_module
from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.llama_ffi.library import lib
from kvcompose_local.llama_ffi.model import Model

TOKENS = np.random.default_rng(1).integers(3, 259, 60).tolist()
ROPES = [
    Rope(),
    Rope(8),
    Rope(4, mode=0, base=500.0),
    Rope(4, offset=4),
    Rope(8, factors=(1.0, 2.0, 4.0, 8.0), magnitude=1.5),
    Rope(8, scale=0.25, extrapolation=1.0, n_ctx_original=64, base=1e4),
]


def turned(rope: Rope, row: FloatArray, position: int) -> FloatArray:
    """One head's numbers after RoPE, number by number, as ggml's loop has it."""
    result = row.astype(np.float64)
    for pair in range(rope.n_rotated // 2):
        i = rope.offset + (2 * pair if rope.mode == 0 else pair)
        j = i + (1 if rope.mode == 0 else rope.n_rotated // 2)
        angle = position * rope.frequencies[pair]
        a, b = row[i], row[j]
        result[i] = rope.length * (a * np.cos(angle) - b * np.sin(angle))
        result[j] = rope.length * (a * np.sin(angle) + b * np.cos(angle))
    return result.astype(np.float32)


@given(st.sampled_from(ROPES), st.integers(0, 10**5), st.integers(0, 3))
def test_undone_is_the_inverse(rope: Rope, first: int, n: int) -> None:
    keys = np.random.default_rng(n).standard_normal((2, n, 8)).astype(np.float32)
    after = np.array([[turned(rope, row, first + t) for t, row in enumerate(head)] for head in keys], np.float32)
    np.testing.assert_allclose(rope.undone(after.reshape(keys.shape), first), keys, atol=1e-5)


def test_yarn_mixes_frequencies_by_their_wavelength() -> None:
    """From its paper: fast pairs stay, slow ones are stretched, and all are a little longer."""
    plain, yarn = Rope(64), Rope(64, scale=0.25, extrapolation=1.0, n_ctx_original=4096)
    ratio = yarn.frequencies / plain.frequencies
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(0.25)
    assert (np.diff(ratio) <= 0).all()
    assert yarn.length == pytest.approx(1 + 0.1 * np.log(4))


def test_a_hadamard_matrix_undoes_itself() -> None:
    rows = np.random.default_rng(0).standard_normal((2, 3, 128)).astype(np.float32)
    assert unjoined(rows, 0) is rows
    for size in (64, 128):
        joined = unjoined(rows, size)
        assert np.abs(joined - rows).max() > 0.1
        np.testing.assert_allclose(unjoined(joined, size), rows, atol=1e-5)


def keys_before_rope(engine: PatchedEngine, tokens: list[int], n_parts: int) -> dict[int, list[list[FloatArray]]]:
    """What stood in tensors named Kcur while tokens were decoded: of each layer, of each stage, its parts."""
    seen: dict[tuple[int, bytes, int], list[FloatArray]] = {}
    counts: dict[tuple[int, bytes], int] = {}

    @lib.ggml_backend_sched_eval_callback
    def callback(tensor: int, ask: bool, _user_data: object) -> bool:
        name = context_module._ggml_get_name(tensor)
        found = re.fullmatch(rb"(K\w*)-(\d+)( \(\w+\))?", name)
        if not found:
            return not ask
        if not ask:
            key = (int(found[2]), name)
            counts[key] = counts.get(key, 0) + 1
            size = context_module._ggml_nelements(tensor)
            data = np.asarray(context_module._Floats(context_module._ggml_get_data(tensor), (size,)))
            seen.setdefault((*key, counts[key]), []).append(data.copy())
        return True

    engine._cells._call("set_eval_callback", ctypes.cast(callback, ctypes.c_void_p), None)
    size = len(tokens) // n_parts
    for start in range(0, len(tokens), size):
        counts.clear()
        engine.decode(tokens[start : start + size])
    engine._cells._call("set_eval_callback", None, None)
    by_layer: dict[int, list[list[FloatArray]]] = {}
    for (layer, _name, _count), parts in seen.items():
        by_layer.setdefault(layer, []).append(parts)
    return by_layer


@pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")
@pytest.mark.parametrize(("cache_type", "off"), [("f16", 2e-3), ("q8_0", 2e-2), ("q8_0/q4_0", 2e-2)])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"])
def test_live_rows_are_what_the_model_made(
    tiny_model: Callable[..., Path], arch: str, cache_type: str, off: float
) -> None:
    model = Model(tiny_model(arch, n_layers=7, head=64))
    with PatchedEngine(model, n_cells=256, n_threads=1, cache_type=cache_type, n_ubatch=64) as engine:
        stages = keys_before_rope(engine, TOKENS, 3)
        rows = engine.live_rows(len(TOKENS))
        for (keys, values), layer in zip(rows, engine.shape.layers, strict=True):
            errors = []
            for parts in stages[layer.index]:
                if [part.size for part in parts] == [keys.size // 3] * 3:
                    made = np.concatenate([part.reshape(-1, keys.shape[0], keys.shape[2]) for part in parts])
                    errors.append(np.abs(made.transpose(1, 0, 2) - keys).max() / np.abs(made).max())
            assert min(errors) < off, f"layer {layer.index}"
            assert values.shape == keys.shape
        assert [key.shape[1] for key, _ in engine.live_rows(10)] == [10] * len(engine.shape.layers)
