"""The facts about a context that methods go by: collected once an item, shared by all methods and keep ratios."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvcompose_local.chat.scoring import Learned, Replayed, Scored, Scoring
from kvcompose_local.composing.attention import AttentionMax
from kvcompose_local.composing.cell_scores import by_layer
from kvcompose_local.composing.policy import Policy
from kvcompose_local.composing.scorer import Scorer
from kvcompose_local.engines.base import LlamaEngine
from kvcompose_local.errors import InvalidInput
from kvcompose_local.interfaces import FloatArray

#: Queries of a recent-query method (SnapKV, arXiv 2404.14469, uses 32 with short contexts).
N_RECENT = 32


class Statistics:
    """Statistics of one context. The engine's cache holds it, uncompressed, while attributes are computed.

    All are lists of L arrays over the T tokens.
    """

    def __init__(
        self,
        engine: LlamaEngine,
        tokens: Sequence[int],
        scorer: Scorer | None = None,
        left_out: Scorer | None = None,
    ) -> None:
        """Reads ``tokens`` into the empty cache of ``engine``.

        scorer: the model's, None where it has no profile; left_out: one that was fitted to no text of this kind.
        """
        self.engine = engine
        self.tokens = list(tokens)
        self._model_scorer = scorer
        self._left_out = left_out
        self._n_scratch = Policy.for_cells(len(self.tokens)).n_scratch
        engine.decode(self.tokens)

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @cached_property
    def cells(self) -> tuple[Scorer, list[FloatArray]]:
        """The scorer that a chat goes by, and its scores without age: float32 (H, T)."""
        return self._scored(self._model_scorer)

    @cached_property
    def unseen(self) -> tuple[Scorer, list[FloatArray]]:
        """:attr:`cells` of a scorer that was not fitted to this kind of text. Raises InvalidInput without one."""
        if self._left_out is None:
            raise InvalidInput("no profile was fitted without this kind of text")
        return self._scored(self._left_out)

    def _scored(self, scorer: Scorer | None) -> tuple[Scorer, list[FloatArray]]:
        by: Scoring = Learned(self.engine) if scorer is None else Scored(self.engine, scorer)
        scores = self._by(by)
        if by.scorer is None:
            raise AssertionError("what has scored has a scorer")
        return by.scorer, scores

    @cached_property
    def replay(self) -> list[FloatArray]:
        """Logarithms of the most attention that any replayed token pays, replayed in the chat's chunks: (H, T)."""
        return self._by(Replayed(self.engine))

    def _by(self, scoring: Scoring) -> list[FloatArray]:
        return by_layer(scoring.scores(self.tokens, self.n_tokens, self._n_scratch), self.engine.shape.layers)

    @cached_property
    def whole_replay(self) -> list[FloatArray]:
        """Attention, float32 (Q, T), replayed in one piece as published: needs as much room again."""
        seen = AttentionMax(len(self.engine.shape.layers), [layer.n_heads for layer in self.engine.shape.layers])
        self.engine.replay(self.tokens, seen)
        return seen.result()

    @cached_property
    def recent(self) -> list[FloatArray]:
        """The mean attention of the last 32 tokens: float32 (Q, T)."""
        sums = [np.zeros((layer.n_heads, self.n_tokens), np.float32) for layer in self.engine.shape.layers]

        def tap(layer: int, weights: FloatArray) -> None:
            sums[layer] += weights[:, :, : self.n_tokens].sum(axis=1) / N_RECENT

        if self.engine.moves_on:  # and does not come back
            self.engine.clear()
            self.engine.decode(self.tokens[:-N_RECENT])
        else:
            self.engine.drop_tail(N_RECENT)
        with self.engine.watching(tap):
            self.engine.decode(self.tokens[-N_RECENT:])
        return sums

    @cached_property
    def key_norms(self) -> list[FloatArray]:
        """The Euclidean norms of an F16 cache's keys, float32 (H, T)."""
        return [self._norms(rows, i) for i, rows in enumerate(self.engine.snapshot().keys)]

    def _norms(self, rows: npt.NDArray[np.uint8], layer: int) -> FloatArray:
        n_heads = self.engine.shape.layers[layer].n_kv_heads
        by_head = np.ascontiguousarray(rows).view(np.float16).astype(np.float32).reshape(len(rows), n_heads, -1)
        return np.asarray(np.linalg.norm(by_head, axis=2).T, np.float32)  # (H, T)
