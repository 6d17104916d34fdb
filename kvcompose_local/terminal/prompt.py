"""The line editor of the interactive chat: history, completion, multi-line paste (prompt_toolkit)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import DummyOutput, Output, create_output
from prompt_toolkit.output.plain_text import PlainTextOutput

from kvcompose_local.install.resources import state_folder
from kvcompose_local.terminal.type_ahead import typed


class CommandCompleter(Completer):
    """Completes /commands, file names after /read, and names of sessions after /save and /load."""

    def __init__(self, commands: Sequence[str], sessions: Callable[[], Sequence[str]]) -> None:
        self._commands = commands
        self._sessions = sessions
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if text.startswith("/read "):
            path = Document(text[len("/read ") :])
            yield from self._paths.get_completions(path, complete_event)
        elif text.startswith(("/save ", "/load ")):
            begun = text[len("/save ") :]
            yield from (Completion(s, start_position=-len(begun)) for s in self._sessions() if s.startswith(begun))
        elif text.startswith("/") and " " not in text:
            yield from (Completion(c, start_position=-len(text)) for c in self._commands if c.startswith(text))


class _History(FileHistory):
    """A history whose failure to be written does not end the chat."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def _history() -> History:
    try:
        history = state_folder() / "history"
        history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        history.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return _History(str(history))


def _output() -> Output | None:
    """The place to draw at: None is standard output, otherwise standard error or the program's terminal."""
    if sys.stdout.isatty():
        return None
    stream: TextIO = sys.stderr
    if not stream.isatty():
        try:
            stream = open("/dev/tty", "w", encoding="utf-8")  # noqa: SIM115 -- as long as the chat
        except OSError:
            return DummyOutput()
    return PlainTextOutput(stream) if os.environ.get("TERM") == "dumb" else create_output(stdout=stream)


def _no_mouse() -> KeyBindings:
    """Ignore mouse events: a colour that was typed, ``ESC [ 31 m``, would be read as one."""
    bindings = KeyBindings()
    bindings.add(Keys.Vt100MouseEvent, eager=True)(lambda event: None)
    return bindings


class LineEditor:
    """Reads messages from the terminal."""

    def __init__(self, commands: Sequence[str], sessions: Callable[[], Sequence[str]]) -> None:
        self._has_asked = False
        with create_app_session(output=_output()):  # given to the prompt itself, it would draw on dumb terminals
            self._session: PromptSession[str] = PromptSession(
                history=_history(),
                completer=CommandCompleter(commands, sessions),
                complete_while_typing=False,
                key_bindings=_no_mouse(),
                enable_suspend=True,
            )

    def __call__(self, text: str, prompt: str = "> ") -> str | None:
        """The next message, None at Ctrl-D; KeyboardInterrupt at Ctrl-C.

        text: what is there to be edited, and behind it what was typed while the program worked. Lines that were there
        before the first prompt are what a script types, and are taken as they are.
        """
        typed_before = typed() if self._has_asked else ""
        self._has_asked = True
        try:
            return self._session.prompt(prompt, default=text + typed_before)
        except EOFError:
            return None

    def interrupt(self) -> bool:
        """Let a prompt that waits raise KeyboardInterrupt, from a signal's handler; False where none waits."""
        app = self._session.app
        if not app.is_running or app.loop is None:
            return False
        app.loop.call_soon_threadsafe(self._leave)
        return True

    def _leave(self) -> None:
        app = self._session.app
        if app.is_running and not app.is_done:
            app.exit(exception=KeyboardInterrupt())
