"""The choice of cells, by the logarithms of their scores. Chats and evaluations both use it.

Each head ranks its rows. The r-th best rows of all heads make one composite token, whose worth is the power mean of
exponent 1/2 of their scores. By their worth the composite tokens of all layers compete for the bytes
(:func:`~kvcompose_local.composing.budgets.allocate_composites`). Axes: layer L, KV head H, row T.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kvcompose_local.composing.budgets import allocate_composites
from kvcompose_local.composing.scorer import BOUNDS, DTYPE, Scorer
from kvcompose_local.interfaces import FloatArray, HalfArray, IntArray, Selection

#: The logarithm of a pinned token, above any score.
PINNED = 2 * BOUNDS[1]


def choose(
    layers: Iterable[FloatArray],
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

    layers: L float arrays (H, T_l) as :func:`competing` gives them, each looked at once; row_bytes: int64 (L,), of a
    layer's cell; room: int64 (devices,), bytes for composed cells; device: int64 (L,), whose room a layer draws on;
    per_layer: False where every layer is to keep equally many, or all of its rows where they are fewer; steps,
    n_beside, at_least: of :func:`~kvcompose_local.composing.budgets.allocate_composites`.
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
    layer: int,
    scores: FloatArray | HalfArray,
    origins: Selection,
    n_seen: int,
    pinned: npt.NDArray[np.bool_],
) -> FloatArray:
    """Logarithms by which the rows of a layer compete: float32 (H, T). Pinned tokens get :data:`PINNED`.

    scores: float (H, T), without age; origins: int (H, T) or (T,), positions of the tokens, below ``n_seen``; pinned:
    bool (n_seen,); scorer: None where age does not count.
    """
    result = scores.astype(np.float32)
    if scorer is not None:
        result += scorer.ages(layer, origins, n_seen)
    np.clip(result, *BOUNDS, out=result)
    if pinned.any():
        np.copyto(result, np.float32(PINNED), where=pinned.take(origins))
    return result


def ranked(layers: Iterable[FloatArray]) -> tuple[list[Selection], list[FloatArray]]:
    """For each layer the rows of its heads, best first: int (H, T), and the worth of each rank: float32 (T,).

    layers: L float arrays (H, T) of logarithms, each looked at once. They are compared as float16; of equal ones the
    lower row is better. The worth never rises from rank to rank.
    """
    orders, worths = [], []
    for logarithms in layers:
        order, roots = _sorted_heads(logarithms.astype(DTYPE))
        orders.append(order)
        worths.append(roots.mean(axis=0).astype(np.float32))
    return orders, worths


def _sorted_heads(halves: HalfArray) -> tuple[Selection, npt.NDArray[np.float64]]:
    """Of each head the rows, best first, and the roots of their scores: int and float64 (H, T).

    A number's place and its row are sorted as one integer: ten times as fast as an argsort of the numbers.
    """
    n = halves.shape[1]
    wide, narrow, shift = (np.uint32, np.uint16, 16) if n <= 2**16 else (np.uint64, np.uint32, 32)
    places, roots = _of_all_halves()
    both = places.take(halves.view(np.uint16)).astype(wide)
    both <<= wide(shift)
    both |= np.arange(n, dtype=wide)
    both.sort(axis=1)
    order = both.astype(narrow).astype(np.min_scalar_type(max(n - 1, 0)), copy=False)  # the low half
    return order, roots.take(both >> wide(shift))


@lru_cache(maxsize=1)
def _of_all_halves() -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float64]]:
    """By the bits of a float16: its place, where the largest number has the first one, and +0 and -0 the same.

    By its place: the root of its exponential.
    """
    numbers = np.arange(2**16, dtype=np.uint16).view(DTYPE)
    roots = np.zeros(2**16, np.float64)
    with np.errstate(all="ignore"):  # some are none, and never asked for
        bits = (numbers + DTYPE(0)).view(np.uint16)  # the sum makes one zero of both
        places = np.where(bits & 0x8000, bits, 0x7FFF - bits).astype(np.uint16)
        roots[places] = np.exp(numbers, dtype=np.float32) ** np.float32(0.5)
    return places, roots
