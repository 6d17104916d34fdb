"""The part that all protocols share: models by name, the engine's thread, and answers on their way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import psutil
from starlette.requests import Request as HttpRequest

from kvcompose_local import __version__
from kvcompose_local.errors import KVComposeError
from kvcompose_local.server.hosted import Hosted
from kvcompose_local.server.metrics import Metrics
from kvcompose_local.server.requests import (
    Begun,
    Done,
    Event,
    Failed,
    Job,
    Piece,
    Reading,
    Refused,
    Request,
    Result,
    ToolCall,
)
from kvcompose_local.server.worker import Worker

log = logging.getLogger("kvcompose_local.server")

#: Seconds after which an idle stream says that it is alive; proxies give up after 30 or more.
PING_SECONDS = 5.0
#: Seconds between two messages of how far a prompt is read.
PROGRESS_SECONDS = 1.0
#: Seconds that a stream waits for the content of its headers, before it begins without them.
_PATIENCE = 5.0


class Service:
    """The models that are served, and the thread that runs them.

    models: by name, the first is taken where nobody names one; idle_unload: seconds after which a model that nobody
    asked is freed, 0 for never; defaults: of sampling, as ``/props`` tells them.
    """

    def __init__(self, models: Mapping[str, Hosted], *, idle_unload: float = 0, defaults: Any = None) -> None:
        self.models = dict(models)
        self.default = next(iter(self.models))
        self.defaults = defaults
        self.idle_unload = idle_unload
        self.metrics = Metrics(self.props)
        self.worker = Worker(self._at_start, self._at_rest, self._at_the_end)
        self.failure: BaseException | None = None  # why the first model cannot be loaded
        self.on_failure: Callable[[BaseException], None] = lambda _error: None
        self.started = int(time.time())

    # -- for the engine's thread --------------------------------------------------------------------------------------

    def _at_start(self) -> None:
        try:
            _ = self.models[self.default].exchange
        except BaseException as error:
            self.failure = KVComposeError(str(error)) if isinstance(error, Refused) else error
            self.on_failure(error)

    def _at_rest(self) -> None:
        for hosted in self.models.values():
            if hosted.is_loaded:
                hosted.at_rest()
                if self.idle_unload and time.monotonic() - hosted.used > self.idle_unload:
                    hosted.unload()

    def _at_the_end(self) -> None:
        for hosted in self.models.values():
            hosted.close(0.7)

    # -- asking -------------------------------------------------------------------------------------------------------

    def hosted(self, name: str | None) -> Hosted:
        """The model of a name. Raises Refused."""
        if not name or name == "default":
            return self.models[self.default]
        found = self.models.get(name)
        if found is None:
            known = ", ".join(self.models)
            raise Refused(404, f"there is no model {name[:100]!r}: {known}", code="model_not_found", param="model")
        return found

    def ask(self, request: Request) -> Job:
        """A request that waits for its turn. Raises Refused."""
        hosted = self.hosted(request.model)
        return self.submit(request.client, lambda job: hosted.answer(request, job))

    def submit(self, client: str, work: Callable[[Job], None]) -> Job:
        """Work for the engine's thread. Raises Refused where too much waits."""
        job = Job(client)
        try:
            self.worker.submit(job, work)
        except Refused:
            self.metrics.refused.inc()
            raise
        return job

    async def result(self, http: HttpRequest, work: Callable[[Job], None]) -> Any:
        """What work for the engine's thread gives. Raises Refused."""
        job = self.submit(client_of(http), work)
        async with watching(http, job):
            async for event in job.events(PING_SECONDS):
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Result):
                    return event.value
        raise Refused(503, "the server is stopping", retry_after=5)

    def props(self) -> dict[str, Any]:
        """The server's models, queue and memory."""
        kept = [h.keeping for h in self.models.values() if h.keeping is not None]
        sizes = [h.n_bytes for h in self.models.values()]
        options = self.models[self.default].options
        cells = {"bytes": sum(s.cells for s in sizes), "used": sum(s.used for s in sizes)}
        compute = {"bytes": sum(s.compute for s in sizes)}
        chats = {
            "bytes": sum(k.n_bytes for k in kept),
            "bound": options.keep * len(self.models),
            "chats": sum(len(k.listed()) for k in kept),
        }
        return {
            "program": "kvcompose-local",
            "version": __version__,
            "models": [h.told for h in self.models.values()],
            "default_model": self.default,
            "default_sampling": self.defaults,
            "queue": {
                "waiting": len(self.worker.queue),
                "bound": self.worker.queue.bound,
                "running": int(self.worker.running is not None),
            },
            "ceiling": {
                "cells": cells,
                "kept": chats,
                "compute": compute,
                "disk": {"bytes": sum(k.disk_bytes for k in kept), "bound": options.keep_disk * len(self.models)},
                "rss": psutil.Process().memory_info().rss,
                "total_bound": cells["bytes"] + compute["bytes"] + chats["bound"],
            },
        }


def client_of(http: HttpRequest) -> str:
    """The client whose turn a request takes: its own name for itself, or its address."""
    host = http.client.host if http.client else ""
    return f"{host} {http.headers.get('x-kvcompose-client', http.headers.get('user-agent', ''))[:200]}"


@contextlib.asynccontextmanager
async def watching(http: HttpRequest, job: Job) -> AsyncIterator[None]:
    """In this block a client that hangs up cancels its job. The request's body must have been read."""

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Answering:
    """An answer on its way: its events, and what was known when its headers had to be sent."""

    def __init__(self, service: Service, http: HttpRequest, job: Job) -> None:
        self._service, self._http, self._job = service, http, job
        self._events = job.events(PING_SECONDS)
        self._early: list[Event | None] = []
        self._begun: Begun | None = None

    @classmethod
    async def start(cls, http: HttpRequest, job: Job, *, streams: bool) -> Answering:
        """Wait until the answer's reading begins, or, for one that streams, for some seconds. Raises Refused."""
        answering = cls(http.app.state.service, http, job)
        await answering._wait(_PATIENCE if streams else math.inf)
        return answering

    @property
    def has_begun(self) -> bool:
        """Whether the reading has begun."""
        return self._begun is not None

    @property
    def begun(self) -> Begun:
        """What was known when the reading began. Raises RuntimeError before that."""
        if self._begun is None:
            raise RuntimeError("the answer has not begun")
        return self._begun

    async def _wait(self, patience: float) -> None:
        until = time.monotonic() + patience
        async with watching(self._http, self._job):
            while not self.has_begun and time.monotonic() < until:
                event = await anext(self._events, None)
                self._early.append(event)
                if isinstance(event, Failed):
                    self._service.metrics.count(event)
                    raise event.error
                if isinstance(event, Begun):
                    self._begun = event

    @property
    def headers(self) -> dict[str, str]:
        """Headers that tell of the answer before it begins."""
        if not self.has_begun:
            return {}
        return {"X-KVCompose-Chat": self.begun.chat, "X-KVCompose-Cached": str(self.begun.cached)}

    async def __aiter__(self) -> AsyncIterator[Event | str]:
        """Events, and between them what a comment of a stream says."""
        told = 0.0
        async with watching(self._http, self._job):
            async for event in self._all():
                if event is None:
                    before = self._service.worker.queue.before(self._job)
                    yield f"waiting {before + 1}" if before >= 0 else "ping"
                elif isinstance(event, Reading):
                    if time.monotonic() - told >= PROGRESS_SECONDS:
                        told = time.monotonic()
                        yield f"reading {event.done}/{event.total}"
                else:
                    if isinstance(event, Begun):
                        self._begun = event
                    self._service.metrics.count(event, self._begun)
                    yield event
                    if isinstance(event, (Done, Failed)):
                        return

    async def whole(self) -> tuple[list[Piece | ToolCall], Done]:
        """All that is said, and how it ended. Raises Refused."""
        said: list[Piece | ToolCall] = []
        async for event in self:
            if isinstance(event, (Piece, ToolCall)):
                said.append(event)
            elif isinstance(event, Failed):
                raise event.error
            elif isinstance(event, Done):
                return said, event
        raise Refused(503, "the server is stopping", retry_after=5)

    async def _all(self) -> AsyncIterator[Event | None]:
        for event in self._early:
            if event is not None:
                yield event
        self._early = []
        async for later in self._events:
            yield later
