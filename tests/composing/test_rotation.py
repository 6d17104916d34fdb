"""Rows as the model made them: RoPE and Hadamard undone, against what llama.cpp had before it did them."""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_models import RandomModel
from real_shapes import SHAPES

from kvcompose_local.architectures.fixtures import metadata, tiny, weights
from kvcompose_local.composing.cell_scores import by_layer
from kvcompose_local.composing.rotation import Rope, unjoined
from kvcompose_local.composing.scorer import products
from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.errors import InvalidInput
from kvcompose_local.interfaces import FloatArray
from kvcompose_local.llama_ffi import context as context_module
from kvcompose_local.llama_ffi import random_models
from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.llama_ffi.library import lib
from kvcompose_local.llama_ffi.model import Model
from kvcompose_local.llama_ffi.random_models import Value

TOKENS = np.random.default_rng(1).integers(3, 60, 60).tolist()
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


def keys_before_rope(engine: PatchedEngine, tokens: list[int], n_parts: int) -> dict[int, list[FloatArray]]:
    """Of each layer every tensor named K-something while tokens were decoded, its parts one after another: (n,)."""
    seen: dict[tuple[int, str], list[FloatArray]] = {}
    counts: Counter[str] = Counter()

    @lib.ggml_backend_sched_eval_callback
    def callback(tensor: int, ask: bool, _user_data: object) -> bool:
        name = context_module._ggml_get_name(tensor).decode()
        found = re.fullmatch(r"K\w*-(\d+)( \(\w+\))?", name)
        if found and not ask:
            counts[name] += 1
            data = np.empty(context_module._ggml_nelements(tensor), np.float32)
            context_module._ggml_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
            seen.setdefault((int(found[1]), f"{name} {counts[name]}"), []).append(data)
        return bool(found) or not ask

    engine._cells._call("set_eval_callback", ctypes.cast(callback, ctypes.c_void_p), None)
    size = len(tokens) // n_parts
    for start in range(0, len(tokens), size):
        counts.clear()
        engine.decode(tokens[start : start + size])
    engine._cells._call("set_eval_callback", None, None)
    by_layer: dict[int, list[FloatArray]] = {}
    for (layer, _name), parts in seen.items():
        by_layer.setdefault(layer, []).append(np.concatenate(parts))
    return by_layer


def check_rows(engine: PatchedEngine, off: float) -> list[bool]:
    """Live rows equal what stood in a tensor before RoPE, and what ggml multiplies them to equals their products.

    Returns of each layer whether it was turned at all.
    """
    stages = keys_before_rope(engine, TOKENS, 3)
    turned = []
    for i, ((keys, values), layer) in enumerate(zip(engine.live_rows(len(TOKENS)), engine.shape.layers, strict=True)):
        made = [
            stage.reshape(len(TOKENS), *keys.shape[::2]) for stage in stages[layer.index] if stage.size == keys.size
        ]
        errors = [float(np.abs(stage.transpose(1, 0, 2) - keys).max() / np.abs(stage).max()) for stage in made]
        assert min(errors) < off, f"layer {layer.index}: {errors}"
        assert values.shape[:2] == keys.shape[:2]
        turned.append(engine._turns[i].rope.n_rotated > 0)
    rng, rows = np.random.default_rng(0), engine.live_rows(len(TOKENS))
    sizes = [(len(keys), keys.shape[2] + values.shape[2]) for keys, values in (rows[i] for i in range(len(rows)))]
    multipliers = [rng.standard_normal(size).astype(np.float32) for size in sizes]
    for i, sums in enumerate(by_layer(engine.live_products(multipliers, len(TOKENS)), engine.shape.layers)):
        wanted = products(multipliers[i], *rows[i])
        assert np.abs(sums - wanted).max() < 1e-3 * wanted.std()
    return turned


needs_patches = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")


@needs_patches
@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q8_0/q4_0"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_live_rows_are_what_the_model_made(tiny_model: Callable[..., Path], arch: str, cache_type: str) -> None:
    head = 32 if arch == "qwen2" else 64
    with PatchedEngine(
        Model(tiny_model(arch, n_layers=7, head=head)), n_cells=256, n_threads=1, cache_type=cache_type, n_ubatch=64
    ) as engine:
        assert all(check_rows(engine, 2e-3 if cache_type == "f16" else 3e-2))
        for n in (0, 10, len(TOKENS)):
            assert [key.shape[1] for key, _ in engine.live_rows(n)] == [n] * len(engine.shape.layers)
        with pytest.raises(InvalidInput):
            engine.live_rows(len(TOKENS) + 1)


TRIED = (
    "Llama 3.2 1B",
    "Ministral 3 8B",
    "SmolLM3 3B",
    "Qwen3 4B, 8B",
    "Phi 4 mini, 2 layers",
    "Gemma 3 1B",
    "gpt-oss-20b",
    "EXAONE 4 1.2B",
    "EXAONE 4 32B",
    "GLM 4 9B",
    "Granite 3 2B",
    "OLMo 2 1B",
)


@needs_patches
@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
@pytest.mark.parametrize("name", TRIED)
def test_rows_of_real_shapes(name: str, cache_type: str) -> None:
    shape = next(shape for shape in SHAPES if shape.name == name)
    if name != "EXAONE 4 32B":  # which llama.cpp knows by its 64 layers
        shape = replace(shape, n_layers=min(shape.n_layers, 8))
    with PatchedEngine(RandomModel(shape), n_cells=256, n_threads=1, cache_type=cache_type, n_ubatch=64) as engine:
        turned = check_rows(engine, 2e-3 if cache_type == "f16" else 3e-2)
        if name == "SmolLM3 3B":
            assert turned == [True, True, True, False] * 2
        elif name == "EXAONE 4 32B":
            assert not any(turned), "its layers with full attention have no RoPE"
        else:
            assert all(turned)


#: Tiny models of architectures that turn rows in ways that none of those shapes has, what is theirs alone, and how many
#: pairs text does not turn.
OTHERS: tuple[tuple[str, dict[str, Value], int], ...] = (
    ("qwen2vl", {}, 0),
    ("qwen2vl", {"rope.dimension_sections": [8, 8, 8, 40]}, 40),
    ("qwen3vl", {}, 9),  # every third pair follows a section, until that has no more
    ("qwen3vl", {"rope.dimension_sections": [24, 10, 10, 20]}, 22),
    ("glm4", {"rope.dimension_sections": [16, 24, 24, 0]}, 0),
    ("paddleocr", {}, 0),
    ("gemma3n", {}, 0),
    ("gemma4", {}, 0),
    ("cohere2", {}, 0),
)


@needs_patches
@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
@pytest.mark.parametrize(("arch", "own", "n_fixed"), OTHERS)
def test_rows_of_other_architectures(arch: str, own: dict[str, Value], n_fixed: int, cache_type: str) -> None:
    keys = metadata(arch) | {f"{arch}.{key}": value for key, value in own.items()}
    model = random_models.RandomModel(keys, weights=weights(arch))
    with PatchedEngine(model, n_cells=256, n_threads=1, cache_type=cache_type, n_ubatch=64) as engine:
        turned = check_rows(engine, 3e-3 if cache_type == "f16" else 4e-2)
        if arch == "cohere2":
            assert not any(turned), "its layers with full attention have no RoPE"
        else:
            assert all(turned)
        assert sum(np.isinf(engine._turns[0].rope.factors)) == n_fixed


@needs_patches
@pytest.mark.parametrize(("arch", "offset"), [("mistral4", 512), ("minicpm3", 64), ("deepseek2", 512)])
def test_a_turned_part_is_the_last_of_a_row(arch: str, offset: int) -> None:
    """The rope part of a latent row, and of a head that is made of two; exact_trials.py has what comes of it."""
    with PatchedEngine(tiny(arch), n_cells=256, n_threads=1, n_ubatch=64) as engine:
        engine.decode(TOKENS)
        for keys, values in engine.live_rows(len(TOKENS)):
            assert keys.shape[2] == engine._cells.layer(0).head_dim_k
            assert (values.shape[2] == 0) == engine.model.is_mla
        assert {turn.rope.offset for turn in engine._turns} == {offset}


@needs_patches
@pytest.mark.parametrize("arch", ["hunyuan-dense", "maincoder"])
def test_a_norm_after_rope_is_told(arch: str) -> None:
    with PatchedEngine(tiny(arch), n_cells=256, n_threads=1, n_ubatch=64) as engine:
        engine.decode(TOKENS)
        engine.live_rows(1)
        assert all(len(turn.gain) == engine._cells.layer(0).head_dim_k for turn in engine._turns)
