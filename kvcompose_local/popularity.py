"""How much all of a model looks at a token, which tells a head what it may need beyond what it looked at itself.

What a question will need is looked at by many heads while the text is read, by others only when the question comes. So
a token's *popularity* counts beside its score: for ranks as much as a head is *sharp*, that is, has few tokens that it
looks at; for budgets within bounds, since there it says what a layer's cells are worth. This project's own; measured
in docs/trials.md, "What other layers look at".
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvcompose_local.interfaces import FloatArray

#: What popularity may do to a score where layers compete for cells.
_BOUNDS = (0.7, 1.5)
#: One byte a popularity: its logarithm in sixteenths of an octave, as many above 1, whose byte is ONE, as below.
_STEPS, ONE = 16, 128
#: The smallest and the largest; a token that nobody looks at still has a score of its own.
_LEAST, _MOST = 2.0 ** (-ONE / _STEPS), 2.0 ** ((255 - ONE) / _STEPS)


def popularity_of(layers: Iterable[FloatArray]) -> FloatArray:
    """The mean over all heads of a token's score, each relative to its head's mean: float32 (T,), its median 1.

    layers: L float32 arrays (H_l, T) of scores, 0 or more; each layer counts as much as any other, and is looked at
    once.
    """
    sums: FloatArray | None = None
    for scores in layers:
        if not scores.shape[1]:
            return np.zeros(0, np.float32)
        means = scores.mean(axis=1, keepdims=True)
        relative = (scores / np.where(means > 0, means, 1)).mean(axis=0)
        sums = relative if sums is None else sums + relative
    if sums is None:
        return np.zeros(0, np.float32)
    median = np.median(sums)
    return np.asarray(np.clip(sums / median, _LEAST, _MOST) if median > 0 else np.ones_like(sums), np.float32)


def sharpness(scores: FloatArray) -> FloatArray:
    """How few of its tokens a head looks at: float32 (H, 1), 0 where the median of ``scores`` (H, T) is the mean.

    1 from a median of half the mean on. A head without scores has none.
    """
    if not scores.shape[1]:
        return np.zeros((len(scores), 1), np.float32)
    means = scores.mean(axis=1, keepdims=True)
    medians = np.median(scores, axis=1, keepdims=True)
    return np.asarray(np.clip(2 * (1 - medians / np.where(means > 0, means, np.inf)), 0, 1) * (means > 0), np.float32)


def for_ranks(scores: FloatArray, popularity: FloatArray, sharp: FloatArray) -> FloatArray:
    """Scores, float32 (H, T), by which a head's tokens compete.

    popularity: float32 (T,) or (H, T); sharp: (H, 1).
    """
    return np.asarray(scores * popularity**sharp, np.float32)


def for_budgets(scores: FloatArray, popularity: FloatArray) -> FloatArray:
    """Scores, float32 (H, T), by which layers compete; popularity: float32 (T,) or (H, T)."""
    return np.asarray(scores * np.clip(popularity, *_BOUNDS), np.float32)


def packed(popularity: FloatArray) -> npt.NDArray[np.uint8]:
    """What is kept of popularities, one byte each, within a fortieth of them."""
    return np.asarray(np.rint(np.log2(np.clip(popularity, _LEAST, _MOST)) * _STEPS) + ONE, np.uint8)


def unpacked(codes: npt.NDArray[np.uint8]) -> FloatArray:
    """The popularities that :func:`packed` took: float32 of the same shape. Any byte stands for one."""
    return np.exp2((codes.astype(np.float32) - ONE) / _STEPS)
