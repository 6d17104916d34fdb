"""Chats to be saved and loaded, and whether two of them are the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fake_engine import FakeEngine, FakeModel

from kvcompose_local.api import memory_of
from kvcompose_local.chat import Chat, ChatState
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.engines import open_engine
from kvcompose_local.engines.base import LlamaEngine
from kvcompose_local.interfaces import CacheSnapshot, FloatArray, Sampling


def fake_chat(answers: list[str] | None = None, *, n_cells: int = 200, n_ctx: int = 400, **options: Any) -> Chat:
    engine = FakeEngine(n_cells, answers or [], per_layer=True)
    return Chat(FakeModel(), CacheMemory(engine, n_ctx, compose=n_cells < n_ctx), **options)


def talked() -> Chat:
    """A fake chat with composed and live cells and a draft."""
    chat = fake_chat(["hello", "again"], system="Be kind.")
    list(chat.ask("x" * 200, max_tokens=9))
    chat.read("a document", pin=True)
    assert chat.memory.reports
    assert chat.memory.pins
    assert chat.state().steps
    return chat


def fake_engine(chat: Chat) -> FakeEngine:
    engine = chat.memory.engine
    assert isinstance(engine, FakeEngine)
    return engine


@contextmanager
def real_chat(
    path: Path, *, n_ctx: int = 1024, budget: float = 0.25, cache: str | None = "f16", **options: Any
) -> Iterator[Chat]:
    greedy = Sampling(temperature=0)
    engine, positions = open_engine(
        path, n_ctx=n_ctx, budget=budget, n_threads=1, cache_type=cache, sampling=greedy, **options
    )
    with engine:
        yield Chat(engine.model, memory_of(engine, positions, compose=budget < 1))


def next_tokens(chat: Chat, n: int, *, walk: int = 0) -> tuple[list[int], list[FloatArray]]:
    """The greedy tokens after a fixed text, end tokens included, so that there are always ``n``; and all their logits.

    A random model may say one word over and over; ``walk`` puts others in their places.
    """
    memory = chat.memory
    engine = memory.engine
    assert isinstance(engine, LlamaEngine)
    memory.feed(list(range(10, 30)))
    tokens: list[int] = []
    logits: list[FloatArray] = []
    for i in range(n):
        tokens.append(engine.sample())
        logits.append(engine.logits().copy())
        memory.feed([(tokens[-1] + i * walk) % engine.shape.n_vocab])
    return tokens, logits


def same_cells(a: CacheSnapshot, b: CacheSnapshot) -> bool:
    planes = zip([*a.keys, *a.values, a.state], [*b.keys, *b.values, b.state], strict=True)
    return replace(a, keys=(), values=(), state=b.state) == replace(b, keys=(), values=()) and all(
        np.array_equal(x, y) for x, y in planes
    )


def same_state(a: ChatState, b: ChatState) -> bool:
    one, two = a.memory, b.memory
    arrays = zip([*one.scores, *one.origins], [*two.scores, *two.origins], strict=True)
    scorers = [state.scorer and state.scorer.digest for state in (one, two) if any(state.cells.composed)]
    return (
        replace(a, memory=two, began=b.began) == b  # when a chat began is no part of what was said
        and (one.tokens, one.pins) == (two.tokens, two.pins)
        and len({*scorers}) <= 1
        and all(np.array_equal(x, y) for x, y in arrays)
        and same_cells(one.cells, two.cells)
    )
