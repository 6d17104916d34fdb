"""What is known of a cache's cells: the attention that says which of them to keep.

Every row of a layer has what later text was seen to look at. Beside that a composed cell has what it got in the replay
that it was chosen by, and a live one what it got in a replay since. Their sum competes, with the token's popularity
(:mod:`popularity`) or the factor by which a predictor (:mod:`predictor`) expects questions to look at it more, which
composed cells bring along. Axes: KV head H, row of a layer, its composed cells first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvcompose_local import popularity, predictor
from kvcompose_local.attention import AttentionMax
from kvcompose_local.errors import InvalidInput
from kvcompose_local.interfaces import CacheLayout, FloatArray, LayerShape, Lazy, Selection

#: The score of a pinned token: above any other, since those are sums of a few attention weights, which are at most 1.
PINNED = 2.0**15
#: Attention of a token to the ones just before it says nothing about who else needs them.
N_NEAREST = 16
#: The newest tokens of watched text, at which at most the last watched token looked: every eighth is watched.
N_UNSEEN = N_NEAREST + 8
#: What was seen of each row and its replay's score count in every later compaction, so they are always in memory.
SEEN_DTYPE, SCORE_DTYPE = np.uint8, np.float16


class CellScores:
    """The scores of all layers; those of one are made when they are asked for, since all take a sixtieth of the cells.

    seen: takes in what text looks at while it is read; replayed: what a replay shows of the live tokens; n_replayed:
    how many of those, oldest first, it has shown.
    """

    def __init__(self, layers: Sequence[LayerShape], predictor: predictor.Predictor | None = None) -> None:
        self._layers = layers
        self._predictor = predictor
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._kept = [np.zeros((layer.n_kv_heads, 0), SCORE_DTYPE) for layer in self._layers]
        self._popularity = [np.zeros(kept.shape, np.uint8) for kept in self._kept]
        self.seen = AttentionMax.over(self._layers, exclude_nearest=N_NEAREST, dtype=SEEN_DTYPE)
        self._forget_replay()

    def _forget_replay(self) -> None:
        self.replayed = AttentionMax.over(self._layers, dtype=SCORE_DTYPE)
        self.n_replayed = 0

    def popularity_of_live(self, pinned: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.uint8]]:
        """Of the first live tokens, packed: L arrays uint8 (H, n), that of 1 for those of bool (n,) ``pinned``.

        With a predictor it is each head's own.
        """
        n_layers, n = len(self._layers), len(pinned)
        if self._predictor is not None:
            found = self._predictor.packed_factors(
                Lazy(n_layers, lambda i: _first(self.replayed.of_layer(i), 0, n)),
                Lazy(n_layers, lambda i: _first(self.seen.of_layer(i), self._kept[i].shape[1], n)),
            )
            for codes in found:
                codes[:, pinned] = popularity.ONE
            return found
        codes = popularity.packed(popularity.popularity_of(self._live(i, n) for i in range(n_layers)))
        codes[pinned] = popularity.ONE
        return [np.broadcast_to(codes, (layer.n_kv_heads, n)) for layer in self._layers]

    def for_budgets(
        self, layer: int, pinned: npt.NDArray[np.bool_], live: Sequence[npt.NDArray[np.uint8]]
    ) -> FloatArray:
        """By what a layer competes with others: as :meth:`of_layer`, with ``live``, the popularity of the live ones."""
        scores, factors = self.of_layer(layer, pinned), self._popularity_of(layer, live)
        if self._predictor is not None:
            return predictor.for_budgets(scores, factors)
        return popularity.for_budgets(scores, factors)

    def for_ranks(self, layer: int, pinned: npt.NDArray[np.bool_], live: Sequence[npt.NDArray[np.uint8]]) -> FloatArray:
        """By what a head's rows compete, as :meth:`for_budgets`."""
        scores, factors = self.of_layer(layer, pinned), self._popularity_of(layer, live)
        if self._predictor is not None:
            return predictor.for_ranks(scores, factors)
        return popularity.for_ranks(scores, factors, popularity.sharpness(self._live(layer, len(pinned))))

    def _live(self, layer: int, n: int) -> FloatArray:
        """The scores of the first ``n`` live tokens, pinned or not: float32 (H, n)."""
        return self.of_layer(layer, np.zeros(n, bool))[:, self._kept[layer].shape[1] :]

    def _popularity_of(self, layer: int, live: Sequence[npt.NDArray[np.uint8]]) -> FloatArray:
        """Of all rows that :meth:`of_layer` has: float32 (H, K_l + n)."""
        return popularity.unpacked(np.concatenate([self._popularity[layer], live[layer]], axis=1))

    def of_layer(self, layer: int, pinned: npt.NDArray[np.bool_]) -> FloatArray:
        """Of a layer's composed cells and its first live ones: float32 (H, K_l + n).

        pinned: bool (n,), which of these are.
        """
        scores = self._in_replay(layer, pinned)
        seen = self.seen.of_layer(layer)[:, : scores.shape[1]]
        scores[:, : seen.shape[1]] += seen
        return scores

    def _in_replay(self, layer: int, pinned: npt.NDArray[np.bool_]) -> FloatArray:
        """The same without what was seen."""
        old = self._kept[layer]
        new = np.zeros((len(old), len(pinned)), np.float32)
        replayed = self.replayed.of_layer(layer)[:, : len(pinned)]  # none where a profile left nothing to replay
        new[:, : replayed.shape[1]] = replayed
        new[:, pinned] = PINNED
        return np.concatenate([old, new], axis=1)

    def keep(
        self,
        selection: Sequence[Selection],
        before: CacheLayout,
        pinned: npt.NDArray[np.bool_],
        live: Sequence[npt.NDArray[np.uint8]],
        reserve: int,
    ) -> None:
        """Follow a rewrite: ``selection`` is composed now, the live cells after those of ``pinned`` are the tail.

        live: their popularity, as :meth:`popularity_of_live` gives it. There is room for what is seen of ``reserve``
        more.
        """
        for i, (rows, n_composed) in enumerate(zip(selection, before.composed, strict=True)):
            # In place: twice the scores of all cells would be memory for nothing.
            self._kept[i] = np.take_along_axis(self._in_replay(i, pinned), rows, axis=1).astype(SCORE_DTYPE)
            of_rows = np.concatenate([self._popularity[i], live[i]], axis=1)
            self._popularity[i] = np.take_along_axis(of_rows, rows, axis=1)
            tail = np.arange(n_composed + len(pinned), n_composed + before.n_live, dtype=np.int32)
            self.seen.pick(i, np.concatenate([rows, np.tile(tail, (len(rows), 1))], axis=1), reserve)
        self._forget_replay()

    def trim(self, layout: CacheLayout) -> None:
        """Forget what is not in the cache any more, its newest live cells."""
        self.seen.trim([n + layout.n_live for n in layout.composed])
        self.replayed.trim([layout.n_live] * len(layout.composed))
        self.n_replayed = min(self.n_replayed, layout.n_live)

    def n_seen(self, layout: CacheLayout) -> int:
        """Live tokens that later ones were seen to look at; the newest, and answers until text follows, are not."""
        n_shown = max(n - n_composed for n, n_composed in zip(self.seen.n_columns, layout.composed, strict=True))
        return max(0, n_shown - N_UNSEEN)

    def view(self) -> tuple[Sequence[FloatArray], Sequence[npt.NDArray[np.uint8]], Sequence[FloatArray]]:
        """What :meth:`restored` takes, of composed cells float32 (H, K_l) of their replays and uint8 (H, K_l) of their
        popularity (:func:`~kvcompose_local.popularity.packed`), and float32 (H, rows) of what was seen.

        Made when it is looked at, layer by layer: good until anything changes.
        """
        n = len(self._layers)
        return (
            Lazy(n, lambda i: self._kept[i].astype(np.float32)),
            Lazy(n, lambda i: self._popularity[i].copy()),
            Lazy(n, lambda i: self.seen.of_layer(i).astype(np.float32)),
        )

    def restored(
        self,
        kept: Sequence[FloatArray],
        codes: Sequence[npt.NDArray[np.uint8]],
        seen: Sequence[FloatArray],
        composed: Sequence[int],
        n_live: int,
    ) -> CellScores:
        """Those of another time, of a cache laid out so. Raises InvalidInput where they cannot be."""
        fits = len(kept) == len(codes) == len(composed) == len(self._layers)
        for layer, scores, code, k in zip(self._layers, kept, codes, composed, strict=False):
            fits = fits and scores.shape == code.shape == (layer.n_kv_heads, k)
            fits = fits and scores.dtype == np.float32 and code.dtype == np.uint8
            fits = fits and bool((np.isfinite(scores) & (scores >= 0)).all())
        if not fits:
            raise InvalidInput("the scores are not those of these cells")
        if len(seen) != len(self._layers) or any(
            rows.ndim != 2 or rows.shape[1] > k + n_live for rows, k in zip(seen, composed, strict=True)
        ):
            raise InvalidInput("the attention is not that of these cells")
        result = CellScores(self._layers, self._predictor)
        result.seen.take_back(seen)
        result._kept = [np.minimum(scores, PINNED).astype(SCORE_DTYPE) for scores in kept]
        result._popularity = [np.array(code) for code in codes]
        return result


def _first(attention: FloatArray, start: int, n: int) -> FloatArray:
    """``n`` columns of what may have fewer, from ``start`` on: float32 (H, n), 0 where there are none."""
    found = np.zeros((len(attention), n), np.float32)
    shown = attention[:, start : start + n]
    found[:, : shown.shape[1]] = shown
    return found
