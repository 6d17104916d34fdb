"""Turns taken back, repeated and pinned on llama.cpp: the future must be that of a chat in which they never were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kvcompose_local.chat import Chat
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.engines import open_engine
from kvcompose_local.engines.base import LlamaEngine
from kvcompose_local.interfaces import ByteArray, FloatArray, Sampling
from kvcompose_local.llama_ffi.cells import library_is_patched

pytestmark = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")

TinyModel = Callable[..., Path]
LONG = "The long way round. " * 12
#: How far the logits of a tiny F32 model move with the shape of its batches: its cache is F16.
CLOSE = 0.02


@contextmanager
def chat_of(path: Path, *, budget: float = 0.21, cache_type: str | None = None) -> Iterator[tuple[Chat, LlamaEngine]]:
    engine, n_ctx = open_engine(
        path, n_ctx=2048, budget=budget, n_threads=1, cache_type=cache_type, sampling=Sampling(temperature=0)
    )
    with engine:
        yield Chat(engine.model, CacheMemory(engine, n_ctx, compose=budget < 1)), engine


def logits_after(chat: Chat, engine: LlamaEngine, *messages: str, answer: int = 1) -> FloatArray:
    """float32 (n_vocab,): logits after asking these."""
    for message in messages:
        list(chat.ask(message, max_tokens=answer))
    return engine.logits().copy()


@pytest.mark.parametrize(("arch", "budget"), [("llama", 0.21), ("llama", 1), ("gemma3", 0.21), ("gemma3", 1)])
def test_what_was_taken_back_leaves_no_trace(tiny_model: TinyModel, arch: str, budget: float) -> None:
    rebuilt: list[int] = []
    with chat_of(tiny_model(arch, n_layers=6), budget=budget) as (chat, engine):
        fresh = logits_after(chat, engine, "Hello", "Bye")
    with chat_of(tiny_model(arch, n_layers=6), budget=budget) as (chat, engine):
        other = logits_after(chat, engine, "Hello", "Bya")
        assert np.abs(other - fresh).max() > 10 * CLOSE, "a trace would show"
        chat.on_rebuild = rebuilt.append
        chat.undo()
        assert rebuilt == []
        logits_after(chat, engine, LONG, LONG)
        chat.undo()
        chat.undo()
        assert rebuilt == [], "a sliding window of 64 has moved on by then, and was kept"
        assert np.abs(logits_after(chat, engine, "Bye") - fresh).max() < CLOSE
        list(chat.ask_again(max_tokens=1))
        assert np.abs(engine.logits() - fresh).max() < CLOSE
        list(chat.ask("Bye", max_tokens=1, instead=True))
        assert np.abs(engine.logits() - fresh).max() < CLOSE
        if budget < 1:
            chat.memory.compact(0.2)
            rebuilt.clear()
            chat.undo()
            assert rebuilt, "what is left is less than a tail: all of it is read again"
            assert np.abs(logits_after(chat, engine, "Bye") - fresh).max() < CLOSE


def test_pinned_text_keeps_its_bytes_in_all_layers(tiny_model: TinyModel) -> None:
    """Each head of each layer still holds the keys of every pinned token after several compactions.

    But for rounding: they were read again meanwhile, in other micro-batches.
    """

    def heads(rows: ByteArray) -> FloatArray:
        return np.ascontiguousarray(rows).view(np.float16).astype(np.float32).reshape(len(rows), 2, -1)

    with chat_of(tiny_model("llama", n_layers=4), budget=0.25, cache_type="f16") as (chat, engine):
        list(chat.ask(LONG[:20], max_tokens=1))
        stop = chat.memory.position
        keys = [heads(rows[:stop]) for rows in engine.snapshot().keys]
        kept = [[0.0]]
        for pinned in (False, True):
            if pinned:
                chat.pin()
            for _ in range(3):
                list(chat.ask(LONG, max_tokens=1))
            assert chat.memory.reports
            after = [heads(rows) for rows in engine.snapshot().keys]
            kept = [
                [
                    np.mean(
                        [np.abs(now[:, head] - row).max(axis=1).min() < 0.02 for row in old[: stop - 1, head]]
                    ).item()
                    for head in range(2)
                ]
                for old, now in zip(keys, after, strict=True)
            ]
            if not pinned:
                assert min(map(min, kept)) < 1, "without a pin some token is dropped from some head"
                for _ in range(3):
                    chat.undo()
        assert kept == [[1.0, 1.0]] * 4
