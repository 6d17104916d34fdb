"""Where and when a chat is saved: none is lost, and none is overwritten by another."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, FakeModel

from kvcompose_local.chat import Chat, drafts, sessions
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.errors import InvalidInput, SessionError
from kvcompose_local.install import model_files
from kvcompose_local.interrupts import Interrupts
from kvcompose_local.terminal.autosave import Autosave
from kvcompose_local.terminal.status import Status

Begin = Callable[..., tuple[Chat, Autosave]]


@pytest.fixture
def told() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def begin(tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> Begin:
    """``begin(session, said)`` starts a chat, resumes its session where there is one, and says something."""
    monkeypatch.setattr(sessions, "sessions_folder", lambda: tmp_path)
    monkeypatch.setattr(model_files, "cache_folder", lambda: tmp_path / "cache")
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


def saving_but_in(full: Path) -> Callable[..., int]:
    """``sessions.save``, and a folder whose disk is full."""
    save = sessions.save

    def refuse(path: Path, *rest: Any) -> int:
        if path.parent == full:
            raise SessionError("the disk is full")
        return save(path, *rest)

    return refuse


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


def test_an_empty_chat_replaces_none(begin: Begin, tmp_path: Path, told: io.StringIO) -> None:
    begin("s", "One")[1].at_the_end()
    chat, autosave = begin("s")
    chat.clear()
    autosave.at_the_end()
    assert told.getvalue().endswith("the chat is empty: s stays as it was saved\n")
    assert n_messages(begin, "s") == 2
    chat, autosave = begin(None, "Hi")
    chat.clear()
    autosave.at_the_end()
    assert sessions.names() == ["s"], "no empty file that nobody asked for"


def test_two_chats_without_a_name_are_both_saved(begin: Begin, told: io.StringIO) -> None:
    first, second = begin(None, "One")[1], begin(None, "Two", "Three")[1]
    second.at_the_end()
    first.at_the_end()
    assert "another chat was saved as last meanwhile: this one is saved as last-2\n" in told.getvalue()
    assert [n_messages(begin, name) for name in ("last", "last-2")] == [4, 2]
    begin(None, "Four")[1].at_the_end()
    assert n_messages(begin, "last") == 2
    day = time.strftime("%Y-%m-%d")
    assert told.getvalue().splitlines()[-2] == f"the chat before this one is kept as last-{day}"
    assert n_messages(begin, f"last-{day}") == 4
    begin(None, "Five", "Six", "Seven")[1].at_the_end()
    assert [n_messages(begin, name) for name in ("last", f"last-{day}", f"last-{day}-2")] == [6, 4, 2]


@pytest.mark.parametrize("bound", ["MOST_EARLIER", "MOST_EARLIER_BYTES"])
def test_the_oldest_of_many_earlier_chats_make_room(
    begin: Begin, tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    begin("mine", "Kept for good")[1].at_the_end()
    size = (tmp_path / "mine.kvc").stat().st_size
    monkeypatch.setattr(drafts, bound, 2 if bound == "MOST_EARLIER" else size * 5 // 2)
    for day in (1, 2, 3, 4):
        begin(None, "Hello")[1].at_the_end()
        os.utime(tmp_path / "last.kvc", (day * 86400 + 43200,) * 2)
    assert sessions.names() == ["mine", "last", "last-1970-01-04", "last-1970-01-03"]
    assert "the chat before this one is kept as last-1970-01-04; last-1970-01-02 made room for it\n" in told.getvalue()


def crashed(path: Path) -> None:
    """Let the draft of a session be one that a process left which is no more."""
    draft = drafts.draft_of(path)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    draft.rename(draft.with_name(f".{path.name}.{process.pid}.draft"))


def test_a_crash_loses_no_turn(begin: Begin, tmp_path: Path) -> None:
    begin("s", "One")[1].at_the_end()
    chat, autosave = begin("s", "x" * 150)
    assert chat.memory.reports
    autosave.keep()
    assert drafts.recover(tmp_path) == [], "it still runs"
    crashed(tmp_path / "s.kvc")
    day = time.strftime("%Y-%m-%d")
    assert drafts.recover(tmp_path) == [
        f"a chat ended without being saved: what was said is kept as s, and what was saved before as s-{day}"
    ]
    assert drafts.recover(tmp_path) == []
    again, autosave = begin("s")
    assert again.messages == chat.messages
    assert (again.memory.position, again.unread_tokens) == (0, len(chat.transcript.tokens))
    assert n_messages(begin, f"s-{day}") == 2
    list(again.ask("More", max_tokens=9))
    assert again.unread_tokens <= 1
    autosave.at_the_end()
    assert n_messages(begin, "s") == 6


def test_drafts_of_the_last_chat_are_the_last_chat(begin: Begin, tmp_path: Path) -> None:
    begin(None, "One")[1].at_the_end()
    begin(None, "Two", "Three")[1].keep()
    crashed(tmp_path / "last.kvc")
    assert len(drafts.recover(tmp_path)) == 1
    assert [n_messages(begin, name) for name in sessions.names()] == [4, 2]


def test_a_draft_goes_when_the_chat_is_saved_or_over(begin: Begin, tmp_path: Path) -> None:
    chat, autosave = begin(None, "One")
    draft = drafts.draft_of(tmp_path / "last.kvc")
    autosave.keep()
    written = sessions.version_of(draft)
    autosave.keep()
    assert sessions.version_of(draft) == written != (), "nothing is new"
    autosave.save("s")
    assert not draft.exists()
    list(chat.ask("Two", max_tokens=9))
    autosave.keep()
    assert drafts.draft_of(tmp_path / "s.kvc").exists()
    chat.clear()
    autosave.keep()
    assert not [*tmp_path.glob(".*.draft")]
    list(chat.ask("Two", max_tokens=9))
    autosave.keep()
    autosave.at_the_end()
    begin(None, "One", is_on=False)[1].keep()
    assert not [*tmp_path.glob(".*.draft")]


def test_a_draft_that_cannot_be_written_is_told_once(
    begin: Begin, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> int:
        raise SessionError("the disk is full")

    autosave = begin(None, "One")[1]
    monkeypatch.setattr(sessions, "save_state", fail)
    autosave.keep()
    autosave.keep()
    assert told.getvalue() == "if the program is killed, this turn is lost: the disk is full\n"


def test_a_draft_is_small(begin: Begin, tmp_path: Path) -> None:
    chat, autosave = begin("s", "x" * 150)
    autosave.keep()
    n_bytes = drafts.draft_of(tmp_path / "s.kvc").stat().st_size
    autosave.at_the_end()
    header = 2500
    assert n_bytes < header + 4 * len(chat.transcript.tokens) + 4 * len(chat.transcript.fed)


@pytest.mark.parametrize("state_folder_is_full", [False, True])
def test_a_chat_that_cannot_be_saved_in_its_place_is_saved_elsewhere(
    begin: Begin, tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch, state_folder_is_full: bool
) -> None:
    folder, other = tmp_path / "gone", tmp_path / "temporary"
    folder.mkdir()
    other.mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(other))
    autosave = begin(str(folder / "s.kvc"), "Hi")[1]
    folder.rmdir()
    if state_folder_is_full:
        monkeypatch.setattr(sessions, "save", saving_but_in(tmp_path))
    with pytest.raises(SessionError, match="make the folder") as error:
        autosave.at_the_end()
    name = str(next(other.iterdir())) if state_folder_is_full else "last-2"
    assert "; elsewhere the chat is saved (" in str(error.value)
    assert str(error.value).endswith(f"--session {name} goes on from here")
    assert n_messages(begin, name) == 2


def test_an_unnamed_chat_that_is_saved_elsewhere_is_not_called_lost(
    begin: Begin, tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "save", saving_but_in(tmp_path))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    begin(None, "Hi")[1].at_the_end()
    assert told.getvalue().startswith("the disk is full; elsewhere the chat is saved (")
    assert len(told.getvalue().splitlines()) == 1


def test_a_file_that_is_no_session_is_not_called_a_chat(begin: Begin, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    autosave = begin(None, "Hi")[1]
    for name in (str(tmp_path / "notes.txt"), "/dev/null"):
        with pytest.raises(SessionError, match="give another name") as error:
            autosave.save(name)
        assert "remove" not in str(error.value)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_another_chat_saved_meanwhile_is_not_overwritten_on_demand(begin: Begin) -> None:
    begin("s", "Zero")[1].at_the_end()
    first, second = begin("s", "One")[1], begin("s", "Two", "Three")[1]
    second.at_the_end()
    with pytest.raises(InvalidInput, match="s holds another chat"):
        first.save("s")
    second.save("s")
    assert n_messages(begin, "s") == 6
    first.save("t")
    assert n_messages(begin, "t") == 4


def test_a_chat_has_the_name_that_it_was_saved_to(begin: Begin, told: io.StringIO) -> None:
    chat, autosave = begin(None, "One")
    autosave.save("a")
    list(chat.ask("Two", max_tokens=9))
    autosave.at_the_end()
    assert [(name, n_messages(begin, name)) for name in sessions.names()] == [("a", 4)]
    chat, autosave = begin("b", "One")
    autosave.load("a")
    list(chat.ask("Three", max_tokens=9))
    autosave.at_the_end()
    assert [(name, n_messages(begin, name)) for name in sessions.names()] == [("a", 6), ("b", 2)]
    assert "meanwhile" not in told.getvalue()


def test_a_chat_that_was_saved_elsewhere_leaves_its_session_to_others(
    begin: Begin, tmp_path: Path, told: io.StringIO
) -> None:
    first, second = begin("s", "One")[1], begin("s", "Two", "Three")[1]
    second.at_the_end()
    first.save("copy")
    first.at_the_end()
    assert "meanwhile" not in told.getvalue()
    assert [(name, n_messages(begin, name)) for name in sessions.names()] == [("copy", 2), ("s", 4)]


def test_a_load_that_fails_saves_once(begin: Begin, tmp_path: Path, told: io.StringIO) -> None:
    autosave = begin("s", "One")[1]
    with pytest.raises(InvalidInput, match="takes a name; nothing is saved yet"):
        autosave.load("")
    for _ in range(2):
        with pytest.raises(SessionError, match="there is no saved chat typo; saved: s"):
            autosave.load("typo")
    assert told.getvalue().count("saved (") == 1
    autosave.at_the_end()
    assert "meanwhile" not in told.getvalue()
    assert sessions.names() == ["s"]


def test_a_name_that_holds_another_chat_is_not_saved_to(begin: Begin) -> None:
    begin("a b", "One")[1].at_the_end()
    autosave = begin("s", "Two")[1]
    with pytest.raises(InvalidInput, match="a b holds another chat: give another name, or remove "):
        autosave.save("a b")
    assert n_messages(begin, "a b") == 2
    for _ in range(2):  # its own copy
        autosave.save("copy")
    with pytest.raises(InvalidInput, match='/load takes a name; saved: copy, "a b"'):
        autosave.load("")
    autosave.load("a b")
    autosave.save("a b")  # it is from there
    for impossible in ("x" * 300, f"{'y' * 300}/a", "a/\0b"):
        for use in (autosave.save, autosave.load):
            with pytest.raises(InvalidInput, match="no file can have that name"):
                use(impossible)


def test_a_chat_beside_its_session_stays_there(begin: Begin, tmp_path: Path) -> None:
    chat, first = begin("s", "One")
    begin("s", "Two", "Three")[1].at_the_end()
    with pytest.raises(SessionError):
        first.load("typo")
    list(chat.ask("More", max_tokens=9))
    first.at_the_end()
    assert sorted(path.name for path in tmp_path.glob("*.kvc")) == ["s-2.kvc", "s.kvc"]
    assert n_messages(begin, "s-2") == 4


def test_a_chat_beside_its_session_overwrites_none_there_either(begin: Begin, told: io.StringIO) -> None:
    chat, first = begin("s", "One")
    begin("s", "Two", "Three")[1].at_the_end()
    with pytest.raises(SessionError):
        first.load("typo")  # saves it as s-2 ...
    begin("s-2", "Four", "Five")[1].at_the_end()  # ... with which another goes on
    list(chat.ask("More", max_tokens=9))
    first.at_the_end()
    assert "another chat was saved as s-2 meanwhile: this one is saved as s-2-2\n" in told.getvalue()
    assert [n_messages(begin, name) for name in ("s", "s-2", "s-2-2")] == [4, 6, 4]


def test_a_session_that_was_deleted_meanwhile_is_written_again(begin: Begin, tmp_path: Path, told: io.StringIO) -> None:
    begin("s", "One")[1].at_the_end()
    autosave = begin("s", "Two")[1]
    (tmp_path / "s.kvc").unlink()
    autosave.at_the_end()
    assert "meanwhile" not in told.getvalue()
    assert n_messages(begin, "s") == 4


def test_what_was_taken_back_after_saving_is_taken_back_in_the_file(begin: Begin) -> None:
    begin("s", "One")[1].at_the_end()
    chat, autosave = begin("s", "Two")
    autosave.save("s")
    assert n_messages(begin, "s") == 4
    chat.undo()
    autosave.at_the_end()
    assert n_messages(begin, "s") == 2


def test_a_session_is_the_same_however_it_is_spelled(begin: Begin, tmp_path: Path, told: io.StringIO) -> None:
    path = str(tmp_path / "s.kvc")
    chat, autosave = begin("s", "One")
    autosave.save(path)
    list(chat.ask("Two", max_tokens=9))
    with pytest.raises(InvalidInput, match="would be lost"):
        autosave.load(path)
    (tmp_path / "link.kvc").symlink_to(path)
    with pytest.raises(InvalidInput, match="would be lost"):
        autosave.load("link")
    autosave.at_the_end()
    assert "meanwhile" not in told.getvalue()
    assert n_messages(begin, "s") == 4


def test_no_chat_of_a_program_is_saved_over_another_of_it(begin: Begin, tmp_path: Path) -> None:
    for name in ("a", "b"):
        begin(name, "One")[1].at_the_end()
    for i, session in enumerate((None, "last"), start=1):  # the second goes on from what the first left as last
        before = n_messages(begin, "last") if session else 0
        chat, autosave = begin(session, "Two")
        for name in ("a", "b"):
            autosave.load(name)
            list(chat.ask("Three", max_tokens=9))
        autosave.at_the_end()
        assert n_messages(begin, "last") == before + 2
        assert [n_messages(begin, name) for name in ("a", "b")] == [2 + 2 * i] * 2
    assert sorted(sessions.names()) == ["a", "b", "last"]


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
    assert (tmp_path / "s.kvc").stat().st_size < size
    assert sessions.names() == ["s"]


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
