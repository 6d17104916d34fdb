"""What questions about a text look at in it: what a scorer is fitted to.

The questions are a task's own, one that the model makes up itself, sentences to be completed, and a summary, so that
what they have in common counts: each is answered by the model with all of its cells, and seen is what the question and
its answer look at.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from kvcompose_local.composing.attention import AttentionMax
from kvcompose_local.composing.fitting import Observed
from kvcompose_local.composing.policy import LEAST_TAIL
from kvcompose_local.engines.base import LlamaEngine
from kvcompose_local.evaluation.tasks import Item
from kvcompose_local.interfaces import FloatArray, Lazy

#: Of each kind of question, how many at most, and what all of them together count.
_N_OWN, _N_SENTENCES = 4, 3
_OWN, _MADE_UP, _SENTENCES, _SUMMARY = 1.0, 0.5, 0.5, 0.5
_LONGEST_ANSWER = 48
#: Sentences that are completed, in characters, and how much of their words is given.
_SENTENCE = range(60, 400)
_GIVEN = 1 / 3
_MAKE_UP = "Ask one short question that only this text answers. Write the question alone."


def observe(engine: LlamaEngine, item: Item, head: str, tail: str, file: Path) -> None:
    """Ask about an item's text, and write what is seen to ``file`` for :func:`observed`.

    engine: with an empty, uncompressed F16 cache; head, tail: the chat template's, before a text and after a question.
    The newest tokens, which a compaction leaves alone, are left out.
    """
    model, layers = engine.model, engine.shape.layers
    tokens = model.tokenize(head + item.context + "\n\n", add_bos=model.adds_bos)
    engine.decode(tokens)
    n = len(tokens) - LEAST_TAIL
    tensors: dict[str, npt.NDArray[Any]] = {}
    rows = engine.live_rows(n)
    for i in range(len(layers)):
        keys, values = rows[i]
        tensors |= {
            f"{name}.{i}": np.ascontiguousarray(x, np.float16)
            for name, x in zip(("keys", "values"), (keys, values), strict=True)
        }
    cells = engine.snapshot()
    looked = [np.zeros((layer.n_kv_heads, len(tokens)), np.float32) for layer in layers]
    written = _answer(engine, model.tokenize(_MAKE_UP + tail))
    made_up = b"".join(map(model.token_bytes, written)).decode("utf-8", "replace").strip()
    sentences = [(f"Complete this sentence from the text: {given}{tail}", whole) for given, whole in _sentences(item)]
    for weight, questions in (
        (_OWN, [(question.text + tail + question.prefix, "") for question in item.questions[:_N_OWN]]),
        (_MADE_UP, [(made_up + tail, "")]),
        (_SENTENCES, sentences),
        (_SUMMARY, [("Summarize the text in a few sentences." + tail, "")]),
    ):
        for question, answer in questions:
            asked = model.tokenize(question)
            engine.restore(cells)
            answered = model.tokenize(answer)[:_LONGEST_ANSWER] if answer else _answer(engine, asked)
            engine.restore(cells)
            for sums, most in zip(looked, _attention(engine, [*asked, *answered[:-1]], len(tokens)), strict=True):
                sums += weight / len(questions) * most
    tensors |= {f"looked.{i}": np.ascontiguousarray(sums[:, :n]) for i, sums in enumerate(looked)}
    save_file(tensors, file, {"n_tokens": str(len(tokens))})


def observed(file: Path) -> Observed:
    """What :func:`observe` wrote, each layer read when it is looked at."""
    with safe_open(file, "numpy") as tensors:
        n_layers, n_tokens = len(tensors.keys()) // 3, int(tensors.metadata()["n_tokens"])

    def kind(name: str) -> Lazy:
        def layer(i: int) -> FloatArray:
            with safe_open(file, "numpy") as tensors:
                return np.asarray(tensors.get_tensor(f"{name}.{i}"))

        return Lazy(n_layers, layer)

    return Observed(kind("keys"), kind("values"), kind("looked"), n_tokens)


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


def _attention(engine: LlamaEngine, tokens: Sequence[int], n: int) -> list[FloatArray]:
    """The most that any of the tokens, which come next, looks at the ``n`` of the cache: L arrays float32 (H, n)."""
    most = AttentionMax.over(engine.shape.layers, dtype=np.float32)
    with engine.watching(lambda layer, weights: most.update(layer, weights, slice(0, n))):
        engine.decode(tokens)
    return most.result()
