"""One conversation: turns, the chat template, streaming answers. Knows a model's text side and a cache, no terminal."""

from __future__ import annotations

import codecs
import contextlib
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple, Protocol

from kvcompose_local.compaction import CacheMemory, MemoryState
from kvcompose_local.errors import ContextFull, InvalidInput, KVComposeError
from kvcompose_local.interfaces import Progress

#: Stands for what the user has yet to type when a document is read ahead of the question.
_REST_OF_MESSAGE = "\x00rest of the message\x00"
#: Models without a template answer as the assistant and then go on as the user.
_PLAIN_STOP = "\nUser:"
#: How Qwen, DeepSeek and their kin write their thinking; the last of it may be cut short.
_THINKING = re.compile(r"<think>.*?(?:</think>|\Z)\s*", re.DOTALL)


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


class Place(NamedTuple):
    """A place in the transcript: how many tokens and how many characters stand before it."""

    n_tokens: int
    n_chars: int


@dataclass(frozen=True)
class Step:
    """A message with its answer, or a document, and what it takes to take it back.

    begin: where it begins; n_messages, draft: those before it; answer: where its answer begins, None for a document and
    where that is not known.
    """

    begin: Place
    n_messages: int
    draft: str
    answer: Place | None = None


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
    steps: tuple[Step, ...] = ()


class Chat:
    """A multi-turn chat over a :class:`CacheMemory`.

    should_stop is asked between micro-batches and tokens; True ends what runs, and nothing is lost: text that was not
    read yet is read before the next message. on_rebuild is told how many tokens are about to be read again, where going
    back needs cells that are compressed.
    """

    def __init__(
        self,
        model: TextModel,
        memory: CacheMemory,
        *,
        system: str | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_read: Progress | None = None,
        on_rebuild: Callable[[int], None] = lambda n_tokens: None,
    ) -> None:
        self.model = model
        self.memory = memory
        self.system = system
        self.should_stop = should_stop
        self.on_read = on_read
        self.on_rebuild = on_rebuild
        self.turns: list[TurnStats] = []
        self.answering = ""  # the answer so far, while one is being given
        self._is_answering = False
        self.messages: list[dict[str, str]] = []
        self._stop_text = "" if model.chat_template() else _PLAIN_STOP
        self._reset()

    def _reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self._draft = ""  # the part of the next user message that /read has fed already
        self._fed = ""  # every character of the transcript, prompts and answers
        self._tokens: list[int] = []  # the transcript; the cache holds it, or as much as an interrupt let it read
        self._steps: list[Step] = []

    @property
    def unread_tokens(self) -> int:
        """Tokens that an interrupt left to be read before the next message."""
        return len(self._tokens) - self.memory.position

    def clear(self) -> None:
        """Start anew; the system prompt stays."""
        self.memory.clear()
        self._reset()

    def state(self) -> ChatState:
        """A copy of everything, for :meth:`restore`."""
        return replace(self.view(), memory=self.memory.state())

    def view(self) -> ChatState:
        """The same, but cells and scores are copied when they are looked at: good until anything changes."""
        messages = tuple(dict(message) for message in self.messages)
        pending = tuple(self._tokens[self.memory.position :])
        memory, steps = self.memory.view(), tuple(self._steps)
        return ChatState(self.system, messages, self._draft, self._fed, pending, memory, steps)

    def restore(self, state: ChatState) -> None:
        """Go on from a state, which replaces the conversation.

        Raises InvalidInput, before anything is changed, where it belongs to another model or contradicts itself, and
        ContextFull where it does not fit. After any other error the conversation is empty.
        """
        self._check_idle()
        n_vocab = self.memory.engine.shape.n_vocab
        if not all(0 <= token < n_vocab for token in state.pending):
            raise InvalidInput("the tokens to be read are not of this model")
        end = Place(len(state.memory.tokens) + len(state.pending), len(state.fed))
        places = [place for step in state.steps for place in (step.begin, step.answer or step.begin)] + [end]
        ordered = all(0 <= a.n_tokens <= b.n_tokens and 0 <= a.n_chars <= b.n_chars for a, b in pairwise(places))
        counts = [0, *(step.n_messages for step in state.steps), len(state.messages)]
        if not ordered or counts != sorted(counts):
            raise InvalidInput("the turns are not those of this conversation")
        try:
            self.memory.restore(state.memory)
        except (InvalidInput, ContextFull):
            raise
        except BaseException:
            self.clear()
            raise
        self.system = state.system
        self.messages = [dict(message) for message in state.messages]
        self._draft, self._fed, self._steps = state.draft, state.fed, [*state.steps]
        self._tokens = [*state.memory.tokens, *state.pending]
        if not self.memory.pins and not any(state.memory.cells.composed):  # as where it was saved at budget 1
            self._pin_system(self._fed)

    def set_system(self, text: str) -> None:
        """Give the chat another system prompt and read the whole conversation again under it.

        Raises ContextFull, with nothing changed, when it does not fit the positions there are.
        """
        self._check_idle()
        with self._taken_back_on_failure():
            self.system = text or None
            self._retell()
            self._read(TurnStats())

    def read(self, document: str, *, pin: bool = False) -> TurnStats:
        """Read a document now, as the beginning of the next user message; returns its counts and seconds.

        ``pin`` protects it from compaction. Raises ContextFull, with the document taken back, when it does not fit the
        positions left, or the pin what a compaction keeps.
        """
        if not document.strip():
            raise InvalidInput("there is no text to read")
        self._check_idle()
        stats = TurnStats()
        with self._taken_back_on_failure():
            self._follow_template()
            begin = self._begin()
            self._draft += document.rstrip() + "\n\n"
            self._queue_draft()
            if pin:
                self.memory.pin(begin.n_tokens, len(self._tokens))
            self._read(stats)
        self.turns.append(stats)
        return stats

    def ask(self, text: str, *, max_tokens: int, instead: bool = False) -> Generator[str]:
        """Send a user message, perhaps ``instead`` of the last one; yields the answer in pieces of whole characters.

        ``turns[-1]`` holds the counts, and in ``stopped`` why it ended: ``end``, ``length``, ``context`` or
        ``interrupt``. Raises ContextFull, with the message taken back, when it does not fit the positions left.
        """
        self._check_idle()
        replaced = self._last_message() if instead else None
        if not text.strip() and not (replaced.draft if replaced else self._draft):
            raise InvalidInput("the message is empty")
        stats = TurnStats()
        with self._taken_back_on_failure():
            if replaced:
                self._take_back(replaced)
            self._follow_template()
            self._begin()
            self.messages.append({"role": "user", "content": self._draft + text})
            self._draft = ""
            self._queue(self._prompt())
            self._steps[-1] = replace(self._steps[-1], answer=self._end())
            self._read(stats, for_logits=True)
        self.turns.append(stats)
        yield from self._answer(stats, max_tokens)

    def ask_again(self, *, max_tokens: int) -> Generator[str]:
        """Another answer to the last message, in place of its own; otherwise as :meth:`ask`.

        An interrupt before its first token leaves the old answer in place. Raises InvalidInput without a message.
        """
        self._check_idle()
        step = self._last_message()
        if step.answer is None:
            yield from self.ask(self.last_message, max_tokens=max_tokens, instead=True)
            return
        stats, before = TurnStats(), self.conversation
        self._cut(step.answer)
        self._read(stats, for_logits=True)
        self.turns.append(stats)
        if stats.stopped:
            self._put_back(before)
        else:
            self.messages.pop()
            yield from self._answer(stats, max_tokens)

    @property
    def last_message(self) -> str:
        """What the user typed last, without documents. Raises InvalidInput where there is no message to speak of."""
        step = self._last_message()
        return self.messages[step.n_messages]["content"][len(step.draft) :]

    def undo(self) -> str:
        """Take back what came last, a message with its answer or a document; returns which, in words.

        Raises InvalidInput when there is nothing.
        """
        self._check_idle()
        if not self._steps:
            raise InvalidInput("there is nothing to take back")
        step = self._steps[-1]
        what = "your message and its answer" if len(self.messages) > step.n_messages else "the document"
        self._take_back(step)
        self._read(TurnStats(), go_on=False)
        return what

    def forget_thinking(self) -> int:
        """Drop the thinking of the last answer from the conversation and its cache; returns the tokens it took.

        Raises InvalidInput when there is none.
        """
        step = self._last_message()
        opened = step.answer is not None and self._fed[: step.answer.n_chars].rstrip().endswith("<think>")
        message = self.messages[-1]
        spoken = _THINKING.sub("", "<think>" * opened + message["content"]).lstrip()
        if spoken == message["content"]:
            raise InvalidInput("the last answer holds no thinking")
        n_dropped = len(self.model.tokenize(message["content"])) - len(self.model.tokenize(spoken))
        before = len(self._tokens)
        self.messages[-1] = message | {"content": spoken}
        self._follow_template()
        if len(self._tokens) == before and step.answer is not None:  # the template changed more than that
            self._cut(step.answer)
            self._queue("</think>\n\n" * opened + spoken)
        self._read(TurnStats())
        return n_dropped

    def pin(self) -> int:
        """Protect the last message, or the document read last, from compaction; returns its tokens.

        Where it is compressed already, it is read again from the transcript. Raises InvalidInput where there is
        nothing, or nothing is ever dropped, and ContextFull where a compaction could not keep that much.
        """
        if not self._steps:
            raise InvalidInput("there is nothing to pin yet")
        step = self._steps[-1]
        begin, end = step.begin.n_tokens, (step.answer or self._end()).n_tokens
        with self._taken_back_on_failure():
            if not self.memory.pin(begin, end):
                self._read(TurnStats(), n_kept=begin)
        return end - begin

    # -- the transcript -----------------------------------------------------------------------------------------------

    def _check_idle(self) -> None:
        if self._is_answering:
            raise InvalidInput("an answer is still being given: take all of it, or close it, before anything else")

    def _end(self) -> Place:
        return Place(len(self._tokens), len(self._fed))

    def _begin(self) -> Place:
        self._steps.append(Step(self._end(), len(self.messages), self._draft))
        return self._steps[-1].begin

    def _last_message(self) -> Step:
        if not self._steps or not any(message["role"] == "user" for message in self.messages):
            raise InvalidInput("there is no message yet")
        if self._steps[-1].n_messages == len(self.messages):
            raise InvalidInput("a document was read since your last message: /undo takes it back first")
        return self._steps[-1]

    def _cut(self, place: Place) -> None:
        del self._tokens[place.n_tokens :]
        self._fed = self._fed[: place.n_chars]
        self.memory.unpin(place.n_tokens)

    def _take_back(self, step: Step) -> None:
        """Forget the last step; the cache still holds it until the next :meth:`_read`."""
        self._cut(step.begin)
        self._steps.pop()
        del self.messages[step.n_messages :]
        self._draft = step.draft

    @property
    def conversation(self) -> tuple[Any, ...]:
        """All that was said and done so far, to be compared with what it was before."""
        lists = [*self.messages], [*self._tokens], [*self._steps], [*self.memory.pins]
        return self.system, self._draft, self._fed, *lists

    def _put_back(self, copy: tuple[Any, ...]) -> None:
        self.system, self._draft, self._fed, self.messages, self._tokens, self._steps, self.memory.pins = copy

    @contextlib.contextmanager
    def _taken_back_on_failure(self) -> Iterator[None]:
        before = self.conversation
        try:
            yield
        except (KVComposeError, KeyboardInterrupt):  # the cache is full, the template refuses, the text is being cut up
            self._put_back(before)
            self._read(TurnStats(), go_on=False)  # only where that came on the way
            raise

    def _retell(self) -> None:
        """Make the transcript anew, as if the conversation had been under this system prompt from its beginning."""
        steps, messages, draft = self._steps, self.messages, self._draft
        following = [*((step.draft, step.n_messages) for step in steps), (draft, len(messages))][1:]
        ends = [*(step.begin for step in steps[1:]), self._end()]
        spans = [(step.begin.n_tokens, (step.answer or end).n_tokens) for step, end in zip(steps, ends, strict=False)]
        pins = self.memory.pins
        pinned = [any(start <= begin and end <= stop for start, stop in pins) for begin, end in spans]
        self._reset()
        self.memory.unpin(0)
        for step, (draft, n_messages), pin in zip(steps, following, pinned, strict=True):
            self._follow_template()
            begin = self._begin()
            self._draft = draft
            if said := messages[step.n_messages : n_messages]:
                self.messages.append(said[0])
                self._queue(self._prompt())
                self._steps[-1] = replace(self._steps[-1], answer=self._end())
            else:
                self._queue_draft()
            if pin:
                self.memory.pin(begin.n_tokens, len(self._tokens))
            for answer in said[1:]:
                self.messages.append(answer)
                self._queue(answer["content"])
        self._head()  # fails where the template has no place for a system prompt

    def _prompt(self) -> str:
        """What the template puts between the text fed so far and the coming answer."""
        whole = self.model.render_chat(self.messages, add_generation_prompt=True)
        if whole.startswith(self._fed):
            return whole[len(self._fed) :]
        # The template rewrites earlier turns (trims them, drops their thinking): continue where the last answer ends.
        # Its words may stand in other messages, too, so it is looked for where it begins.
        answer = self.messages[-2]["content"].strip() if len(self.messages) > 2 else ""
        for opened in (True, False) if answer else ():  # what opens an answer may begin as that does
            before = self.model.render_chat(self.messages[:-2], add_generation_prompt=opened)
            begin = whole.find(answer, _n_common(before, whole))
            if begin >= 0:
                return whole[begin + len(answer) :]
        past = self.model.render_chat(self.messages[:-1], add_generation_prompt=False)
        if whole.startswith(past):
            return whole[len(past) :]
        return self.model.render_chat(self.messages[-1:], add_generation_prompt=True)

    def _head(self) -> str:
        """The whole conversation up to where the user goes on typing; empty where the template hides that place."""
        message = {"role": "user", "content": self._draft + _REST_OF_MESSAGE}
        whole = self.model.render_chat([*self.messages, message], add_generation_prompt=True)
        head, found, _ = whole.partition(_REST_OF_MESSAGE)
        return head if found else ""

    def _follow_template(self) -> None:
        """Where the template drops part of the last answer, its thinking, go back and go on with its version."""
        step = self._steps[-1] if self._steps else None
        if step is None or step.answer is None:
            return
        head = self._head()
        if head.startswith(self._fed) or self._fed[step.answer.n_chars :].strip() in head:
            return
        pins, before = self.memory.pins, [*self._tokens]
        if head.startswith(self._fed[: step.answer.n_chars]):
            self._cut(step.answer)
        elif head.startswith(self._fed[: step.begin.n_chars]):
            self._cut(step.begin)  # the prompt itself opened the thinking
            self._steps[-1] = replace(step, answer=None)
        else:
            return
        self._queue(head[len(self._fed) :])
        n_same = _n_common(before, self._tokens)  # which stay pinned
        self.memory.pins = [(start, min(stop, n_same)) for start, stop in pins if start < n_same]

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
        first = not self._fed
        add_bos, start = first and self._adds_bos(text), 0
        for begin, end in [*self._said_with_markers(text), (len(text), len(text))]:
            self._tokens += self.model.tokenize(text[start:begin], add_bos=add_bos and start == 0)
            self._tokens += self.model.tokenize(text[begin:end], special=False)
            start = end
        self._fed += text
        if first:
            self._pin_system(text)

    def _said_with_markers(self, text: str) -> Iterator[tuple[int, int]]:
        """(begin, end) of what was said or read, not put there by the template, and holds markers like ``<|im_end|>``.

        They are text there: what is read must not be able to begin a turn of its own.
        """
        texts = [*(message["content"] for message in self.messages), self._draft]
        if self._steps:  # of a message that was read in part, only the rest is new
            texts += [said[len(self._steps[-1].draft) :] for said in texts[-2:]]
        start = 0
        for said in filter(None, map(str.strip, texts)):
            begin = text.find(said, start)
            if begin >= 0 and self.model.tokenize(said) != self.model.tokenize(said, special=False):
                start = begin + len(said)
                yield begin, start

    def _adds_bos(self, text: str) -> bool:
        """Whether a transcript that begins with ``text`` begins with a token that is not in it."""
        bos = self.model.special_text("bos")
        return self.model.adds_bos and not (bos and text.startswith(bos))

    def _pin_system(self, text: str) -> None:
        """Instructions must outlast the text they are about (docs/trials.md), which ``text`` begins with."""
        system = (self.system or "").strip()
        if self.memory.compose and system and system in text:
            until = self.model.tokenize(text[: text.index(system) + len(system)], add_bos=self._adds_bos(text))
            with contextlib.suppress(ContextFull):  # too long to be kept whole: it competes like everything else
                self.memory.pin(0, len(until))

    def _n_shared(self) -> int:
        """How many of the tokens in the cache begin the transcript."""
        return _n_common(self.memory.tokens, self._tokens)

    def _read(
        self, stats: TurnStats, *, n_kept: int | None = None, for_logits: bool = False, go_on: bool = True
    ) -> None:
        """Let the cache hold the transcript: go back to where they part, then feed the rest, unless not to ``go_on``.

        n_kept: tokens that may be kept at most; for_logits: read at least the last token. An interrupt leaves the rest
        to be read by the next call.
        """
        memory = self.memory
        n_shared = min(self._n_shared(), len(self._tokens) if n_kept is None else n_kept)
        if for_logits:
            n_shared = min(n_shared, len(self._tokens) - 1)
        if go_on:
            memory.check_positions(n_shared, len(self._tokens) - n_shared)
        reports, started, before = len(memory.reports), time.perf_counter(), n_shared

        def progress(n: int, of: int) -> None:
            if self.on_read is not None:
                self.on_read(n, of)
            if self.should_stop():
                raise KeyboardInterrupt

        try:
            if n_shared < memory.position:
                if not memory.can_drop(n_shared):
                    before = 0
                    if self._tokens:
                        self.on_rebuild(len(self._tokens))
                memory.rewind(n_shared, progress)
            if go_on:
                memory.feed(self._tokens[n_shared:], progress)
        except KeyboardInterrupt:
            stats.stopped = "interrupt"
        finally:
            stats.prompt_tokens += memory.position - before
            stats.compactions += len(memory.reports) - reports
            spent = self._compaction_seconds(reports)
            stats.compaction_seconds += spent
            stats.prefill_seconds += time.perf_counter() - started - spent

    def _compaction_seconds(self, since: int) -> float:
        return sum(report.seconds for report in self.memory.reports[since:])

    def _answer(self, stats: TurnStats, max_tokens: int) -> Iterator[str]:
        self.answering, self._is_answering = "", True
        try:
            if not stats.stopped:
                for piece in self._generate(stats, max_tokens):
                    self.answering += piece
                    yield piece
        finally:
            answer, self.answering, self._is_answering = self.answering, "", False
            self.messages.append({"role": "assistant", "content": answer.strip() if self._stop_text else answer})

    def _generate(self, stats: TurnStats, max_tokens: int) -> Iterator[str]:
        # Tokens are bytes, not characters: one character may span several tokens.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        started, reports = time.perf_counter(), len(self.memory.reports)
        held, n_said = "", len(self._tokens)  # what may begin the stop text; tokens of what was said
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
                    if not held:  # the next prompt begins with the stop text itself
                        del self._tokens[n_said:]
                        self._read(TurnStats(), go_on=False)
                    stats.stopped = "end"
                    break
                self._tokens.append(token)
                keep = _beginning_at_end(self._stop_text, held)
                piece, held = held[: len(held) - keep], held[len(held) - keep :]
                if piece:
                    self._fed += piece
                    n_said = len(self._tokens)
                    yield piece
                self.memory.feed([token])
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


def _n_common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many tokens or characters both begin with."""
    if one == other[: len(one)]:
        return len(one)
    return next(i for i, (a, b) in enumerate(zip_longest(one, other)) if a != b)


def _beginning_at_end(stop: str, text: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``."""
    return next((n for n in range(len(stop), 0, -1) if text.endswith(stop[:n])), 0)
