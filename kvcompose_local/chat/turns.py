"""One conversation: turns, streaming answers, what is taken back. It knows a model's text and a cache, no terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from datetime import datetime
from itertools import pairwise

from kvcompose_local.chat.comparing import n_common
from kvcompose_local.chat.generation import PLAIN_STOP, generate
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.chat.reasoning import CLOSE, OPEN, Format, Reader, Said
from kvcompose_local.chat.state import ChatState, TurnStats
from kvcompose_local.chat.steps import Place, Saved
from kvcompose_local.chat.text_model import Message, TextModel
from kvcompose_local.chat.transcript import Transcript
from kvcompose_local.errors import ContextFull, InvalidInput, KVComposeError
from kvcompose_local.interfaces import Progress

#: What was said, and what of it is pinned.
Conversation = tuple[Saved, tuple[tuple[int, int], ...]]


class Chat:
    """A multi-turn chat over a :class:`CacheMemory`.

    should_stop is asked between micro-batches and tokens; True ends what runs, and nothing is lost: text that was not
    read yet is read before the next message. on_rebuild gets the number of tokens that are about to be read again,
    where going back needs more than live cells; on_note gets a line that the user should know about the template.
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
        on_note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model = model
        self.memory = memory
        self.should_stop = should_stop
        self.on_read = on_read
        self.on_rebuild = on_rebuild
        self.on_note = on_note
        self.turns: list[TurnStats] = []
        self.answering = ""  # the answer so far, while one is being given
        self._is_answering = False
        self._noted: set[str] = set()
        self.stops: tuple[str, ...] = () if model.has_template else (PLAIN_STOP,)  # texts that end an answer
        self.tells_tags = True  # whether thinking stands between tags
        self.shown: frozenset[str] = frozenset()  # control tokens that are part of what is said
        self.transcript = Transcript(model, system)

    @property
    def system(self) -> str | None:
        """The system prompt."""
        return self.transcript.system

    @property
    def messages(self) -> list[Message]:
        """What was said: role and content, and as "reasoning" what the model thought before an answer."""
        return self.transcript.messages

    @property
    def n_answers(self) -> int:
        """Answers among the messages."""
        return sum(message["role"] == "assistant" for message in self.messages)

    @property
    def unread_tokens(self) -> int:
        """Tokens that an interrupt left to be read before the next message."""
        return len(self.transcript.tokens) - self.memory.position

    def clear(self) -> None:
        """Start anew; the system prompt stays."""
        self.memory.clear()
        self.transcript = Transcript(self.model, self.system)

    def state(self) -> ChatState:
        """A copy of everything, for :meth:`restore`."""
        return replace(self.view(), memory=self.memory.state())

    def view(self) -> ChatState:
        """The same, but cells and scores are copied when they are looked at: it is valid until anything changes."""
        said = self.transcript
        return ChatState(
            said.system,
            tuple(dict(message) for message in said.messages),
            said.draft,
            said.fed,
            tuple(said.tokens[self.memory.position :]),
            self.memory.view(),
            tuple(said.steps),
            said.began.timestamp(),
            self.model.template_name,
            said.tools,
        )

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
            raise InvalidInput("the turns do not belong to this conversation")
        self.model.use_template(state.template)
        try:
            self.memory.restore(state.memory)
        except (InvalidInput, ContextFull):
            raise
        except BaseException:
            self.clear()
            raise
        tokens = (*state.memory.tokens, *state.pending)
        messages = tuple(dict(message) for message in state.messages)
        saved = Saved(state.system, state.draft, state.fed, messages, tokens, state.steps, (), state.tools)
        began = datetime.fromtimestamp(state.began) if state.began else None
        self.transcript = Transcript.of(self.model, saved, began)
        if not self.memory.pins and not any(state.memory.cells.composed):  # as where it was saved at budget 1
            self._pin_system()

    def set_system(self, text: str) -> None:
        """Give the chat another system prompt and read the whole conversation again under it.

        Raises ContextFull, with nothing changed, when it does not fit the positions there are.
        """
        self._check_idle()
        with self._taken_back_on_failure():
            self.transcript.set_system(text or None)
            self._follow(self.transcript.told(), go_back=True)
            self._read(TurnStats())

    def read(self, document: str, *, pin: bool = False) -> TurnStats:
        """Read a document now, as the beginning of the next user message; returns its counts and seconds.

        ``pin`` protects it from compaction. Raises ContextFull, with the document taken back, when it does not fit the
        positions left, or the pin what a compaction keeps.
        """
        if not document.strip():
            raise InvalidInput("there is no text to read")
        self._check_idle()
        stats, said = TurnStats(), self.transcript
        with self._taken_back_on_failure():
            said.begin_step()
            said.draft += document.rstrip() + "\n\n"
            if head := said.head():
                self._follow(head, stats)
            if pin:
                self.memory.pin(said.steps[-1].begin.n_tokens, len(said.tokens))
            self._read(stats)
        self.turns.append(stats)
        return stats

    def ask(self, text: str, *, max_tokens: int, instead: bool = False) -> Generator[Said]:
        """Send a user message, perhaps ``instead`` of the last one; yields the answer in pieces of whole characters.

        Each piece tells whether it is part of the model's thinking, which stands between ``<think>`` and ``</think>``
        whatever the model's own markers are. ``turns[-1]`` holds the counts, and in ``stopped`` why it ended: ``end``,
        ``length``, ``context`` or ``interrupt``. Raises ContextFull, with the message taken back, when it does not fit
        the positions left.
        """
        self._check_idle()
        said = self.transcript
        replaced = said.last_message_step() if instead else None
        if not text.strip() and not (replaced.draft if replaced else said.draft):
            raise InvalidInput("the message is empty")
        stats = TurnStats()
        with self._taken_back_on_failure():
            if replaced:
                said.take_back(replaced)
            said.begin_step()
            said.messages.append({"role": "user", "content": said.draft + text})
            said.draft = ""
            self._follow(said.prompt(), stats)
            said.begin_answer()
            self._read(stats, for_logits=True)
        self.turns.append(stats)
        yield from self._answer(stats, max_tokens)

    def ask_again(self, *, max_tokens: int) -> Generator[Said]:
        """Another answer to the last message, in place of its own; otherwise as :meth:`ask`.

        An interrupt before its first token leaves the old answer in place. Raises InvalidInput without a message.
        """
        self._check_idle()
        said = self.transcript
        step = said.last_message_step()
        stats, before = TurnStats(), said.saved()
        pins = self.memory.pins
        with self._taken_back_on_failure():
            said.messages.pop()
            if step.answer is not None:  # an answer of nothing but white space is none that the template tells
                said.cut(step.answer)
            self._follow(said.prompt(), go_back=True)
            said.begin_answer()
            self._read(stats, for_logits=True)
        self.turns.append(stats)
        if stats.stopped:
            self._put_back(before, pins)
            self._read(TurnStats(), go_on=False)
        else:
            yield from self._answer(stats, max_tokens)

    @property
    def last_message(self) -> str:
        """What the user typed last, without documents. Raises InvalidInput where there is no message to speak of."""
        step = self.transcript.last_message_step()
        return self.messages[step.n_messages]["content"][len(step.draft) :]

    def undo(self) -> str:
        """Take back what came last, a message with its answer or a document; returns which, in words.

        Raises InvalidInput when there is nothing.
        """
        self._check_idle()
        said = self.transcript
        if not said.steps:
            raise InvalidInput("there is nothing to take back")
        step = said.steps[-1]
        what = "your message and its answer" if len(said.messages) > step.n_messages else "the document"
        said.take_back(step)
        self.memory.unpin(len(said.tokens))
        self._read(TurnStats(), go_on=False)
        return what

    def forget_thinking(self) -> int:
        """Drop the thinking of the last answer from the conversation and its cache; returns the tokens it took.

        Raises InvalidInput when there is none.
        """
        self._check_idle()
        said = self.transcript
        said.last_message_step()
        reasoning = said.messages[-1].get("reasoning", "")
        if not reasoning:
            raise InvalidInput("the last answer holds no thinking")
        with self._taken_back_on_failure():
            said.messages[-1] = {k: text for k, text in said.messages[-1].items() if k != "reasoning"}
            self._follow(said.told(), go_back=True)
            self._read(TurnStats())
        return len(self.model.tokenize(reasoning))

    def pin(self) -> int:
        """Protect the last message, or the document read last, from compaction; returns its tokens.

        Where it is compressed already, it is read again from the transcript. Raises InvalidInput where there is
        nothing, or nothing is ever dropped, and ContextFull where a compaction could not keep that much.
        """
        if not self.transcript.steps:
            raise InvalidInput("there is nothing to pin yet")
        begin, end = self.transcript.spans()[-1]
        with self._taken_back_on_failure():
            if not self.memory.pin(begin, end):
                self._read(TurnStats(), n_kept=begin)
        return end - begin

    # -- the transcript and the cache ---------------------------------------------------------------------------------

    def _check_idle(self) -> None:
        if self._is_answering:
            raise InvalidInput("an answer is still being given: take all of it, or close it, before anything else")

    def _note(self, line: str) -> None:
        """Tell a line that was not told before."""
        if line not in self._noted:
            self._noted.add(line)
            self.on_note(line)

    @property
    def conversation(self) -> Conversation:
        """All that was said and done so far; two of them can be compared."""
        return self.transcript.saved(), tuple(self.memory.pins)

    def _put_back(self, before: Saved, pins: list[tuple[int, int]]) -> None:
        self.transcript.put_back(before)
        self.memory.pins = [*pins]

    @contextlib.contextmanager
    def _taken_back_on_failure(self) -> Iterator[None]:
        before, pins = self.transcript.saved(), [*self.memory.pins]
        try:
            yield
        except (KVComposeError, KeyboardInterrupt):  # the cache is full, the template refuses, the text is being cut up
            self._put_back(before, pins)
            self._read(TurnStats(), go_on=False)  # only where that came on the way
            raise

    def _follow(self, want: str, stats: TurnStats | None = None, *, go_back: bool = False) -> None:
        """Make the transcript say ``want``. Without ``go_back``, the past changes only where the cache can go back.

        The cost is told where more tokens are read again than are new.
        """
        said, spans = self.transcript, self.transcript.spans()
        begins = not said.fed
        n_held = n_common(self.memory.tokens, said.tokens)
        reread = said.follow(want, n_held, (lambda _position: True) if go_back else self.memory.can_drop)
        if reread.n_shared is not None:
            self._move_pins(spans, reread.n_shared)
        if begins or reread.n_shared is not None:
            self._pin_system()
            if said.system and self.model.folds_system:
                self._note("the chat template has no place for a system prompt: yours stands before your first message")
        if reread.is_kept:
            self._note(
                "the chat template rewrites what is compressed already, which cannot be read again in part: "
                "it stays as it was read"
            )
        if stats is not None and reread.n_shared is not None and reread.n_shared < n_held:
            stats.reread_tokens += reread.n_again
            if reread.n_again > reread.n_new:
                self.on_note(f"the chat template rewrites what was said: {reread.n_again} tokens are read again")

    def _move_pins(self, spans: list[tuple[int, int]], n_shared: int) -> None:
        """Pin messages that were pinned as a whole at their new places; spans: the steps' old places."""
        pins = self.memory.pins
        moved = [(start, stop) for start, stop in pins if stop <= n_shared]
        for (begin, end), now in zip(spans, self.transcript.spans(), strict=False):
            if end > n_shared and any(start <= begin and end <= stop for start, stop in pins):
                moved.append(now)
        self.memory.pins = moved

    def _pin_system(self) -> None:
        """Instructions must outlast the text they are about (docs/decisions.md), which begins with them."""
        said = self.transcript
        system = (said.system or "").strip()
        if self.memory.compose and system and system in said.fed:
            text = said.fed[: said.fed.index(system) + len(system)]
            span = 0, len(self.model.tokenize(text, add_bos=said.adds_bos(text)))
            with contextlib.suppress(ContextFull):  # too long to be kept whole: it competes like everything else
                if span not in self.memory.pins:
                    self.memory.pin(*span)

    def _read(
        self, stats: TurnStats, *, n_kept: int | None = None, for_logits: bool = False, go_on: bool = True
    ) -> None:
        """Let the cache hold the transcript: go back to where they part, then, with ``go_on``, feed the rest.

        n_kept: tokens that may be kept at most; for_logits: read at least the last token. After an interrupt the next
        call reads the rest.
        """
        memory, tokens = self.memory, self.transcript.tokens
        n_shared = min(n_common(memory.tokens, tokens), len(tokens) if n_kept is None else n_kept)
        if for_logits:
            if not tokens:
                raise InvalidInput("in this model's vocabulary the message is no token")
            n_shared = min(n_shared, len(tokens) - 1)
        if go_on:
            memory.check_positions(n_shared, len(tokens) - n_shared)
        reports, started, before = len(memory.reports), time.perf_counter(), n_shared
        n_new = len(tokens) - n_shared
        n_done: int | None = 0

        def progress(n: int, of: int) -> None:
            if self.on_read is not None:
                self.on_read(*(n, of) if n_done is None else (n_done + n, n_new))
            if self.should_stop():
                raise KeyboardInterrupt

        try:
            if n_shared < memory.position:
                n_again = memory.n_again(n_shared)
                before -= n_again
                if tokens and (n_again > memory.policy.n_tail or not memory.can_drop(n_shared)):
                    self.on_rebuild(n_again + n_new)
                n_done = None
                memory.rewind(n_shared, progress)
            if go_on:
                for start, stop in pairwise([n_shared, *self._places_to_mark(n_shared), len(tokens)]):
                    memory.mark()
                    n_done = start - n_shared
                    memory.feed(tokens[start:stop], progress)
        except KeyboardInterrupt:
            stats.stopped = "interrupt"
        finally:
            stats.prompt_tokens += memory.position - before
            stats.compactions += len(memory.reports) - reports
            spent = self._compaction_seconds(reports)
            stats.compaction_seconds += spent
            stats.prefill_seconds += time.perf_counter() - started - spent

    def _places_to_mark(self, position: int) -> list[int]:
        """Where the last turn and its answer begin, if behind ``position``: what is taken back leads there.

        An answer is asked for by the last token before it, which is read by itself, so that it can be read again.
        """
        places = set()
        for step in self.transcript.steps[-1:] if self.memory.moves_on else ():
            places.add(step.begin.n_tokens)
            if step.answer is not None:
                places.add(step.answer.n_tokens - 1)
        return sorted(place for place in places if position < place < len(self.transcript.tokens))

    def _compaction_seconds(self, since: int) -> float:
        return sum(report.seconds for report in self.memory.reports[since:])

    def _answer(self, stats: TurnStats, max_tokens: int) -> Iterator[Said]:
        self.answering, self._is_answering = "", True
        said: list[Said] = []
        try:
            if not stats.stopped:
                is_open = False
                for piece in generate(
                    self.model,
                    self.memory,
                    self.transcript,
                    stats,
                    max_tokens,
                    form=self._format(),
                    draw=self._draw,
                    stops=self.stops,
                    shown=self.shown,
                    should_stop=self.should_stop,
                    forget=lambda: self._read(TurnStats(), go_on=False),
                ):
                    said.append(piece)
                    tag = OPEN * (piece.is_reasoning and not is_open) + CLOSE * (is_open and not piece.is_reasoning)
                    tag *= self.tells_tags
                    is_open = piece.is_reasoning
                    for shown in filter(None, (Said(tag, True), piece)):
                        self.answering += shown
                        yield shown
                if is_open and self.tells_tags:
                    yield Said(CLOSE, True)
        finally:
            self.answering, self._is_answering = "", False
            answer, reasoning = ("".join(x for x in said if x.is_reasoning is kind) for kind in (False, True))
            message = {"role": "assistant", "content": answer}
            if not self.model.has_template:
                message["content"] = answer.strip()
            if reasoning.strip():
                message |= {"content": answer.lstrip(), "reasoning": reasoning.strip()}
            self.messages.append(message)

    def _format(self) -> Format:
        """How the model marks its thinking, and what else its answers hold."""
        return self.model.reasoning_format

    def _draw(self, reader: Reader) -> int:
        """The next token of an answer that ``reader`` has read so far."""
        return self.memory.engine.sample()
