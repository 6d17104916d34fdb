"""The choices of other tools, at equal bytes: equally many cells in every layer."""

from __future__ import annotations

import numpy as np

from kvcompose_local.composing.selection import select_composites
from kvcompose_local.evaluation.methods import by_kv_head, method
from kvcompose_local.evaluation.statistics import N_RECENT, Statistics
from kvcompose_local.interfaces import FloatArray, IntArray

N_SINKS = 4
#: Width of the smoothing of SnapKV.
_POOL = 7


def _per_layer(stats: Statistics, n_cells: int) -> int:
    return min(n_cells // len(stats.engine.shape.layers), stats.n_tokens)


def _best(stats: Statistics, scores: list[FloatArray], n_cells: int) -> list[IntArray]:
    return select_composites(scores, [_per_layer(stats, n_cells)] * len(scores))


@method("sinks+recent")
def sinks_and_recent(stats: Statistics, n_cells: int) -> list[IntArray]:
    """The first four tokens and the newest ones: what context shift keeps (StreamingLLM, arXiv 2309.17453)."""
    k = _per_layer(stats, n_cells)
    kept = np.concatenate([np.arange(min(N_SINKS, k)), np.arange(stats.n_tokens - max(k - N_SINKS, 0), stats.n_tokens)])
    return [np.tile(kept, (layer.n_kv_heads, 1)) for layer in stats.engine.shape.layers]


@method("recent-query")
def recent_query(stats: Statistics, n_cells: int) -> list[IntArray]:
    """What the last 32 tokens attended to, smoothed over neighbours, and those tokens (SnapKV, arXiv 2404.14469)."""
    scores = []
    for attention, layer in zip(stats.recent, stats.engine.shape.layers, strict=True):
        mean = by_kv_head(attention, layer.n_kv_heads).mean(axis=1)
        padded = np.pad(mean, ((0, 0), (_POOL // 2, _POOL // 2)))
        pooled = np.lib.stride_tricks.sliding_window_view(padded, _POOL, axis=1).max(axis=2).copy()
        pooled[:, -N_RECENT:] = 2  # attention is at most 1
        scores.append(pooled.astype(np.float32))
    return _best(stats, scores, n_cells)


@method("key-norm")
def key_norm(stats: Statistics, n_cells: int) -> list[IntArray]:
    """The keys of smallest norm (arXiv 2406.11430)."""
    return _best(stats, [-norms for norms in stats.key_norms], n_cells)


@method("random")
def random(stats: Statistics, n_cells: int) -> list[IntArray]:
    """Tokens drawn at random, the same for all heads of a layer."""
    rng = np.random.default_rng(stats.n_tokens)
    layers = stats.engine.shape.layers
    return _best(
        stats, [np.tile(rng.random(stats.n_tokens, np.float32), (layer.n_kv_heads, 1)) for layer in layers], n_cells
    )
