"""What the cells of a model's layers are worth: weights that bring a small cache's answers nearer to the full one's.

Attention says how strongly a token is looked at, not what the model makes of it. In Qwen2.5-Coder-0.5B layer 10 gets a
hundredth of the cells by attention and needs a tenth (docs/trials.md). So each layer's weight is doubled and halved,
and what lowers the KL divergence of some answers stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcompose_local.compaction import Policy
from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.evaluation.harness import log_softmax
from kvcompose_local.evaluation.methods.kvcompose import tempered_budgets, with_newest
from kvcompose_local.evaluation.statistics import Statistics
from kvcompose_local.evaluation.tasks import make_item
from kvcompose_local.interfaces import CacheSnapshot, FloatArray, IntArray
from kvcompose_local.selection import select_composites

#: Kinds of text that differ: numbers and UUIDs in prose, facts in a conversation, UUIDs in a list, assignments. Most of
#: those of one question stand twice.
TASKS = (
    "needles_8",
    "recall",
    "vt",
    *("niah_single_3", "niah_multikey_3", "niah_multivalue", "niah_multikey_1", "niah_multiquery") * 2,
)
#: Seeds of the evaluation start at 0, those of profiles at 1,000,000: these texts are nobody else's.
FIRST_SEED = 2_000_000
#: The ratios at which layers compete most and still answer.
KEEPS = (0.25, 0.1)
#: Factors of one step, and the furthest that a weight may go from 1.
_STEP, _FURTHEST = 2.0, 16.0
#: Of the logarithm of the divergence: less than this is not worth a step.
_LEAST_GAIN = 0.02
_MAX_ANSWER = 48


@dataclass(frozen=True)
class _Asked:
    """A question's tokens, the full cache's answer, and float16 (n, n_vocab) log-probabilities before each of it."""

    question: list[int]
    answer: list[int]
    log_probs: npt.NDArray[np.float16]


@dataclass(frozen=True)
class _Text:
    cells: CacheSnapshot
    scores: list[FloatArray]
    asked: list[_Asked]


def tune_weights(
    engine: PatchedEngine,
    *,
    n_tokens: int = 2048,
    progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
) -> tuple[float, ...]:
    """A weight for each layer, 1 where nothing is better.

    engine: uncompressed and empty, with room for a text of ``n_tokens``, its replay and a question; progress gets
    (what, done, in all).
    """
    texts = []
    for number, task in enumerate(TASKS):
        progress("reading", number, len(TASKS))
        texts.append(_read(engine, task, FIRST_SEED + number, n_tokens))
    n_layers = len(engine.shape.layers)
    weights = np.ones(n_layers)
    best = _divergences(engine, texts, weights)
    for layer in range(n_layers):
        progress("tuning", layer, n_layers)
        for factor in (_STEP, 1 / _STEP):
            started_at = weights[layer]
            while True:
                tried = _stepped(texts, weights, layer, factor)
                if tried is None:
                    break
                found = _divergences(engine, texts, tried)
                gains = best - found
                if gains.mean() < max(_LEAST_GAIN, gains.std(ddof=1) / np.sqrt(gains.size)):
                    break
                weights, best = tried, found
            if weights[layer] != started_at:
                break
    progress("tuning", n_layers, n_layers)
    return tuple(weights.tolist())


def _read(engine: PatchedEngine, task: str, seed: int, n_tokens: int) -> _Text:
    model = engine.model
    gap = "\x00"
    head, _, tail = model.render_chat([{"role": "user", "content": gap}], add_generation_prompt=True).partition(gap)
    item = make_item(task, seed, n_tokens, lambda text: len(model.tokenize(text)))
    tokens = model.tokenize(head + item.context + "\n\n", add_bos=model.adds_bos)
    policy = Policy.for_cells(len(tokens))
    engine.clear()
    stats = Statistics(engine, tokens, n_scratch=policy.n_scratch, n_lead_in=policy.n_lead_in)
    cells, scores = engine.snapshot(), with_newest(stats.both)
    asked = []
    for question in item.questions:
        engine.restore(cells)
        words = list(model.tokenize(question.text + tail + question.prefix))
        engine.decode(words)
        answer: list[int] = []
        rows = []
        while len(answer) < min(question.max_tokens, _MAX_ANSWER):
            rows.append(log_softmax(engine.logits()))
            answer.append(int(rows[-1].argmax()))
            if model.is_end(answer[-1]):
                break
            engine.decode(answer[-1:])
        asked.append(_Asked(words, answer, np.stack(rows).astype(np.float16)))
    return _Text(cells, scores, asked)


def _budgets(text: _Text, weights: npt.NDArray[np.float64], keep: float) -> IntArray:
    n_cells = int(keep * text.cells.n_live * len(text.scores))
    return tempered_budgets(text.scores, n_cells, weights.tolist())


def _stepped(
    texts: Sequence[_Text], weights: npt.NDArray[np.float64], layer: int, factor: float
) -> npt.NDArray[np.float64] | None:
    """The weights with a layer's moved by steps until it gets other budgets, None where that is too far."""
    tried: npt.NDArray[np.float64] = weights.copy()
    before = [_budgets(text, weights, keep)[layer] for text in texts for keep in KEEPS]
    while 1 / _FURTHEST <= tried[layer] * factor <= _FURTHEST:
        tried[layer] *= factor
        after = [_budgets(text, tried, keep)[layer] for text in texts for keep in KEEPS]
        if np.abs(np.subtract(after, before)).mean() >= np.mean(before) * 0.02:
            return tried
    return None


def _divergences(
    engine: PatchedEngine, texts: Sequence[_Text], weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The logarithm of the KL divergence of answers, the mean of each text and ratio: float64 (texts * ratios,)."""
    found = []
    for text in texts:
        for keep in KEEPS:
            selection = select_composites(text.scores, _budgets(text, weights, keep))
            divergences = [_divergence(engine, text.cells, selection, asked) for asked in text.asked]
            found.append(np.log(np.array(divergences) + 1e-4).mean())
    return np.array(found)


def _divergence(engine: PatchedEngine, cells: CacheSnapshot, selection: list[IntArray], asked: _Asked) -> float:
    """KL divergence in nats a token along the full cache's answer."""
    engine.restore(cells)
    engine.rewrite(selection, 0)
    if len(asked.question) > 1:
        engine.decode(asked.question[:-1], logits=False)
    rows = log_softmax(engine.decode_all([asked.question[-1], *asked.answer[:-1]]))
    reference = asked.log_probs.astype(np.float32)
    return float((np.exp(reference) * (reference - rows)).sum(axis=1).mean())
