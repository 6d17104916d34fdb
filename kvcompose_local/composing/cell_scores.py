"""The scores of a cache's composed cells, and the positions that their tokens stood at.

A token gets its score when it is composed for the first time, and keeps it: the logarithm of the attention that it is
expected to get, without its age. The heads of a composed cell come from different tokens, so each head has its own
score and position. Axes: KV head H, row of a layer, its composed cells first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcompose_local.composing.scorer import BOUNDS, DTYPE, within_bounds
from kvcompose_local.errors import InvalidInput
from kvcompose_local.interfaces import FloatArray, HalfArray, LayerShape, Lazy, Selection
from kvcompose_local.interrupts import uninterrupted


def kept_shares(origins: Sequence[Selection], n_tokens: int, n_live: int) -> FloatArray:
    """How many of all layers' heads hold a cell of each token, as a share: float32 (n_tokens,).

    origins: L int arrays (H, K_l), positions of the composed cells' tokens. The newest ``n_live`` tokens are live, and
    held by all heads.
    """
    counts = np.zeros(n_tokens, np.int64)
    for places in origins:
        counts += np.bincount(places.ravel(), minlength=n_tokens)[:n_tokens]
    shares = (counts / max(sum(len(places) for places in origins), 1)).astype(np.float32)
    shares[n_tokens - n_live :] = 1
    return shares


def by_layer(numbers: npt.NDArray[Any], layers: Sequence[LayerShape]) -> list[npt.NDArray[Any]]:
    """Views of the heads of each layer, which stand below each other: L arrays (H, n) of one (all heads, n)."""
    return np.split(numbers, np.cumsum([layer.n_kv_heads for layer in layers])[:-1])


class CellScores:
    """The scores of all layers. A layer's arrays are joined only when somebody asks for them, which saves memory."""

    def __init__(self, layers: Sequence[LayerShape]) -> None:
        self._layers = layers
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._kept = [np.zeros((layer.n_kv_heads, 0), DTYPE) for layer in self._layers]
        self._origins: list[npt.NDArray[np.integer[Any]]] = [np.zeros(kept.shape, np.uint16) for kept in self._kept]
        self._rewritten: list[tuple[int, Selection, FloatArray, int]] = []  # layer, selection, live, first

    def composed(self, layer: int) -> tuple[HalfArray, Selection]:
        """Scores float16 (H, K_l) and origins (H, K_l) of a layer's composed cells."""
        self.settle()
        return self._kept[layer], self._origins[layer]

    def rows(self, live: FloatArray, first: int) -> Sequence[tuple[HalfArray, Selection]]:
        """Scores float16 (H, K_l + n) and origins (H, K_l + n) of each layer's composed cells and its first live ones.

        live: float32 (all heads, n), scores of tokens at positions from ``first`` on. A layer is joined when it is
        looked at, so this is valid until anything changes.
        """
        self.settle()
        of_layers = by_layer(live, self._layers)
        return Lazy(len(self._layers), lambda layer: self._rows(layer, of_layers[layer], first))

    def _rows(self, layer: int, live: FloatArray, first: int) -> tuple[HalfArray, Selection]:
        new_scores = within_bounds(live.copy())
        scores = np.concatenate([self._kept[layer], new_scores], axis=1, dtype=DTYPE, casting="same_kind")
        end = first + live.shape[1]
        new = np.broadcast_to(np.arange(first, end, dtype=_origin_dtype(end)), live.shape)
        return scores, np.concatenate([self._origins[layer], new], axis=1)

    def keep(self, selection: Sequence[Selection], live: FloatArray, first: int) -> None:
        """Follow a rewrite: the rows of :meth:`rows` that ``selection`` names are composed now.

        The scores follow at :meth:`settle`, or when somebody asks.
        """
        self.settle()
        of_layers = by_layer(live, self._layers)
        self._rewritten = [(i, chosen, of_layers[i], first) for i, chosen in enumerate(selection)]

    def settle(self) -> None:
        """Do what :meth:`keep` left to do: there is time while a device reads on."""
        if not self._rewritten:
            return
        with uninterrupted():
            while self._rewritten:  # one layer at a time: twice all scores would be memory for nothing
                layer, chosen, live, first = self._rewritten[-1]
                scores, origins = self._rows(layer, live, first)
                places = chosen + np.arange(len(scores))[:, None] * scores.shape[1]  # in all heads' rows: take is fast
                self._kept[layer], self._origins[layer] = scores.take(places), origins.take(places)
                self._rewritten.pop()

    def before(self, position: int) -> Sequence[Selection]:
        """Which composed cells stay when tokens from ``position`` on are forgotten: L int arrays (H, K).

        Each head keeps its best older cells, as many as the head with the fewest older cells has.
        """
        chosen = []
        for origins in self.origins:
            older = origins < position
            n = int(older.sum(axis=1).min(initial=origins.shape[1]))
            chosen.append(np.argsort(~older, axis=1, kind="stable")[:, :n])
        return chosen

    @property
    def origins(self) -> Sequence[Selection]:
        """Positions of the composed cells' tokens: L int arrays (H, K_l)."""
        self.settle()
        return self._origins

    def view(self) -> tuple[Sequence[FloatArray], Sequence[Selection]]:
        """What :meth:`restored` takes: float32 (H, K_l) scores and int32 (H, K_l) origins of each layer.

        A layer is read when it is looked at, so this is valid until anything changes.
        """
        self.settle()
        n = len(self._layers)
        return Lazy(n, lambda i: self._kept[i].astype(np.float32)), Lazy(n, lambda i: self._origins[i].astype(np.int32))

    def restored(
        self, kept: Sequence[FloatArray], origins: Sequence[Selection], composed: Sequence[int], first_live: int
    ) -> CellScores:
        """The scores that :meth:`view` told earlier. Raises InvalidInput where they do not fit such a layout."""
        fits = len(kept) == len(origins) == len(composed) == len(self._layers)
        for layer, scores, places, k in zip(self._layers, kept, origins, composed, strict=False):
            fits = fits and scores.shape == places.shape == (layer.n_kv_heads, k)
            fits = fits and scores.dtype == np.float32 and bool(np.isfinite(scores).all())
            fits = fits and places.dtype == np.int32 and bool(((places >= 0) & (places < first_live)).all())
        if not fits:
            raise InvalidInput("the scores do not belong to these cells")
        result = CellScores(self._layers)
        result._kept = [np.clip(scores, *BOUNDS).astype(DTYPE) for scores in kept]
        result._origins = [places.astype(_origin_dtype(first_live)) for places in origins]
        return result


def _origin_dtype(n_positions: int) -> np.dtype[Any]:
    return np.min_scalar_type(max(n_positions, 2**16) - 1)
