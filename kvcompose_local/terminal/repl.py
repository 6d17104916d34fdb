"""The chat in a terminal: commands, streaming, statistics. Input and output are handed in, so tests can be exact."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TextIO

from kvcompose_local.chat import Chat, Said, TurnStats, inputs
from kvcompose_local.chat.reasoning import CLOSE, OPEN
from kvcompose_local.chat.report import CompactionReport
from kvcompose_local.errors import InvalidInput, KVComposeError, PositionsFull
from kvcompose_local.interrupts import Interrupts
from kvcompose_local.terminal.memory_chart import ASCII_MARKS, UNICODE_MARKS, can_show, draw
from kvcompose_local.terminal.shown import control, shown

HELP = """\
/help           this text
/undo           take back your last message and its answer, or the document read last
/regen [T]      another answer to your last message, drawn at temperature T if given
/edit [TEXT]    another text in place of your last message; without TEXT the old one is there to edit
/forget         drop the thinking of the last answer
/pin            keep every token of your last message, or of the document read last, when the cache is compressed
/stats          speeds, tokens and cache of this chat
/memory         what each layer of the cache holds
/compress [R]   compress the cache now, keeping at most the share R of the bytes in use (default 0.5)
/read FILE…     read text files now; your next message asks about them
/system [TEXT]  show the system prompt, or set it and read the conversation again under it; \"\" for none
/clear          forget the conversation, keep the system prompt
/save NAME      save the chat and its cache under a name, or to a path
/load NAME      go on from a saved chat, in place of this one
/quit           leave (Ctrl-D does too)
A line that begins with \"\"\" starts a message of several lines, which ends with \"\"\".
Ctrl-C stops the answer, the reading or the compaction that runs; the chat goes on."""

COMMANDS = tuple(line.split()[0] for line in HELP.splitlines() if line.startswith("/"))
_FENCE = '"""'
#: How often progress is shown, on a terminal and elsewhere; work of under a second shows none.
_REDRAW_SECONDS, _LINE_SECONDS = 0.2, 10.0
_BAR_WIDTH = 20
#: Work on so many is shown before its first part is done, which may take seconds.
_MANY = 256
#: Tokens of so many characters are counted at once, which takes less than a second.
_MANY_CHARACTERS = 1 << 18
#: Commands that take no text; the others say themselves what they take.
_ALONE = frozenset("/help /undo /forget /pin /stats /memory /clear /quit".split())


def _bar(done: int, total: int, n_before: int) -> str:
    """How far something is as a bar behind ``n_before`` characters, where the terminal has room for it."""
    if not total or shutil.get_terminal_size().columns <= n_before + _BAR_WIDTH + 3:
        return ""
    full = _BAR_WIDTH * min(done, total) // total
    return f" [{'#' * full}{'.' * (_BAR_WIDTH - full)}]"


def _fitting(line: str) -> str:
    """As much of a line as stays on one of the terminal's: what wraps cannot be redrawn."""
    return line[: max(shutil.get_terminal_size().columns - 1, 1)]


class Status:
    """Progress and statistics on stderr: one line that is redrawn on a terminal, a line now and then otherwise."""

    def __init__(self, stream: TextIO, *, should_stop: Callable[[], bool] = lambda: False) -> None:
        self.stream = stream
        self.should_stop = should_stop
        self._terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = False
        self.inside_a_line = False  # an answer on the same terminal has not ended its line: what is told gets its own
        self._reading = False
        self._untold: list[CompactionReport] = []  # of the text that is being read
        self._works: dict[str, tuple[float, int]] = {}  # when each began, and how far it is: one may stop another
        self._last = 0.0

    def progress(self, what: str, done: int, total: int, unit: str = "tokens") -> None:
        """Show ``what done/total unit`` once the work lasts; raises KeyboardInterrupt when Ctrl-C was pressed."""
        now = time.monotonic()
        started, before = self._works.get(what, (now, done))
        if done == 0 or done < before:
            started = now
        if not self._works:
            self._last = now
        self._works[what] = started, done
        elapsed = now - started
        if done >= total > 0:
            del self._works[what]
            self._erase()
        elif (now - self._last >= (_REDRAW_SECONDS if self._terminal else _LINE_SECONDS) and elapsed >= 1) or (
            self._terminal and done == 0 and total >= _MANY
        ):
            left = f", {elapsed / done * (total - done):.0f} s left" if done and total else ""
            text = f"{what} {done}/{total} {unit}{left}" if total else f"{what} {done} {unit}"
            text += _bar(done, total, len(text)) if self._terminal else "\n"
            if self._terminal:
                self._write(_fitting(shown(text)), over=True)
            else:
                self._write(text)
            self._shown = self._terminal
            self._last = now
        if self.should_stop():
            self._works.clear()
            self._erase()
            self.settle()
            raise KeyboardInterrupt

    def reading(self, done: int, total: int) -> None:
        """Progress of reading, in tokens."""
        self._reading = done < total
        self.progress("reading:", done, total)
        if not self._reading:
            self.settle()

    def compacted(self, report: CompactionReport) -> None:
        """Tell of a compaction: at once, or all those of a text in one line when it is read."""
        self._untold.append(report)
        if not self._reading:
            self.settle()

    def settle(self) -> None:
        """Tell what is untold: nothing is being read any more."""
        self._reading = False
        self._tell()

    def _tell(self) -> None:
        if self._untold:
            *earlier, last = self._untold
            self._untold = []
            self.line(last.line(*earlier))

    def fetching(self, done: int, total: int) -> None:
        """Progress of a download, in bytes."""
        self.progress("fetching:", done >> 20, total >> 20, "MiB")

    def checking(self, done: int, total: int) -> None:
        """Progress of hashing a model, in MiB."""
        self.progress("checking the model:", done, total, "MiB")

    def line(self, text: str) -> None:
        """Print one line."""
        self._tell()
        self._erase()
        self._write(text + "\n")

    def _erase(self) -> None:
        if self._shown:
            self._write("", over=True)
            self._shown = False

    def _write(self, text: str, *, over: bool = False) -> None:
        """``over`` what stands on the line already."""
        with contextlib.suppress(OSError):  # a window that is gone must not end what is done in its name
            if self.inside_a_line:
                self.inside_a_line = False
                self.stream.write("\n")
            if over:
                control(self.stream, "\r\x1b[K")
            self.stream.write(text)
            self.stream.flush()


def check_room(chat: Chat, documents: Sequence[tuple[str, str]]) -> None:
    """Raises PositionsFull where (name, text) do not all fit the positions left: reading some takes minutes."""
    memory, whole = chat.memory, "".join(text for _, text in documents)
    position, n_tokens, end = memory.position + chat.unread_tokens, 0, 0
    while end < len(whole) and position + n_tokens <= memory.n_ctx:
        n_tokens += len(chat.model.tokenize(whole[end : end + _MANY_CHARACTERS]))
        end += _MANY_CHARACTERS
    if end < len(whole):  # the rest is taken to be like it
        n_tokens = n_tokens * len(whole) // end
    memory.check_positions(position, n_tokens)


class _Fenced(str):
    """A message between fences, which is never a command."""

    __slots__ = ()


class _Printed:
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


class Repl:
    """Reads messages and commands, prints answers.

    read_line returns the next line without its newline, or None at the end of input; it may raise KeyboardInterrupt
    for Ctrl-C at the prompt. Answers go to ``out``, everything else to ``status``. save and load take the name of a
    session and return what to say of it. edit shows a text to be edited and returns it, None or an interrupt for no
    change. at_temperature is entered while an answer is drawn at another temperature.
    """

    def __init__(
        self,
        chat: Chat,
        *,
        read_line: Callable[[], str | None],
        out: TextIO,
        status: Status,
        interrupts: Interrupts,
        max_tokens: int,
        hides_thinking: bool = False,
        describe: Callable[[], str] = lambda: "",
        save: Callable[[str], str] = lambda name: "",
        load: Callable[[str], str] = lambda name: "",
        edit: Callable[[str], str | None] | None = None,
        at_temperature: Callable[[float], AbstractContextManager[object]] = lambda temperature: nullcontext(),
    ) -> None:
        self.chat = chat
        self.read_line = read_line
        self.out = out
        self.status = status
        self.interrupts = interrupts
        self.max_tokens = max_tokens
        self.hides_thinking = hides_thinking
        self.describe = describe
        self.save = save
        self.load = load
        self.edit = edit
        self.at_temperature = at_temperature
        self._takes_commands = False  # as `run` does
        self._warned = 0  # which of the warnings that positions run out was given

    def run(self) -> None:
        """Serve until the end of input, /quit or a signal that ends the program."""
        self._takes_commands = True
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
                with self.interrupts.caught():
                    if self.interrupts.leaving:  # it came after the message did
                        return
                    if not isinstance(message, _Fenced) and inputs.dropped_files(message):
                        self.status.line(f"that is a file: /read {message.strip()} reads it")
                    elif not isinstance(message, _Fenced) and self._is_command(message):
                        if self._command(message) == "quit":
                            return
                    else:
                        self.explain_end(self.answer(message))
            except KeyboardInterrupt:
                self.status.line("stopped")
            except KVComposeError as error:
                self.status.line(f"error: {error}{', or /clear' if isinstance(error, PositionsFull) else ''}")
            finally:
                self.status.settle()

    def _read_message(self) -> str | None:
        line = self.read_line()
        if line is None or not line.lstrip().startswith(_FENCE):
            return line
        text = line.lstrip()[len(_FENCE) :]
        if self.edit is not None and not text.rstrip().endswith(_FENCE):
            self.status.line(f"(several lines: {_FENCE} or Ctrl-D ends the message, Ctrl-C drops it)")
        while not text.rstrip().endswith(_FENCE):
            more = self.read_line()
            if more is None:
                return _Fenced(text)
            text += "\n" + more
        return _Fenced(text.rstrip()[: -len(_FENCE)].strip("\n"))

    def _is_command(self, message: str) -> bool:
        """What begins with a slash is one, but for pasted lines that begin with no name of one (a path, a comment)."""
        return message.startswith("/") and ("\n" not in message or message.split()[0] in COMMANDS)

    def answer(self, message: str) -> TurnStats:
        """Ask and stream; returns the turn's statistics."""
        return self._stream(self.chat.ask(message, max_tokens=self.max_tokens))

    def _stream(self, pieces: Generator[Said]) -> TurnStats:
        line_begins = True
        shared = self.out.isatty() and self.status.stream.isatty()
        printed = _Printed(self.out, hides_thinking=self.hides_thinking)
        with contextlib.closing(pieces), printed:  # what was answered counts where it cannot be written any more
            for piece in pieces:
                if line_begins or not piece.startswith("\n"):
                    self._warn_of_the_end(line_begins)
                printed.write(piece)
                line_begins = printed.line_begins
                self.status.inside_a_line = shared and not line_begins
        self.out.write("\n")
        self.out.flush()
        self.status.inside_a_line = False
        self._warn_of_the_end()
        return self.chat.turns[-1]

    def _warn_of_the_end(self, line_begins: bool = True) -> None:
        """Say once that few positions are left, perhaps too few for an answer, and once that very few are.

        The first of these waits for a line to begin.
        """
        memory = self.chat.memory
        n_ctx, left = memory.n_ctx, memory.n_ctx - memory.position
        few = min(max(n_ctx // 10, 256, self.max_tokens), n_ctx // 2)
        level = 2 if left < n_ctx // 50 else 1 if left < few else 0
        if left > 0 and level > self._warned and (line_begins or level == 2):
            self.status.line(f"{left} of {n_ctx} positions are left: {self._more_positions()}")
            self._warned = level
        self._warned = min(self._warned, level)

    def _more_positions(self) -> str:
        """What can be done about positions."""
        n_ctx, known = self.chat.memory.n_ctx, self.chat.memory.engine.shape.n_ctx_train
        if not self._takes_commands:
            return self.chat.memory.way_to_more_positions
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
            way = "/regen tries again" if self._takes_commands else "ask in other words, or with another --seed"
            thought = "thought and " if self.chat.messages[-1].get("reasoning") else ""
            self.status.line(f"(the model {thought}said nothing: {way})")
        elif stats.stopped == "interrupt":
            unread = self.chat.unread_tokens
            self.status.line(
                f"(stopped; {unread} tokens are read before your next message)" if unread > 1 else "(stopped)"
            )

    def _command(self, line: str) -> str | None:
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if name in _ALONE and argument:
            raise InvalidInput(f"{name} takes nothing after it; a space before it sends the line as a message")
        if name == "/quit":
            return "quit"
        if name == "/help":
            self.status.line(HELP)
        elif name == "/stats":
            self.status.line(self.describe())
        elif name == "/undo":
            self.status.line(f"taken back: {self.chat.undo()}{self._unread()}")
        elif name == "/regen":
            self._regen(argument)
        elif name == "/edit":
            self._edit(argument)
        elif name == "/forget":
            self.status.line(f"forgotten: {self.chat.forget_thinking()} tokens of thinking{self._unread()}")
        elif name == "/pin":
            self.status.line(
                f"pinned: {self.chat.pin()} tokens are kept whenever the cache is compressed{self._unread()}"
            )
        elif name == "/memory":
            self._memory()
        elif name == "/compress":
            self._compress(argument)
        elif name == "/clear":
            self.chat.clear()
            self.status.line("forgotten: the conversation is empty")
        elif name == "/system":
            self._system(argument)
        elif name == "/read":
            self._read_files(argument)
        elif name == "/save":
            self.status.line(self.save(argument))
        elif name == "/load":
            self.status.line(self.load(inputs.session_in(argument)))
        else:
            self.status.line(
                f"there is no {name}: /help lists the commands, and a space before it sends the line as a message"
            )
        return None

    def _unread(self) -> str:
        unread = self.chat.unread_tokens
        return f"; {unread} tokens are read before your next message" if unread > 1 else ""

    def _regen(self, argument: str) -> None:
        try:
            temperature = float(argument) if argument else None
        except ValueError:
            temperature = -1.0
        if temperature is not None and not 0 <= temperature <= 10:
            raise InvalidInput(f"/regen takes a temperature from 0 to 10, not {argument!r}")
        before = self.chat.messages[-1:]
        drawn = nullcontext() if temperature is None else self.at_temperature(temperature)
        with drawn:
            stats = self._stream(self.chat.ask_again(max_tokens=self.max_tokens))
        self.explain_end(stats)
        if self.chat.messages[-1:] == before and stats.stopped != "interrupt":
            self.status.line("(the same answer again: /regen 1 varies it more)")

    def _edit(self, argument: str) -> None:
        before = self.chat.last_message
        text: str | None = argument
        if not argument:
            if self.edit is None:
                raise InvalidInput("/edit takes the new text")
            with contextlib.suppress(KeyboardInterrupt), self.interrupts.waiting():
                text = self.edit(before)
        if text and text.strip():
            self.explain_end(self._stream(self.chat.ask(text, max_tokens=self.max_tokens, instead=True)))
        else:
            self.status.line("nothing is changed")

    def _memory(self) -> None:
        memory = self.chat.memory
        fancy = can_show(UNICODE_MARKS, self.status.stream.encoding)
        chart = draw(
            memory.engine.layout(),
            memory.engine.shape,
            cap_bytes=memory.engine.cache_bytes,
            width=shutil.get_terminal_size().columns,
            marks=UNICODE_MARKS if fancy else ASCII_MARKS,
        )
        self.status.line(chart)

    def _compress(self, argument: str) -> None:
        try:
            keep = float(argument) if argument else 0.5
        except ValueError as error:
            raise InvalidInput(f"/compress takes a share in (0, 1], not {argument!r}") from error
        if self.chat.memory.compact(keep) is None:
            self.status.line("there is nothing to compress yet")

    def _system(self, argument: str) -> None:
        if argument == '""':
            self.chat.set_system("")
            self.status.line(f"there is no system prompt any more{self._unread()}")
        elif argument:
            self.chat.set_system(argument)
            self.status.line(f"the system prompt is set{self._unread()}")
        else:
            self.status.line(self.chat.system or "there is no system prompt; /system TEXT sets one")

    def _read_files(self, argument: str) -> None:
        if not argument:
            raise InvalidInput("/read takes a file name")
        with self.interrupts.waiting():  # a pipe may keep it
            documents, empty = inputs.read_all(inputs.paths_in(argument))
        for name in empty:
            self.status.line(f"{name} holds no text: it is left out")
        check_room(self.chat, documents)
        for i, (name, text) in enumerate(documents):
            stats = self.chat.read(text)
            if stats.stopped == "interrupt":
                more = ", the files after it are not" if i + 1 < len(documents) else ""
                unread = self.chat.unread_tokens
                self.status.line(f"stopped; the other {unread} tokens are read before your next message{more}")
                break
            self.status.line(f"read {stats.prompt_tokens} tokens of {name}: ask about it")
        self._warn_of_the_end()
