"""What a compaction needs beside the cells, for a chat of Qwen2.5-0.5B's shape: Python's own count, to the byte."""

from __future__ import annotations

import copy
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from kvcompose_local.arena import UPKEEP_BYTES
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.chat.state import MemoryState
from kvcompose_local.composing import threads
from kvcompose_local.composing.policy import Policy
from kvcompose_local.composing.scorer import DTYPE, Scorer, products
from kvcompose_local.interfaces import (
    CacheLayout,
    CacheSnapshot,
    FloatArray,
    HalfArray,
    LayerShape,
    Lazy,
    ModelShape,
    Selection,
)

N_LAYERS, N_QUERY_HEADS, N_KV_HEADS, HEAD, N_CELLS = 24, 14, 2, 64, 8192
ROW_BYTES = 4 * N_KV_HEADS * HEAD
POLICY = Policy.for_cells(N_CELLS)


class FullEngine:
    """An arena as a long chat leaves it before a compaction, one layer with most of the cells."""

    per_layer = True
    reads_rows = True
    max_replay = max_drop = 10**6
    state_bytes = 0
    row_steps = (1,)

    def __init__(self) -> None:
        layers = tuple(LayerShape(i, N_QUERY_HEADS, N_KV_HEADS, ROW_BYTES) for i in range(N_LAYERS))
        self.shape = ModelShape("Qwen", "qwen2", 32768, 1000, layers)
        self.arena_bytes = (N_CELLS * N_LAYERS * ROW_BYTES,)
        n_composed = (N_CELLS - POLICY.n_headroom - POLICY.n_tail) * N_LAYERS
        self.composed = tuple([20_000] + [(n_composed - 20_000) // (N_LAYERS - 1)] * (N_LAYERS - 1))
        self.n_live = POLICY.n_tail + POLICY.n_headroom
        self.rng = np.random.default_rng(0)

    def layout(self) -> CacheLayout:
        return CacheLayout(self.composed, self.n_live, 300, 24_000)

    def live_rows(self, n: int) -> Sequence[tuple[FloatArray, FloatArray]]:
        def rows(_layer: int) -> tuple[FloatArray, FloatArray]:
            keys, values = self.rng.standard_normal((2, N_KV_HEADS, n, HEAD), np.float32)
            return keys, values

        return Lazy(N_LAYERS, rows)

    def live_products(self, weights: Sequence[HalfArray], n: int) -> FloatArray:
        rows = self.live_rows(n)
        return np.concatenate([products(w, *rows[i]) for i, w in enumerate(weights)])

    def restore(self, snapshot: CacheSnapshot) -> None:
        assert (snapshot.composed, snapshot.n_live) == (self.composed, self.n_live)

    def rewrite(self, selection: Sequence[Selection], n_tail: int, n_forgotten: int = 0, *_: object) -> None:
        self.composed, self.n_live = tuple(rows.shape[1] for rows in selection), n_tail  # read as it is by llama.cpp


class OneByOne:
    """A pool without threads: what is submitted is done when its result is wanted."""

    def submit(self, function: Callable[[slice], Any], part: slice) -> OneByOne:
        self.result = lambda: function(part)
        return copy.copy(self)


def test_a_compaction_needs_little_beside_the_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_pool", OneByOne)  # each thread chooses some layers' cells
    engine = FullEngine()
    rng = engine.rng
    weights = tuple(rng.standard_normal((N_KV_HEADS, 2 * HEAD)).astype(DTYPE) for _ in range(N_LAYERS))
    places = (np.full((N_KV_HEADS, 3), -0.2, np.float32),) * N_LAYERS
    scorer = Scorer(weights, places, 2048)
    memory = CacheMemory(engine, 10**6, policy=POLICY, scorer=scorer)  # type: ignore[arg-type]
    position, composed = engine.layout().position, engine.composed
    tracemalloc.start()
    try:
        scores = [rng.normal(-8, 2, (N_KV_HEADS, k)).astype(np.float32) for k in composed]
        origins = [rng.integers(0, 20_000, (N_KV_HEADS, k)).astype(np.int32) for k in composed]
        cells = CacheSnapshot(composed, engine.n_live, position, (), (), np.zeros(0, np.uint8))
        memory.restore(MemoryState((0,) * position, scores, origins, cells, scorer=scorer))
        del scores, origins
        tracemalloc.reset_peak()
        rows = engine.arena_bytes[0] // ROW_BYTES
        memory.compact()
        lasting, peak = (n - sys.getsizeof(memory.tokens) for n in tracemalloc.get_traced_memory())
    finally:
        tracemalloc.stop()
    at_rest = np.dtype(DTYPE).itemsize + np.dtype(np.uint16).itemsize
    assert lasting < 1.05 * at_rest * N_KV_HEADS * rows
    # beyond it, what cells compete by, worths, and the choice of some layers
    assert peak < 2.1 * UPKEEP_BYTES * N_KV_HEADS * rows
