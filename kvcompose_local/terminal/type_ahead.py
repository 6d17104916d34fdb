"""What is typed while the program works: it is not echoed, and becomes the draft of the next message."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from types import FrameType

_LOCAL, _CONTROL = 3, 6  # of what tcgetattr returns
#: What is pasted comes in parts: the next is waited for so long.
_PASTE_SECONDS = 0.05
_KEYS = re.compile(r"\x1b(?:\[[0-9;?]*[@-~]|O.|.)?", re.DOTALL)


def _terminal() -> int | None:
    """Standard input, where it is a terminal that listens to this program; otherwise None."""
    try:
        number = sys.stdin.fileno()
        return number if os.isatty(number) and os.tcgetpgrp(number) == os.getpgrp() else None
    except (OSError, ValueError, AttributeError):
        return None


def _hide(terminal: int) -> list[int | list[bytes | int]]:
    """Echo nothing, and keep all that is typed as it is, but for the keys of signals; returns what was set before."""
    import termios  # not on Windows, where there is no such terminal

    before = termios.tcgetattr(terminal)
    now = termios.tcgetattr(terminal)
    now[_LOCAL] &= ~(termios.ECHO | termios.ICANON)
    now[_CONTROL][termios.VMIN], now[_CONTROL][termios.VTIME] = 1, 0
    termios.tcsetattr(terminal, termios.TCSANOW, now)
    return before


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """In this block nothing typed is echoed; whatever ends or stops the program gives the terminal back before."""
    terminal = _terminal()
    if terminal is None:
        yield
        return

    import termios

    before = _hide(terminal)

    def restore() -> None:
        with contextlib.suppress(termios.error):  # it is gone
            termios.tcsetattr(terminal, termios.TCSANOW, before)

    def on_signal(number: int, _frame: FrameType | None) -> None:
        restore()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # comes back where that stopped it and it goes on
        signal.signal(number, on_signal)
        if _terminal() is not None:
            _hide(terminal)

    stops = (signal.SIGTSTP, signal.SIGTERM, signal.SIGHUP)  # what stops or ends a program that does nothing about it
    taken = [number for number in stops if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
        restore()


def typed() -> str:
    """All that was typed and not read yet, without the keys that move a cursor and without newlines at its end."""
    terminal = _terminal()
    if terminal is None:
        return ""
    raw = b""
    with hidden():  # where lines are kept back until they end, half of one could not be read
        while select.select([terminal], [], [], _PASTE_SECONDS if raw else 0)[0]:
            part = os.read(terminal, 1 << 16)
            if not part:
                break
            raw += part
    text = _KEYS.sub("", raw.decode("utf-8", "replace").replace("\r", "\n"))
    kept: list[str] = []
    for sign in text:
        if sign in "\x7f\b":
            del kept[-1:]
        elif sign in "\t\n" or sign >= " ":
            kept.append(sign)
    return "".join(kept).rstrip("\n")
