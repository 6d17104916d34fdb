"""Where and when a chat is saved: none is lost, and none is overwritten by another."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, FakeModel

from kvcompose_local import sessions
from kvcompose_local.autosave import Autosave
from kvcompose_local.chat import Chat
from kvcompose_local.compaction import CacheMemory
from kvcompose_local.errors import InvalidInput, SessionError
from kvcompose_local.interrupts import Interrupts
from kvcompose_local.repl import Status

Begin = Callable[..., tuple[Chat, Autosave]]


@pytest.fixture
def told() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def begin(tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> Begin:
    """``begin(session, said)`` starts a chat, resumes its session where there is one, and says something."""
    monkeypatch.setattr(sessions, "sessions_folder", lambda: tmp_path)
    monkeypatch.setattr(sessions, "cache_folder", lambda: tmp_path / "cache")
    model = tmp_path / "fake.gguf"
    model.write_bytes(b"GGUF of nothing")

    def start(session: str | None = None, *said: str, is_on: bool = True) -> tuple[Chat, Autosave]:
        engine = FakeEngine(200, ["ok"] * 9, per_layer=True)
        chat = Chat(FakeModel(), CacheMemory(engine, 400))
        path = sessions.path_of(session) if session else None
        options: dict[str, Any] = {"status": Status(told), "interrupts": Interrupts(), "is_on": is_on}
        autosave = Autosave(
            chat,
            sessions.Setup(model, "f16", 0.5),
            session=session,
            version=sessions.version_of(path) if path else (),
            **options,
        )
        if path is not None and path.exists():
            autosave.resume()
        for message in said:
            list(chat.ask(message, max_tokens=9))
        return chat, autosave

    return start


def n_messages(begin: Begin, session: str) -> int:
    return len(begin(session)[0].messages)


def test_what_was_said_is_saved_and_silence_is_not(begin: Begin, tmp_path: Path, told: io.StringIO) -> None:
    begin("s")[1].at_the_end()
    assert not (tmp_path / "s.kvc").exists()
    begin("s", "Hi", is_on=False)[1].at_the_end()
    assert not (tmp_path / "s.kvc").exists()
    begin("s", "Hi")[1].at_the_end()
    before = sessions.version_of(tmp_path / "s.kvc")
    begin("s")[1].at_the_end()
    assert sessions.version_of(tmp_path / "s.kvc") == before
    begin(None, "Hi")[1].at_the_end()
    assert told.getvalue().count("goes on from here") == 2
    assert sorted(sessions.names()) == ["last", "s"]


def test_a_copy_does_not_make_the_session_ones_own_again(begin: Begin, tmp_path: Path, told: io.StringIO) -> None:
    """Another chat wrote the session meanwhile, and a /save elsewhere changes nothing about that."""
    first, second = begin("s", "One")[1], begin("s", "Two", "Three")[1]
    second.at_the_end()
    first.save("copy")
    first.at_the_end()
    assert "another chat was saved as s meanwhile" in told.getvalue()
    assert [n_messages(begin, name) for name in ("s", "copy", str(tmp_path / "s-2.kvc"))] == [4, 2, 2]


def test_a_load_that_fails_saves_once(begin: Begin, tmp_path: Path, told: io.StringIO) -> None:
    autosave = begin("s", "One")[1]
    with pytest.raises(InvalidInput, match="takes a name: nothing is saved yet"):
        autosave.load("")
    with pytest.raises(SessionError, match="cannot read"):
        autosave.load("typo")
    autosave.at_the_end()
    assert "meanwhile" not in told.getvalue()
    assert sessions.names() == ["s"]


def test_a_chat_beside_its_session_stays_there(begin: Begin, tmp_path: Path) -> None:
    chat, first = begin("s", "One")
    begin("s", "Two", "Three")[1].at_the_end()
    with pytest.raises(SessionError):
        first.load("typo")
    list(chat.ask("More", max_tokens=9))
    first.at_the_end()
    assert sorted(path.name for path in tmp_path.glob("*.kvc")) == ["s-2.kvc", "s.kvc"]
    assert n_messages(begin, str(tmp_path / "s-2.kvc")) == 4


def test_what_was_compressed_alone_is_saved_or_taken_back(begin: Begin, tmp_path: Path) -> None:
    begin("s", "x" * 150)[1].at_the_end()
    size = (tmp_path / "s.kvc").stat().st_size
    chat, autosave = begin("s")
    chat.memory.compact(0.3)
    assert autosave.is_unsaved
    autosave.load("s")  # as it was: nothing that was said would be lost
    assert not autosave.is_unsaved
    chat.memory.compact(0.3)
    autosave.at_the_end()
    assert (tmp_path / "last.kvc").stat().st_size < size == (tmp_path / "s.kvc").stat().st_size


def test_what_was_taken_back_is_not_in_the_way_of_loading(begin: Begin) -> None:
    begin("s", "One")[1].at_the_end()
    chat, autosave = begin("s", "x" * 200)
    assert chat.memory.reports
    with pytest.raises(InvalidInput, match="would be lost: /save it under another name than s first"):
        autosave.load("s")
    chat.undo()
    autosave.load("s")
    assert len(chat.messages) == 2


def test_a_failure_is_the_programs_only_where_it_was_asked_to_save(
    begin: Begin, tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> int:
        raise SessionError("the disk is full")

    monkeypatch.setattr(sessions, "save", fail)
    begin(None, "Hi")[1].at_the_end()
    assert told.getvalue() == "the chat is not saved: the disk is full\n"
    with pytest.raises(SessionError, match="disk is full"):
        begin("s", "Hi")[1].at_the_end()
