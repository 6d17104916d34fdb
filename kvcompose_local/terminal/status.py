"""Messages beside the answers: progress, compactions, and lines of any kind."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from kvcompose_local.chat.report import CompactionReport
from kvcompose_local.terminal.shown import control, shown
from kvcompose_local.terminal.wrapping import n_columns, wrapped

#: How often progress is shown, on a terminal and elsewhere; work of under a second shows none.
_REDRAW_SECONDS, _LINE_SECONDS = 0.2, 10.0
_BAR_WIDTH = 20
#: Work on so many is shown before its first part is done, which may take seconds.
_MANY = 256

#: To a line below the cursor, which is made where there is none and emptied, and back again: down a line, up, save the
#: place (DECSC), to the next line, erase it; restore the place (DECRC).
_TO_LINE_BELOW, _BACK = "\x1bD\x1b[A\x1b7\r\n\x1b[K", "\x1b8"


def _bar(done: int, total: int, n_before: int, width: int) -> str:
    """A progress bar behind ``n_before`` characters, where the terminal's ``width`` has room for it."""
    if not total or width <= n_before + _BAR_WIDTH + 3:
        return ""
    full = _BAR_WIDTH * min(done, total) // total
    return f" [{'#' * full}{'.' * (_BAR_WIDTH - full)}]"


class Status:
    """Progress and statistics on stderr: one line that is redrawn on a terminal, a line now and then otherwise."""

    def __init__(self, stream: TextIO, *, should_stop: Callable[[], bool] = lambda: False) -> None:
        self.stream = stream
        self.should_stop = should_stop
        self._terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = False
        self.inside_a_line = False  # an answer on the same terminal has not ended its line, so messages begin a new one
        self._reading = self._answering = False
        self._untold: list[CompactionReport] = []  # of the text that is being read or answered
        self._works: dict[
            str, tuple[float, int, int]
        ] = {}  # when each began, how far it was, and is: one may stop another
        self._last = 0.0

    def progress(self, what: str, done: int, total: int, unit: str = "tokens") -> None:
        """Show ``what done/total unit`` once the work lasts; raises KeyboardInterrupt when Ctrl-C was pressed."""
        now = time.monotonic()
        started, first, before = self._works.get(what, (now, done, done))
        if done == 0 or done < before:
            started, first = now, done
        if not self._works:
            self._last = now
        self._works[what] = started, first, done
        elapsed = now - started
        if done >= total > 0:
            del self._works[what]
            self._erase()
        elif (now - self._last >= (_REDRAW_SECONDS if self._terminal else _LINE_SECONDS) and elapsed >= 1) or (
            self._terminal and done == 0 and total >= _MANY
        ):
            left = f", {elapsed / (done - first) * (total - done):.0f} s left" if done > first and total else ""
            text = f"{what} {done}/{total} {unit}{left}" if total else f"{what} {done} {unit}"
            if self._terminal:
                width = n_columns(self.stream)
                text = shown(text + _bar(done, total, len(text), width))
                self._write(text[: max(width - 1, 1)], over=True)  # a wrapped line cannot be redrawn
            else:
                self._write(text + "\n")
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
        """Tell of a compaction: at once, or, while a text is read or answered, in one line for all at its end."""
        self._untold.append(report)
        if not self._reading:
            self.settle()

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """In this block an answer is printed, which no compaction is told in the middle of."""
        self._answering = True
        try:
            yield
        finally:
            self._answering = False
            self.settle()

    def settle(self) -> None:
        """Tell of compactions that were not told yet: reading has ended."""
        self._reading = False
        self._tell()

    def _tell(self) -> None:
        if self._untold and not self._answering:
            *earlier, last = self._untold
            self._untold = []
            self.line(last.line(*earlier))

    def fetching(self, done: int, total: int) -> None:
        """Progress of a download, in bytes."""
        self.progress("fetching:", done >> 20, total >> 20, "MiB")

    def checking(self, done: int, total: int) -> None:
        """Progress of hashing a model, in MiB."""
        self.progress("checking the model:", done, total, "MiB")

    def line(self, text: str, *, indent: int = 0) -> None:
        """Print one line; on a terminal it is wrapped at words, and ``indent`` is that of the lines that go on."""
        self._tell()
        self._erase()
        self._write((wrapped(shown(text), n_columns(self.stream), indent) if self.stream.isatty() else text) + "\n")

    def _erase(self) -> None:
        if self._shown:
            self._write("", over=True)
            self._shown = False

    def _write(self, text: str, *, over: bool = False) -> None:
        """Write text; with ``over``, in place of what the line holds already."""
        with contextlib.suppress(OSError):  # a window that is gone must not end what is done in its name
            if over and self.inside_a_line:  # below it, so that the answer goes on where it is
                control(self.stream, _TO_LINE_BELOW)
                self.stream.write(text)
                control(self.stream, _BACK)
            else:
                if self.inside_a_line:
                    self.inside_a_line = False
                    self.stream.write("\n")
                if over:
                    control(self.stream, "\r\x1b[K")
                self.stream.write(text)
            self.stream.flush()
