"""Scores live cells, by their content or by a replay of their text.

A score is the logarithm of the attention that a token is expected to get, without its age
(:mod:`kvcompose_local.composing.scorer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kvcompose_local.composing.attention import AttentionMax
from kvcompose_local.composing.cell_scores import by_layer
from kvcompose_local.composing.fitting import Observed, fit
from kvcompose_local.composing.scorer import BOUNDS, Scorer
from kvcompose_local.errors import ContextFull, EngineError, InvalidInput
from kvcompose_local.interfaces import Engine, FloatArray, Lazy, Progress, even_parts

#: The least attention that a token is said to have; no attention that counts is below it.
_LEAST = 1e-6
#: Tokens before a replayed chunk that are replayed with it, so that its first ones find their place in the text.
_N_LEAD_IN = 4
#: A scorer is fitted to at most so many tokens while somebody waits, with a ridge, since one text is little evidence.
_MOST_FITTED, _RIDGE = 2048, 0.01
#: The first tokens of all, at which most heads look when they look at nothing.
_N_SINKS = 4


class Scoring(Protocol):
    """How live cells get their scores."""

    @property
    def scorer(self) -> Scorer | None:
        """The scorer that predicts scores and ages them; None where a replay measures them."""
        ...

    @property
    def feeds(self) -> bool:
        """Whether it needs free cells to feed tokens to."""
        ...

    def scores(self, tokens: Sequence[int], n: int, n_scratch: int, progress: Progress | None = None) -> FloatArray:
        """Scores of the first ``n`` live cells: float32 (all heads, n), the heads of all layers below each other.

        They may be out of bounds.

        tokens: all that were seen; n_scratch: free cells that may be used; progress gets (tokens done, in all) and may
        raise KeyboardInterrupt.
        """
        ...


class Scored:
    """A scorer predicts the scores from the cells themselves."""

    feeds = False

    def __init__(self, engine: Engine, scorer: Scorer) -> None:
        self._engine = engine
        self._weights = [weights.astype(np.float32) for weights in scorer.weights]  # once: NumPy takes its time for it
        self.scorer = scorer

    def scores(self, tokens: Sequence[int], n: int, n_scratch: int, progress: Progress | None = None) -> FloatArray:
        """See :class:`Scoring`."""
        first = len(tokens) - self._engine.layout().n_live
        if progress is not None:
            progress(0, n)
        return self.scorer.all_scores(self._engine.live_products(self._weights, n), first)


class Replayed:
    """The score is the most attention that a replay of the text pays, as in KVCompose (arXiv 2509.05165); the text is
    replayed in chunks, as in KVzip (arXiv 2505.23416).
    """

    feeds = True
    scorer: Scorer | None = None

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def scores(self, tokens: Sequence[int], n: int, n_scratch: int, progress: Progress | None = None) -> FloatArray:
        """See :class:`Scoring`. Raises ContextFull where there are no free cells."""
        layout, layers = self._engine.layout(), self._engine.shape.layers
        step = min(layout.n_free, self._engine.max_replay, max(n_scratch, 1))
        if n and step <= 0:
            raise ContextFull("no free cells are left to score the text in")
        seen = AttentionMax.over(layers, dtype=np.float32)
        first, lead_in = len(tokens) - layout.n_live, min(_N_LEAD_IN, step // 2)
        for start, stop in even_parts(n, step - lead_in) if n else []:
            if progress is not None:
                progress(start, n)
            try:
                self._engine.replay(tokens[max(first + start - lead_in, 0) : first + stop], seen)
            except InvalidInput as error:  # nobody has told us these numbers but the model
                raise EngineError(f"the model's file is damaged, fetch it again: {error}") from error
        if progress is not None:
            progress(n, n)
        if not n:
            return np.zeros((sum(layer.n_kv_heads for layer in layers), 0), np.float32)
        looked = np.concatenate([seen.of_layer(i)[:, :n] for i in range(len(layers))])
        return np.asarray(np.log(np.maximum(looked, _LEAST)))


class Learned:
    """A scorer predicts the scores that a replay of the first live text taught: for models without a profile.

    It scores that text, too, so that all scores have one scale.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.scorer: Scorer | None = None

    @property
    def feeds(self) -> bool:
        """See :class:`Scoring`."""
        return self.scorer is None

    def scores(self, tokens: Sequence[int], n: int, n_scratch: int, progress: Progress | None = None) -> FloatArray:
        """See :class:`Scoring`. Raises ContextFull where there are no free cells."""
        if self.scorer is None:
            self.scorer = self._fitted(tokens, min(n, _MOST_FITTED), n_scratch, progress)
        found = Scored(self._engine, self.scorer).scores(tokens, n, n_scratch, progress)
        n_sinks = max(_N_SINKS - (len(tokens) - self._engine.layout().n_live), 0)
        found[:, :n_sinks] = BOUNDS[1]
        return found

    def _fitted(self, tokens: Sequence[int], n: int, n_scratch: int, progress: Progress | None) -> Scorer:
        replayed = Replayed(self._engine).scores(tokens, n, n_scratch, progress)
        looked = by_layer(np.exp(replayed), self._engine.shape.layers)
        rows = self._engine.live_rows(n)

        def of_cells(which: int) -> Lazy[FloatArray]:
            return Lazy(len(rows), lambda i: rows[i][which])

        return fit([Observed(of_cells(0), of_cells(1), looked, n)], ridge=_RIDGE)
