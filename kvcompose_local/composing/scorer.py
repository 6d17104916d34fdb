"""Predicts the attention that questions will pay a cell, from its key, its value and its place.

Each KV head has a linear function of its own key and value, which stand in the cache anyway; it gives the logarithm of
that attention. Keys and values of the layer's other heads add nothing (docs/decisions.md). The function is fitted once
a model (:mod:`fitting`), to the attention of questions about some texts. From then on no attention is computed: a cell
gets its score when it is composed for the first time, and only its age, which grows, is added when cells compete.
This is the project's own method; KVzap (arXiv 2601.07891) predicts another method's scores from the hidden state.
Axes: layer L, KV head H, token T, numbers of a head D, features F.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcompose_local.composing.threads import in_parts
from kvcompose_local.errors import InvalidInput
from kvcompose_local.interfaces import FloatArray, HalfArray, IntArray

#: No logarithm of an attention is beyond these.
BOUNDS = -30.0, 5.0
#: Weights, and scores, as they are kept.
DTYPE = np.float16


def within_bounds(logarithms: FloatArray) -> FloatArray:
    """The same array with no number outside :data:`BOUNDS`; what is not a number is the least."""
    np.fmax(logarithms, BOUNDS[0], out=logarithms)
    return np.fmin(logarithms, BOUNDS[1], out=logarithms)


def features_of(keys: FloatArray, values: FloatArray) -> FloatArray:
    """The features of a layer's cells: float32 (H, T, F).

    keys, values: float (H, T, D), keys as they were before RoPE.
    """
    return np.concatenate([keys, values], axis=2, dtype=np.float32)


def products(weights: FloatArray | HalfArray, keys: FloatArray, values: FloatArray) -> FloatArray:
    """The features of tokens times the weights of their heads, summed: float32 (H, T).

    weights: float (H, F); keys, values: as :func:`features_of` takes them. Raises InvalidInput where they do not fit.
    """
    features = features_of(keys, values)
    if weights.shape != features.shape[::2]:
        raise InvalidInput("the model's profile is of other heads: measure it again")
    return np.asarray((features @ weights.astype(np.float32)[..., None])[..., 0])


@dataclass(frozen=True)
class Scorer:
    """The linear functions of one model.

    weights: L float16 arrays (H, F), of the features; places: L float32 arrays (H, 3), of the logarithm of the token's
    age, of the logarithm of its position, both at least 1, and of the constant 1; furthest: older and later tokens
    count as if they had this age and this position.
    """

    weights: tuple[HalfArray, ...]
    places: tuple[FloatArray, ...]
    furthest: int

    def __post_init__(self) -> None:
        if not self.weights or len(self.weights) != len(self.places) or self.furthest < 1:
            raise InvalidInput("a scorer has weights and places for each layer")
        for weights, places in zip(self.weights, self.places, strict=True):
            if weights.ndim != 2 or places.shape != (len(weights), 3):
                raise InvalidInput("a scorer's weights and places are not of the same heads")
            if not (np.isfinite(weights).all() and np.isfinite(places).all()):
                raise InvalidInput("a scorer's weights are not finite")

    @cached_property
    def digest(self) -> str:
        """A name of 16 characters that no other scorer has."""
        found = hashlib.blake2b(str(self.furthest).encode(), digest_size=8)
        for array in (*self.weights, *self.places):
            found.update(np.ascontiguousarray(array, np.float32).data)
        return found.hexdigest()

    def weighed(self, logarithms: npt.NDArray[np.float64]) -> Scorer:
        """The same with a layer's logarithm of a weight, of float64 (L,), added to all of its scores."""
        shifts = np.zeros((len(self.places), 3), np.float32)
        shifts[:, 2] = logarithms
        return replace(self, places=tuple(of + by for of, by in zip(self.places, shifts, strict=True)))

    def check(self, heads: Sequence[int]) -> None:
        """Raises InvalidInput unless the model's layers have these KV heads."""
        if [len(weights) for weights in self.weights] != list(heads):
            raise InvalidInput("the model's profile is of other layers: measure it again")

    def scores(self, layer: int, keys: FloatArray, values: FloatArray, first: int) -> FloatArray:
        """Logarithms of expected attention, without age: float32 (H, T).

        keys, values: float32 (H, T, D), keys as they were before RoPE, of tokens at positions from ``first`` on. Raises
        InvalidInput for another number of heads or features.
        """
        return within_bounds(self._placed(self.places[layer], products(self.weights[layer], keys, values), first))

    def all_scores(self, sums: FloatArray, first: int) -> FloatArray:
        """The scores of what :func:`products` gives for all layers, their heads below each other: float32 (H, T).

        They take the place of ``sums``, and are not within bounds yet.
        """

        def compute(heads: slice) -> None:
            self._placed(self._all_places[heads], sums[heads], first)

        in_parts(compute, [sums.shape[1]] * len(sums))
        return sums

    def _placed(self, places: FloatArray, sums: FloatArray, first: int) -> FloatArray:
        by_place = places[:, 1:2] * _positions(first, sums.shape[1], self.furthest)
        by_place += places[:, 2:]
        sums += by_place
        return sums

    def ages(
        self,
        layer: int | None,
        origins: npt.NDArray[np.integer[Any]],
        n_seen: int,
        heads: slice = slice(None),
    ) -> FloatArray:
        """What age adds for some heads of a layer: float32 (H, T).

        layer: None for all layers, their heads below each other; origins: int (H, T) or (T,), positions of the tokens,
        below ``n_seen``.
        """
        places = self._all_places if layer is None else self.places[layer]
        logarithms = _ages(n_seen, self.furthest)  # a table: a logarithm costs more than a look
        return places[heads, :1] * logarithms.take(origins)

    @cached_property
    def _all_places(self) -> FloatArray:
        return np.concatenate(self.places)


@lru_cache(maxsize=1)  # all layers of a compaction ask for the same
def _positions(first: int, n: int, furthest: int) -> FloatArray:
    return _logarithm(np.arange(first, first + n) + 1, furthest)


@lru_cache(maxsize=1)
def _ages(n_seen: int, furthest: int) -> FloatArray:
    return _logarithm(n_seen - np.arange(n_seen), furthest)


def _logarithm(places: IntArray, furthest: int) -> FloatArray:
    return np.log(np.clip(places, 1, furthest)).astype(np.float32)
