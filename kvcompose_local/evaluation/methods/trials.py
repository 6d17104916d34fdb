"""Variants of the program's own method, one change at a time: what docs/trials.md reports."""

from __future__ import annotations

import numpy as np

from kvcompose_local.budgets import allocate_bytes
from kvcompose_local.evaluation.methods import Method, method
from kvcompose_local.evaluation.methods.kvcompose import compose, tempered_budgets, with_mean, with_newest
from kvcompose_local.evaluation.statistics import Statistics
from kvcompose_local.interfaces import FloatArray, IntArray
from kvcompose_local.selection import select_composites


def _both(stats: Statistics, weight: float) -> list[FloatArray]:
    return [a + weight * b for a, b in zip(stats.replay, stats.seen, strict=True)]


@method("replay-own")
def replay_own(stats: Statistics, n_cells: int) -> list[IntArray]:
    """Chunked replay; no mean over KV heads."""
    return compose(stats.replay, n_cells)


@method("seen")
def seen(stats: Statistics, n_cells: int) -> list[IntArray]:
    """Attention seen during prefill, without a replay."""
    return compose(stats.seen, n_cells)


@method("replay+seen")
def replay_and_seen(stats: Statistics, n_cells: int) -> list[IntArray]:
    """The sum of both attentions; no mean over KV heads."""
    return compose(stats.both, n_cells)


@method("replay+seen-mean")
def replay_and_seen_mean(stats: Statistics, n_cells: int) -> list[IntArray]:
    """The sum of both attentions, plus the mean over KV heads."""
    return compose(with_mean(stats.both), n_cells)


@method("replay+seen-half")
def replay_and_half_seen(stats: Statistics, n_cells: int) -> list[IntArray]:
    """Attention seen counts half."""
    return compose(_both(stats, 0.5), n_cells)


@method("replay+seen-double")
def replay_and_double_seen(stats: Statistics, n_cells: int) -> list[IntArray]:
    """Attention seen counts twice."""
    return compose(_both(stats, 2.0), n_cells)


@method("replay+seen-value")
def replay_and_seen_value(stats: Statistics, n_cells: int) -> list[IntArray]:
    """The sum of both, times the norm of the value relative to its head's mean norm."""
    scores = stats.both
    weights = [v / v.mean(axis=1, keepdims=True) for v in stats.value_norms]
    return compose([s * w for s, w in zip(scores, weights, strict=True)], n_cells)


@method("replay+seen-sinks")
def replay_and_seen_sinks(stats: Statistics, n_cells: int) -> list[IntArray]:
    """The first four tokens are pinned in every layer."""
    scores = [s.copy() for s in stats.both]
    for layer in scores:
        layer[:, :4] = 3  # the sum of two softmax weights is at most 2
    return compose(scores, n_cells)


@method("replay+seen-recent")
def replay_and_seen_recent(stats: Statistics, n_cells: int) -> list[IntArray]:
    """The last 32 tokens are pinned in every layer."""
    scores = [s.copy() for s in stats.both]
    for layer in scores:
        layer[:, -32:] = 3
    return compose(scores, n_cells)


def _power_mean(exponent: float, *, floor: float = 0.0, smooth: bool = False) -> Method:
    """A composite token is worth the power mean of its heads' scores: geometric at 0, below it nearer the least.

    floor: the share of the cells that is shared out evenly before layers compete; smooth: a token counts with a quarter
    of each neighbour.
    """

    def chosen(stats: Statistics, n_cells: int) -> list[IntArray]:
        scores = stats.both
        if smooth:
            padded = [np.pad(s, ((0, 0), (1, 1))) for s in scores]
            scores = [s + np.float32(0.25) * (p[:, :-2] + p[:, 2:]) for s, p in zip(scores, padded, strict=True)]
        ranked = [np.sort(np.maximum(s, 1e-9), axis=1)[:, ::-1].astype(np.float64) for s in scores]
        worth = [np.log(r) if exponent == 0 else r**exponent for r in ranked]
        means = [w.mean(axis=0) for w in worth]
        means = [np.exp(m) if exponent == 0 else m ** (1 / exponent) for m in means]
        least = int(floor * n_cells) // len(scores)
        as_one_head = [m[None].astype(np.float32) for m in means]
        return select_composites(scores, allocate_bytes(as_one_head, [1] * len(scores), n_cells, min_per_layer=least))

    return chosen


for _name, _method in {
    "power0.25": _power_mean(0.25),
    "power0.35": _power_mean(0.35),
    "power0.5": _power_mean(0.5),
    "power0.7": _power_mean(0.7),
    "power0.5-floor0.2": _power_mean(0.5, floor=0.2),
    "power0.5-floor0.4": _power_mean(0.5, floor=0.4),
    "power0.5-smooth": _power_mean(0.5, smooth=True),
    "geometric": _power_mean(0),
    "geometric-floor": _power_mean(0, floor=0.1),
    "geometric-smooth": _power_mean(0, smooth=True),
    "harmonic": _power_mean(-1),
    "least": _power_mean(-8),
    "smooth": _power_mean(1, smooth=True),
    "tempered": _power_mean(1, floor=0.1),
}.items():
    method(f"replay+seen-{_name}")(_method)


@method("unweighted")
def unweighted(stats: Statistics, n_cells: int) -> list[IntArray]:
    """The program before its layers were weighted and the newest tokens kept."""
    return select_composites(stats.both, tempered_budgets(stats.both, n_cells))


@method("newest")
def newest(stats: Statistics, n_cells: int) -> list[IntArray]:
    """The program before its layers were weighted."""
    scores = with_newest(stats.both)
    return select_composites(scores, tempered_budgets(scores, n_cells))


@method("weighted")
def weighted(stats: Statistics, n_cells: int) -> list[IntArray]:
    """The program before popularity counted."""
    scores = with_newest(stats.both)
    return select_composites(scores, tempered_budgets(scores, n_cells, stats.tuning.weights))


@method("replay+seen-separators")
def replay_and_seen_separators(stats: Statistics, n_cells: int) -> list[IntArray]:
    """Tokens without a letter or digit count half."""
    model = stats.engine.model
    bare = [not any(map(str.isalnum, model.token_bytes(t).decode("utf-8", "replace"))) for t in stats.tokens]
    weight = np.where(bare, 0.5, 1.0).astype(np.float32)
    return compose([s * weight for s in stats.both], n_cells)


def _rooted(stats: Statistics) -> list[FloatArray]:
    """Attention seen counts with four times its geometric mean with its layer's mean, which raises what is small."""
    return [a + 4 * np.sqrt(b * b.mean()) for a, b in zip(stats.replay, stats.seen, strict=True)]


@method("rooted")
def rooted(stats: Statistics, n_cells: int) -> list[IntArray]:
    """The program's layer budgets; tokens are ranked by rooted attention."""
    return select_composites(_rooted(stats), tempered_budgets(stats.both, n_cells))


@method("rooted-own")
def rooted_own(stats: Statistics, n_cells: int) -> list[IntArray]:
    """Rooted attention for both."""
    scores = _rooted(stats)
    return select_composites(scores, tempered_budgets(scores, n_cells))
