"""A model with its chats: which of them answers a request, and which cells are in the engine meanwhile."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from kvcompose_local.api import LocalChat
from kvcompose_local.chat import ChatState, TurnStats, sessions
from kvcompose_local.chat.transcript import Saved, Transcript
from kvcompose_local.chat_options import ChatOptions
from kvcompose_local.errors import ContextFull, InvalidInput, KVComposeError, NoHome, PositionsFull
from kvcompose_local.install.model_files import model_digest, size_of
from kvcompose_local.install.resources import state_folder
from kvcompose_local.server.answers import Answer
from kvcompose_local.server.conversation import Conversation
from kvcompose_local.server.keeping import Keeping, Kept, marks_of, n_alike
from kvcompose_local.server.requests import Begun, Job, Reading, Refused, Request

log = logging.getLogger("kvcompose_local.server")

#: Chats that are looked at closely for each request.
_CANDIDATES = 4
#: Tokens from which what chats begin with is kept by itself; fewer are read again sooner than kept.
LEAST_PREFIX = 64
#: Tokens that a chat may lose to one that goes another way; one that would lose more stays, and the other is new.
_SPARED = 256
#: Of the F16 bytes of a chat's own tokens, what is kept of it where room is short.
KEEP_RATIO = 0.15


@dataclass(frozen=True)
class Options:
    """What models are served with, as ``kvcompose-local serve --help`` tells.

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
    """A model that is loaded when it is asked for. For the engine's thread, but for ``told`` and ``n_bytes``."""

    def __init__(self, name: str, path: Path, options: Options) -> None:
        self.name, self.path, self.options = name, path, options
        self.used = 0.0  # when it answered last
        self.keeping: Keeping | None = None
        self._local: LocalChat | None = None
        self._conversation: Conversation | None = None
        self._current: Kept | None = None  # whose cells are in the engine
        self._look()
        self._should_stop: Callable[[], bool] = lambda: False
        self._on_read: Callable[[int, int], None] = lambda _done, _total: None

    # -- the model ----------------------------------------------------------------------------------------------------

    @property
    def is_loaded(self) -> bool:
        return self._local is not None

    @property
    def conversation(self) -> Conversation:
        """Raises EngineError's kin where the model cannot be loaded."""
        if self._conversation is None:
            self.load()
        assert self._conversation is not None
        return self._conversation

    def load(self) -> None:
        """Load the model, and find its chats. Raises Refused where the memory that is free does not hold it."""
        if self._local is not None:
            return
        needed, free = size_of(self.path), psutil.virtual_memory().available
        if needed > free:
            raise Refused(
                503,
                f"{self.name} takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free",
                retry_after=60,
            )
        started = time.monotonic()
        local = LocalChat(self.path, replace(self.options.chat, system=""))
        try:
            self._conversation = Conversation(
                local.chat.model,
                local.memory,
                should_stop=lambda: self._should_stop(),
                on_read=lambda done, total: self._on_read(done, total),
                on_note=lambda line: log.info("%s: %s", self.name, line),
            )
            local.memory.on_progress = self._on_compacting
            if self.keeping is None:
                self.keeping = self._kept_chats(local)
        except BaseException:
            local.close()
            raise
        self._local, self._current, self.used = local, None, time.monotonic()
        self._look()
        log.info("%s: loaded in %.1f s", self.name, time.monotonic() - started)

    def _kept_chats(self, local: LocalChat) -> Keeping:
        folder = None
        if self.options.on_disk and not local.memory.engine.cannot_snapshot:
            with contextlib.suppress(NoHome):
                digest = model_digest(local.setup.model, None, local.setup.files)
                folder = state_folder() / "server" / f"{digest[:16]}"
        elif self.options.on_disk:
            log.info("%s: %s, so only the last chat goes on", self.name, local.memory.engine.cannot_snapshot)

        def write(path: Path, state: ChatState) -> int:
            assert self._local is not None
            return sessions.save_state(path, state, self._local.memory, self._local.setup)

        return Keeping(folder, self.options.keep, self.options.keep_disk, write)

    def unload(self) -> None:
        """Free the model; its chats stay."""
        if self._local is None:
            return
        if self.keeping is not None and self._conversation is not None:
            self.park()
            while (kept := self.keeping.unwritten()) is not None:
                self.keeping.write(kept)
                if not kept.is_written:
                    break
        self._local.close()
        self._local = self._conversation = self._current = None
        self._look()
        log.info("%s: unloaded", self.name)

    def close(self, seconds: float) -> None:
        """Save what can be saved in so many seconds, the last used first, and free the model."""
        until = time.monotonic() + seconds
        if self._local is not None and self.keeping is not None and self._conversation is not None:
            with contextlib.suppress(KVComposeError):
                self.park(shrink=False)
            while time.monotonic() < until and (kept := self.keeping.unwritten()) is not None:
                self.keeping.write(kept)
                if not kept.is_written:
                    break
            self._local.close()
        if self.keeping is not None:
            self.keeping.close()
        self._local = self._conversation = self._current = None

    def at_rest(self) -> None:
        """Nobody asks: write down the cells of one chat that are in memory alone."""
        if self.keeping is not None and self._local is not None and (kept := self.keeping.unwritten()) is not None:
            self.keeping.write(kept)

    def _on_compacting(self, _done: int, _total: int) -> None:
        if self._should_stop():
            raise KeyboardInterrupt

    # -- which chat is in the engine ----------------------------------------------------------------------------------

    def park(self, *, shrink: bool = True) -> None:
        """Keep the chat that is in the engine, which may be given to another then."""
        kept, keeping = self._current, self.keeping
        conversation = self.conversation
        assert keeping is not None
        if kept is None or conversation.memory.engine.cannot_snapshot or not conversation.memory.tokens:
            return
        if kept.state is not None and not kept.is_stale:
            return
        with self._undisturbed():
            kept.state, kept.n_bytes = None, 0  # of an earlier turn
            keeping.drop_stale()
            is_small = False
            if shrink and keeping.n_bytes + conversation.memory.used_bytes > keeping.bound:
                is_small = self._shrink()
            keeping.hold(kept, conversation.state(), is_small=is_small)
            if shrink:
                self._make_room(kept)

    def _shrink(self) -> bool:
        """Compact the chat in the engine to what is kept of it; returns whether that was done."""
        memory = self.conversation.memory
        wanted = self.options.keep_ratio * memory.position * memory.engine.shape.uncompressed_row_bytes
        share = wanted / max(memory.used_bytes, 1)
        if not memory.compose:
            return False
        if share < 1:
            try:
                memory.compact(share)
            except (ContextFull, InvalidInput) as error:
                log.info("a chat of %d tokens stays as it is: %s", memory.position, error)
        return True

    def _make_room(self, last: Kept) -> None:
        """Have what is kept in memory within its bound: chats lose cells first, and then their place."""
        keeping, conversation = self.keeping, self.conversation
        assert keeping is not None
        while keeping.over() and conversation.memory.compose and (kept := keeping.shrinkable()) is not None:
            self._current = None  # the engine is another's
            if kept.state is None:
                break
            conversation.restore(kept.state)
            kept.state, kept.n_bytes = None, 0
            self._shrink()
            keeping.hold(kept, conversation.state(), is_small=True)
            if kept is last:
                break
        while keeping.over() and keeping.evict():
            pass

    @contextlib.contextmanager
    def _undisturbed(self) -> Any:
        """What is kept of others is not cut short by one who hangs up."""
        before, self._should_stop = self._should_stop, lambda: False
        on_read, self._on_read = self._on_read, lambda _done, _total: None
        try:
            yield
        finally:
            self._should_stop, self._on_read = before, on_read

    def _state_of(self, kept: Kept) -> ChatState | None:
        """The cells of a chat, from disk where they are there alone; None where they are nowhere."""
        if kept.state is not None:
            return kept.state
        keeping, conversation = self.keeping, self.conversation
        assert keeping is not None and self._local is not None
        path = keeping.file_of(kept)
        if path is None or not kept.file_bytes:
            return None
        try:
            with self._undisturbed():
                self.park()
                self._current = None
                sessions.load(path, conversation, self._local.setup)
        except KVComposeError as error:
            log.warning("the cells of chat %s are not to be had, and its text is read again: %s", kept.id, error)
            kept.file_bytes, kept.is_written = 0, False
            return None
        keeping.hold(kept, conversation.state(), is_small=True)
        kept.is_written = True
        self._current = kept
        return kept.state

    # -- choosing -----------------------------------------------------------------------------------------------------

    def _held(self, state: ChatState, request: Request) -> int:
        """Tokens of a request that need not be read where the engine has these cells."""
        saved = Saved(
            state.system,
            state.draft,
            state.fed,
            state.messages,
            (*state.memory.tokens, *state.pending),
            state.steps,
            (),
        )
        from datetime import datetime

        said = Transcript.of(
            self.conversation.model, saved, datetime.fromtimestamp(state.began) if state.began else None
        )
        said.tools = state.tools
        return self._kept_of(
            said, request, state.memory.cells.position, state.memory.cells.n_live, state.memory.cells.window.size > 0
        )

    def _kept_of(self, said: Transcript, request: Request, position: int, n_live: int, has_window: bool) -> int:
        engine = self.conversation.memory.engine
        before, self.conversation.transcript = self.conversation.transcript, said
        try:
            want = (
                request.prompt
                if request.prompt is not None
                else self.conversation.want(request.messages, request.tools)
            )
        finally:
            self.conversation.transcript = before
        place = min(said.shared(want), position)
        if place == position or (place >= position - n_live and not has_window):
            return place
        n_tail = self.conversation.memory.policy.n_tail
        return place - n_tail if engine.goes_back and 2 * place > position and place > n_tail else 0

    def choose(self, request: Request) -> tuple[Kept | None, ChatState | None, int]:
        """The chat that has most of a request: it, its cells where they are not in the engine, and tokens it has."""
        keeping, conversation = self.keeping, self.conversation
        assert keeping is not None
        marks = marks_of(request.messages, request.tools)
        best: tuple[Kept | None, ChatState | None, int] = (None, None, 0)
        current = self._current
        if current is not None and conversation.transcript.fed:
            memory = conversation.memory
            layout = memory.engine.layout()
            # what the memory itself says counts: it knows how far a sliding window reaches
            place = self._place(request)
            if place == layout.position or memory.can_drop(place):
                best = current, None, place
        for kept in keeping.best(marks, _CANDIDATES):
            if kept is self._current and not kept.is_stale:
                continue
            on_disk = kept.state is None
            if on_disk and best[2] >= kept.n_tokens > 0:
                continue
            if on_disk and n_alike(marks, kept.marks) < min(len(kept.marks) - 1, len(marks) - 1):
                continue  # it parts early: its cells would be read for little
            state = self._state_of(kept)
            if state is not None and (held := self._held(state, request)) > best[2]:
                best = kept, None if kept is self._current and not kept.is_stale else state, held
        if best[0] is current and best[1] is None and self._current is not current:  # another was looked at meanwhile
            assert current is not None
            best = current, self._state_of(current), best[2]
        return best

    def _place(self, request: Request) -> int:
        conversation = self.conversation
        if request.prompt is not None:
            want = request.prompt
        else:
            want = conversation.want(request.messages, request.tools)
        return min(conversation.transcript.shared(want), conversation.memory.position)

    def _change_to(self, request: Request) -> Kept:
        """Have the cells that serve a request best in the engine; returns the chat that it belongs to."""
        keeping, conversation = self.keeping, self.conversation
        assert keeping is not None
        found, state, n_held = self.choose(request)
        target = self._target(found, request, n_held)
        if found is not None and state is None:  # they are there
            if target is not found:
                self.park()
                if self._current is not found:  # room was made for it
                    state = found.state
        elif found is not None:
            self.park()
        if found is not None and state is not None:
            try:
                conversation.restore(state)
            except KVComposeError as error:
                log.warning("the cells of chat %s cannot be had, and its text is read again: %s", found.id, error)
                found = None
            else:
                keeping.touch(found)
        if found is None:
            self.park()
            conversation.new()
        self._current = target
        target.is_stale = True
        n_held = n_held if found is not None else 0
        if request.prompt is None:
            self._keep_prefix(request, n_held)
        return target

    def _target(self, found: Kept | None, request: Request, n_held: int) -> Kept:
        """The chat that a request goes on with: the one it names or has most of, or a new one."""
        keeping = self.keeping
        assert keeping is not None
        if request.chat_id and (named := keeping.get(request.chat_id)) is not None:
            return named
        if found is None or found.is_prefix:
            return keeping.new()
        alike = n_alike(marks_of(request.messages, request.tools), found.marks)
        if alike >= len(found.marks) - 1 or found.n_tokens - n_held <= _SPARED:
            return found
        return keeping.new()

    def _keep_prefix(self, request: Request, n_held: int) -> None:
        """Read what the chat begins with first, and keep it, unless more than that is held."""
        keeping, conversation = self.keeping, self.conversation
        assert keeping is not None
        head = conversation.head(request.messages, request.tools)
        if not head or conversation.memory.engine.cannot_snapshot:
            return
        n_head = len(conversation.model.tokenize(head))
        if n_held >= n_head - 8 or n_head < LEAST_PREFIX:  # what is tokenized by itself may take a token more
            return
        stats = TurnStats()
        if conversation.read_head(request.messages, request.tools, stats):
            self._read_before = stats.prompt_tokens, stats.prefill_seconds
            kept = keeping.prefix(
                request.messages[:1] if request.messages[0]["role"] == "system" else (),
                request.tools,
                conversation.state(),
            )
            with self._undisturbed():
                if keeping.over():
                    keeping.drop_stale()
                while keeping.over() and keeping.evict():
                    pass
            log.info("a beginning of %d tokens is kept as %s", kept.n_tokens, kept.id)

    # -- answering ----------------------------------------------------------------------------------------------------

    def answer(self, request: Request, job: Job) -> None:
        """Answer a request. Raises Refused and KVComposeError."""
        self.load()
        conversation, keeping = self.conversation, self.keeping
        assert keeping is not None
        self.used = time.monotonic()
        self._should_stop = lambda: job.is_cancelled
        self._read_before: tuple[int, float] = (0, 0.0)
        try:
            want = request.prompt if request.prompt is not None else conversation.want(request.messages, request.tools)
            conversation.check_length(want)
            self._on_read = lambda done, total: job.emit(Reading(done, total))
            kept = self._change_to(request)
            answer = Answer(conversation, request, job)

            def on_begin(n_prompt: int, cached: int, reread: int) -> None:
                cached = max(cached - self._read_before[0], 0)
                job.emit(Begun(kept.id, n_prompt, cached, reread))
                log.info("chat %s: %d tokens, %d of them held, %d read again", kept.id, n_prompt, cached, reread)

            done = answer.run(on_begin, self._read_before)
            self._note(kept)
            if job.is_cancelled:
                log.info("chat %s: nobody waits any more", kept.id)
            job.emit(done)
        except PositionsFull as error:
            raise Refused(400, str(error), code="context_length_exceeded", param="messages") from error
        finally:
            self._should_stop = lambda: False
            self._on_read = lambda _done, _total: None
            conversation.memory.reports.clear()
            self._look()
            self.used = time.monotonic()

    def _note(self, kept: Kept) -> None:
        """Have the text of the chat in the engine on disk."""
        assert self.keeping is not None
        said = self.conversation.transcript
        self.keeping.tell(kept, said.messages, said.tools, len(said.tokens), said.began.timestamp(), self.name)

    # -- for others ---------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Note what other threads may want to know."""
        local, conversation = self._local, self._conversation
        if local is None or conversation is None:
            self.told, self.n_bytes = {"id": self.name, "loaded": False}, Bytes()
            return
        model, memory = conversation.model, local.memory
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
        }
