"""A chat that is told as a whole, again and again, as protocols without a memory do."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np

from kvcompose_local.chat import Chat, Message, Said, Transcript, TurnStats
from kvcompose_local.chat.comparing import n_common
from kvcompose_local.chat.reasoning import Format, Reader
from kvcompose_local.errors import PositionsFull
from kvcompose_local.llama_ffi.model import Model
from kvcompose_local.server.requests import Request, TokenChance


@dataclass(frozen=True)
class Constraint:
    """What an answer may be: a grammar, empty for anything, and whether it holds only once the model has thought."""

    grammar: str = ""
    waits: bool = False


class Conversation(Chat):
    """A chat whose messages are given as a list, of which as much as possible is held already.

    model: of the chat's memory, whose grammar and chances are needed here.
    """

    model: Model

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.tells_tags = False
        self.forced = ""  # what the next answer begins with, as the model would
        self.begun = ""  # what somebody else said of it
        self.call_markers: tuple[str, ...] = ()  # of tools, as :class:`Format` has them
        self._constraint = Constraint()
        self._n_logprobs: int | None = None
        self._chances: list[TokenChance] = []

    def new(self) -> None:
        """Forget everything, also the system prompt."""
        self.memory.clear()
        self.transcript = Transcript(self.model, None)

    def want(self, messages: Sequence[Message], tools: str, began: datetime | None = None) -> str:
        """The text of a conversation that began then, and what begins its answer. Raises ModelError."""
        options = {"tools": json.loads(tools)} if tools else {}
        return self.model.render_chat(messages, add_generation_prompt=True, now=began, **options)

    def want_of(self, request: Request) -> str:
        """The same of a request."""
        return self.want(request.messages, request.tools) if request.prompt is None else request.prompt

    def check_length(self, want: str, messages: Sequence[Message], tools: str) -> int:
        """Tokens of a text of these messages and tools. Raises PositionsFull where there are fewer positions.

        By these words Anthropic's and OpenAI's clients know that they must compact the conversation.
        """
        n_tokens, n_ctx = self.transcript.n_tokens_of(want, messages, tools), self.memory.n_ctx
        if n_tokens >= n_ctx:
            raise PositionsFull(
                f"prompt is too long: {n_tokens} tokens > {n_ctx} maximum; this model's maximum context length is "
                f"{n_ctx} tokens here: {self.memory.way_to_more_positions(n_tokens)}"
            )
        return n_tokens

    def head(self, messages: Sequence[Message], tools: str) -> str:
        """What stands before the first message: the system prompt and the tools. Empty where there is none."""
        said = Transcript(self.model, messages[0]["content"] if messages and messages[0]["role"] == "system" else None)
        said.tools, said.began = tools, self.transcript.began
        return said.head() if said.messages or tools else ""

    def read_head(self, messages: Sequence[Message], tools: str, stats: TurnStats) -> bool:
        """Read what stands before the first message; returns whether that came to its end.

        What is held already is gone on with where that is a part of it, as after a client that gave up waiting.
        """
        said, memory = Transcript(self.model, None, self.transcript.began), self.memory
        said.set_system(messages[0]["content"] if messages[0]["role"] == "system" else None)
        said.tools = tools
        head = said.head()
        if n_common(memory.tokens, self.model.tokenize(head, add_bos=said.adds_bos(head))) < memory.position:
            memory.clear()
        if not memory.tokens:
            said.began = datetime.now()
            head = said.head()
        memory.pins, self.transcript = [], said
        with self._taken_back_on_failure():
            self._follow(head, stats)
            self._read(stats)
        return not stats.stopped

    def answer_to(
        self,
        request: Request,
        constraint: Constraint,
        *,
        max_tokens: int,
        stats: TurnStats,
        on_begin: Callable[[int, int, int], None],
    ) -> Generator[Said]:
        """Be a request's conversation, and answer it; yields the answer in pieces.

        on_begin is told, before anything is read, of how many tokens the prompt is, how many of them are held, and how
        many more were but are read again. Raises ContextFull, with the conversation as it was, where it does not fit.
        """
        self._check_idle()
        said = self.transcript
        with self._taken_back_on_failure():
            if request.prompt is not None:
                said.follow_text(request.prompt)
            else:
                went_on = said.tell(request.messages, request.tools)
                if not said.fed and (head := self.head(request.messages, request.tools)):
                    self._follow(head)  # where other chats may part from this one
                self._follow(said.prompt(), stats, go_back=not went_on)
                said.begin_answer()
                if self.forced:
                    said.queue(said.fed + self.forced, len(said.fed), messages=())
                if self.begun:
                    said.say(self.begun)
            self._begin(stats, on_begin)
        self.turns = [stats]  # a server's chats have no end
        self._constraint, self._n_logprobs, self._chances = constraint, request.n_logprobs, []
        if constraint.grammar and not constraint.waits:
            self.memory.engine.set_grammar(constraint.grammar, self.shown)  # type: ignore[attr-defined]
        try:
            yield from self._answer(stats, max_tokens)
        finally:
            self.memory.engine.set_grammar("")  # type: ignore[attr-defined]
            self._constraint, self._n_logprobs = Constraint(), None

    def _begin(self, stats: TurnStats, on_begin: Callable[[int, int, int], None]) -> None:
        memory, tokens = self.memory, self.transcript.tokens
        memory.check_positions(0, len(tokens))
        held = min(n_common(memory.tokens, tokens), len(tokens) - 1)
        cached = held - (memory.n_again(held) if held < memory.position else 0)
        on_begin(len(tokens), cached, held - cached + stats.reread_tokens)
        self._read(stats, for_logits=True)

    def take_chances(self) -> tuple[TokenChance, ...]:
        """Of the tokens drawn since this was called last."""
        chances, self._chances = tuple(self._chances), []
        return chances

    def pin_passage(self, start: int, stop: int) -> int:
        """Keep the tokens from ``start`` to ``stop``; returns how many had to be read again for that.

        Raises ContextFull where a compaction could not keep that much.
        """
        memory = self.memory
        if memory.pin(start, stop):
            return 0
        n_again = memory.position - start
        stats = TurnStats()
        with self._taken_back_on_failure():
            self._read(stats, n_kept=start)
        return max(stats.prompt_tokens, n_again)

    def unpin_all(self) -> None:
        """Let everything compete again but the system prompt."""
        self.memory.pins = []
        self._pin_system()

    def _format(self) -> Format:
        return replace(self.model.reasoning_format, calls=self.call_markers)

    def _draw(self, reader: Reader) -> int:
        engine = self.memory.engine
        if self._constraint.waits and not reader.is_reasoning and reader.has_answered:
            engine.set_grammar(self._constraint.grammar, self.shown)  # type: ignore[attr-defined]
            self._constraint = replace(self._constraint, waits=False)
        if self._n_logprobs is None:
            return engine.sample()
        logits = engine.logits().astype(np.float64)  # type: ignore[attr-defined]
        logits -= logits.max()
        logits -= np.log(np.exp(logits).sum())
        token = engine.sample()
        n = min(self._n_logprobs, len(logits) - 1)
        best = np.argpartition(-logits, n)[:n] if n else np.zeros(0, np.int64)
        likeliest = sorted(((float(logits[t]), int(t)) for t in best), reverse=True)
        if not self.model.is_end(token):
            raw = self.raw(token)
            self._chances.append(
                TokenChance(raw, float(logits[token]), tuple((self.raw(t), chance) for chance, t in likeliest))
            )
        return token

    def raw(self, token: int) -> bytes:
        """The bytes of a token, a marker's text where it is one."""
        return self.model.control_text(token).encode() or self.model.token_bytes(token)
