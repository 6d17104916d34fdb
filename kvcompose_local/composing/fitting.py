"""Fits a scorer to the attention that questions about some texts paid, by Poisson regression with a ridge.

What is expected is the mean of a *power* of the attention, and a score is its root. With a power of 1 a token of a text
full of long names, each of which one question in forty looks at closely, is worth less than a word that every question
glances at. But an answer bears the lack of what it glances at, and not of what it copies (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcompose_local.composing.scorer import BOUNDS, DTYPE, Scorer, features_of
from kvcompose_local.interfaces import FloatArray, Progress

#: The ridge per unit of the features' variance.
RIDGE = 0.003
#: The most of Newton's steps, of which five to ten are taken; what the next one must promise; the least share of one.
_STEPS, _SMALL_GAIN, _SMALLEST_SHARE = 30, 1e-5, 1e-4
#: Beyond it, exponentials that are tried would overflow.
_LARGEST_LOGARITHM = np.float32(30)
#: The power of a question's attention whose mean a scorer is fitted to.
POWER = 1.25
#: A float16 holds it, and no weight that counts is near it.
_LARGEST = 6e4


@dataclass(frozen=True)
class Observed:
    """The cells of one text, and the attention that questions paid them.

    keys, values: L float arrays (H, T, D), keys as they were before RoPE; looked: L float32 arrays (H, T), the mean of
    a power of the attention; n_tokens: T and the newest tokens, which are left out.
    """

    keys: Sequence[FloatArray]
    values: Sequence[FloatArray]
    looked: Sequence[FloatArray]
    n_tokens: int


def fit(
    texts: Sequence[Observed],
    *,
    ridge: float = RIDGE,
    power: float = 1.0,
    progress: Progress = lambda _done, _total: None,
) -> Scorer:
    """The scorer that makes most likely what questions looked at in these texts.

    power: which power of the attention ``looked`` is the mean of; progress gets (layers done, in all). A head that no
    question looked at gets the lowest score everywhere.
    """
    n_layers = len(texts[0].keys)
    weights, of_places = [], []
    for layer in range(n_layers):
        progress(layer, n_layers)
        features = np.concatenate([features_of(text.keys[layer], text.values[layer]) for text in texts], axis=1)
        place = np.concatenate([_places_of(text, layer) for text in texts])
        looked = np.concatenate([text.looked[layer] for text in texts], axis=1)
        found = np.stack([_fitted(*of_head, place, ridge) for of_head in zip(features, looked, strict=True)]) / power
        found[looked.sum(axis=1) <= 0, -1] = BOUNDS[0]
        weights.append(np.clip(found[:, :-3], -_LARGEST, _LARGEST).astype(DTYPE))
        of_places.append(found[:, -3:].astype(np.float32))
    progress(n_layers, n_layers)
    return Scorer(tuple(weights), tuple(of_places), max(text.n_tokens for text in texts))


def _places_of(text: Observed, layer: int) -> FloatArray:
    """Logarithms of age and position: float32 (T, 2)."""
    positions = np.arange(text.looked[layer].shape[1])
    return np.log(np.stack([text.n_tokens - positions, positions + 1], axis=1)).astype(np.float32)


def _fitted(features: FloatArray, counts: FloatArray, place: FloatArray, ridge: float) -> npt.NDArray[np.float64]:
    """A head's weights of its features, of age and position, and of the constant 1: float64 (F + 3,)."""
    rows = np.concatenate([features, place, np.ones((len(place), 1), np.float32)], axis=1)
    mean, deviation = rows.mean(axis=0), rows.std(axis=0) + np.float32(1e-6)
    mean[-1], deviation[-1] = 0, 1
    found = poisson((rows - mean) / deviation, counts, ridge)
    weights = found / deviation
    weights[-1] -= (found[:-1] * mean[:-1] / deviation[:-1]).sum()
    return np.asarray(weights)


def poisson(features: FloatArray, counts: FloatArray, ridge: float) -> npt.NDArray[np.float64]:
    """b for which exp(features · b) is most likely the mean of ``counts``: float64 (F,).

    features: float32 (T, F), the last of which is 1 and is not held back by the ridge; counts: float32 (T,), 0 or more.

    Newton's method, each step halved until it gains. A whole first step says of the few tokens at which heads look when
    they look at nothing that they get e^15 times what they do, and undoing that takes more steps than there are.
    """
    n = features.shape[1]
    b = np.zeros(n)
    total = float(counts.sum(dtype=np.float64))
    if total <= 0:
        b[-1] = BOUNDS[0]
        return b
    b[-1] = np.log(total / len(counts))
    held = ridge * np.eye(n)
    held[-1, -1] = 1e-6

    def expected(b: npt.NDArray[np.float64]) -> tuple[FloatArray, float]:
        """Means of the counts, float32 (T,), and what is to be as small as can be."""
        logarithms = np.minimum(features @ b.astype(np.float32), _LARGEST_LOGARITHM)
        means = np.exp(logarithms)
        loss = means.sum(dtype=np.float64) - counts @ logarithms.astype(np.float64)
        return means, float(loss / total + b @ held @ b / 2)

    means, loss = expected(b)
    for _ in range(_STEPS):
        slope = (features.T @ (counts - means)).astype(np.float64) / total - held @ b
        curvature = (features * means[:, None]).T @ features / total + held
        step = np.linalg.solve(curvature, slope)
        gain = float(slope @ step)
        if gain < _SMALL_GAIN:  # the last step goes to the end, so that rounding does not tell where it was begun
            return np.asarray(b + step)
        share = 1.0
        while (found := expected(b + share * step))[1] > loss - share * gain / 10:
            share /= 2
            if share < _SMALLEST_SHARE:  # what is left to gain is less than what float32 rounds
                return b
        b += share * step
        means, loss = found
    return b
