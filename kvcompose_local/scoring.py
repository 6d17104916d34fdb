"""Where the scores of live cells come from: what stands in them, or a replay of their text.

A score is the logarithm of the attention that a token is expected to get, but for its age
(:mod:`kvcompose_local.composing.scorer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kvcompose_local.attention import AttentionMax
from kvcompose_local.composing.fitting import Observed, fit
from kvcompose_local.composing.scorer import DTYPE, Scorer
from kvcompose_local.errors import ContextFull
from kvcompose_local.interfaces import Engine, HalfArray, Lazy, Progress, even_parts

#: Attention that any token has; less than any that counts.
_LEAST = 1e-6
#: Tokens before a replayed chunk that are replayed with it, so that its first ones find their place in the text.
_N_LEAD_IN = 4
#: Tokens that a scorer is fitted to at most while somebody waits, and how much it is held back: one text is little.
_MOST_FITTED, RIDGE_OF_ONE = 2048, 1.0
#: What is asked of a text to learn what questions look at.
QUESTIONS = (
    "Summarize the text in a few sentences.",
    "Who and what is named in the text?",
    "Which numbers, dates and codes does the text give, and for what?",
    "List the most important facts, each with its details.",
    "What comes first in the text, and what at its end?",
    "Quote the most important sentences word for word.",
)


#: Stands for what a user says in a chat template.
_MESSAGE = "\x00"


class _Text(Protocol):
    """What makes tokens of questions (:class:`kvcompose_local.llama_ffi.Model`)."""

    def render_chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str: ...

    def tokenize(self, text: str) -> list[int]: ...


def questions_of(model: _Text) -> list[list[int]]:
    """Tokens of :data:`QUESTIONS`, as a chat goes on with them behind a text."""
    rendered = model.render_chat([{"role": "user", "content": _MESSAGE}], add_generation_prompt=True)
    return [model.tokenize(question + rendered.partition(_MESSAGE)[2]) for question in QUESTIONS]


class Scoring(Protocol):
    """How live cells get their scores."""

    @property
    def scorer(self) -> Scorer | None:
        """What tells scores from cells, and how they age; None where a replay does."""
        ...

    @property
    def feeds(self) -> bool:
        """Whether it needs free cells to feed tokens to."""
        ...

    def scores(
        self, tokens: Sequence[int], n: int, n_scratch: int, progress: Progress | None = None
    ) -> list[HalfArray]:
        """Scores of the first ``n`` live cells: L float16 arrays (H, n).

        tokens: all that were seen; n_scratch: free cells that may be used; progress gets (tokens done, in all) and may
        raise KeyboardInterrupt.
        """
        ...


class Scored:
    """By a scorer, from the cells themselves."""

    feeds = False

    def __init__(self, engine: Engine, scorer: Scorer) -> None:
        self._engine = engine
        self.scorer = scorer

    def scores(
        self, tokens: Sequence[int], n: int, n_scratch: int, progress: Progress | None = None
    ) -> list[HalfArray]:
        """See :class:`Scoring`."""
        first = len(tokens) - self._engine.layout().n_live
        if progress is not None:
            progress(0, n)
        rows = self._engine.live_rows(n)
        return [self.scorer.scores(i, *rows[i], first).astype(DTYPE) for i in range(len(rows))]


class Replayed:
    """By the most attention that a replay of the text pays, as KVCompose (arXiv 2509.05165) has it, in chunks as KVzip
    (arXiv 2505.23416) has them.
    """

    feeds = True
    scorer: Scorer | None = None

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def scores(
        self, tokens: Sequence[int], n: int, n_scratch: int, progress: Progress | None = None
    ) -> list[HalfArray]:
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
            self._engine.replay(tokens[max(first + start - lead_in, 0) : first + stop], seen)
        if progress is not None:
            progress(n, n)
        return [
            np.log(np.maximum(seen.of_layer(i)[:, :n], _LEAST)).astype(DTYPE)
            if n
            else np.zeros((layer.n_kv_heads, 0), DTYPE)
            for i, layer in enumerate(layers)
        ]


class Learned:
    """By a scorer that the first live text teaches: some questions that any text answers are put to it.

    questions: tokens of each, as the chat template has them. The scorer then scores that text, too, so that all scores
    are of one scale.
    """

    def __init__(self, engine: Engine, questions: Sequence[Sequence[int]]) -> None:
        self._engine = engine
        self._questions = questions
        self.scorer: Scorer | None = None

    @property
    def feeds(self) -> bool:
        """See :class:`Scoring`."""
        return self.scorer is None

    def scores(
        self, tokens: Sequence[int], n: int, n_scratch: int, progress: Progress | None = None
    ) -> list[HalfArray]:
        """See :class:`Scoring`. Raises ContextFull where there are no free cells."""
        if self.scorer is None:
            self.scorer = self._fitted(tokens, n, n_scratch, progress)
        return Scored(self._engine, self.scorer).scores(tokens, n, n_scratch, progress)

    def _fitted(self, tokens: Sequence[int], n: int, n_scratch: int, progress: Progress | None) -> Scorer:
        engine = self._engine
        layers = engine.shape.layers
        longest = min(engine.layout().n_free, engine.max_replay, n_scratch)
        if longest <= 0:
            raise ContextFull("no free cells are left to score the text in")
        n_fitted = min(n, _MOST_FITTED)
        looked = [np.zeros((layer.n_kv_heads, n_fitted), np.float32) for layer in layers]
        for done, question in enumerate(self._questions):
            if progress is not None:
                progress(done, len(self._questions))
            seen = AttentionMax.over(layers, dtype=np.float32)
            engine.replay(question[-longest:], seen)
            for i, sums in enumerate(looked):
                sums += seen.of_layer(i)[:, :n_fitted] / len(self._questions)

        rows = engine.live_rows(n_fitted)

        def of_cells(which: int) -> Lazy:
            return Lazy(len(layers), lambda i: rows[i][which])

        return fit([Observed(of_cells(0), of_cells(1), looked, len(tokens))], ridge=RIDGE_OF_ONE, places=False)
