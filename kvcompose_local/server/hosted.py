"""A served model: it is loaded when somebody asks for it, freed when nobody does, and its chats are kept meanwhile."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from kvcompose_local.api import LocalChat
from kvcompose_local.chat import ChatState, TurnStats, sessions
from kvcompose_local.chat_options import ChatOptions
from kvcompose_local.errors import InvalidInput, KVComposeError, ModelError, NoHome, PositionsFull, SessionError
from kvcompose_local.install.model_files import model_digest, size_of
from kvcompose_local.install.resources import state_folder
from kvcompose_local.server.answers import answer
from kvcompose_local.server.conversation import Conversation
from kvcompose_local.server.exchange import Exchange
from kvcompose_local.server.keeping import Keeping, Kept
from kvcompose_local.server.memory_view import memory_view
from kvcompose_local.server.requests import Begun, Job, Reading, Refused, Request

log = logging.getLogger("kvcompose_local.server")

#: The share of the F16 bytes of a chat's own tokens that is kept of it where room is short.
KEEP_RATIO = 0.15


@dataclass(frozen=True)
class Options:
    """The options that models are served with, as ``kvcompose-local serve --help`` tells.

    keep, keep_disk: bytes of chats that wait, in memory and on disk; keep_ratio: what is kept of one where room is
    short, a share of its own tokens' F16 bytes.
    """

    chat: ChatOptions
    keep: int = 2 << 30
    keep_disk: int = 8 << 30
    keep_ratio: float = KEEP_RATIO
    on_disk: bool = True


class Bytes(NamedTuple):
    """Bytes of all cells, of those in use, and of work buffers."""

    cells: int = 0
    used: int = 0
    compute: int = 0


class Hosted:
    """A model by its name.

    For the engine's thread; any thread may use ``told``, ``n_bytes``, and what :class:`Keeping` allows.
    """

    def __init__(self, name: str, path: Path, options: Options) -> None:
        self.name, self.path, self.options = name, path, options
        self.used = 0.0  # when it answered last
        self.keeping: Keeping | None = None
        self._local: LocalChat | None = None
        self._exchange: Exchange | None = None
        self._look()

    @property
    def is_loaded(self) -> bool:
        return self._local is not None

    @property
    def exchange(self) -> Exchange:
        """The model's chats; it is loaded if need be. Raises Refused and KVComposeError."""
        if self._exchange is None:
            self._exchange = self._load()
            self._look()
        return self._exchange

    def _load(self) -> Exchange:
        needed, free = size_of(self.path), psutil.virtual_memory().available
        if needed > free:
            told = f"{self.name} takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
            raise Refused(503, told, retry_after=60)
        started = time.monotonic()
        local = LocalChat(self.path, replace(self.options.chat, system=""))
        try:
            conversation = Conversation(
                local.chat.model, local.memory, on_note=lambda line: log.info("%s: %s", self.name, line)
            )
            if self.keeping is None:
                self.keeping = self._kept_chats(local)
        except BaseException:
            local.close()
            raise
        self._local, self.used = local, time.monotonic()
        log.info("%s: loaded in %.1f s", self.name, time.monotonic() - started)
        return Exchange(conversation, self.keeping, local.setup, self.options.keep_ratio)

    def _kept_chats(self, local: LocalChat) -> Keeping:
        folder = None
        if self.options.on_disk:
            with contextlib.suppress(NoHome):
                digest = model_digest(local.setup.model, None, local.setup.files)
                folder = state_folder() / "server" / digest[:16]

        def write(path: Path, state: ChatState) -> int:
            if self._local is None:
                raise SessionError(f"{self.name} is not loaded")
            return sessions.save_state(path, state, self._local.memory, self._local.setup)

        return Keeping(folder, self.options.keep, self.options.keep_disk, write)

    def unload(self) -> None:
        """Free the model; its chats stay."""
        if self._exchange is not None:
            with contextlib.suppress(KVComposeError):
                self._exchange.park(at_the_end=True)
            self._write(time.monotonic() + 60)
            self._free()
            log.info("%s: unloaded", self.name)

    def close(self, seconds: float) -> None:
        """Save what can be saved in so many seconds, the last used first, and free the model."""
        until = time.monotonic() + seconds
        if self._exchange is not None:
            with contextlib.suppress(KVComposeError):
                self._exchange.park(at_the_end=True)
            self._write(until)
            self._free()
        if self.keeping is not None:
            self.keeping.close()

    def _write(self, until: float) -> None:
        """Write to disk what is in memory alone."""
        keeping = self.keeping
        while keeping is not None and time.monotonic() < until and (kept := keeping.unwritten()) is not None:
            keeping.write(kept)
            if not kept.is_written:  # the disk refuses
                return

    def _free(self) -> None:
        if self._local is not None:
            self._local.close()
        self._local = self._exchange = None
        self._look()

    def at_rest(self) -> None:
        """While nobody asks, make room, and write down the cells of one chat that are in memory alone."""
        if self._exchange is not None:
            self._exchange.at_rest()
        if self.keeping is not None and self._local is not None and (kept := self.keeping.unwritten()) is not None:
            self.keeping.write(kept)

    # -- what is asked ------------------------------------------------------------------------------------------------

    def answer(self, request: Request, job: Job) -> None:
        """Answer a request. Raises Refused and KVComposeError."""
        exchange = self.exchange
        conversation, keeping = exchange.conversation, exchange.keeping
        exchange.should_stop = lambda: job.is_cancelled
        stats = TurnStats()
        self._think(request, conversation)
        try:
            conversation.check_length(_want_of(request, conversation), request.messages, request.tools)
            conversation.on_read = lambda done, total: job.emit(Reading(done, total))
            kept = exchange.change_to(request, stats)

            def on_begin(n_prompt: int, n_held: int, reread: int) -> None:
                cached = max(n_held - stats.prompt_tokens, 0)  # its beginning may have been read just now
                log.info("chat %s: %d tokens, %d held, %d read again", kept.id, n_prompt, cached, reread)
                job.emit(Begun(kept.id, n_prompt, cached, reread))

            done = answer(conversation, request, job, stats, on_begin)
            said = conversation.transcript
            if request.prompt is None:  # the rest is nobody's chat
                keeping.tell(kept, said.messages, said.tools, len(said.tokens), said.began.timestamp(), self.name)
            if stats.stopped == "interrupt":  # whoever still waits must not take half an answer for a whole one
                log.info("chat %s: its answer was stopped", kept.id)
                raise Refused(503, "the answer was stopped before its end: ask again", retry_after=5)
            job.emit(done)
        except PositionsFull as error:
            raise Refused(400, str(error), code="context_length_exceeded", param="messages") from error
        finally:
            exchange.should_stop = lambda: False
            conversation.on_read = None
            self._look()

    def count(self, request: Request) -> int:
        """Tokens of a request's conversation. Raises KVComposeError."""
        conversation = self.exchange.conversation
        self._think(request, conversation)
        return conversation.transcript.n_tokens_of(_want_of(request, conversation), request.messages, request.tools)

    def _think(self, request: Request, conversation: Conversation) -> None:
        """Let the template turn thinking on or off as the request says, or else as the server was told."""
        usual = self.options.chat.thinking
        if not conversation.model.use_thinking(request.thinking or usual):
            conversation.model.use_thinking(usual)

    def is_current(self, kept: Kept) -> bool:
        """Whether the engine holds its cells."""
        exchange = self._exchange
        return exchange is not None and exchange.current is not None and exchange.current.id == kept.id

    def forget(self, kept: Kept) -> None:
        """Forget a chat."""
        exchange = self.exchange
        if exchange.current is kept:
            exchange.current = None
            exchange.conversation.new()
        exchange.keeping.forget(kept)
        self._look()

    def memory_view(self, kept: Kept, budget: float | None, job: Job) -> dict[str, Any]:
        """What a chat remembers, or would at ``budget`` × its own tokens' F16 bytes. Raises Refused."""
        exchange = self.exchange
        conversation = exchange.conversation
        if budget is None:
            state = conversation.view() if exchange.current is kept else exchange.state_of(kept)
            if state is None:
                raise Refused(409, "the cells of this chat are gone: its next request reads it again", code="no_cells")
            return memory_view(conversation, state)
        exchange.should_stop = lambda: job.is_cancelled
        try:
            self._take_in(kept)
            memory = conversation.memory
            n_bytes = int(budget * memory.position * memory.engine.shape.uncompressed_row_bytes)
            would = memory.would_keep(n_bytes) if n_bytes < memory.used_bytes and memory.compose else None
            return memory_view(conversation, conversation.view(), kept=would)
        except KeyboardInterrupt as error:
            raise Refused(503, "nobody waits any more") from error
        finally:
            exchange.should_stop = lambda: False
            self._look()

    def _take_in(self, kept: Kept) -> None:
        if not self.exchange.take_in(kept):
            raise Refused(409, "the cells of this chat are gone: its next request reads it again", code="no_cells")

    def pin(self, kept: Kept, start: int, stop: int, job: Job) -> dict[str, Any]:
        """Keep the tokens from ``start`` to ``stop`` in all layers and heads. Raises Refused and ContextFull."""
        exchange = self.exchange
        self._take_in(kept)
        conversation = exchange.conversation
        if not 0 <= start < stop <= conversation.memory.position:
            raise InvalidInput(f"this chat has {conversation.memory.position} tokens: there are no {start} to {stop}")
        exchange.should_stop = lambda: job.is_cancelled
        try:
            n_again = conversation.pin_passage(start, stop)
            kept.is_stale, kept.is_written = True, False
            return {"pins": [[*pin] for pin in conversation.memory.pins], "reread": n_again}
        finally:
            exchange.should_stop = lambda: False
            self._look()

    def unpin(self, kept: Kept, _job: Job) -> dict[str, Any]:
        """Let everything compete again but the system prompt. Raises Refused."""
        self._take_in(kept)
        conversation = self.exchange.conversation
        conversation.unpin_all()
        kept.is_stale, kept.is_written = True, False
        return {"pins": [[*pin] for pin in conversation.memory.pins]}

    # -- for others ---------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Take down figures for other threads."""
        self.used = time.monotonic()
        if self._local is None:
            self.told: dict[str, Any] = {"id": self.name, "loaded": False}
            self.n_bytes = Bytes()
            return
        memory, model = self._local.memory, self._local.chat.model
        memory.reports.clear()  # a server's have no end
        engine = memory.engine
        self.n_bytes = Bytes(engine.cache_bytes, memory.used_bytes, engine.compute_bytes or 0)
        self.told = {
            "id": self.name,
            "loaded": True,
            "n_ctx": memory.n_ctx,
            "budget": self.options.chat.budget,
            "cache_type": engine.shape.cache_type,
            "engine": engine.name,
            "has_template": model.has_template,
            "thinks": model.reasoning_format.name != "unknown",
            "folds_system": model.folds_system,
        }


def _want_of(request: Request, conversation: Conversation) -> str:
    """The text of a request. Raises Refused where the model's template does not take its messages."""
    try:
        return conversation.want_of(request)
    except ModelError as error:
        raise Refused(400, str(error), param="messages") from error
