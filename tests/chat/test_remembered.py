"""What is left of each part of a conversation."""

from __future__ import annotations

import numpy as np
import pytest
from fake_engine import FakeEngine, FakeModel

from kvcompose_local.chat import Chat
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.chat.remembered import Remembered, remembered
from kvcompose_local.composing.policy import Policy


def make(answers: list[str], n_cells: int, n_ctx: int = 500) -> Chat:
    memory = CacheMemory(FakeEngine(n_cells, answers), n_ctx, policy=Policy(n_tail=4, n_headroom=8, n_scratch=8))
    return Chat(FakeModel(), memory, system="S")


def test_a_conversation_is_told_in_its_parts() -> None:
    chat = make(["yes", "no"], 500)
    chat.read("DOC one\nand more")
    chat.read("DOC two")
    list(chat.ask("Q?", max_tokens=9))
    chat.read("third")
    assert remembered(chat, 8) == [
        Remembered("document", "DOC one", len("[s]S[/][u]DOC one\nand more\n\n"), 1.0),
        Remembered("document", "DOC two", len("DOC two\n\n"), 1.0),
        Remembered("message", "Q?", len("Q?[/][a]"), 1.0),
        Remembered("answer", "yes", len("yes"), 1.0),
        Remembered("document", "third", len("[/][u]third\n\n"), 1.0),
    ]
    list(chat.ask("And?", max_tokens=9))
    assert [part.kind for part in remembered(chat)][-3:] == ["document", "message", "answer"]


def test_shares_are_counted_from_the_cells() -> None:
    chat = make(["ok"], 60)
    chat.read("a" * 30 + "zzzz")
    chat.read("y" * 60)
    memory = chat.memory
    assert memory.reports
    kept = memory.kept()
    layout = memory.engine.layout()
    first_live = layout.position - layout.n_live
    cells = [rows for layer in memory.view().origins for rows in layer]  # a head each
    expected = np.mean([np.isin(np.arange(first_live), rows) for rows in cells], axis=0)
    np.testing.assert_allclose(kept[:first_live], expected, atol=1e-6)
    assert (kept[first_live:] == 1).all()
    parts = remembered(chat)
    assert sum(part.n_tokens for part in parts) == layout.position
    assert sum(part.kept * part.n_tokens for part in parts) == pytest.approx(kept.sum(), rel=1e-5)
    assert any(part.kept < 1 for part in parts)
