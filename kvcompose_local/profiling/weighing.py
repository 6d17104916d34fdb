"""Weighs a model's layers: the attention that one layer loses costs answers more than that of another does.

All layers compete for cells by the attention that a scorer expects. Here one layer at a time keeps what it would keep
of a text, beside all cells of the other layers. The KL divergence along an answer that this costs, in proportion to
the attention that the layer loses, is what its attention is worth. This is the project's own method.
Axes: layer L, text X.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvcompose_local.composing.choice import competing, logarithms_of
from kvcompose_local.composing.policy import LEAST_TAIL
from kvcompose_local.composing.scorer import Scorer
from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.evaluation.harness import kl_divergence
from kvcompose_local.evaluation.methods.kvcompose import chosen
from kvcompose_local.interfaces import FloatArray, Selection
from kvcompose_local.profiling.observing import log_probs, observed

#: The share of the cells that all layers keep together.
_KEEP = 0.1
#: The share of a weight's logarithm that counts: the rest would be noise of some twenty answers.
_TRUSTED = 0.5
#: Less than so many nats a token, or so much attention, counts as that much.
_LEAST = 1e-5


@dataclass(frozen=True)
class Losses:
    """What the choice of cells loses of one text. kl: float64 (L,), nats a token that each layer's choice alone costs;
    attention: float64 (L,), what is expected of the cells that each layer drops.
    """

    kl: npt.NDArray[np.float64]
    attention: npt.NDArray[np.float64]

    def dump(self) -> str:
        """As a file's text."""
        return json.dumps({"kl": self.kl.tolist(), "attention": self.attention.tolist()})

    @classmethod
    def read(cls, text: str) -> Losses:
        """What :meth:`dump` gave."""
        return cls(**{name: np.array(numbers) for name, numbers in json.loads(text).items()})


def losses(engine: PatchedEngine, file: Path, scorer: Scorer) -> Losses:
    """Of the text whose observations stand in ``file``; engine: uncompressed F16, with room for it and a question."""
    seen, shape = observed(file), engine.shape
    n = seen.n_tokens - LEAST_TAIL
    nothing = np.zeros(seen.n_tokens, np.bool_)
    scores = [scorer.scores(i, seen.keys[i], seen.values[i], 0) for i in range(len(shape.layers))]
    levels = [competing(scorer, i, of, np.arange(n), seen.n_tokens, nothing) for i, of in enumerate(scores)]
    kept = chosen(shape, levels, int(_KEEP * n) * len(shape.layers))
    all_rows: list[Selection] = [np.tile(np.arange(n), (len(rows), 1)) for rows in kept]
    engine.clear()
    engine.decode(seen.tokens)
    cells = engine.snapshot()

    def answered(selection: Sequence[Selection]) -> FloatArray:
        engine.restore(cells)
        engine.rewrite(selection, LEAST_TAIL)
        return log_probs(engine, *seen.question)

    whole = answered(all_rows)
    kl, attention = [], []
    for i, rows in enumerate(kept):
        kl.append(float(kl_divergence(whole, answered([*all_rows[:i], rows, *all_rows[i + 1 :]])).mean()))
        expected = np.exp(logarithms_of(levels[i]).astype(np.float64))
        attention.append(expected.sum() - np.take_along_axis(expected, rows.astype(np.int64), axis=1).sum())
    engine.clear()
    return Losses(np.array(kl), np.array(attention))


def layer_weights(texts: Sequence[Losses]) -> npt.NDArray[np.float64]:
    """Logarithms of what attention is worth in each layer, 0 on average: float64 (L,). All texts count alike."""
    kl = np.stack([np.maximum(text.kl, _LEAST) for text in texts])
    attention = np.stack([np.maximum(text.attention, _LEAST) for text in texts])
    worth = np.log(_shares(kl).mean(axis=0) / _shares(attention).mean(axis=0))
    return np.asarray(_TRUSTED * (worth - worth.mean()))


def _shares(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Each layer's share of a text's sum: float64 (X, L)."""
    return np.asarray(numbers / numbers.sum(axis=1, keepdims=True))
