"""KVCompose: as published (arXiv 2509.05165), as the program does it, and that with equal layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcompose_local.budgets import allocate_bytes, allocate_tempered
from kvcompose_local.evaluation.methods import method
from kvcompose_local.evaluation.statistics import Statistics
from kvcompose_local.interfaces import FloatArray, IntArray
from kvcompose_local.selection import select_composites


def compose(stats: Statistics, scores: Sequence[FloatArray], n_cells: int) -> list[IntArray]:
    """Composite tokens by scores, L arrays (H, T), the layers competing for the cells by the mean of their heads."""
    return select_composites(scores, allocate_bytes(scores, [1] * len(scores), n_cells))


@method("published")
def published(stats: Statistics, n_cells: int) -> list[IntArray]:
    """One replay of the whole text, mean over the group, plus the mean over KV heads."""
    return compose(stats, stats.scores(stats.whole_replay, mean=True), n_cells)


@method("replay")
def replay(stats: Statistics, n_cells: int) -> list[IntArray]:
    """Chunked replay, plus the mean over KV heads."""
    return compose(stats, stats.scores(stats.replay, mean=True), n_cells)


@method("kvcompose-local")
def ours(stats: Statistics, n_cells: int) -> list[IntArray]:
    """What the program does: the sum of both attentions, no mean over KV heads, tempered layer budgets."""
    scores = stats.scores(stats.both)
    return select_composites(scores, allocate_tempered(scores, [1] * len(scores), n_cells))


@method("uniform")
def uniform(stats: Statistics, n_cells: int) -> list[IntArray]:
    """The same scores, equally many cells in every layer: what stock llama.cpp can hold."""
    scores = stats.scores(stats.both)
    return select_composites(scores, np.full(len(scores), min(n_cells // len(scores), stats.n_tokens), np.int64))
