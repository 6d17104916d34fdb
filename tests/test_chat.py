"""Turns, templates and interrupts, on the fake engine: what the cache was fed, to the byte."""

from __future__ import annotations

import pytest
from fake_engine import FakeEngine, FakeModel

from kvcompose_local.chat import Chat
from kvcompose_local.compaction import CacheMemory
from kvcompose_local.errors import ContextFull, InvalidInput


def make(answers: list[str], *, n_cells: int = 500, n_ctx: int = 500, **options: object) -> tuple[Chat, FakeEngine]:
    model = FakeModel(**{k: bool(options.pop(k)) for k in ("template", "trims") if k in options})
    engine = FakeEngine(n_cells, answers)
    return Chat(model, CacheMemory(engine, n_ctx, compose=n_cells < n_ctx), **options), engine  # type: ignore[arg-type]


def test_turns_are_fed_once_and_joined_by_the_template() -> None:
    chat, engine = make(["one", "two"], system="S")
    assert "".join(chat.ask("Hi", max_tokens=9)) == "one"
    assert "".join(chat.ask("More", max_tokens=9)) == "two"
    assert engine.fed == b"[s]S[/][u]Hi[/][a]one[/][u]More[/][a]two"
    assert chat.turns[1].prompt_tokens == len("[/][u]More[/][a]")
    assert chat.turns[1].stopped == "end"


def test_a_template_that_rewrites_history_is_followed_from_where_the_answer_ends() -> None:
    chat, engine = make([" one \n", "two"], trims=True)
    list(chat.ask("Hi", max_tokens=9))
    list(chat.ask("More", max_tokens=9))
    assert engine.fed == b"[u]Hi[/][a] one \n[/][u]More[/][a]two"


def test_a_character_split_over_tokens_comes_out_whole() -> None:
    chat, _ = make(["né🦦!"])
    assert list(chat.ask("Hi", max_tokens=99)) == ["n", "é", "🦦", "!"]


def test_a_document_is_read_ahead_of_the_question() -> None:
    chat, engine = make(["yes"])
    chat.read("DOC one\n")
    chat.read("DOC two")
    assert engine.fed == b"[u]DOC one\n\nDOC two\n\n"
    list(chat.ask("Q?", max_tokens=9))
    assert engine.fed == b"[u]DOC one\n\nDOC two\n\nQ?[/][a]yes"
    assert chat.messages[0]["content"] == "DOC one\n\nDOC two\n\nQ?"


def test_an_answer_cut_short_is_closed_by_the_next_turn() -> None:
    chat, engine = make(["abcdef", "x"])
    assert "".join(chat.ask("Hi", max_tokens=3)) == "abc"
    assert chat.turns[-1].stopped == "length"
    engine._answer = []
    list(chat.ask("Go", max_tokens=9))
    assert engine.fed == b"[u]Hi[/][a]abc[/][u]Go[/][a]x"


def test_a_consumer_that_leaves_loses_nothing() -> None:
    chat, engine = make(["abcdef", "x"])
    answer = chat.ask("Hi", max_tokens=9)
    assert [next(answer), next(answer)] == ["a", "b"]
    answer.close()  # type: ignore[attr-defined]
    assert chat.turns[-1].stopped == "interrupt"
    engine._answer = []
    list(chat.ask("Go", max_tokens=9))
    assert engine.fed == b"[u]Hi[/][a]ab[/][u]Go[/][a]x"


def test_stopping_while_a_prompt_is_read_keeps_the_rest_for_later() -> None:
    stop = [False]
    chat, engine = make(["x"], should_stop=lambda: stop[0], on_read=lambda n, of: stop.__setitem__(0, n >= 4))
    assert list(chat.ask("Hello", max_tokens=9)) == []
    assert engine.fed == b"[u]H"
    assert chat.unread_tokens == len("ello[/][a]")
    assert chat.turns[-1].stopped == "interrupt"
    chat.on_read = None
    stop[0] = False
    assert list(chat.ask("Go", max_tokens=9)) == ["x"]
    assert engine.fed == b"[u]Hello[/][a][/][u]Go[/][a]x"


def test_a_message_that_does_not_fit_is_taken_back() -> None:
    chat, engine = make(["ok"], n_cells=40, n_ctx=40)
    with pytest.raises(ContextFull, match="--ctx"):
        list(chat.ask("x" * 50, max_tokens=9))
    with pytest.raises(ContextFull):
        chat.read("y" * 50)
    assert engine.fed == b""
    assert "".join(chat.ask("Hi", max_tokens=9)) == "ok"
    assert engine.fed == b"[u]Hi[/][a]ok"


def test_positions_that_run_out_end_the_answer() -> None:
    chat, _ = make(["z" * 100], n_cells=40, n_ctx=40)
    assert len("".join(chat.ask("Hi", max_tokens=99))) == 40 - len("[u]Hi[/][a]") + 1
    assert chat.turns[-1].stopped == "context"


def test_another_system_prompt_reads_the_conversation_again() -> None:
    chat, engine = make(["one", "two"])
    list(chat.ask("Hi", max_tokens=9))
    engine.fed = b""
    chat.set_system("S")
    assert engine.fed == b"s]S[/][u]Hi[/][a]one", "but for the bracket that both begin with"
    list(chat.ask("More", max_tokens=9))
    assert engine.fed == b"s]S[/][u]Hi[/][a]one[/][u]More[/][a]two"
    chat.clear()
    assert engine.position == 0
    assert chat.messages == [{"role": "system", "content": "S"}]


def test_a_model_without_a_template_stops_at_the_next_speaker() -> None:
    chat, engine = make([" Blue.\nUser: and", " Red\nUs"], template=False)
    assert "".join(chat.ask("Colour?", max_tokens=99)) == " Blue."
    engine._answer = []
    assert "".join(chat.ask("Other?", max_tokens=99)) == " Red\nUs"


def test_empty_messages_are_refused() -> None:
    chat, _ = make([])
    with pytest.raises(InvalidInput):
        list(chat.ask("  ", max_tokens=1))
    with pytest.raises(InvalidInput):
        chat.read("\n")


def test_compactions_are_counted_with_their_turn() -> None:
    chat, engine = make(["a" * 30], n_cells=120, n_ctx=1000)
    list(chat.ask("h" * 100, max_tokens=30))
    assert chat.turns[0].compactions == len(chat.memory.reports) > 0
    assert engine.position == chat.memory.position
