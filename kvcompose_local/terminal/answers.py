"""Prints answers as they come, and says why they ended."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Sequence
from typing import TextIO

from kvcompose_local.chat import Chat, Said, TurnStats
from kvcompose_local.chat.reasoning import CLOSE, OPEN
from kvcompose_local.terminal.shown import control
from kvcompose_local.terminal.status import Status

#: Tokens of so many characters are counted at once, which takes less than a second.
_MANY_CHARACTERS = 1 << 18


def check_room(chat: Chat, documents: Sequence[tuple[str, str]]) -> None:
    """Raises PositionsFull where (name, text) do not all fit the positions left: reading some takes minutes."""
    memory, whole = chat.memory, "".join(text for _, text in documents)
    position, n_tokens, end = memory.position + chat.unread_tokens, 0, 0
    while end < len(whole) and position + n_tokens <= memory.n_ctx:
        n_tokens += len(chat.model.tokenize(whole[end : end + _MANY_CHARACTERS]))
        end += _MANY_CHARACTERS
    if end < len(whole):  # the rest is assumed to have as many tokens a character
        n_tokens = n_tokens * len(whole) // end
    memory.check_positions(position, n_tokens)


class Printed:
    """Prints an answer as it comes; on a terminal its thinking is dimmed, elsewhere it stands between tags.

    hides_thinking: print the answer alone.
    """

    def __init__(self, out: TextIO, *, hides_thinking: bool) -> None:
        self.out = out
        self.hides_thinking = hides_thinking
        self.dims = out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.line_begins = True
        self._follows_thinking = False
        self._is_dim = False

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._dim(False)

    def write(self, piece: Said) -> None:
        """Print a piece of it."""
        text: str = piece
        if piece.is_reasoning:
            self._follows_thinking = True
            if self.hides_thinking:
                return
            if self.dims:
                self._dim(piece != CLOSE)
                text = "" if piece in (OPEN, CLOSE) else text
                text = text.lstrip() if self.line_begins and not text.strip() else text
        elif self._follows_thinking and (self.dims or self.hides_thinking):
            text = text.lstrip()
            if text and not self.hides_thinking:
                text = ("\n" if self.line_begins else "\n\n") + text
            self._follows_thinking = not text
        if text:
            self.out.write(text)
            self.line_begins = text.endswith("\n")
        self.out.flush()

    def _dim(self, on: bool) -> None:
        if on != self._is_dim:
            control(self.out, "\x1b[2m" if on else "\x1b[0m")
            self.out.flush()
            self._is_dim = on


class Answers:
    """Asks a chat and prints its answers to ``out``, everything else to ``status``.

    takes_commands: whether the user has the REPL's commands, so that messages may name them.
    """

    def __init__(
        self,
        chat: Chat,
        *,
        out: TextIO,
        status: Status,
        max_tokens: int,
        hides_thinking: bool = False,
        takes_commands: bool = False,
    ) -> None:
        self.chat = chat
        self.out = out
        self.status = status
        self.max_tokens = max_tokens
        self.hides_thinking = hides_thinking
        self.takes_commands = takes_commands
        self._warned = 0  # the last warning about positions that was given

    def answer(self, message: str) -> TurnStats:
        """Ask and stream; returns the turn's statistics."""
        return self.stream(self.chat.ask(message, max_tokens=self.max_tokens))

    def stream(self, pieces: Generator[Said]) -> TurnStats:
        """Print an answer that has begun; returns the turn's statistics."""
        line_begins = True
        shared = self.out.isatty() and self.status.stream.isatty()
        printed = Printed(self.out, hides_thinking=self.hides_thinking)
        with self.status.answering():
            with contextlib.closing(pieces), printed:  # what was answered counts where it cannot be written any more
                for piece in pieces:
                    if line_begins or not piece.startswith("\n"):
                        self.warn_of_the_end(line_begins)
                    printed.write(piece)
                    line_begins = printed.line_begins
                    self.status.inside_a_line = shared and not line_begins
            self.out.write("\n")
            self.out.flush()
            self.status.inside_a_line = False
        self.warn_of_the_end()
        return self.chat.turns[-1]

    def warn_of_the_end(self, line_begins: bool = True) -> None:
        """Say once that few positions are left, perhaps too few for an answer, and once that very few are."""
        memory = self.chat.memory
        n_ctx, left = memory.n_ctx, memory.n_ctx - memory.position
        few = min(max(n_ctx // 10, 256, self.max_tokens), n_ctx // 2)
        level = 2 if left < n_ctx // 50 else 1 if left < few else 0
        if left > 0 and level > self._warned and line_begins:
            self.status.line(f"{left} of {n_ctx} positions are left: {self._more_positions()}")
            self._warned = level
        self._warned = min(self._warned, level)

    def _more_positions(self) -> str:
        """What can be done about positions."""
        n_ctx, known = self.chat.memory.n_ctx, self.chat.memory.engine.shape.n_ctx_train
        if not self.takes_commands:
            return self.chat.memory.way_to_more_positions()
        if known <= n_ctx:
            return "/undo or /clear make room, or another model: this one knows no more than that"
        return (
            "/undo or /clear make room, or /save NAME, then `kvcompose-local run --session NAME --ctx N` goes on with "
            f"up to {known}"
        )

    def explain_end(self, stats: TurnStats) -> None:
        """Say why an answer ended where the model did not end it."""
        if stats.stopped == "context":
            self.status.line(f"the chat has used all {self.chat.memory.n_ctx} positions: {self._more_positions()}")
        elif stats.stopped == "length":
            self.status.line(f"(stopped after {self.max_tokens} tokens: --max-tokens allows more)")
        elif stats.stopped == "end" and not self.chat.messages[-1]["content"].strip():
            way = "/regen tries again" if self.takes_commands else "ask in other words, or with another --seed"
            thought = "thought and " if self.chat.messages[-1].get("reasoning") else ""
            self.status.line(f"(the model {thought}said nothing: {way})")
        elif stats.stopped == "interrupt":
            unread = self.chat.unread_tokens
            self.status.line(
                f"(stopped; {unread} tokens are read before your next message)" if unread > 1 else "(stopped)"
            )

    def unread(self) -> str:
        """What to add to a line where an interrupt left tokens to be read."""
        unread = self.chat.unread_tokens
        return f"; {unread} tokens are read before your next message" if unread > 1 else ""
