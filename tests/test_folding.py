"""Dropped values go into kept ones: against a naive loop, and in the real cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.folding import LEAST_SCORE, ArrayPlane, fold_dropped
from kvcompose_local.interfaces import FloatArray, IntArray
from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.llama_ffi.context import CACHE_TYPES
from kvcompose_local.llama_ffi.model import Model

N, H, D = 1300, 2, 32  # more rows than are looked at together


def drawn(seed: int, n: int = N) -> tuple[FloatArray, FloatArray, FloatArray, IntArray]:
    """Keys and values float32 (n, H, D) that F16 can hold, scores (H, n), and the rows that each head keeps."""
    rng = np.random.default_rng(seed)
    keys, values = rng.normal(size=(2, n, H, D)).astype(np.float16).astype(np.float32)
    scores = (rng.random((H, n)) ** 8).astype(np.float32)
    kept = np.stack([rng.permutation(n)[: n // 3] for _ in range(H)])
    return keys, values, scores, kept


def raw(numbers: FloatArray) -> ArrayPlane:
    return ArrayPlane(numbers.astype(np.float16).view(np.uint8).reshape(len(numbers), -1))


def naive(keys: FloatArray, values: FloatArray, scores: FloatArray, kept: IntArray) -> FloatArray:
    mixed = values.copy()
    for h in range(H):
        unit = keys[:, h] / np.linalg.norm(keys[:, h], axis=1, keepdims=True)
        own = np.maximum(scores[h], LEAST_SCORE)
        total = {int(r): (own[r] * values[r, h], own[r]) for r in kept[h]}
        for row in set(range(len(keys))) - set(kept[h].tolist()):
            if scores[h, row] >= LEAST_SCORE:
                into = int(kept[h][(unit[kept[h]] @ unit[row]).argmax()])
                value, weight = total[into]
                total[into] = value + scores[h, row] * values[row, h], weight + scores[h, row]
        for row, (value, weight) in total.items():
            mixed[row, h] = value / weight
    return mixed


def test_values_are_mixed_by_score_into_the_nearest_key():
    keys, values, scores, kept = drawn(1)
    plane = raw(values)
    n_dropped = fold_dropped(raw(keys), plane, kept, scores)
    got = plane.rows.view(np.float16).astype(np.float32).reshape(values.shape)
    assert n_dropped == sum(
        int((scores[h][np.setdiff1d(np.arange(N), kept[h])] >= LEAST_SCORE).sum()) for h in range(H)
    )
    np.testing.assert_allclose(got, naive(keys, values, scores, kept), atol=4e-3)
    assert not np.array_equal(got, values)


def test_what_is_not_wanted_stays_to_the_byte():
    keys, values, scores, kept = drawn(2)
    everything = np.tile(np.arange(N), (H, 1))
    for rows, weights in ((everything, scores), (kept, np.full_like(scores, LEAST_SCORE / 2)), (kept[:, :0], scores)):
        plane = raw(values)
        assert fold_dropped(raw(keys), plane, rows, weights) == 0
        assert np.array_equal(plane.rows, raw(values).rows)
    scores[:, kept[0]] = 2.0**20  # as a pinned token's
    plane = raw(values)
    fold_dropped(raw(keys), plane, np.tile(kept[0], (H, 1)), scores)
    got = plane.rows.view(np.float16).reshape(values.shape)[kept[0]]
    np.testing.assert_allclose(got, values[kept[0]], rtol=2e-3)  # but for a rounding


@pytest.mark.parametrize("kind", [k for k in CACHE_TYPES if k != "f16"])
def test_a_head_that_drops_nothing_stays(kind: str):
    keys, values, scores, kept = drawn(5, 600)
    scores[1] = 0
    quant = GGMLQuantizationType[kind.upper()]
    stored = [np.ascontiguousarray(quantize(x.reshape(600, -1), quant)).view(np.uint8) for x in (keys, values)]
    plane = ArrayPlane(stored[1].copy(), int(quant))
    assert fold_dropped(ArrayPlane(stored[0], int(quant)), plane, kept, scores) > 0
    width = plane.rows.shape[1] // H
    assert np.array_equal(plane.rows[:, width:], stored[1][:, width:])
    assert not np.array_equal(plane.rows[:, :width], stored[1][:, :width])


def test_a_quantized_cache_changes_only_what_was_mixed():
    keys, values, scores, kept = drawn(3, 90)
    kind = GGMLQuantizationType.Q8_0
    stored = [np.asarray(quantize(x.reshape(90, -1), kind), np.uint8) for x in (keys, values)]
    exact = [dequantize(x, kind).reshape(90, H, D) for x in stored]
    plane = ArrayPlane(stored[1].copy(), int(kind))
    assert fold_dropped(ArrayPlane(stored[0], int(kind)), plane, kept, scores) > 0
    got, wanted = dequantize(plane.rows, kind).reshape(90, H, D), naive(exact[0], exact[1], scores, kept)
    np.testing.assert_allclose(got, wanted, atol=0.03)
    same = np.isclose(wanted, exact[1], atol=1e-6).all(axis=2)
    heads = (stored[1].reshape(90, H, -1) == plane.rows.reshape(90, H, -1)).all(axis=2)
    assert heads[same].all()
    assert not heads.all()


@pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")
@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_the_engine_folds_where_its_cells_stand(tiny_model: Callable[..., Path], cache_type: str):
    """Twice, so that composed cells are folded, too; then the bytes are those of a snapshot folded outside."""
    rng = np.random.default_rng(4)
    engine = PatchedEngine(Model(tiny_model()), n_cells=256, n_threads=1, cache_type=CACHE_TYPES[cache_type])
    with engine:
        for n_tokens in (120, 60):
            engine.decode(rng.integers(3, 259, n_tokens).tolist())
            layout = engine.layout()
            selection, scores = [], []
            for layer, n_composed in zip(engine.shape.layers, layout.composed, strict=True):
                n = n_composed + layout.n_live - 8
                k = int(rng.integers(20, 60))
                selection.append(np.stack([rng.permutation(n)[:k] for _ in range(layer.n_kv_heads)]))
                scores.append((rng.random((layer.n_kv_heads, n)) ** 4).astype(np.float32))
            before = engine.snapshot()
            engine.rewrite(selection, 8, iter(scores))
            after = engine.snapshot()
            values = tuple(rows.copy() for rows in before.values)
            for i, (rows, of_rows) in enumerate(zip(selection, scores, strict=True)):
                key_type, value_type = (engine._cells.plane(i, values=v).ggml_type for v in (False, True))
                planes = ArrayPlane(before.keys[i], key_type), ArrayPlane(values[i], value_type)
                assert fold_dropped(*planes, rows, of_rows) > 0
            engine.restore(replace(before, values=values))
            engine.rewrite(selection, 8)
            outside = engine.snapshot()
            for ours, theirs in zip(after.keys, outside.keys, strict=True):
                np.testing.assert_array_equal(ours, theirs)
            for ours, theirs in zip(after.values, outside.values, strict=True):
                if cache_type == "f32":  # where rows stand decides in which order products are summed
                    np.testing.assert_allclose(ours.view(np.float32), theirs.view(np.float32), atol=1e-5)
                else:
                    np.testing.assert_array_equal(ours, theirs)
            assert not all(map(np.array_equal, before.values, values))
            engine.restore(after)
