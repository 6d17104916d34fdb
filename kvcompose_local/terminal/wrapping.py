"""Text is wrapped at words on a terminal; a command between backticks is one word, so that it can be copied."""

from __future__ import annotations

import os
import re
import shutil
from typing import TextIO

_WORD = re.compile(r"\s*(?:[^\s`]*`[^`]*`\S*|\S+)")


def n_columns(stream: TextIO) -> int:
    """The width of a stream's terminal; of no terminal, what the environment says or 80."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or shutil.get_terminal_size().columns
    except (OSError, ValueError):  # it has no file, or a file that is no terminal
        return shutil.get_terminal_size().columns


def n_shown(text: str) -> int:
    """The columns that ``text`` takes, two for a wide character."""
    if text.isascii():
        return len(text)
    from prompt_toolkit.utils import get_cwidth  # late: it takes a while, and most text is ASCII

    return get_cwidth(text)


def wrapped(text: str, width: int, indent: int = 0) -> str:
    """``text`` with newlines in place of the spaces before words that would not fit ``width`` columns.

    indent: of lines that go on, where half of the width is left. A word longer than a line is left to the terminal.
    """
    return "\n".join(_wrapped(line, width, " " * min(indent, width // 2)) for line in text.split("\n"))


def _wrapped(line: str, width: int, margin: str) -> str:
    if n_shown(line) <= width:
        return line
    done, column = "", 0
    for word in _WORD.findall(line):
        n = n_shown(word)
        if column and column + n > width:
            word = margin + word.lstrip()
            done, column, n = done + "\n", 0, n_shown(word)
        done, column = done + word, column + n
    return done
