"""Observes what questions about a text look at: scorers are fitted to these observations.

Questions come from a task, from the model itself, from sentences to be completed, and from a wish for a summary, so
that what they have in common counts. The model answers each question with all cells, and the attention of the question
and of its answer is observed.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from kvcompose_local.composing.attention import AttentionMax
from kvcompose_local.composing.fitting import POWER, Observed
from kvcompose_local.composing.policy import LEAST_TAIL
from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.evaluation.harness import around_a_message, kl_divergence, log_softmax
from kvcompose_local.evaluation.tasks import Item
from kvcompose_local.interfaces import FloatArray, Lazy

#: For each kind of question: the most of them, and the weight of all of them together.
_N_OWN, _N_SENTENCES = 4, 12
_OWN, _MADE_UP, _SENTENCES, _SUMMARY = 1.0, 0.5, 0.5, 0.5
#: The most questions about a text, and how many of them the model answers: it is told how sentences go on.
N_ASKED, N_ANSWERED = _N_OWN + 1 + _N_SENTENCES + 1, _N_OWN + 2
#: The most tokens of an answer, and the tokens of a usual answer.
LONGEST_ANSWER, TYPICAL_ANSWER = 48, 24
#: Sentences and lines that are completed, in characters; a third is given.
_SENTENCE = range(20, 400)
_ENDS = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n")
_MAKE_UP = "Ask one short question that only this text answers. Write the question alone."
_SUMMARIZE = "Summarize the text in a few sentences."


@dataclass(frozen=True)
class Chatter:
    """The engine that is asked, with an uncompressed F16 cache, and engines of other cache types, by their names."""

    engine: PatchedEngine
    beside: Mapping[str, PatchedEngine] = field(default_factory=dict)

    @cached_property
    def around(self) -> tuple[str, str]:
        """The chat template's text before a message and after it."""
        return around_a_message(self.engine.model)


@dataclass(frozen=True)
class Seen(Observed):
    """The observations of one text.

    tokens: all of the text's, in the chat template; question: tokens of a question about it and of its answer; kl: nats
    a token from F16 along its answers, by cache type.
    """

    tokens: Sequence[int] = ()
    question: tuple[Sequence[int], Sequence[int]] = ((), ())
    kl: Mapping[str, float] = field(default_factory=dict)


def observe(chatter: Chatter, item: Item, file: Path) -> None:
    """Ask about an item's text, and write what is seen to ``file`` for :func:`observed`.

    The newest tokens, which a compaction leaves alone, are left out.
    """
    engine, (head, tail) = chatter.engine, chatter.around
    model, layers = engine.model, engine.shape.layers
    tokens = model.tokenize(head + item.context + "\n\n", add_bos=model.adds_bos)
    engine.clear()
    engine.decode(tokens)
    n = len(tokens) - LEAST_TAIL
    rows, tensors = engine.live_rows(n), {}
    for i in range(len(layers)):
        for name, numbers in zip(("keys", "values"), rows[i], strict=True):
            tensors[f"{name}.{i}"] = np.ascontiguousarray(numbers, np.float16)
    cells = engine.snapshot()
    written = _answer(engine, model.tokenize(_MAKE_UP + tail))
    made_up = b"".join(map(model.token_bytes, written)).decode("utf-8", "replace").strip()
    seen, weights, asked_about = [], [], []
    for weight, questions in (
        (_OWN, [(question.text + tail + question.prefix, "") for question in item.questions[:_N_OWN]]),
        (_MADE_UP, [(made_up + tail, "")]),
        (_SENTENCES, [(f"Complete this sentence from the text: {given}{tail}", all_) for given, all_ in _parts(item)]),
        (_SUMMARY, [(_SUMMARIZE + tail, "")]),
    ):
        for question, answer in questions:
            asked = model.tokenize(question)
            engine.restore(cells)
            answered = model.tokenize(answer)[:LONGEST_ANSWER] if answer else _answer(engine, asked)
            engine.restore(cells)
            seen.append(_attention(engine, [*asked, *answered[:-1]], n))
            weights.append(weight / len(questions))
            asked_about.append((asked, answered))
    for i in range(len(layers)):
        tensors[f"seen.{i}"] = np.stack([by_layer[i] for by_layer in seen]).astype(np.float16)
    facts = {"tokens": tokens, "weights": weights, "question": asked_about[0], "kl": {}}
    if chatter.beside:
        engine.restore(cells)
        facts["kl"] = _kl_of_types(chatter, tokens, asked_about[0], asked_about[-1])
    save_file(tensors, file, {"facts": json.dumps(facts)})


def observed(file: Path) -> Seen:
    """The observations that :func:`observe` wrote; layers are read when they are looked at."""
    with safe_open(file, "numpy") as tensors:
        n_layers, facts = len(tensors.keys()) // 3, json.loads(tensors.metadata()["facts"])

    def of_layer(name: str, i: int) -> npt.NDArray[Any]:
        with safe_open(file, "numpy") as tensors:
            return np.asarray(tensors.get_tensor(f"{name}.{i}"))

    def looked(i: int) -> FloatArray:
        return np.tensordot(np.array(facts["weights"], np.float32), of_layer("seen", i).astype(np.float32) ** POWER, 1)

    keys, values = (Lazy(n_layers, partial(of_layer, name)) for name in ("keys", "values"))
    tokens, question = facts["tokens"], facts["question"]
    return Seen(keys, values, Lazy(n_layers, looked), len(tokens), tokens, question, facts["kl"])


def _kl_of_types(
    chatter: Chatter, tokens: Sequence[int], *asked: tuple[Sequence[int], Sequence[int]]
) -> dict[str, float]:
    """KL divergence of other cache types from F16 along the answers to questions: nats a token, by type.

    The text is read into each cache: its later layers see the errors of the earlier ones, as in a chat.
    """

    def answers(engine: PatchedEngine) -> list[FloatArray]:
        rows = []
        for question in asked:
            if excess := engine.layout().position - len(tokens):
                engine.drop_tail(excess)
            rows.append(log_probs(engine, *question))
        return rows

    wanted = answers(chatter.engine)
    found = {}
    for name, other in chatter.beside.items():
        other.clear()
        other.decode(tokens)
        costs = [kl_divergence(a, b).mean() for a, b in zip(wanted, answers(other), strict=True)]
        found[name] = float(np.mean(costs))
        other.clear()
    return found


def log_probs(engine: PatchedEngine, asked: Sequence[int], answered: Sequence[int]) -> FloatArray:
    """Log-probabilities before each token of an answer to what is asked next: float32 (tokens, n_vocab)."""
    engine.decode(asked[:-1])
    return log_softmax(engine.decode_all([asked[-1], *answered[:-1]]))


def _parts(item: Item) -> list[tuple[str, str]]:
    """Some sentences and lines of a text, each as its beginning and as a whole; always the same ones."""
    found = [part for part in _ENDS.split(item.context) if len(part) in _SENTENCE]
    chosen = random.Random(f"{item.task}/{item.seed}").sample(found, min(_N_SENTENCES, len(found)))
    return [(part[: len(part) // 3], part) for part in chosen]


def _answer(engine: PatchedEngine, asked: Sequence[int]) -> list[int]:
    """The model's greedy answer."""
    engine.decode(asked)
    tokens: list[int] = []
    while len(tokens) < LONGEST_ANSWER:
        tokens.append(int(engine.logits().argmax()))
        if engine.model.is_end(tokens[-1]):
            break
        engine.decode(tokens[-1:])
    return tokens


def _attention(engine: PatchedEngine, tokens: Sequence[int], n: int) -> list[FloatArray]:
    """The most attention that any of the next ``tokens`` pays to the cache's first ``n``: L float32 arrays (H, n)."""
    most = AttentionMax.over(engine.shape.layers, dtype=np.float32)
    with engine.watching(lambda layer, weights: most.update(layer, weights, slice(0, n))):
        engine.decode(tokens)
    return most.result()
