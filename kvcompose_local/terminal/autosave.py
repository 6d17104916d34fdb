"""Saves the chats of the command line, so that none is lost unasked and none is overwritten by another."""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kvcompose_local.chat import drafts, sessions
from kvcompose_local.chat.drafts import alone
from kvcompose_local.errors import InvalidInput, KVComposeError, NoHome, SessionError
from kvcompose_local.install.files import disk_errors
from kvcompose_local.terminal.figures import MIB

if TYPE_CHECKING:
    from kvcompose_local.chat import Chat
    from kvcompose_local.chat.turns import Conversation
    from kvcompose_local.interrupts import Interrupts
    from kvcompose_local.terminal.status import Status


class Autosave:
    """Saves and loads one chat: on ``/save`` and ``/load``, and unasked at its end, with drafts after each turn.

    session: what ``--session`` named; a name that the chat is saved to or loaded from takes its place. None saves the
    chat as :data:`sessions.LAST` in the end, where an earlier chat makes room for it, and a failure to do so does not
    fail the program. version: of the session's file when it was looked at first; is_on: False saves nothing unasked.
    """

    def __init__(
        self,
        chat: Chat,
        setup: sessions.Setup,
        *,
        session: str | None,
        version: tuple[int, ...],
        is_on: bool,
        status: Status,
        interrupts: Interrupts,
    ) -> None:
        self.chat = chat
        self.setup = setup
        self.is_on = is_on
        self.status = status
        self.interrupts = interrupts
        self._session = session
        self._name = session or sessions.LAST  # of what is saved unasked
        # What is known of that file, which another chat may write meanwhile.
        self._version = version if session is not None else _version_of(self._name)
        self._wrote = False  # that file, since the chat was begun or loaded
        self._ours: set[Path] = set()  # files that this chat is from, or was saved to
        self._begun = self._kept = self._drafted = self._now()  # as it was loaded; as it was saved, drafted last

    def _now(self) -> tuple[Conversation, int]:
        """All that is worth a file, ``/compress`` included."""
        return self.chat.conversation, self.chat.memory.n_asked

    @property
    def is_unsaved(self) -> bool:
        """Whether there may be something to save at the end."""
        return self.is_on and not self._is_empty and (self._wrote or self._now() != self._begun)

    @property
    def _is_empty(self) -> bool:
        return not self.chat.transcript.tokens

    def save(self, name: str) -> str:
        """Save the chat under a name or to a path, which is its own from now on; returns what to say of it.

        Raises InvalidInput and SessionError.
        """
        if not name:
            raise InvalidInput("/save takes a name")
        path = sessions.path_of(name)
        sessions.check_writable(path)
        with alone():
            is_own = self._is_free() if _is_same(name, self._name) else path.resolve() in self._ours
            if path.exists() and not is_own:
                raise InvalidInput(f"{name} holds another chat: give another name, or remove {path}")
            told = self._save(name)
        self._be(name)
        self._wrote = True
        return told

    def load(self, name: str) -> str:
        """Save this chat, and put a saved one in its place, under its name; returns what to say of it.

        Raises InvalidInput where that would overwrite what is to be loaded, and SessionError.
        """
        if not name:
            raise InvalidInput(f"/load takes a name; {told_names()}")
        if self.is_unsaved and self._now()[0] not in (self._begun[0], self._kept[0]):
            if _is_same(name, self._name):
                raise InvalidInput(f"this chat would be lost: /save it under another name than {name} first")
            with alone():
                self.status.line(self._save(self._own_name()))
        if not sessions.path_of(name).exists():
            raise SessionError(f"there is no saved chat {name}; {told_names()}")
        told = self._load(name)
        self._be(name)
        return told

    def resume(self) -> str:
        """Load the session of ``--session``; returns what to say of it. Raises SessionError."""
        return self._load(self._name)

    def keep(self) -> None:
        """Have what was said on the disk, should the program end without a word. What is saved needs no draft."""
        now = self._now()
        if not self.is_on or now == self._drafted:
            return
        self._drafted = now
        if self._is_empty or now[0] in (self._begun[0], self._kept[0]):
            self._remove_draft()
            return
        try:
            with self.interrupts.caught():
                drafts.write(sessions.path_of(self._name), self.chat, self.setup, self.status.checking)
        except KeyboardInterrupt:  # a large model's file is looked through, once
            self._drafted = self._kept
        except KVComposeError as error:
            self.status.line(f"if the program is killed, this turn is lost: {error}")

    def at_the_end(self) -> None:
        """Save what is unsaved, at another place where its own fails. What cannot be saved stays as a draft.

        Raises SessionError where the session of ``--session`` could not be saved.
        """
        if not self.is_unsaved:
            if self.is_on and self._is_empty and self._version and self._ours:
                self.status.line(f"the chat is empty: {self._name} stays as it was saved")
            self._remove_draft()
            return
        try:
            with self.interrupts.caught(), alone():
                told = self._save(self._own_name())
        except (KVComposeError, KeyboardInterrupt) as error:
            elsewhere = self._saved_elsewhere() if isinstance(error, KVComposeError) else ""
            reason = str(error) or "stopped"
            if self._session is not None:
                if not elsewhere:
                    raise
                raise SessionError(f"{reason}; elsewhere the chat is {elsewhere}") from error
            told = f"{reason}; elsewhere the chat is {elsewhere}" if elsewhere else f"the chat is not saved: {reason}"
        self.status.line(told)

    def _saved_elsewhere(self) -> str:
        """Save the chat beside the last one or among temporary files, and say where; empty where that fails, too."""
        with contextlib.suppress(KVComposeError, KeyboardInterrupt):
            return self._save(_beside(sessions.LAST))
        with contextlib.suppress(KVComposeError, KeyboardInterrupt):
            return self._save(str(Path(tempfile.gettempdir()) / f"kvcompose-{os.getpid()}.kvc"))
        return ""

    def _own_name(self) -> str:
        """Where the chat is saved unasked: beside its session where another chat was saved there meanwhile.

        An earlier chat that is there gets another name.
        """
        if not self._is_free():
            self._remove_draft()
            name, self._name, self._version = self._name, _beside(self._name), ()
            self.status.line(f"another chat was saved as {name} meanwhile: this one is saved as {self._name}")
        path = sessions.path_of(self._name)
        if path.exists() and path.resolve() not in self._ours:
            with disk_errors(path, SessionError, then="save again"):
                told = f"the chat before this one is kept as {drafts.set_aside(path).stem}"
            gone = drafts.forget_oldest()
            self.status.line(f"{told}; {', '.join(gone)} made room for it" if gone else told)
        return self._name

    def _is_free(self) -> bool:
        """Whether no other chat was saved under our name meanwhile; one that was deleted can be written."""
        return _version_of(self._name) in (self._version, ())

    def _be(self, name: str) -> None:
        """Belong to a file that was just written or read."""
        self._remove_draft()
        self._session = self._name = name
        self._version = _version_of(name)

    def _remove_draft(self) -> None:
        with contextlib.suppress(NoHome):
            drafts.remove(sessions.path_of(self._name))

    def _save(self, name: str) -> str:
        path = sessions.path_of(name)
        mib = sessions.save(path, self.chat, self.setup, self.status.checking) / MIB
        self._remove_draft()
        self._kept = self._drafted = self._now()
        self._ours.add(path.resolve())
        if _is_same(name, self._name):
            self._wrote = True
            self._version = sessions.version_of(path)
        return f"saved ({mib:.1f} MiB): kvcompose-local run --session {shlex.quote(name)} goes on from here"

    def _load(self, name: str) -> str:
        path = sessions.path_of(name)
        sessions.load(path, self.chat, self.setup, self.status.checking)
        self._ours = {path.resolve()}
        self._begun = self._kept = self._drafted = self._now()
        self._wrote = False
        n_messages = sum(message["role"] != "system" for message in self.chat.messages)
        told = f"loaded {name}: {n_messages} messages, {self.chat.memory.position} tokens"
        n_unread = self.chat.unread_tokens
        return f"{told}; {n_unread} more are read before your next message" if n_unread > 1 else told


def told_names() -> str:
    """What is saved, for people."""
    told = ", ".join(f'"{name}"' if " " in name else name for name in sessions.names())
    return f"saved: {told}" if told else "nothing is saved yet"


def _version_of(name: str) -> tuple[int, ...]:
    with contextlib.suppress(NoHome):
        return sessions.version_of(sessions.path_of(name))
    return ()


def _is_same(one: str, other: str) -> bool:
    """Whether two names are of one session, however they are spelled."""
    try:
        first, second = sessions.path_of(one), sessions.path_of(other)
    except NoHome:  # then a plain name is of no session
        return False
    return first.resolve() == second.resolve() or (first.exists() and second.exists() and first.samefile(second))


def _beside(name: str) -> str:
    """A name that is free, next to this one."""
    path = sessions.beside(sessions.path_of(name))
    return str(path) if Path(name).suffix or Path(name).parent != Path() else path.stem
