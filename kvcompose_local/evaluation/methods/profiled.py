"""Layer budgets from the model's profile, tokens by attention seen and a short look back: no replay of the text."""

from __future__ import annotations

import numpy as np

from kvcompose_local.evaluation.methods import method
from kvcompose_local.evaluation.statistics import Statistics
from kvcompose_local.interfaces import IntArray
from kvcompose_local.selection import select_composites


@method("profile")
def profile(stats: Statistics, n_cells: int) -> list[IntArray]:
    """As ``run --scoring profile`` does it."""
    scores = stats.scores([a + b for a, b in zip(stats.look_back, stats.seen, strict=True)])
    ones = np.ones(len(scores), np.int64)
    budgets = stats.profile.budgets(stats.n_tokens, ones * stats.n_tokens, ones, [n_cells], 0 * ones)
    return select_composites(scores, budgets)
