"""Text of models, files and names is shown on a terminal, and never obeyed by it.

An escape sequence in an answer could write the clipboard, the title or the screen; a reversed line hides what it says.
The program's own sequences go through :meth:`Shown.control`. Pipes and files get everything as it is.
"""

from __future__ import annotations

import codecs
import io
import sys
from typing import TextIO

_SIGNS = {
    **{code: f"^{chr(code ^ 64)}" for code in (*range(32), 127) if code not in b"\t\n"},
    **{code: f"<U+{code:04X}>" for code in (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))},
}


def shown(text: str) -> str:
    """``text`` with visible signs in place of characters that a terminal obeys: C0 except tab and newline, DEL, C1, and
    characters that change the direction of writing.
    """
    return text.translate(_SIGNS)


class Shown(io.TextIOWrapper):
    """A terminal's text stream on which everything written is :func:`shown`. CRLF is a newline, wherever it is cut.

    It shares the file of the stream it replaces, which must not be written any more.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        stream.flush()
        self._replaced = stream  # whose end would close the file
        self._held = ""  # a carriage return, which may begin a CRLF
        # click would write past this one where it is ASCII.
        encoding = "utf-8" if codecs.lookup(stream.encoding).name == "ascii" else stream.encoding
        super().__init__(stream.buffer, encoding=encoding, errors=stream.errors, line_buffering=True)

    def write(self, text: str, /) -> int:
        whole = (self._held + text).replace("\r\n", "\n")
        self._held = "\r" if whole.endswith("\r") else ""
        super().write(shown(whole[: len(whole) - len(self._held)]))
        return len(text)

    def control(self, sequence: str) -> None:
        """Write a sequence that the terminal is to obey."""
        super().write(sequence)


def control(stream: TextIO, sequence: str) -> None:
    """Write a sequence that a terminal is to obey, on any stream."""
    if isinstance(stream, Shown):
        stream.control(sequence)
    else:
        stream.write(sequence)


def show_on_terminals() -> None:
    """Let standard output and error show what is written on them, where they are terminals."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, Shown) and stream.isatty():
            setattr(sys, name, Shown(stream))
