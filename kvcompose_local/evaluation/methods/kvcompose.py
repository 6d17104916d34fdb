"""KVCompose: as published (arXiv 2509.05165), as the program does it, and that with equal layers."""

from __future__ import annotations

from collections.abc import Sequence

from kvcompose_local import predictor
from kvcompose_local.budgets import allocate_bytes, allocate_tempered
from kvcompose_local.cell_scores import PINNED
from kvcompose_local.compaction import LEAST_TAIL
from kvcompose_local.evaluation.methods import method
from kvcompose_local.evaluation.statistics import Statistics
from kvcompose_local.interfaces import FloatArray, IntArray
from kvcompose_local.popularity import for_budgets, for_ranks, popularity_of, sharpness, unpacked
from kvcompose_local.profiles import faded
from kvcompose_local.scores import token_scores
from kvcompose_local.selection import select_composites


def compose(scores: Sequence[FloatArray], n_cells: int) -> list[IntArray]:
    """Composite tokens by scores, L arrays (H, T), the layers competing for the cells by the mean of their heads."""
    return select_composites(scores, allocate_bytes(scores, [1] * len(scores), n_cells))


def tempered_budgets(scores: Sequence[FloatArray], n_cells: int, weights: Sequence[float] = ()) -> IntArray:
    """The program's layer budgets for scores, L arrays (H, T), and a profile's L weights: int64 (L,)."""
    n_all = sum(layer.shape[1] for layer in scores)
    return allocate_tempered(scores, [1] * len(scores), n_cells, weights=faded(weights, n_cells / n_all))


def with_newest(scores: Sequence[FloatArray]) -> list[FloatArray]:
    """The scores with those of the newest tokens, which a compaction leaves alone, above all others."""
    pinned = [s.copy() for s in scores]
    for layer in pinned:
        layer[:, -LEAST_TAIL:] = PINNED
    return pinned


def with_mean(scores: Sequence[FloatArray]) -> list[FloatArray]:
    """The scores, each plus the mean over the KV heads: float32 (H, T)."""
    return [s + s.mean(axis=0, keepdims=True) for s in scores]


@method("published")
def published(stats: Statistics, n_cells: int) -> list[IntArray]:
    """One replay of the whole text, mean over the group, plus the mean over KV heads."""
    layers = zip(stats.whole_replay, stats.engine.shape.layers, strict=True)
    return compose([token_scores(a[None], layer.n_kv_heads)[0] for a, layer in layers], n_cells)


@method("replay")
def replay(stats: Statistics, n_cells: int) -> list[IntArray]:
    """Chunked replay, plus the mean over KV heads."""
    return compose(with_mean(stats.replay), n_cells)


@method("kvcompose-local")
def ours(stats: Statistics, n_cells: int) -> list[IntArray]:
    """What the program does: the sum of both attentions and what questions are predicted to look at, or popularity
    where there is no predictor; tempered and weighted layer budgets.
    """
    if stats.tuning.predictor is None:
        return popular(stats, n_cells)
    factors = [unpacked(codes) for codes in stats.tuning.predictor.packed_factors(stats.replay, stats.seen)]
    competing = with_newest([predictor.for_budgets(s, f) for s, f in zip(stats.both, factors, strict=True)])
    ranked = with_newest([predictor.for_ranks(s, f) for s, f in zip(stats.both, factors, strict=True)])
    return select_composites(ranked, tempered_budgets(competing, n_cells, stats.tuning.weights))


@method("popular")
def popular(stats: Statistics, n_cells: int) -> list[IntArray]:
    """What the program does where it has no predictor of the model."""
    popularity = popularity_of(stats.both)
    competing = with_newest([for_budgets(scores, popularity) for scores in stats.both])
    ranked = with_newest([for_ranks(scores, popularity, sharpness(scores)) for scores in stats.both])
    return select_composites(ranked, tempered_budgets(competing, n_cells, stats.tuning.weights))
