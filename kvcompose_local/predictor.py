"""What questions will look at, predicted from what all heads looked at while the text was read and replayed.

A head looks at other tokens when a question comes than it did before. How much more at which is the same for every text
of a model: a log-linear function of what all of its heads looked at. Its weights are fitted once a model, to what
questions about some texts looked at (``evaluation/profiling.py``), and stand in the model's profile. Without them
:mod:`popularity` takes its place, which gives all heads the same say. This project's own; measured in docs/trials.md,
"What questions look at".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvcompose_local.errors import InvalidInput
from kvcompose_local.interfaces import FloatArray
from kvcompose_local.popularity import packed, popularity_of

#: What is added to attention in units of its head's mean, so that none has a logarithm.
_LEAST = 0.02
#: No fitted weight is near it, and any below it has a factor.
_LARGEST_WEIGHT = 1e6
#: Tokens whose features are in memory at once.
_AT_ONCE = 1024


def n_features(n_heads: int) -> int:
    """Features of a token: two for each of the model's KV heads, its popularity, and one that is 1."""
    return 2 * n_heads + 2


def features_of(
    replayed: Sequence[FloatArray], seen: Sequence[FloatArray], popularity: FloatArray
) -> Iterator[FloatArray]:
    """What a prediction goes by, in parts of some tokens: float32 (n, :func:`n_features`), all of them T rows.

    replayed, seen: L arrays (H_l, T) of attention, each looked at twice; popularity: float32 (T,) of their sum.
    """
    layers = [*replayed, *seen] if len(popularity) else []
    means = [layer.mean(axis=1, keepdims=True) for layer in layers]
    for start in range(0, len(popularity), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        relative = [
            layer[:, part] / np.where(mean > 0, mean, 1) + _LEAST for layer, mean in zip(layers, means, strict=True)
        ]
        rows = np.concatenate([*relative, popularity[None, part], np.full_like(popularity[None, part], np.e)])
        yield np.asarray(np.log(rows).T, np.float32)


class Predictor:
    """Of one model, whose layers have H KV heads in all.

    weights: H rows of :func:`n_features` (H) numbers, the logarithm of a head's factor by a token's features.
    """

    def __init__(self, weights: Sequence[Sequence[float]]) -> None:
        """Raises InvalidInput for weights of another shape, and ones that are not finite or above a million."""
        as_given = np.array(weights, np.float64)
        n_heads = len(as_given)
        fits = n_heads > 0 and as_given.shape == (n_heads, n_features(n_heads))
        if not fits or not (np.abs(as_given) <= _LARGEST_WEIGHT).all():
            raise InvalidInput("a predictor has finite weights of 2 H + 2 features for each of H KV heads")
        self._weights = as_given.astype(np.float32)

    @property
    def n_heads(self) -> int:
        return len(self._weights)

    def packed_factors(self, replayed: Sequence[FloatArray], seen: Sequence[FloatArray]) -> list[npt.NDArray[np.uint8]]:
        """How much more questions look at tokens than text did: L arrays uint8 (H_l, T), packed as popularity is.

        replayed, seen: L float arrays (H_l, T), H heads in all, what the replay and later text looked at.
        """
        popularity = popularity_of(a + b for a, b in zip(replayed, seen, strict=True))
        heads = np.cumsum([len(layer) for layer in replayed])
        codes = np.zeros((self.n_heads, len(popularity)), np.uint8)
        done = 0
        for rows in features_of(replayed, seen, popularity):
            with np.errstate(over="ignore"):  # what overflows is packed as the most
                codes[:, done : done + len(rows)] = packed(np.exp(self._weights @ rows.T))
            done += len(rows)
        return np.split(codes, heads[:-1])


def for_ranks(scores: FloatArray, factors: FloatArray) -> FloatArray:
    """Scores, float32 (H, T), by which a head's tokens compete: what questions are predicted to look at."""
    return np.asarray(scores * factors, np.float32)


def for_budgets(scores: FloatArray, factors: FloatArray) -> FloatArray:
    """Scores, float32 (H, T), by which layers compete: half way from what text looked at to what questions will."""
    return np.asarray(scores * np.sqrt(factors), np.float32)
