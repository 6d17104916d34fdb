"""Layer budgets from the model's profile, tokens by attention seen: no replay of the text."""

from __future__ import annotations

import numpy as np

from kvcompose_local.cell_scores import N_UNSEEN
from kvcompose_local.evaluation.methods import method
from kvcompose_local.evaluation.methods.kvcompose import tempered_budgets
from kvcompose_local.evaluation.statistics import Statistics
from kvcompose_local.interfaces import FloatArray, IntArray
from kvcompose_local.popularity import for_ranks, popularity_of, sharpness
from kvcompose_local.selection import select_composites


def _seen_or_replayed(stats: Statistics) -> list[FloatArray]:
    """Scores by attention seen; only what nothing was seen of is replayed."""
    scores = [layer.copy() for layer in stats.seen]
    for layer, replayed in zip(scores, stats.replay, strict=True):
        layer[:, -N_UNSEEN:] += replayed[:, -N_UNSEEN:]
    return scores


def _by_profile(stats: Statistics, scores: list[FloatArray], n_cells: int) -> list[IntArray]:
    ones = np.ones(len(scores), np.int64)
    budgets = stats.profile.budgets(stats.n_tokens, ones * stats.n_tokens, ones, [n_cells], 0 * ones)
    return select_composites(scores, budgets)


@method("profile")
def profile(stats: Statistics, n_cells: int) -> list[IntArray]:
    """As ``run --scoring profile`` does it."""
    scores = _seen_or_replayed(stats)
    popularity = popularity_of(scores)
    return _by_profile(stats, [for_ranks(layer, popularity, sharpness(layer)) for layer in scores], n_cells)


@method("profile-look-back")
def profile_look_back(stats: Statistics, n_cells: int) -> list[IntArray]:
    """The last 64 tokens are replayed and look at everything."""
    return _by_profile(stats, [a + b for a, b in zip(stats.look_back, stats.seen, strict=True)], n_cells)


@method("profile-replay")
def profile_replay(stats: Statistics, n_cells: int) -> list[IntArray]:
    """The whole score with the profile's layer budgets: what the budgets alone cost."""
    return _by_profile(stats, stats.both, n_cells)


@method("seen-budgets")
def seen_with_whole_budgets(stats: Statistics, n_cells: int) -> list[IntArray]:
    """Attention seen with the layer budgets of the whole score: what the ranking alone costs."""
    return select_composites(stats.seen, tempered_budgets(stats.both, n_cells))
