"""What a compaction needs beside the cells, for a chat of Qwen2.5-0.5B's shape: Python's own count, to the byte."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest

from kvcompose_local.attention import AttentionMax
from kvcompose_local.cell_scores import N_NEAREST, SCORE_DTYPE, SEEN_DTYPE
from kvcompose_local.compaction import CacheMemory, Policy
from kvcompose_local.interfaces import UPKEEP_BYTES, AttentionSink, CacheLayout, LayerShape, ModelShape, Selection
from kvcompose_local.predictor import Predictor, n_features
from kvcompose_local.profiles import Tuning

N_LAYERS, N_QUERY_HEADS, N_KV_HEADS, HEAD_BYTES, N_CELLS = 24, 14, 2, 128, 8192
ROW_BYTES = 2 * N_KV_HEADS * HEAD_BYTES
POLICY = Policy.for_cells(N_CELLS)


class FullEngine:
    """An arena as a long chat leaves it before a compaction, one layer with most of the cells."""

    per_layer = True
    max_replay = 10**6

    def __init__(self) -> None:
        layers = tuple(LayerShape(i, N_QUERY_HEADS, N_KV_HEADS, ROW_BYTES) for i in range(N_LAYERS))
        self.shape = ModelShape("Qwen", "qwen2", 32768, 1000, layers)
        self.arena_bytes = (N_CELLS * N_LAYERS * ROW_BYTES,)
        n_composed = (N_CELLS - POLICY.n_headroom - POLICY.n_scratch - POLICY.n_tail) * N_LAYERS
        self.composed = tuple([20_000] + [(n_composed - 20_000) // (N_LAYERS - 1)] * (N_LAYERS - 1))
        self.n_live = POLICY.n_tail + POLICY.n_headroom
        self.rng = np.random.default_rng(0)

    def layout(self) -> CacheLayout:
        return CacheLayout(self.composed, self.n_live, 300, 24_000)

    def replay(self, tokens: Sequence[int], seen: AttentionSink, near: slice) -> None:
        for i in range(N_LAYERS):
            weights = self.rng.random((N_QUERY_HEADS, 1, near.stop - near.start)).astype(np.float32) ** 6
            seen.update(i, weights, slice(None), first=near.start)

    def rewrite(self, selection: Sequence[Selection], n_tail: int) -> None:
        self.composed, self.n_live = tuple(rows.shape[1] for rows in selection), n_tail  # read as it is by llama.cpp


@pytest.mark.parametrize("predicting", [False, True])
def test_a_compaction_needs_little_beside_the_cells(predicting: bool) -> None:
    engine = FullEngine()
    n_heads = N_KV_HEADS * len(engine.shape.layers)
    tuning = Tuning((), Predictor(np.full((n_heads, n_features(n_heads)), 1e-3).tolist()) if predicting else None)
    memory = CacheMemory(engine, 10**6, policy=POLICY, tuning=tuning)  # type: ignore[arg-type]
    memory.tokens = list(range(24_000))
    np.median(np.zeros(1))  # imports more of numpy, once
    tracemalloc.start()
    try:
        memory._scores._kept = [(engine.rng.random((N_KV_HEADS, k)) ** 6).astype(SCORE_DTYPE) for k in engine.composed]
        memory._scores._popularity = [np.full((N_KV_HEADS, k), 128, np.uint8) for k in engine.composed]
        memory._scores.seen = AttentionMax.over(engine.shape.layers, N_NEAREST, SEEN_DTYPE)
        for i, k in enumerate(engine.composed):
            weights = engine.rng.random((N_QUERY_HEADS, 1, k + engine.n_live)).astype(np.float32) ** 8
            memory._scores.seen.update(i, weights, slice(None))
        del weights
        tracemalloc.reset_peak()
        rows = engine.arena_bytes[0] // ROW_BYTES
        memory.compact()
        lasting, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    at_rest = np.dtype(SEEN_DTYPE).itemsize + np.dtype(SCORE_DTYPE).itemsize + np.dtype(np.uint8).itemsize
    assert lasting < 1.02 * at_rest * N_KV_HEADS * rows
    assert peak < 1.3 * UPKEEP_BYTES * N_KV_HEADS * rows  # beyond it, the choice of the widest layer
