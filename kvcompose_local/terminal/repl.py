"""The chat in a terminal: a loop over lines. Input and output are handed in, so that tests can be exact."""

from __future__ import annotations

from collections.abc import Callable

from kvcompose_local.chat import inputs
from kvcompose_local.errors import KVComposeError, PositionsFull
from kvcompose_local.terminal.chat_commands import COMMANDS, FENCE, ChatCommands
from kvcompose_local.terminal.type_ahead import hidden

#: Before a message, and inside one that a fence will end.
PROMPT, PROMPT_WITHIN = "> ", "... "
#: Words that are commands elsewhere, and the command that is meant.
_BARE = {"exit": "/quit", "quit": "/quit", "bye": "/quit", "help": "/help"}


class _Fenced(str):
    """A message between fences, which is never a command."""

    __slots__ = ()


class Repl:
    """Reads messages and commands, and has them answered.

    read_line gets the prompt and returns the next line without its newline, several where they were pasted, or None at
    the end of input; it may raise KeyboardInterrupt for Ctrl-C at the prompt.
    """

    def __init__(self, commands: ChatCommands, read_line: Callable[[str], str | None]) -> None:
        self.commands = commands
        self.answers = commands.answers
        self.status = commands.status
        self.interrupts = commands.interrupts
        self.read_line = read_line

    def run(self) -> None:
        """Serve until the end of input, /quit or a signal that ends the program."""
        while not self.interrupts.leaving:
            try:
                with self.interrupts.waiting():
                    message = self._read_message()
            except KeyboardInterrupt:
                if self.interrupts.leaving:
                    return
                self.status.line("(Ctrl-D or /quit leaves)")
                continue
            if message is None:
                return
            if not message.strip():
                continue
            try:
                with self.interrupts.caught(), hidden():
                    if self.interrupts.leaving:  # it came after the message did
                        return
                    if not isinstance(message, _Fenced) and inputs.dropped_files(message):
                        self.status.line(f"that is a file: /read {message.strip()} reads it")
                    elif not isinstance(message, _Fenced) and self._is_command(message):
                        if self.commands.run(message):
                            return
                    elif meant := _BARE.get(message.rstrip().lower()):
                        self.status.line(f"{meant} is the command; a space before the word sends it as a message")
                    else:
                        self.answers.explain_end(self.answers.answer(message))
            except KeyboardInterrupt:
                self.status.line("stopped")
            except KVComposeError as error:
                self.status.line(f"error: {error}{', or /clear' if isinstance(error, PositionsFull) else ''}")
            finally:
                self.status.settle()

    def _read_message(self) -> str | None:
        line = self.read_line(PROMPT)
        if line is None or "\n" in line.strip() or not line.lstrip().startswith(FENCE):
            return line  # of pasted lines, such as a program that begins with a docstring, all are there
        text = line.lstrip()[len(FENCE) :]
        if self.commands.edit is not None and not text.rstrip().endswith(FENCE):
            self.status.line(f"(several lines: {FENCE} or Ctrl-D ends the message, Ctrl-C drops it)")
        while not text.rstrip().endswith(FENCE):
            more = self.read_line(PROMPT_WITHIN)
            if more is None:
                return _Fenced(text)
            text += "\n" + more
        return _Fenced(text.rstrip()[: -len(FENCE)].strip("\n"))

    def _is_command(self, message: str) -> bool:
        """Whether a message is a command: a line whose first word has one slash, before it, where a path has more, or
        pasted lines that begin with a command's name.
        """
        if not message.startswith("/"):
            return False
        name = message.split()[0]
        return name in COMMANDS if "\n" in message else "/" not in name[1:]
