"""One conversation: turns, the chat template, streaming answers. Knows a model's text side and a cache, no terminal."""

from __future__ import annotations

import codecs
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvcompose_local.compaction import CacheMemory, MemoryState
from kvcompose_local.errors import ContextFull, InvalidInput
from kvcompose_local.interfaces import Progress

#: Stands for what the user has yet to type when a document is read ahead of the question.
_REST_OF_MESSAGE = "\x00rest of the message\x00"
#: Models without a template answer as the assistant and then go on as the user.
_PLAIN_STOP = "\nUser:"


class TextModel(Protocol):
    """What a chat needs of a model beside its engine (:class:`kvcompose_local.llama_ffi.Model`)."""

    @property
    def adds_bos(self) -> bool: ...

    def chat_template(self) -> str | None: ...

    def render_chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str: ...

    def special_text(self, which: str) -> str: ...

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = True) -> list[int]: ...

    def token_bytes(self, token: int) -> bytes: ...

    def is_end(self, token: int) -> bool: ...


@dataclass
class TurnStats:
    """Counts and wall seconds of one turn; compaction seconds are not part of the other two."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    compactions: int = 0
    compaction_seconds: float = 0.0
    stopped: str = ""

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.generated_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class ChatState:
    """All that a :class:`Chat` knows, to go on from later.

    draft: what the next user message begins with already; fed: every character the cache was given; pending: tokens of
    it that are still to be read.
    """

    system: str | None
    messages: tuple[dict[str, str], ...]
    draft: str
    fed: str
    pending: tuple[int, ...]
    memory: MemoryState


class Chat:
    """A multi-turn chat over a :class:`CacheMemory`.

    should_stop is asked between micro-batches and tokens; True ends what runs, and nothing is lost: text that was not
    read yet is read before the next message.
    """

    def __init__(
        self,
        model: TextModel,
        memory: CacheMemory,
        *,
        system: str | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_read: Progress | None = None,
    ) -> None:
        self.model = model
        self.memory = memory
        self.system = system
        self.should_stop = should_stop
        self.on_read = on_read
        self.turns: list[TurnStats] = []
        self.answering = ""  # the answer so far, while one is being given
        self.messages: list[dict[str, str]] = []
        self._stop_text = "" if model.chat_template() else _PLAIN_STOP
        self._reset()

    def _reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self._draft = ""  # the part of the next user message that /read has fed already
        self._fed = ""  # every character the cache has been given, prompts and answers
        self._pending: list[int] = []  # tokens of _fed that an interrupt left unread

    @property
    def unread_tokens(self) -> int:
        """Tokens that an interrupt left to be read before the next message."""
        return len(self._pending)

    def clear(self) -> None:
        """Start anew; the system prompt stays."""
        self.memory.clear()
        self._reset()

    def state(self) -> ChatState:
        """A copy of everything, for :meth:`restore`."""
        messages = tuple(dict(message) for message in self.messages)
        return ChatState(self.system, messages, self._draft, self._fed, tuple(self._pending), self.memory.state())

    def restore(self, state: ChatState) -> None:
        """Go on from a state, which replaces the conversation.

        Raises InvalidInput, before anything is changed, where it belongs to another model or contradicts itself, and
        ContextFull where it does not fit. After any other error the conversation is empty.
        """
        n_vocab = self.memory.engine.shape.n_vocab
        if not all(0 <= token < n_vocab for token in state.pending):
            raise InvalidInput("the tokens to be read are not of this model")
        try:
            self.memory.restore(state.memory)
        except (InvalidInput, ContextFull):
            raise
        except BaseException:
            self.clear()
            raise
        self.system = state.system
        self.messages = [dict(message) for message in state.messages]
        self._draft, self._fed, self._pending = state.draft, state.fed, [*state.pending]

    def set_system(self, text: str) -> None:
        """Give the chat another system prompt and read the whole conversation again under it."""
        history = [m for m in self.messages if m["role"] != "system"]
        draft = self._draft
        self.system = text or None
        self.clear()
        self.messages += history
        if history:
            self._queue(self.model.render_chat(self.messages, add_generation_prompt=False))
        self._draft = draft
        if draft:
            self._queue_draft()
        self._read(TurnStats())

    def read(self, document: str) -> TurnStats:
        """Read a document now, as the beginning of the next user message; returns its counts and seconds.

        Raises ContextFull, with the document taken back, when it does not fit the positions left.
        """
        if not document.strip():
            raise InvalidInput("there is no text to read")
        stats = TurnStats()
        with self._taken_back_when_full():
            self._draft += document.rstrip() + "\n\n"
            self._queue_draft()
            self._read(stats)
        self.turns.append(stats)
        return stats

    def ask(self, text: str, *, max_tokens: int) -> Iterator[str]:
        """Send a user message; yields the answer in pieces of whole characters.

        ``turns[-1]`` holds the counts, and in ``stopped`` why it ended: ``end``, ``length``, ``context`` or
        ``interrupt``. Raises ContextFull, with the message taken back, when it does not fit the positions left.
        """
        if not (self._draft or text.strip()):
            raise InvalidInput("the message is empty")
        stats = TurnStats()
        with self._taken_back_when_full():
            self.messages.append({"role": "user", "content": self._draft + text})
            self._draft = ""
            self._queue(self._prompt())
            self._read(stats)
        self.turns.append(stats)
        self.answering = ""
        try:
            if not self._pending:
                for piece in self._generate(stats, max_tokens):
                    self.answering += piece
                    yield piece
        finally:
            answer, self.answering = self.answering, ""
            self.messages.append({"role": "assistant", "content": answer.strip() if self._stop_text else answer})

    @contextlib.contextmanager
    def _taken_back_when_full(self) -> Iterator[None]:
        before = self._fed, list(self._pending), list(self.messages), self._draft
        try:
            yield
        except ContextFull:
            self._fed, self._pending, self.messages, self._draft = before
            raise

    def _prompt(self) -> str:
        """What the template puts between the text fed so far and the coming answer."""
        whole = self.model.render_chat(self.messages, add_generation_prompt=True)
        if whole.startswith(self._fed):
            return whole[len(self._fed) :]
        # The template rewrites earlier turns (trims them, drops their thinking): continue where the last one ends.
        past = self.model.render_chat(self.messages[:-1], add_generation_prompt=False)
        answer = self.messages[-2]["content"].strip() if len(self.messages) > 1 else ""
        end = past.rfind(answer) + len(answer) if answer and answer in past else len(past)
        if whole.startswith(past):
            return whole[end:]
        return self.model.render_chat(self.messages[-1:], add_generation_prompt=True)

    def _queue_draft(self) -> None:
        message = {"role": "user", "content": self._draft + _REST_OF_MESSAGE}
        self.messages.append(message)
        try:
            head, found, _ = self._prompt().partition(_REST_OF_MESSAGE)
        finally:
            self.messages.pop()
        if found:
            self._queue(head)

    def _queue(self, text: str) -> None:
        bos = self.model.special_text("bos")
        first = not self._fed
        add_bos = first and self.model.adds_bos and not (bos and text.startswith(bos))
        self._fed += text
        self._pending += self.model.tokenize(text, add_bos=add_bos)

    def _read(self, stats: TurnStats) -> None:
        """Feed the pending tokens; an interrupt leaves the rest pending."""
        total = len(self._pending)
        reports = len(self.memory.reports)
        before, started = self.memory.position, time.perf_counter()

        def progress(n: int, of: int) -> None:
            if self.on_read is not None:
                self.on_read(n, of)
            if self.should_stop():
                raise KeyboardInterrupt

        try:
            self.memory.feed(self._pending, progress)
        except KeyboardInterrupt:
            stats.stopped = "interrupt"
        finally:
            read = self.memory.position - before
            del self._pending[:read]
            stats.prompt_tokens += total - len(self._pending)
            stats.compactions += len(self.memory.reports) - reports
            spent = self._compaction_seconds(reports)
            stats.compaction_seconds += spent
            stats.prefill_seconds += time.perf_counter() - started - spent

    def _compaction_seconds(self, since: int) -> float:
        return sum(report.seconds for report in self.memory.reports[since:])

    def _generate(self, stats: TurnStats, max_tokens: int) -> Iterator[str]:
        # Tokens are bytes, not characters: one character may span several tokens.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        started, reports = time.perf_counter(), len(self.memory.reports)
        held = ""
        stats.stopped = "interrupt"  # unless the loop says otherwise: the consumer may close this generator
        try:
            while not self.should_stop():
                if stats.generated_tokens == max_tokens:
                    stats.stopped = "length"
                    break
                token = self.memory.engine.sample()
                if self.model.is_end(token):
                    stats.stopped = "end"
                    break
                stats.generated_tokens += 1
                held += decoder.decode(self.model.token_bytes(token))
                if self._stop_text and self._stop_text in held:
                    held = held.partition(self._stop_text)[0]
                    stats.stopped = "end"
                    break
                self._pending.append(token)
                keep = _beginning_at_end(self._stop_text, held)
                piece, held = held[: len(held) - keep], held[len(held) - keep :]
                if piece:
                    self._fed += piece
                    yield piece
                self.memory.feed(self._pending)
                self._pending.clear()
        except ContextFull:
            stats.stopped = "context"
        except KeyboardInterrupt:
            stats.stopped = "interrupt"
        finally:
            spent = self._compaction_seconds(reports)
            stats.compactions += len(self.memory.reports) - reports
            stats.compaction_seconds += spent
            stats.decode_seconds += time.perf_counter() - started - spent
        held += decoder.decode(b"", final=True)
        if held:
            self._fed += held
            yield held


def _beginning_at_end(stop: str, text: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``."""
    return next((n for n in range(len(stop), 0, -1) if text.endswith(stop[:n])), 0)
