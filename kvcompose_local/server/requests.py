"""Requests of protocols to the engine's thread, and the events of answers. Nothing here knows HTTP or llama.cpp."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from kvcompose_local.chat import Message
from kvcompose_local.chat_options import Sampling


@dataclass(frozen=True)
class Request:
    """A conversation to answer.

    messages, tools: of :class:`kvcompose_local.chat.Transcript`; begun: what the answer begins with, and is to go on
    from; prompt: a text to go on with instead of a conversation; max_tokens: None for as many as there are positions;
    grammar: in llama.cpp's notation; tool_choice: ``auto``, ``none``, ``required`` or a function's name;
    parallel_calls: whether there may be several; thinking: one of :data:`kvcompose_local.chat_options.THINKING`, None
    for what the server does unasked, as where the template has no switch; n_logprobs: of how many likeliest tokens they
    are told, None for none; chat_id: the kept chat to go on with; client: whose turn it takes.
    """

    model: str
    messages: tuple[Message, ...] = ()
    tools: str = ""
    begun: str = ""
    prompt: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    grammar: str = ""
    tool_choice: str = "auto"
    parallel_calls: bool = True
    thinking: str | None = None
    n_logprobs: int | None = None
    chat_id: str | None = None
    client: str = ""


class Refused(Exception):
    """A request that cannot be served: an HTTP status, one line, and what protocols call it.

    retry_after: seconds until it may be, with 503.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after


# -- events, in the order in which they come --------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How many tokens of the prompt were read, of how many must be."""

    done: int
    total: int


@dataclass(frozen=True)
class Begun:
    """The chat that was chosen; tokens of the prompt: in all, held, and read again though they were read before."""

    chat: str
    prompt_tokens: int
    cached: int
    reread: int


@dataclass(frozen=True)
class TokenChance:
    """A token that was drawn: its text as bytes, the logarithm of its probability, and the likeliest with theirs."""

    raw: bytes
    logprob: float
    likeliest: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True)
class Piece:
    """A piece of the answer, of whole characters."""

    text: str
    is_reasoning: bool = False
    chances: tuple[TokenChance, ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool: arguments are JSON of an object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Done:
    """The end of an answer: ``stop``, ``length`` or ``tool_calls``; stop: the stop text that ended it, if one did."""

    finish: str
    stop: str
    read: int
    generated: int
    reasoning: int
    prefill_seconds: float
    decode_seconds: float
    compactions: int
    compaction_seconds: float

    def timings(self) -> dict[str, float]:
        """As llama.cpp's server tells them."""
        return {
            "prompt_n": self.read,
            "prompt_ms": 1000 * self.prefill_seconds,
            "prompt_per_second": self.read / self.prefill_seconds if self.prefill_seconds else 0.0,
            "predicted_n": self.generated,
            "predicted_ms": 1000 * self.decode_seconds,
            "predicted_per_second": self.generated / self.decode_seconds if self.decode_seconds else 0.0,
            "compactions": self.compactions,
            "compaction_ms": 1000 * self.compaction_seconds,
        }


@dataclass(frozen=True)
class Result:
    """The result of a job that is no answer."""

    value: Any


@dataclass(frozen=True)
class Failed:
    """Why there is no answer, or no more of it."""

    error: Refused


Event = Reading | Begun | Piece | ToolCall | Done | Result | Failed


#: Seconds from one piece of an answer to the next. A piece wakes two more threads, this process's and the client's, and
#: on few cores they take time from the model's own; more than 25 a second nobody sees.
PIECE_SECONDS = 0.04


class Job:
    """A request on its way: the engine's thread emits events, a coroutine takes them.

    ``cancel`` may be called from anywhere; the engine's thread looks at ``is_cancelled`` at each token.
    """

    def __init__(self, client: str) -> None:
        self.client = client
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._held: Piece | None = None  # which goes with the next event
        self._sent = 0.0  # when a piece went last
        self.is_over = False

    def cancel(self) -> None:
        """Say that nobody waits for the answer any more."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def emit(self, event: Event) -> None:
        """Send an event; for the engine's thread. Pieces that come fast wait for the next event, and go with it."""
        held, self._held = self._held, None
        if isinstance(event, Piece) and held is not None and held.is_reasoning is event.is_reasoning:
            event = Piece(held.text + event.text, event.is_reasoning, held.chances + event.chances)
        elif held is not None:
            self._send(held)
        if isinstance(event, Piece):
            now = time.monotonic()
            if now - self._sent < PIECE_SECONDS:
                self._held = event
                return
            self._sent = now
        self._send(event)

    def _send(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self, every: float) -> AsyncIterator[Event | None]:
        """What happens, to its end; None every so many seconds in which nothing has. Leaving it cancels."""
        is_quiet = True
        timer: asyncio.TimerHandle

        def tick() -> None:  # a timeout for each token would take longer than the token's own way
            nonlocal timer
            self._events.put_nowait(None)
            timer = self._loop.call_later(every, tick)

        timer = self._loop.call_later(every, tick)
        try:
            while True:
                event = await self._events.get()
                if event is not None or is_quiet:
                    yield event
                is_quiet = event is None
                if isinstance(event, (Done, Result, Failed)):
                    self.is_over = True
                    return
        finally:
            timer.cancel()
            self.cancel()


def one_line(value: Any) -> str:
    """JSON in one line, as events and templates want it."""
    return json.dumps(value, ensure_ascii=False)
