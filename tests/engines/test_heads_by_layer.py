"""Models whose layers differ in heads, as OpenELM's and Nemotron's do, and headers that say much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.commands.inspect import inspect
from kvcompose_local.engines import open_engine
from kvcompose_local.errors import ModelError
from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.llama_ffi.model import Model

TOKENS = np.random.default_rng(5).integers(3, 259, 700).tolist()
#: architecture, query heads and KV heads of each layer, and what inspect says of them.
DIFFERING = [
    ("openelm", (8, 4, 12, 4), (2, 1, 3, 1), "4-12 query heads, 1-3 KV heads"),
    ("openelm", (4, 4, 4, 4), (1, 2, 4, 1), "4 query heads, 1-4 KV heads"),
    ("deci", (8, 2, 4), (2, 2, 1), "2-8 query heads, 1-2 KV heads"),
]
#: Layers without attention, and with a linear one that keeps no cells; which ones are composed.
WITHOUT = [
    ("deci", (4, 0, 4, 8), (2, 0, 1, 2), [0, 2, 3]),
    ("deci", (4, 4, 8), (2, 0, 2), [0, 2]),
    ("deci", (4, 8, 0), (2, 2, 0), [0, 1]),
]


def model_of(tiny_model: Callable[..., Path], arch: str, heads: tuple[int, ...], kv_heads: tuple[int, ...]) -> Path:
    return tiny_model(arch, n_layers=len(heads), n_heads=heads, n_kv_heads=kv_heads)


@pytest.mark.parametrize(("arch", "heads", "kv_heads", "said"), DIFFERING)
def test_each_layer_has_its_heads(
    tiny_model: Callable[..., Path], arch: str, heads: tuple[int, ...], kv_heads: tuple[int, ...], said: str
) -> None:
    path = model_of(tiny_model, arch, heads, kv_heads)
    found = inspect(path)
    assert f"{len(heads)} layers, {said}, trained" in found.text()
    assert found.n_values == sum(kv_heads) * 2 * 32
    for budget in (1.0, 0.25) if library_is_patched() else (1.0,):
        engine, positions = open_engine(path, n_ctx=1024, budget=budget, n_threads=1)
        with engine:
            assert tuple(layer.n_heads for layer in engine.shape.layers) == heads
            assert tuple(layer.n_kv_heads for layer in engine.shape.layers) == kv_heads
            assert engine.shape.uncompressed_row_bytes == 2 * found.n_values
            memory = CacheMemory(engine, positions, compose=budget < 1)
            memory.feed(TOKENS)
            assert bool(memory.reports) == (budget < 1)
            assert np.isfinite(engine.logits()).all()


@pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")
@pytest.mark.parametrize(("arch", "heads", "kv_heads", "composed"), WITHOUT)
def test_layers_without_cells_are_left_out(
    tiny_model: Callable[..., Path],
    arch: str,
    heads: tuple[int, ...],
    kv_heads: tuple[int, ...],
    composed: list[int],
) -> None:
    path = model_of(tiny_model, arch, heads, kv_heads)
    found = inspect(path)
    assert found.n_values == sum(kv_heads) * 2 * 32
    assert "Only --budget 1" not in found.text()
    for budget in (1.0, 0.25):
        engine, positions = open_engine(path, n_ctx=1024, budget=budget, n_threads=1)
        with engine:
            assert [layer.index for layer in engine.shape.layers] == composed
            assert engine.shape.uncompressed_row_bytes == 2 * found.n_values
            memory = CacheMemory(engine, positions, compose=budget < 1)
            memory.feed(TOKENS)
            assert bool(memory.reports) == (budget < 1)
            saved = memory.state()
            engine.decode(TOKENS[:1])
            expected = engine.logits().copy()
            memory.restore(saved)
            engine.decode(TOKENS[:1])
            assert np.array_equal(engine.logits(), expected)
            memory.rewind(600)
            assert memory.position == 600


def test_the_stock_engine_reads_layers_without_cells_and_saves_none(tiny_model: Callable[..., Path]) -> None:
    arch, heads, kv_heads, _ = WITHOUT[0]
    path = model_of(tiny_model, arch, heads, kv_heads)
    engine, _ = open_engine(path, n_ctx=512, budget=1, n_threads=1, engine_name="stock")
    with engine:
        engine.decode(TOKENS[:100])
        assert np.isfinite(engine.logits()).all()
        assert engine.shape.row_bytes == sum(kv_heads) * 2 * 32 * 2
        with pytest.raises(ModelError, match="have no attention, which cannot be saved"):
            engine.snapshot()
    with pytest.raises(ModelError, match="differ in heads"):
        open_engine(path, n_ctx=1024, budget=0.5, n_threads=1, cache_type="f16", engine_name="stock")


def test_the_stock_engine_refuses_differing_layers_below_budget_1(tiny_model: Callable[..., Path]) -> None:
    path = model_of(tiny_model, *DIFFERING[0][:3])
    with pytest.raises(ModelError, match="layers of openelm differ in heads"):
        open_engine(path, n_ctx=1024, budget=0.5, n_threads=1, cache_type="f16", engine_name="stock")


def test_a_long_value_is_read_whole(tiny_model: Callable[..., Path]) -> None:
    name = "an adapted model of many words " * 100
    model = Model(tiny_model("llama", name=name), header_only=True)
    assert model.metadata("general.name") == name
    assert model.metadata("tokenizer.ggml.tokens") is None  # an array
    assert model.numbers("llama.attention.head_count") == [4]
    assert model.numbers("tokenizer.ggml.token_type")[:4] == [2, 3, 3, 6]
    assert model.numbers("tokenizer.ggml.tokens") == model.numbers("nothing") == []
    model.close()
