"""The choice of cells, by the logarithms of their scores. Chats and evaluations both use it.

Each head ranks its rows. The r-th best rows of all heads make one composite token, whose worth is the power mean of
exponent 1/2 of their scores. By their worth the composite tokens of all layers compete for the bytes
(:func:`~kvcompose_local.composing.budgets.allocate_composites`). Axes: layer L, KV head H, row T.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcompose_local.composing.budgets import allocate_composites
from kvcompose_local.composing.scorer import BOUNDS, Scorer, within_bounds
from kvcompose_local.composing.threads import in_parts
from kvcompose_local.interfaces import FloatArray, HalfArray, IntArray, Selection

#: The logarithm of a pinned token, above any score.
PINNED = 2 * BOUNDS[1]
#: Logarithms by which rows compete, as integers: the lowest is the best. NumPy computes with float16 slowly.
Levels = npt.NDArray[np.uint16]
#: Levels of a nat, from PINNED on; finer than the float16 that scores are kept in.
A_NAT = 1600
#: Where ranks compete by the hundred, the worth of one in so many tells enough of them.
_SOME = 8


def choose(
    layers: Sequence[Sequence[Levels]],
    row_bytes: IntArray,
    room: IntArray,
    device: IntArray,
    *,
    per_layer: bool = True,
    steps: Sequence[int] = (),
    n_beside: int = 0,
    at_least: int = 0,
) -> list[Selection]:
    """The rows that become composed cells, of each layer int (H, K_l), best first.

    layers: of each layer what :func:`competing` gives, in parts, (H, T_l) together; row_bytes: int64 (L,), of a layer's
    cell; room: int64 (devices,), bytes for composed cells; device: int64 (L,), whose room a layer draws on; per_layer:
    False where every layer is to keep equally many, or all of its rows where they are fewer; steps, n_beside, at_least:
    of :func:`~kvcompose_local.composing.budgets.allocate_composites`.
    """
    orders, worths = ranked(layers, every=_SOME if max(steps, default=1) > 1 else 1)
    if per_layer:
        counts = allocate_composites(
            worths, row_bytes, room.tolist(), device, steps=steps, n_beside=n_beside, at_least=at_least
        ).tolist()
    else:
        bytes_of_all = np.bincount(device, weights=row_bytes, minlength=len(room)).astype(np.int64)
        counts = [int((room // np.maximum(bytes_of_all, 1)).min())] * len(orders)
    return [order[:, :k] for order, k in zip(orders, counts, strict=True)]


def competing(
    scorer: Scorer | None,
    layer: int | None,
    scores: FloatArray | HalfArray,
    origins: Selection,
    n_seen: int,
    pinned: npt.NDArray[np.bool_],
) -> Levels:
    """The levels at which the rows of a layer compete: uint16 (H, T). A pinned token has 0.

    scorer: None where age does not count; layer: None for all layers, their heads below each other; scores: (H, T),
    without age; origins: int (H, T) or (T,), positions of the tokens, below ``n_seen``; pinned: bool (n_seen,).
    """
    result = np.empty(scores.shape, np.uint16)
    some_pinned = pinned.any()

    def compute(heads: slice) -> None:
        places = origins if origins.ndim == 1 else origins[heads]
        if scorer is None:
            numbers = scores[heads].astype(np.float32)
        else:
            numbers = scorer.ages(layer, places, n_seen, heads)
            numbers += scores[heads]  # which has as many heads
        within_bounds(numbers)
        if some_pinned:
            np.copyto(numbers, PINNED, where=pinned.take(places))
        numbers *= -A_NAT
        numbers += A_NAT * PINNED + 0.5  # which rounds them below
        result[heads] = numbers

    in_parts(compute, [scores.shape[1]] * len(scores))
    return result


def logarithms_of(levels: npt.NDArray[np.integer[Any]]) -> FloatArray:
    """What :func:`competing` made levels of, rounded: float32 of the same shape."""
    logarithms = levels.astype(np.float32)
    logarithms /= -A_NAT
    logarithms += PINNED
    return logarithms


def ranked(layers: Sequence[Sequence[Levels]], *, every: int = 1) -> tuple[list[Selection], list[FloatArray]]:
    """For each layer the rows of its heads, best first: int (H, T), and the worth of each rank: float32 (T,).

    layers: what :func:`competing` gives, of each layer in parts, (H, T) together; every: of so many ranks that follow
    each other all have the worth of the first. Of equal ones the lower row is better. The worth never rises from rank
    to rank.
    """
    shapes = [(len(parts[0]), sum(part.shape[1] for part in parts)) for parts in layers]
    alike = sorted(range(len(layers)), key=shapes.__getitem__)  # what is done to all numbers is done at once

    def some_ranked(some: slice) -> list[tuple[Selection, FloatArray]]:
        groups = itertools.groupby(alike[some], key=shapes.__getitem__)
        return [layer for shape, group in groups for layer in _ranked([layers[i] for i in group], *shape, every)]

    found = in_parts(some_ranked, [math.prod(shapes[i]) for i in alike])
    by_layer = dict(zip(alike, itertools.chain.from_iterable(found), strict=True))
    return [by_layer[i][0] for i in range(len(layers))], [by_layer[i][1] for i in range(len(layers))]


def _ranked(
    layers: Sequence[Sequence[Levels]], n_heads: int, n_rows: int, every: int
) -> Iterator[tuple[Selection, FloatArray]]:
    """The same of layers of one shape.

    A level and its row are sorted as one integer: ten times as fast as an argsort.
    """
    wide, narrow, shift = (np.uint32, np.uint16, 16) if n_rows <= 2**16 else (np.uint64, np.uint32, 32)
    both = _joined(layers, np.empty((len(layers), n_heads, n_rows), wide))
    both <<= wide(shift)
    both |= np.arange(n_rows, dtype=wide)
    both.sort(axis=2)
    orders = both.astype(narrow)  # the low half
    some = both[:, :, ::every]
    some >>= wide(shift)
    levels = some.astype(np.uint16)
    del both, some  # the largest of all these, before more is computed
    roots = logarithms_of(levels)
    roots /= 2
    worths = np.exp(roots, out=roots).mean(axis=1)
    return zip(orders, np.repeat(worths, every, axis=1)[:, :n_rows] if every > 1 else worths, strict=True)


def _joined(
    layers: Sequence[Sequence[Levels]], into: npt.NDArray[np.unsignedinteger[Any]]
) -> npt.NDArray[np.unsignedinteger[Any]]:
    """The parts of each layer beside each other: (L, H, T)."""
    for parts, joined in zip(layers, into, strict=True):
        np.concatenate(parts, axis=1, out=joined)
    return into
