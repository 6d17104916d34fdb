"""When and where the command line saves a chat, so that none is lost unasked and none is overwritten by another."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from kvcompose_local import sessions
from kvcompose_local.errors import InvalidInput, KVComposeError

if TYPE_CHECKING:
    from kvcompose_local.chat import Chat
    from kvcompose_local.interrupts import Interrupts
    from kvcompose_local.repl import Status


class Autosave:
    """Saves and loads one chat: on ``/save`` and ``/load``, and unasked at its end.

    session: what ``--session`` named; None saves the chat as :data:`sessions.LAST` in the end, where no failure is one
    of the program. version: of that file when it was looked at first; is_on: False saves nothing unasked.
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
        self.session = session
        self.is_on = is_on
        self.status = status
        self.interrupts = interrupts
        self._name = session or sessions.LAST
        self._version = version
        self._begun = self._kept = self._now()  # as it was loaded; as it was saved last

    def _now(self) -> tuple[Any, ...]:
        """All that is worth a file, ``/compress`` included."""
        return self.chat.conversation, self.chat.memory.n_asked

    @property
    def is_unsaved(self) -> bool:
        """Whether there is something to save at the end."""
        return self.is_on and self.chat.memory.position > 0 and self._now() != self._begun

    def save(self, name: str) -> str:
        """Save the chat under a name or to a path; returns what to say of it. Raises InvalidInput and SessionError."""
        if not name:
            raise InvalidInput("/save takes a name")
        return self._save(name)

    def load(self, name: str) -> str:
        """Put a saved chat in place of this one, which is saved before; returns what to say of it.

        Raises InvalidInput where that would overwrite what is to be loaded, and SessionError.
        """
        if not name:
            raise InvalidInput(f"/load takes a name: {', '.join(sessions.names()) or 'nothing is saved yet'}")
        if self.is_unsaved and self._now()[0] not in (self._begun[0], self._kept[0]):
            if sessions.path_of(name) == sessions.path_of(self._name):
                raise InvalidInput(f"this chat would be lost: /save it under another name than {name} first")
            self.status.line(self._save(self._own_name()))
        told = self._load(name)
        self._name = sessions.LAST  # not over the session that this chat began as
        return told

    def resume(self) -> str:
        """Load the session of ``--session``; returns what to say of it. Raises SessionError."""
        return self._load(self._name)

    def at_the_end(self) -> None:
        """Save what is unsaved. Raises SessionError where the user asked for it by ``--session``."""
        if not self.is_unsaved:
            return
        try:
            with self.interrupts.caught():
                told = self._save(self._own_name())
        except (KVComposeError, KeyboardInterrupt) as error:
            if self.session is not None:
                raise
            told = f"the chat is not saved: {str(error) or 'stopped'}"
        self.status.line(told)

    def _own_name(self) -> str:
        """Where the chat is saved unasked: beside its session where another chat was saved there meanwhile."""
        if self.session is None or self._name != self.session:
            return self._name
        path = sessions.path_of(self.session)
        if sessions.version_of(path) == self._version:
            return self._name
        self._name = str(sessions.beside(path))
        self.status.line(f"another chat was saved as {self.session} meanwhile: this one is saved as {self._name}")
        return self._name

    def _save(self, name: str) -> str:
        path = sessions.path_of(name)
        mib = sessions.save(path, self.chat, self.setup, self.status.checking) / 2**20
        self._kept = self._now()
        if self.session is not None and path == sessions.path_of(self.session):
            self._version = sessions.version_of(path)
        return f"saved ({mib:.1f} MiB): kvcompose-local run --session {shlex.quote(name)} goes on from here"

    def _load(self, name: str) -> str:
        sessions.load(sessions.path_of(name), self.chat, self.setup, self.status.checking)
        self._begun = self._kept = self._now()
        n_messages = sum(message["role"] != "system" for message in self.chat.messages)
        return f"loaded {name}: {n_messages} messages, {self.chat.memory.position} tokens"
