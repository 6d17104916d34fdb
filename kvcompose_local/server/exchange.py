"""Which chat is in the engine: chats change places with those that are kept, and a request gets the one that serves it.

A request goes on from the cells that have most of it, compared as :mod:`kvcompose_local.chat.transcript` compares: by
the text that the template makes of it now. Cells that are composed can be gone back in only so far; where that does not
do, an earlier turn of the chat serves, or what chats begin with, which is kept by itself.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime

from kvcompose_local.chat import ChatState, TurnStats, sessions
from kvcompose_local.chat.steps import Saved
from kvcompose_local.chat.transcript import Transcript
from kvcompose_local.errors import ContextFull, InvalidInput, KVComposeError
from kvcompose_local.server.conversation import Conversation
from kvcompose_local.server.keeping import Keeping, Kept, bytes_of_waiting, marks_of, n_alike
from kvcompose_local.server.requests import Request

log = logging.getLogger("kvcompose_local.server")

#: Chats that are looked at closely for each request.
_CANDIDATES = 4
#: Tokens from which what chats begin with is kept by itself; fewer are read again sooner than kept.
LEAST_PREFIX = 64
#: Tokens that a prompt may have more where its beginning is tokenized by itself.
_SEAM = 8


@dataclass(frozen=True)
class Choice:
    """What serves a request best: a chat, its cells where the engine does not hold them, and tokens it has of it."""

    kept: Kept | None = None
    state: ChatState | None = None
    n_held: int = 0


class Exchange:
    """The conversation in the engine and the chats that wait. For the engine's thread.

    keep_ratio: what is kept of a chat where room is short, a share of its own tokens' F16 bytes.
    """

    def __init__(self, conversation: Conversation, keeping: Keeping, setup: sessions.Setup, keep_ratio: float) -> None:
        self.conversation, self.keeping, self.setup = conversation, keeping, setup
        self._keep_ratio = keep_ratio
        self.current: Kept | None = None
        self._head = "", 0  # what a chat began with last, and its tokens
        self.should_stop: Callable[[], bool] = lambda: False
        conversation.should_stop = lambda: self.should_stop()
        conversation.memory.on_progress = self._on_compacting

    def _on_compacting(self, _done: int, _total: int) -> None:
        if self.should_stop():
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """What is kept of others is not cut short by one who hangs up."""
        before, self.should_stop = self.should_stop, lambda: False
        on_read, self.conversation.on_read = self.conversation.on_read, None
        try:
            yield
        finally:
            self.should_stop, self.conversation.on_read = before, on_read

    # -- room ---------------------------------------------------------------------------------------------------------

    def park(self, *, at_the_end: bool = False) -> ChatState | None:
        """Keep the chat that is in the engine; returns its cells, None where there are none to keep.

        Afterwards ``current`` is None where the engine was needed to make room; at_the_end: room does not matter.
        """
        kept, keeping, memory = self.current, self.keeping, self.conversation.memory
        if kept is None or not self._can_wait(kept):
            return None
        if kept.state is not None and not kept.is_stale:
            return kept.state
        n_bytes = bytes_of_waiting(memory, self.conversation.transcript.fed)
        with self._undisturbed():
            kept.state, kept.n_bytes = None, 0  # of an earlier turn
            if not at_the_end:
                keeping.drop_stale(n_bytes)
            is_small = not at_the_end and keeping.n_bytes + n_bytes > keeping.bound and self._shrink()
            state = self.conversation.state()
            keeping.hold(kept, state, is_small=is_small)
            if not at_the_end:
                self._make_room()
        return state

    def _can_wait(self, kept: Kept) -> bool:
        """Whether the chat in the engine has cells that can be kept."""
        memory = self.conversation.memory
        return kept in self.keeping and not memory.engine.cannot_snapshot and bool(memory.tokens)

    def _shrink(self) -> bool:
        """Compact the chat in the engine to what is kept of it; returns whether that is all that can be done."""
        memory = self.conversation.memory
        if not memory.compose:
            return False
        wanted = self._keep_ratio * memory.position * memory.engine.shape.uncompressed_row_bytes
        share = wanted / max(memory.used_bytes, 1)
        if share < 1:
            try:
                memory.compact(share)
            except (ContextFull, InvalidInput) as error:
                log.info("a chat of %d tokens stays as it is: %s", memory.position, error)
        return True

    def _make_room(self) -> None:
        """Have what is kept in memory within its bound: chats lose cells first, and then their place."""
        while self.keeping.over() and (found := self._shrinkable()) is not None:
            self._shrink_kept(*found)
        while self.keeping.over() and self.keeping.evict():
            pass

    def _shrinkable(self) -> tuple[Kept, ChatState] | None:
        return self.keeping.shrinkable() if self.conversation.memory.compose else None

    def _shrink_kept(self, kept: Kept, state: ChatState) -> None:
        """Shrink a chat that waits, in the engine, which holds nobody's chat afterwards."""
        self.current = None
        self.conversation.restore(state)
        kept.state, kept.n_bytes = None, 0
        self._shrink()
        self.keeping.hold(kept, self.conversation.state(), is_small=True)

    def at_rest(self) -> None:
        """While nobody asks: shrink a chat that waits, where the one in the engine will want its room.

        The next request would wait for that.
        """
        current, keeping, memory = self.current, self.keeping, self.conversation.memory
        if current is None or not self._can_wait(current) or not (current.is_stale or current.state is None):
            return
        n_bytes = bytes_of_waiting(memory, self.conversation.transcript.fed)
        keeping.drop_stale(n_bytes)
        found = self._shrinkable() if keeping.n_bytes + n_bytes > keeping.bound else None
        if found is not None:
            state = self.conversation.state()
            try:
                self._shrink_kept(*found)
            finally:
                self.conversation.restore(state)
                self.current = current

    # -- choosing -----------------------------------------------------------------------------------------------------

    def state_of(self, kept: Kept) -> ChatState | None:
        """The cells of a chat that is not in the engine, read from disk if need be; None where they are nowhere."""
        if kept.state is not None:
            return kept.state
        path = self.keeping.file_of(kept)
        if path is None or not kept.file_bytes:
            return None
        try:
            return sessions.read_state(path, self.conversation.memory, self.setup)
        except KVComposeError as error:
            log.warning("the cells of chat %s cannot be had, and its text is read again: %s", kept.id, error)
            self.keeping.forget_file(kept)
            return None

    def _want(self, request: Request, began: datetime) -> str:
        if request.prompt is not None:
            return request.prompt
        return self.conversation.want(request.messages, request.tools, began)

    def _held(self, state: ChatState, request: Request) -> int:
        """Tokens of a request that need not be read where the engine has these cells."""
        cells, memory = state.memory.cells, self.conversation.memory
        tokens = (*state.memory.tokens, *state.pending)
        saved = Saved(state.system, state.draft, state.fed, state.messages, tokens, state.steps, (), state.tools)
        began = datetime.fromtimestamp(state.began) if state.began else datetime.now()
        said = Transcript.of(self.conversation.model, saved, began)
        place = min(said.shared(self._want(request, began), request.messages, request.tools), cells.position)
        if place == cells.position:
            return place
        start, first_live = place, cells.position - cells.n_live
        if cells.state.size:  # a part moves on
            start = max((c.position for c in state.memory.checkpoints if c.position <= place), default=0)
        if start >= first_live:
            return start
        start = start if cells.state.size else place - memory.policy.n_tail
        return max(start, 0) if 2 * place > cells.position else 0

    def choose(self, request: Request) -> Choice:
        """The cells that serve a request best; of equally good ones those in the engine."""
        conversation, best = self.conversation, Choice()
        if self.current is not None and conversation.transcript.fed:
            memory, said = conversation.memory, conversation.transcript
            place = min(said.shared(self._want(request, said.began), request.messages, request.tools), memory.position)
            n_held = place - (memory.n_again(place) if place < memory.position else 0)
            best = Choice(self.current, None, n_held) if n_held else best
        marks = marks_of(request.messages, request.tools)
        for kept in self.keeping.best(marks, _CANDIDATES):
            if kept is self.current and not kept.is_stale:
                continue
            parts_early = n_alike(marks, kept.marks) < min(len(kept.marks) - 1, len(marks) - 1)
            if kept.state is None and (parts_early or 0 < kept.n_tokens <= best.n_held):
                continue  # reading its file would be for little
            state = self.state_of(kept)
            if state is not None and (n_held := self._held(state, request)) > best.n_held:
                best = Choice(kept, state, n_held)
        return best

    def _target(self, choice: Choice, request: Request) -> Kept:
        """The chat that a request goes on with: the one that it names, or that it says again without its last answer.

        What goes another way is a chat of its own.
        """
        if request.chat_id and (named := self.keeping.get(request.chat_id)) is not None:
            return named
        marks = marks_of(request.messages, request.tools)
        first = [] if choice.kept is None else [choice.kept]
        for kept in [*first, *self.keeping.best(marks, _CANDIDATES)]:  # whose cells may be gone
            if not kept.is_prefix and n_alike(marks, kept.marks) >= max(len(kept.marks) - 1, 2):
                return kept
        return self.keeping.new()

    def change_to(self, request: Request, stats: TurnStats) -> Kept:
        """Have the cells that serve a request best in the engine; returns the chat that it goes on with.

        What it begins with may be read on the way, of which ``stats`` is told.
        """
        conversation, choice = self.conversation, self.choose(request)
        target, state, n_held = self._target(choice, request), choice.state, choice.n_held
        is_there = choice.kept is not None and state is None
        if not (is_there and target is self.current):
            parked = self.park() if target is not self.current else None
            if is_there and self.current is None:  # others needed the engine
                state = parked
            if state is not None:
                try:
                    conversation.restore(state)
                except KVComposeError as error:
                    log.warning("kept cells cannot be had, and their text is read again: %s", error)
                    conversation.new()
                    n_held = 0
                else:
                    if choice.kept is not None:
                        self.keeping.touch(choice.kept)
            elif not is_there or self.current is None:
                conversation.new()
                n_held = 0
        self.current = target
        target.is_stale = True
        if request.prompt is None:
            self._keep_prefix(request, n_held, stats)
        return target

    def _keep_prefix(self, request: Request, n_held: int, stats: TurnStats) -> None:
        """Read what the chat begins with first, and keep it, unless more than that is held."""
        conversation, keeping = self.conversation, self.keeping
        head = conversation.head(request.messages, request.tools)
        if not head or conversation.memory.engine.cannot_snapshot:
            return
        if head != self._head[0]:  # agents send the same one each time
            self._head = head, len(conversation.model.tokenize(head))
        n_head = self._head[1]
        if n_head < LEAST_PREFIX or n_held >= n_head - _SEAM:
            return
        if conversation.read_head(request.messages, request.tools, stats):
            has_system = request.messages[0]["role"] == "system"
            kept = keeping.prefix(request.messages[:1] if has_system else (), request.tools, conversation.state())
            with self._undisturbed():
                keeping.drop_stale(0)
                while keeping.over() and keeping.evict():
                    pass
            log.info("a beginning of %d tokens is kept as %s", kept.n_tokens, kept.id)

    def take_in(self, kept: Kept) -> bool:
        """Have a chat in the engine as it was left; returns whether its cells were to be had."""
        if self.current is kept:
            return True
        state = self.state_of(kept)
        self.park()
        if state is None:
            self.current = None
            return False
        self.conversation.restore(state)
        self.current = kept
        return True
