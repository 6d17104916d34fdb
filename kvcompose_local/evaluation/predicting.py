"""Fits a model's predictor (:mod:`predictor`) to what questions about some texts look at.

The questions are a task's own, some sentences to be completed, and a summary, so that what they have in common counts:
each is answered by the model with all of its cells, and seen is what the question and its answer look at.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcompose_local.attention import AttentionMax
from kvcompose_local.compaction import LEAST_TAIL
from kvcompose_local.engines.base import LlamaEngine
from kvcompose_local.evaluation.statistics import Statistics
from kvcompose_local.evaluation.tasks import Item
from kvcompose_local.interfaces import FloatArray, Progress
from kvcompose_local.popularity import popularity_of
from kvcompose_local.predictor import features_of, n_features

#: Of each kind of question, how many at most, and what all of them together count.
_N_OWN, _N_SENTENCES = 4, 3
_OWN, _SENTENCES, _SUMMARY = 1.0, 0.5, 0.5
_LONGEST_ANSWER = 48
#: Sentences that are completed, in characters, and how much of their words is given.
_SENTENCE = range(60, 400)
_GIVEN = 1 / 3
#: Attention that any token has for a prediction; less than any that counts.
_LEAST = 1e-5
#: Of the ridge, per unit of the features' variance, and Newton's steps.
_RIDGE, _STEPS, _SMALL_STEP = 0.01, 8, 0.01
#: No logarithm is predicted beyond these.
_BOUNDS = -30.0, 5.0


@dataclass(frozen=True)
class Observed:
    """Of one text of T tokens, of a model of H KV heads in all: what was known, and what questions looked at.

    features: float32 (T, :func:`~kvcompose_local.predictor.n_features`); scores, looked: float32 (H, T).
    """

    features: FloatArray
    scores: FloatArray
    looked: FloatArray


def observe(stats: Statistics, item: Item, tail: str) -> Observed:
    """Ask about the text that ``stats`` has read from ``item``; tail: the chat template's, after a question.

    The newest tokens, which a compaction leaves alone, are left out. The engine's cache is as before afterwards.
    """
    engine, model = stats.engine, stats.engine.model
    replayed, seen, both = stats.replay, stats.seen, stats.both
    cells = engine.snapshot()
    looked = np.zeros((sum(len(layer) for layer in both), stats.n_tokens), np.float32)
    sentences = [(f"Complete this sentence from the text: {given}{tail}", whole) for given, whole in _sentences(item)]
    for weight, questions in (
        (_OWN, [(question.text + tail + question.prefix, "") for question in item.questions[:_N_OWN]]),
        (_SENTENCES, sentences),
        (_SUMMARY, [("Summarize the text in a few sentences." + tail, "")]),
    ):
        for question, answer in questions:
            asked = model.tokenize(question)
            engine.restore(cells)
            answered = model.tokenize(answer)[:_LONGEST_ANSWER] if answer else _answer(engine, asked)
            engine.restore(cells)
            looked += weight / len(questions) * _attention(engine, [*asked, *answered[:-1]], stats.n_tokens)
    engine.restore(cells)
    rows = np.concatenate([*features_of(replayed, seen, popularity_of(both))])
    old = slice(None, -LEAST_TAIL)
    return Observed(rows[old], np.concatenate(both)[:, old], looked[:, old])


def _sentences(item: Item) -> list[tuple[str, str]]:
    """Some of a text's, each its beginning and the whole, the same whenever they are asked for."""
    found = [s for s in re.split(r"(?<=[.!?])\s+", item.context) if len(s) in _SENTENCE and "\n" not in s]
    chosen = random.Random(f"{item.task}/{item.seed}").sample(found, min(_N_SENTENCES, len(found)))
    parts = []
    for sentence in chosen:
        words = sentence.split(" ")
        given = " ".join(words[: max(int(len(words) * _GIVEN), 1)])
        parts.append((given, sentence))
    return parts


def _answer(engine: LlamaEngine, asked: Sequence[int]) -> list[int]:
    """What the model says, greedily."""
    engine.decode(asked)
    tokens: list[int] = []
    while len(tokens) < _LONGEST_ANSWER:
        tokens.append(int(engine.logits().argmax()))
        if engine.model.is_end(tokens[-1]):
            break
        engine.decode(tokens[-1:])
    return tokens


def _attention(engine: LlamaEngine, tokens: Sequence[int], n: int) -> FloatArray:
    """The most that any of the tokens, which come next, looks at the ``n`` of the cache: float32 (H, n)."""
    most = AttentionMax.over(engine.shape.layers, dtype=np.float32)
    with engine.watching(lambda layer, weights: most.update(layer, weights, slice(0, n))):
        engine.decode(tokens)
    return np.concatenate(most.result())


def fit(texts: Sequence[Observed], progress: Progress = lambda _done, _total: None) -> list[list[float]]:
    """Weights of a :class:`~kvcompose_local.predictor.Predictor`, by Poisson regression with a ridge.

    progress gets (heads done, in all).

    A token's score times its factor is to be what questions look at, but for one number that all heads share: the
    median of all factors in these texts is 1. A head that no question looks at has factors of 1.
    """
    features = np.concatenate([text.features for text in texts])
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
    mean[-1], deviation[-1] = 0, 1  # the feature that is 1
    standard = ((features - mean) / deviation).astype(np.float32)
    n_heads = len(texts[0].scores)
    weights = np.zeros((n_heads, n_features(n_heads)))
    for head in range(n_heads):
        progress(head, n_heads)
        scores = np.concatenate([text.scores[head] for text in texts])
        looked = np.concatenate([text.looked[head] for text in texts])
        found = _poisson(standard, np.log(scores + _LEAST), looked)
        weights[head] = found / deviation
        weights[head, -1] -= (found[:-1] * mean[:-1] / deviation[:-1]).sum()
    progress(n_heads, n_heads)
    logarithms = features @ weights.T.astype(np.float32)
    weights[:, -1] -= np.median(logarithms)
    return [[round(float(weight), 4) for weight in row] for row in weights]


def _poisson(features: FloatArray, offset: FloatArray, counts: FloatArray) -> npt.NDArray[np.float64]:
    """b for which exp(offset + features · b) is most likely the mean of ``counts``: float64 (F,), by Newton's method.

    The last feature is 1, and is not held back by the ridge.
    """
    n = features.shape[1]
    b = np.zeros(n)
    total = float(counts.sum(dtype=np.float64))
    if total <= 0:
        return b
    b[-1] = np.log(total / np.exp(offset).sum(dtype=np.float64))
    ridge = _RIDGE * np.eye(n)
    ridge[-1, -1] = 1e-6
    for _ in range(_STEPS):
        means = np.exp(np.clip(offset + features @ b.astype(np.float32), *_BOUNDS))
        slope = (features.T @ (counts - means)).astype(np.float64) / total - ridge @ b
        curvature = (features * means[:, None]).T @ features / total + ridge
        step = np.linalg.solve(curvature, slope)
        largest = float(np.abs(step).max())
        b += step * min(1.0, 1.0 / largest)
        if largest < _SMALL_STEP:
            break
    return b
