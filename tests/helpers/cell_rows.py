"""The rows of a patched engine's cells as NumPy sees them, what a rewrite makes of them, and a reference that masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcompose_local.engines.base import LlamaEngine
from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.interfaces import IntArray


def exported(engine: PatchedEngine) -> list[tuple[np.ndarray, np.ndarray]]:
    """K and V of each layer, uint8 (rows, H, head bytes), in the protocol's order: composed cells, then live ones."""
    live = engine._live_cells()
    cap = engine._cells.info().n_live_cap
    result = []
    for i, layer in enumerate(engine.shape.layers):
        order = np.concatenate([cap + np.arange(engine.layout().composed[i]), live])
        k, v = (engine._cells.rows(i, values=values)[order] for values in (False, True))
        result.append(tuple(x.reshape(len(order), layer.n_kv_heads, x.shape[1] // layer.n_kv_heads) for x in (k, v)))
    return result


def gathered(before: list[tuple[np.ndarray, np.ndarray]], selection: list[IntArray], n_tail: int) -> list:
    result = []
    for planes, rows in zip(before, selection, strict=True):
        result.append(
            tuple(
                np.concatenate([np.stack([x[rows[h], h] for h in range(x.shape[1])], 1), x[len(x) - n_tail :]])
                for x in planes
            )
        )
    return result


def assert_same(a: list, b: list) -> None:
    for one, two in zip(a, b, strict=True):
        for x, y in zip(one, two, strict=True):
            assert x.shape == y.shape
            assert (x == y).all()


def uneven(rng: np.random.Generator, engine: PatchedEngine, n_tail: int) -> list[IntArray]:
    """Random rows, another number in each layer; one layer keeps all, one nothing."""
    layout = engine.layout()
    selection = []
    for i, layer in enumerate(engine.shape.layers):
        n = layout.composed[i] + layout.n_live - n_tail
        k = (n, 0, int(rng.integers(1, n)))[i % 3]
        selection.append(np.stack([rng.permutation(n)[:k] for _ in range(layer.n_kv_heads)]).astype(np.int64))
    return selection


def identity(engine: PatchedEngine, n_tail: int) -> list[IntArray]:
    layout = engine.layout()
    rows = [np.arange(k + layout.n_live - n_tail) for k in layout.composed]
    return [np.tile(r, (layer.n_kv_heads, 1)) for r, layer in zip(rows, engine.shape.layers, strict=True)]


def mask_dropped(reference: LlamaEngine, origin: Sequence[IntArray], first_live: int) -> None:
    """From now on the reference attends, before its 4 newest cells at the last rewrite, to ``origin`` alone."""

    def tap(layer: int, logits: np.ndarray) -> None:
        seen = max(first_live - 4, 0)
        for q in range(logits.shape[0]):
            dropped = np.setdiff1d(
                np.arange(seen), origin[reference._ordinal[layer]][q // 2]
            )  # two query heads share a KV head
            logits[q][:, dropped] = -1e30

    reference._context.tap_prefix = b"kq-"
    reference._context.tap = tap
