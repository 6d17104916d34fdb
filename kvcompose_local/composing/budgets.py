"""How many composite tokens each layer keeps.

Source: arXiv 2509.05165, steps 6 to 9 of the method. A *composite token* of rank ``r`` joins the ``r``-th best token
of every head of a layer; its score is the mean of their scores. The composite tokens of all layers compete in one
ranking, and a layer keeps as many as it has among the best. Of equal scores the lower rank wins, then the lower layer.
The program uses :func:`allocate_composites`.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompose_local.composing.scores import Scores, as_layers, each_layer
from kvcompose_local.errors import InvalidInput
from kvcompose_local.interfaces import FloatArray, IntArray

#: The float32 from -inf to inf, as integers of the same order.
_FLOATS = range(-0x7F800001, 0x7F800001)
#: So many ranks are sorted; of more, the last value that fits is searched for among all float32.
_FEW = 1024
#: The share of the cells that layers do not compete for.
SHARED_EVENLY = 0.25
#: Steps that a layer's cells are on average, at the least, for budgets to be multiples of a step.
COARSE = 3


def allocate_layer_budgets(
    scores: Scores, keep_ratio: float, *, first_layer_largest: bool = False, min_per_layer: int = 0
) -> IntArray:
    """Composite tokens to keep in each layer: int64 (L,).

    ``scores`` is float (L, H, T) or L arrays (H_l, T_l). The best ``floor(sum(T_l) * keep_ratio)`` composite
    tokens of all layers are counted per layer, so the budgets sum to exactly that. ``keep_ratio``, in (0, 1],
    is the share kept, taken as the decimal it prints as (0.29 is 29/100, not the nearest binary fraction).
    Then layers below ``min_per_layer`` are raised to it, or to T_l where that is less; this may make the sum
    larger.

    ``first_layer_largest`` gives rank r of layer 0 the best score that any layer has at rank r, which makes
    layer 0's budget the largest; the reference implementation needs it, llama.cpp does not.

    Raises InvalidInput for scores :func:`~kvcompose_local.composing.scores.as_layers` refuses, a ratio out of range, or
    a negative minimum.
    """
    composites = _composite_scores(as_layers(scores))
    n_tokens = _n_tokens(composites)
    n_kept = int(n_tokens.sum() * _exact_ratio(keep_ratio))
    floor = np.minimum(n_tokens, _count("min_per_layer", min_per_layer))
    if first_layer_largest:
        composites[0] = _largest_by_rank(composites)
    return np.maximum(_take_best(composites, np.ones_like(n_tokens), n_kept), floor)


def allocate_bytes(
    scores: Scores,
    row_bytes: Sequence[int] | NDArray[Any],
    byte_budget: int | Sequence[int] | NDArray[Any],
    device: Sequence[int] | NDArray[Any] | None = None,
    *,
    min_per_layer: int = 0,
) -> IntArray:
    """Composite tokens to keep in each layer, of which the bytes are limited: int64 (L,).

    ``scores`` is float (L, H, T) or L arrays (H_l, T_l); ``row_bytes`` int (L,) is the size of one cell of
    each layer, 0 for a layer that cannot be composed and gets nothing. ``byte_budget`` is one limit for all
    layers, or a sequence of limits; then ``device`` int (L,) names for each layer the limit that it draws on.

    On each device the first ``min_per_layer`` ranks of every layer (all T_l where that is less) are taken,
    then the rest in order of composite score per byte. A rank that no longer fits is passed over, and smaller
    ones after it may still be taken. So ``sum(budgets * row_bytes)`` never exceeds the limit; with cells of
    one size these are the best ``byte_budget // row_bytes`` composite tokens.

    Raises InvalidInput for scores :func:`~kvcompose_local.composing.scores.as_layers` refuses, negative or non-integer
    sizes, limits or minimum, a device without a limit, or a limit too small for the minimum.
    """
    composites = _composite_scores(each_layer(scores))
    limits = _Limits.checked(len(composites), row_bytes, byte_budget, device)
    return _allocate(composites, limits, _count("min_per_layer", min_per_layer))


@dataclass(frozen=True)
class _Limits:
    """Bytes there are: cost and device int64 (L,) of a layer's cells, and one limit a device."""

    cost: IntArray
    device: IntArray
    limits: tuple[int, ...]

    @classmethod
    def checked(
        cls,
        n_layers: int,
        row_bytes: Sequence[int] | NDArray[Any],
        byte_budget: int | Sequence[int] | NDArray[Any],
        device: Sequence[int] | NDArray[Any] | None,
    ) -> _Limits:
        cost = layer_counts("row_bytes", row_bytes, n_layers)
        given = byte_budget if isinstance(byte_budget, Sequence | np.ndarray) else [byte_budget]
        limits = tuple(_count("byte_budget", limit) for limit in given)
        if device is None and len(limits) != 1:
            raise InvalidInput(f"{len(limits)} byte budgets need a device for each layer")
        drawn_on = layer_counts("device", [0] * n_layers if device is None else device, n_layers)
        if drawn_on.max() >= len(limits):
            raise InvalidInput(f"device {drawn_on.max()} has no byte budget; there are {len(limits)}")
        return cls(cost, drawn_on, limits)


def _allocate(composites: list[FloatArray], limits: _Limits, min_per_layer: int) -> IntArray:
    """:func:`allocate_bytes` for composite scores, each layer's best first."""
    cost = limits.cost
    budgets = np.where(cost > 0, np.minimum(_n_tokens(composites), min_per_layer), 0)
    mean_cost = cost.sum() / max(np.count_nonzero(cost), 1)
    for index, limit in enumerate(limits.limits):
        layers = np.flatnonzero((limits.device == index) & (cost > 0))
        if not layers.size:
            continue
        left = limit - int((budgets * cost)[layers].sum())
        if left < 0:
            raise InvalidInput(
                f"a byte budget of {limit} does not hold {min_per_layer} cells a layer; raise it to {limit - left}"
            )
        with np.errstate(over="ignore"):  # beyond float32 all are equally best
            priorities = [
                composites[layer][budgets[layer] :]
                if cost[layer] == mean_cost
                else (composites[layer][budgets[layer] :] * (mean_cost / cost[layer])).astype(np.float32)
                for layer in layers.tolist()
            ]
        budgets[layers] += _take_best(priorities, cost[layers], left)
    return budgets


def allocate_composites(
    worths: Sequence[FloatArray],
    row_bytes: Sequence[int] | NDArray[Any],
    byte_budget: int | Sequence[int] | NDArray[Any],
    device: Sequence[int] | NDArray[Any] | None = None,
    *,
    steps: Sequence[int] = (),
    n_beside: int = 0,
    at_least: int = 0,
) -> IntArray:
    """:func:`allocate_bytes` for the worth of composite tokens: int64 (L,).

    worths: L float32 arrays (T_l,), best first. Layers share :data:`SHARED_EVENLY` of each limit evenly before they
    compete. This project added that, and the power mean that makes worths (:mod:`composing.choice`): together they
    halve the KL divergence at a tenth of the cells (docs/decisions.md).

    steps: of each limit, what its layers' cells and the ``n_beside`` that all have are to be a multiple of together, as
    far as a layer has as many and each keeps ``at_least`` so many; not where few cells make that too coarse.
    """
    limits = _Limits.checked(len(worths), row_bytes, byte_budget, device)
    floors = [
        int(limit * SHARED_EVENLY) // needed
        for index, limit in enumerate(limits.limits)
        if (needed := int(limits.cost[limits.device == index].sum()))
    ]
    stepped = _stepped(worths, limits, steps, n_beside, at_least)
    if (stepped >= 0).all():
        return stepped
    budgets = _allocate([*worths], limits, min(floors, default=0))
    return np.where(stepped < 0, budgets, stepped)


def _stepped(
    worths: Sequence[FloatArray], limits: _Limits, steps: Sequence[int], n_beside: int, at_least: int
) -> IntArray:
    """Budgets of the layers whose limit wants and allows steps, -1 of others: int64 (L,)."""
    budgets = np.full(len(worths), -1, np.int64)
    for index, step in enumerate(steps):
        layers = np.flatnonzero((limits.device == index) & (limits.cost > 0))
        if step > 1 and layers.size:
            some, costs = [worths[i] for i in layers.tolist()], limits.cost[layers]
            found = _in_steps(some, costs, limits.limits[index], step, n_beside)
            if found is not None and all(k >= min(at_least, x.size) for k, x in zip(found, some, strict=True)):
                budgets[layers] = found
    return budgets


def _in_steps(worths: list[FloatArray], cost: IntArray, limit: int, step: int, n_beside: int) -> IntArray | None:
    """Budgets of which each is a multiple of ``step`` with the cells beside: int64 (L,); None where that is too coarse.

    Groups of ``step`` ranks compete by their mean.
    """
    first = -n_beside % step
    left = limit - first * int(cost.sum())
    if limit // int(cost.sum()) + n_beside < COARSE * step or left < 0 or min(x.size for x in worths) < first:
        return None
    counts = [(x.size - first) // step for x in worths]
    whole = np.concatenate([x[first : first + n * step] for x, n in zip(worths, counts, strict=True)])
    groups = np.split(whole.reshape(-1, step).mean(axis=1), np.cumsum(counts)[:-1])  # all at once
    evenly = max(int(limit * SHARED_EVENLY) // int(cost.sum()) - first, 0) // step
    limits = _Limits(cost * step, np.zeros_like(cost), (left,))
    return np.asarray(first + step * _allocate(groups, limits, evenly))


def layer_counts(name: str, values: Sequence[int] | NDArray[Any], n_layers: int) -> IntArray:
    """``values`` as int64 (L,), or InvalidInput about ``name`` if they are not L integers of 0 or more."""
    counts = np.asarray(values)
    if counts.shape != (n_layers,) or counts.dtype.kind not in "iu" or counts.min() < 0:
        raise InvalidInput(f"{name} must be {n_layers} integers of 0 or more, one a layer")
    return counts.astype(np.int64)


def _composite_scores(layers: Iterable[FloatArray]) -> list[FloatArray]:
    """Score of each rank, best first: L float32 arrays (T_l,), each non-increasing.

    Sums are taken head by head in float64: rounding is monotone, so a better rank never ends up below a worse
    one.
    """
    return [
        (np.sort(layer, axis=1)[:, ::-1].sum(axis=0, dtype=np.float64) / layer.shape[0]).astype(np.float32)
        for layer in layers
    ]


def _largest_by_rank(composites: list[FloatArray]) -> FloatArray:
    """The best score at each rank of layer 0, over the layers that have the rank: float32 (T_0,)."""
    largest: FloatArray = composites[0].copy()
    for other in composites[1:]:
        shared = min(largest.size, other.size)
        np.maximum(largest[:shared], other[:shared], out=largest[:shared])
    return largest


def _take_best(priorities: list[FloatArray], cost: IntArray, limit: int) -> IntArray:
    """Ranks taken of each layer, best first while their cost stays within ``limit``: int64 (L,).

    Ties go by rank, then by layer; a layer whose next rank no longer fits takes no more. Priorities never rise within
    a layer and all its ranks cost the same, so what is taken of it is its first ranks.
    """
    costs = cost.tolist()  # Python's integers: a limit may exceed int64
    taken = [0] * len(costs)
    left = limit
    if sum(x.size for x in priorities) <= _FEW:
        ranks = [(-value, rank, i) for i, x in enumerate(priorities) for rank, value in enumerate(x.tolist())]
        for _, rank, i in sorted(ranks):
            if taken[i] == rank and costs[i] <= left:
                taken[i] += 1
                left -= costs[i]
        return np.array(taken, np.int64)
    while layers := [i for i, values in enumerate(priorities) if taken[i] < values.size and costs[i] <= left]:
        ends = _best_that_fit(priorities, costs, layers, taken, left)  # once for each size of cell, at most
        left -= sum(costs[i] * (ends[i] - taken[i]) for i in layers)
        taken = ends
    return np.array(taken, np.int64)


def _best_that_fit(
    priorities: list[FloatArray], costs: list[int], layers: list[int], taken: list[int], left: int
) -> list[int]:
    """How far ``layers`` get beyond ``taken``, best rank first, until one does not fit into ``left``.

    A binary search finds the place: sorting all layers' ranks would take several times the memory of their scores.
    """

    def fits(ends: list[int]) -> bool:
        return sum(costs[i] * (ends[i] - taken[i]) for i in layers) <= left

    def at_least(value: float) -> list[int]:
        ends = taken.copy()
        for i in layers:
            ends[i] = bisect_right(priorities[i], -value, lo=taken[i], key=operator.neg)
        return ends

    # First take every value of which all ranks fit, ...
    lowest = bisect_left(_FLOATS, True, key=lambda place: fits(at_least(_as_float(place))))
    ends = at_least(_as_float(_FLOATS[lowest])) if lowest < len(_FLOATS) else taken.copy()
    rest = [float(priorities[i][ends[i]]) for i in layers if ends[i] < priorities[i].size]
    if not rest:
        return ends
    # ... then whole ranks of the next value, and of one more rank the first layers.
    tied = at_least(max(rest))

    def below(rank: int) -> list[int]:
        return [min(max(rank, end), last) for end, last in zip(ends, tied, strict=True)]

    rank = bisect_left(range(max(tied) + 1), True, key=lambda rank: not fits(below(rank))) - 1
    ends = below(rank)
    for i in layers:
        if ends[i] == rank < tied[i]:
            ends[i] += 1
            if not fits(ends):
                ends[i] -= 1
                break
    return ends


def _as_float(bits: int) -> float:
    """The float32 of a place in :data:`_FLOATS`: an IEEE 754 number has sign and magnitude, an int32 a complement."""
    return float(np.int32(bits ^ (0x7FFFFFFF if bits < 0 else 0)).view(np.float32))


def _n_tokens(composites: list[FloatArray]) -> IntArray:
    return np.array([values.size for values in composites], np.int64)


def _exact_ratio(keep_ratio: float) -> Fraction:
    try:
        ratio = Fraction(str(keep_ratio))
    except (ValueError, ZeroDivisionError):
        ratio = Fraction(0)
    if not 0 < ratio <= 1:
        raise InvalidInput(f"keep ratio must be above 0 and at most 1, not {keep_ratio}")
    return ratio


def _count(name: str, value: int) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = -1
    if count < 0:
        raise InvalidInput(f"{name} must be an integer of 0 or more, not {value}")
    return count
