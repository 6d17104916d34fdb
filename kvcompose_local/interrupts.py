"""Ctrl-C and signals that end the program, as flags where an exception would do harm."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

#: Ctrl-C, ``kill``, a closed window; the last is not known everywhere.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """In this block, which must be short, signals wait for its end: what changes together stays together."""
    if threading.current_thread() is not threading.main_thread():  # where no signal is ever handled
        yield
        return
    waiting: list[int] = []
    # None is a handler that Python did not set, and could not put back.
    handlers: dict[signal.Signals, Any] = {n: signal.getsignal(n) for n in _SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if handler is not None}
    for known in handlers:
        signal.signal(known, lambda number, _frame: waiting.append(number))
    try:
        yield
    finally:
        for known, handler in reversed(handlers.items()):  # Ctrl-C last, whose handler may raise at once: here, ...
            signal.signal(known, handler)
        for number in sorted(set(waiting), key=lambda number: number == signal.SIGINT):  # ... and here
            signal.raise_signal(number)


class Interrupts:
    """Turns Ctrl-C into a flag while native code runs: an exception could not cross its frames.

    A second Ctrl-C before anyone looked at the flag raises KeyboardInterrupt as usual.
    """

    def __init__(self) -> None:
        self.requested = False
        self.leaving = 0  # the number of the signal that ends the program
        self._waiting = False
        #: Ends what waits in an order of its own, and tells whether there was such: an event loop loses exceptions.
        self.end_waiting: Callable[[], bool] = lambda: False

    def __call__(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self.requested

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Catch Ctrl-C in this block; only works in the main thread."""
        self.requested = False
        before: Any = signal.getsignal(signal.SIGINT)

        def on_interrupt(number: int, frame: FrameType | None) -> None:
            if self.requested:
                signal.default_int_handler(number, frame)
            self.requested = True

        signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def leaving_in_order(self) -> Iterator[None]:
        """In this block a closed window or ``kill`` sets ``leaving`` and counts as Ctrl-C: the chat can still be saved.

        Signals and Ctrl-C raise KeyboardInterrupt in a block of ``waiting`` alone, where nothing is cut in two.
        Elsewhere they set a flag, and a Ctrl-C that nobody ``caught`` comes when the work that it would stop is over.
        """

        def on_signal(number: int, _frame: FrameType | None) -> None:
            if self.leaving:  # a terminal that closes may say so twice, and the chat is being saved
                return
            self.leaving = number
            self.requested = True
            on_interrupt(number, None)

        def on_interrupt(_number: int, _frame: FrameType | None) -> None:
            if self._waiting and not self.end_waiting():
                raise KeyboardInterrupt

        handlers = {
            number: on_interrupt if number == signal.SIGINT else on_signal
            for number in _SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN  # nohup's wish
        }
        before: list[Any] = [signal.signal(number, handler) for number, handler in handlers.items()]
        try:
            yield
        finally:
            for number, handler in reversed([*zip(handlers, before, strict=True)]):
                signal.signal(number, handler)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """In this block KeyboardInterrupt tells of ``leaving``, even where it was set before: nothing looks at it."""
        try:
            self._waiting = True
            if self.leaving:
                raise KeyboardInterrupt
            yield
        finally:
            self._waiting = False
