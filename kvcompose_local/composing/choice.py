"""The choice of cells, by the logarithms of their scores. Chats and evaluations both use it.

Each head ranks its rows. The r-th best rows of all heads make one composite token, whose worth is the power mean of
exponent 1/2 of their scores. By their worth the composite tokens of all layers compete for the bytes
(:func:`~kvcompose_local.composing.budgets.allocate_composites`). Axes: layer L, KV head H, row T.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcompose_local.composing.budgets import allocate_composites
from kvcompose_local.composing.scorer import BOUNDS, DTYPE, Scorer
from kvcompose_local.composing.threads import in_parts
from kvcompose_local.interfaces import FloatArray, HalfArray, IntArray, Selection

#: The logarithm of a pinned token, above any score.
PINNED = 2 * BOUNDS[1]


def choose(
    layers: Sequence[Sequence[HalfArray]],
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
    orders, worths = ranked(layers)
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
    scores: HalfArray,
    origins: Selection,
    n_seen: int,
    pinned: npt.NDArray[np.bool_],
) -> HalfArray:
    """Logarithms by which the rows of a layer compete: float16 (H, T). Pinned tokens get :data:`PINNED`.

    scorer: None where age does not count; layer: None for all layers, their heads below each other; scores: float16
    (H, T), without age; origins: int (H, T) or (T,), positions of the tokens, below ``n_seen``; pinned: bool (n_seen,).
    """
    result = np.empty(scores.shape, DTYPE)
    some_pinned = pinned.any()

    def compute(heads: slice) -> None:
        places = origins if origins.ndim == 1 else origins[heads]
        logarithms = scores[heads].astype(np.float32)
        if scorer is not None:
            logarithms += scorer.ages(layer, places, n_seen, heads)
        np.clip(logarithms, *BOUNDS, out=logarithms)
        if some_pinned:
            np.copyto(logarithms, np.float32(PINNED), where=pinned.take(places))
        result[heads] = logarithms

    in_parts(compute, [scores.shape[1]] * len(scores))
    return result


def ranked(layers: Sequence[Sequence[HalfArray]]) -> tuple[list[Selection], list[FloatArray]]:
    """For each layer the rows of its heads, best first: int (H, T), and the worth of each rank: float32 (T,).

    layers: float16 arrays of logarithms, of each layer in parts, (H, T) together. Of equal ones the lower row is
    better. The worth never rises from rank to rank.
    """
    found = in_parts(lambda some: _ranked(layers[some]), [sum(part.size for part in parts) for parts in layers])
    orders, worths = zip(*(layer for some in found for layer in some), strict=True)
    return list(orders), list(worths)


def _ranked(layers: Sequence[Sequence[HalfArray]]) -> list[tuple[Selection, FloatArray]]:
    """The same of some layers, of each by itself; what is done to all numbers alike is done at once.

    A number's place and its row are sorted as one integer: ten times as fast as an argsort of the numbers.
    """
    shapes = [(len(parts[0]), sum(part.shape[1] for part in parts)) for parts in layers]
    edges = list(itertools.pairwise([0, *itertools.accumulate(h * n for h, n in shapes)]))

    def by_layer(numbers: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        return [numbers[start:stop].reshape(shape) for (start, stop), shape in zip(edges, shapes, strict=True)]

    halves = np.empty(edges[-1][1], DTYPE)
    for parts, joined in zip(layers, by_layer(halves), strict=True):
        np.concatenate(parts, axis=1, out=joined)
    widest = max(n for _, n in shapes)
    wide, narrow, shift = (np.uint32, np.uint16, 16) if widest <= 2**16 else (np.uint64, np.uint32, 32)
    places, roots = _of_all_halves(wide, shift)
    both = places.take(halves.view(np.uint16))
    for numbers in by_layer(both):
        numbers |= np.arange(numbers.shape[1], dtype=wide)
        numbers.sort(axis=1)
    orders = by_layer(both.astype(narrow))  # the low half
    both >>= wide(shift)
    worths = [roots.take(numbers).mean(axis=0).astype(np.float32) for numbers in by_layer(both)]
    return list(zip(orders, worths, strict=True))


@lru_cache(maxsize=2)
def _of_all_halves(wide: type, shift: int) -> tuple[npt.NDArray[np.unsignedinteger[Any]], npt.NDArray[np.float64]]:
    """By the bits of a float16: its place, where the largest number has the first one, and +0 and -0 the same.

    Shifted, as integers of a wide type. By its place: the root of its exponential.
    """
    numbers = np.arange(2**16, dtype=np.uint16).view(DTYPE)
    roots = np.zeros(2**16, np.float64)
    with np.errstate(all="ignore"):  # some are none, and never asked for
        bits = (numbers + DTYPE(0)).view(np.uint16)  # the sum makes one zero of both
        places = np.where(bits & 0x8000, bits, 0x7FFF - bits).astype(np.uint16)
        roots[places] = np.exp(numbers, dtype=np.float32) ** np.float32(0.5)
    return places.astype(wide) << wide(shift), roots
