"""The transcript: what was said, and the text and the tokens that stand for it in the cache.

A cache only grows, and templates rewrite the past: they trim answers, drop their thinking, add empty markers. So before
anything is fed, :meth:`Transcript.follow` compares the text that was fed with what the template says now. Differences
in white space and markers do not count, up to the first message that somebody tells otherwise than before. Where there
are no others, the transcript goes on from what was fed; otherwise it goes back to the last place that both share, and
feeds the rest as the template has it now.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime

from kvcompose_local.chat.comparing import Kept, join, n_common, n_same_messages
from kvcompose_local.chat.locating import Located, Span, located
from kvcompose_local.chat.steps import UNPLACED, Place, Reread, Saved, Step
from kvcompose_local.chat.text_model import Message, TextModel
from kvcompose_local.errors import InvalidInput, ModelError

#: A placeholder for what the user has yet to type when a document is read ahead of the question.
_REST_OF_MESSAGE = "\x00rest of the message\x00"
#: A placeholder for the last answer where only the text after it is wanted.
_THE_ANSWER = "\x00the answer\x00"
#: What may be a marker of the template: the vocabulary tells whether it is.
_MAYBE_MARKER = r"<[^<>\s]{1,60}>|\[[^\[\]\s]{1,20}\]"
#: No marker is longer.
_LONGEST_MARKER = 64


#: Whether the cache can go back to a position without reading everything again.
CanRewind = Callable[[int], bool]


class Transcript:
    """The messages of a conversation, and the text and the tokens that the cache holds of them, or is yet to read.

    fed: every character of prompts and answers; tokens: the same as tokens, where markers that a user typed are
    tokenized as text; draft: the part of the next user message that is fed already; tools: what the model may call, as
    JSON of a list in the form of OpenAI's protocol, or empty.
    """

    def __init__(self, model: TextModel, system: str | None, began: datetime | None = None) -> None:
        self.model = model
        self.system = system
        self.began = began or datetime.now()  # templates that tell the date go on telling the same
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.draft = ""
        self.fed = ""
        self.tools = ""
        self.tokens: list[int] = []
        self.steps: list[Step] = []
        self._edges = [Place(0, 0)]  # where pieces that were tokenized by themselves meet
        self._n_alike: int | None = None  # characters of ``fed`` that are told as before, None for all of them
        self._markers: dict[str, bool] = {}
        self._held: dict[str, bool] = {}  # whether what was said holds markers
        self._decoded: dict[str, str] = {}  # JSON of tools and calls, without escapes that hide markers
        self._found: tuple[str, list[Message], str, list[Located]] = ("", [], "", [])  # what was located last

    @classmethod
    def of(cls, model: TextModel, saved: Saved, began: datetime | None) -> Transcript:
        """The transcript of a chat that was saved."""
        said = cls(model, saved.system, began)
        places = {place for step in saved.steps for place in (step.begin, step.answer) if place is not None}
        end = Place(len(saved.tokens), len(saved.fed))
        said.put_back(saved._replace(edges=tuple(sorted({Place(0, 0), *places, end}))))
        return said

    def saved(self) -> Saved:
        """All that changes, for :meth:`put_back`."""
        messages, tokens = tuple(self.messages), tuple(self.tokens)
        steps, edges = tuple(self.steps), tuple(self._edges)
        return Saved(self.system, self.draft, self.fed, messages, tokens, steps, edges, self.tools)

    def put_back(self, before: Saved) -> None:
        """Go back to what was saved."""
        self.system, self.draft, self.fed, self.tools = before.system, before.draft, before.fed, before.tools
        self.messages, self.tokens = [*before.messages], [*before.tokens]
        self.steps, self._edges = [*before.steps], [*before.edges]
        self._n_alike = None

    def set_system(self, text: str | None) -> None:
        """Another system prompt, or none; what was fed stays until :meth:`follow`."""
        without = self.messages[1:] if self.system else self.messages
        n = bool(text) - bool(self.system)
        self._n_alike = None if text == self.system else 0
        self.system = text
        self.messages = [{"role": "system", "content": text}, *without] if text else [*without]
        self.steps = [replace(step, n_messages=step.n_messages + n) for step in self.steps]

    def tell(self, messages: Sequence[Message], tools: str) -> bool:
        """Be of these messages and tools, of which the cache is yet to be told; returns whether they go on from ours.

        What the model thought before answers that are the same is kept: protocols do not send it back.
        """
        ours, theirs = self.messages, [dict(message) for message in messages]
        self._n_alike = self._n_chars_alike(theirs, tools)
        n_same = n_same_messages(ours, theirs)
        went_on = n_same == len(ours) and self.tools == tools
        self.messages = ours[:n_same] + theirs[n_same:]
        self.system = theirs[0]["content"] if theirs and theirs[0]["role"] == "system" else None
        self.tools, self.draft = tools, ""
        asks = [m["role"] in ("user", "tool") or (m["role"] == "system" and i > 0) for i, m in enumerate(theirs)]
        begins = [i for i, asking in enumerate(asks) if asking and not (i and asks[i - 1])] or [len(theirs)]
        self.steps = [step for step in self.steps if step.n_messages < n_same]
        self.steps += [Step(UNPLACED, i, "") for i in begins if i >= n_same]
        return went_on

    def _n_chars_alike(self, messages: Sequence[Message], tools: str) -> int:
        """Characters of what was fed before the first message that is none of these."""
        if tools != self.tools or not (self.messages or tools):
            return 0
        n_same = n_same_messages(self.messages, messages)
        if n_same == len(self.messages):
            return len(self.fed)
        step = next((step for step in reversed(self.steps) if step.n_messages <= n_same), None)
        if step is None:
            return 0
        is_answer = self.messages[n_same]["role"] == "assistant"
        return (step.answer or step.begin if is_answer else step.begin).n_chars

    # -- places -------------------------------------------------------------------------------------------------------

    @property
    def end(self) -> Place:
        return Place(len(self.tokens), len(self.fed))

    def begin_step(self) -> Place:
        """A message or a document begins here."""
        self.steps.append(Step(self.end, len(self.messages), self.draft))
        return self.steps[-1].begin

    def begin_answer(self) -> None:
        """The answer to the last message begins here."""
        self.mark_edge()
        self.steps[-1] = replace(self.steps[-1], answer=self.end)

    def spans(self) -> list[tuple[int, int]]:
        """The tokens of each step, a message without its answer or a document: (start, stop)."""
        ends = [*(step.begin for step in self.steps[1:]), self.end]
        return [
            (step.begin.n_tokens, (step.answer or end).n_tokens) for step, end in zip(self.steps, ends, strict=False)
        ]

    def last_message_step(self) -> Step:
        """Raises InvalidInput where what came last is no message."""
        if not self.steps or not any(message["role"] == "user" for message in self.messages):
            raise InvalidInput("there is no message yet")
        if self.steps[-1].n_messages == len(self.messages):
            raise InvalidInput("a document was read since your last message: /undo takes it back first")
        return self.steps[-1]

    def cut(self, place: Place) -> None:
        """Forget all text from a place on."""
        del self.tokens[place.n_tokens :]
        self.fed = self.fed[: place.n_chars]
        self._edges = [edge for edge in self._edges if edge <= place] or [Place(0, 0)]
        if self._edges[-1] != place:
            self._edges.append(place)

    def take_back(self, step: Step) -> None:
        """Forget the last step."""
        self.cut(step.begin)
        self.steps.pop()
        del self.messages[step.n_messages :]
        self.draft = step.draft

    # -- what the template says ---------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message], *, prompt: bool = True, tools: str | None = None) -> str:
        tools = self.tools if tools is None else tools
        options = {"tools": json.loads(tools)} if tools else {}
        return self.model.render_chat(messages, add_generation_prompt=prompt, now=self.began, **options)

    def prompt(self) -> str:
        """The whole conversation and what begins an answer."""
        return self.render(self.messages)

    def head(self) -> str:
        """The whole conversation up to where the user goes on typing; empty where the template hides that place."""
        message = {"role": "user", "content": self.draft + _REST_OF_MESSAGE}
        head, found, _ = self.render([*self.messages, message]).partition(_REST_OF_MESSAGE)
        return head if found else ""

    def told(self) -> str:
        """The whole conversation, up to the end of what was said or read last."""
        head = self.head() or self.render(self.messages, prompt=False)
        if self.draft:
            return head
        return head[: self.after_last_answer(head)] or head if self.steps else ""

    def after_last_answer(self, want: str) -> int:
        """Where in ``want``, a text of the whole conversation, comes what follows the last answer; 0 without one."""
        last = next((i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] == "assistant"), None)
        if last is None:
            return 0
        messages = [*self.messages]
        if messages[-1]["role"] == "assistant":
            messages.append({"role": "user", "content": self.draft + _REST_OF_MESSAGE})
        calls = json.loads(messages[last].get("tool_calls") or "[]")[-1:]
        answer = {"role": "assistant", "content": _THE_ANSWER}
        calling = answer | {"tool_calls": json.dumps([call | {"arguments": {"": _THE_ANSWER}} for call in calls])}
        ways = ((answer, _THE_ANSWER), (calling, json.dumps(_THE_ANSWER) + "}"))  # some take no results without a call
        for said, end in ways if calls else ways[:1]:
            try:
                text = self.render([*messages[:last], said, *messages[last + 1 :]]).partition(_REST_OF_MESSAGE)[0]
            except ModelError:
                continue
            after = text.rpartition(end)[2] if end in text else ""
            if after and want.endswith(after):
                return len(want) - len(after)
        return 0

    # -- following it -------------------------------------------------------------------------------------------------

    def follow(self, want: str, n_held: int, can_rewind: CanRewind) -> Reread:
        """Make the transcript say what the template says now.

        want: the text of the conversation so far, from its beginning; n_held: tokens of it that the cache holds. Where
        the difference begins in what the cache cannot go back to, what was fed stays, and only what follows the last
        answer is added, where that can be told.
        """
        if want.startswith(self.fed):
            self._n_alike = None
            return Reread(0, self._go_on(want, len(self.fed)))
        n_alike, self._n_alike = len(self.fed) if self._n_alike is None else self._n_alike, None
        edge, at, agrees = self._last_shared(want, n_alike)
        if agrees:
            return Reread(0, self._go_on(want, at))
        begin = self.after_last_answer(want)
        before = self.tokens, self._edges, self.fed, self.steps
        self.tokens, self._edges, self.steps = [*self.tokens], [*self._edges], [*self.steps]
        n_new = self._rewrite(edge, want, at, max(begin, at))
        n_shared = n_common(before[0], self.tokens)
        if n_shared >= n_held or can_rewind(n_shared) or (not begin and self._brings_results()):
            return Reread(max(len(self.tokens) - n_shared - n_new, 0), n_new, n_shared)
        self.tokens, self._edges, self.fed, self.steps = before
        self.steps = [replace(step, begin=min(step.begin, self.end)) for step in self.steps]
        if begin:
            return Reread(0, self.queue(want, begin), is_kept=True)
        alone, messages = self._last_alone()
        return Reread(0, self.queue(alone, messages=messages), is_kept=True)

    def follow_text(self, text: str) -> None:
        """Say this text, which is no conversation: what was fed of it stays."""
        self.system, self.tools, self.draft, self.messages, self.steps = None, "", "", [], []
        n_shared = n_common(self.fed, text)
        edge = max(edge for edge in self._edges if edge.n_chars <= n_shared)
        self.cut(edge)
        self.queue(text, edge.n_chars)
        self.steps = [Step(Place(0, 0), 0, "", self.end)]

    def shared(self, want: str, messages: Sequence[Message], tools: str) -> int:
        """Tokens of the transcript that stay where the template says ``want`` of these messages and tools."""
        return self._place_in(want, messages, tools)[0].n_tokens

    def n_tokens_of(self, want: str, messages: Sequence[Message], tools: str) -> int:
        """Tokens of ``want``, the text of these messages; only what the transcript does not have is tokenized."""
        edge, at = self._place_in(want, messages, tools)
        add_bos = not at and self.adds_bos(want)
        return edge.n_tokens + len(self._tokenized(want, at, len(want), messages, tools, add_bos=add_bos))

    def _place_in(self, want: str, messages: Sequence[Message], tools: str) -> tuple[Place, int]:
        """The last place that stays where the template says ``want`` now, and where that is in ``want``."""
        if want.startswith(self.fed):
            return self.end, len(self.fed)
        return self._last_shared(want, self._n_chars_alike(messages, tools))[:2]

    def _brings_results(self) -> bool:
        """Whether results of tools came since the last answer, which no message alone tells."""
        last = next((i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] == "assistant"), 0)
        return any(message["role"] == "tool" for message in self.messages[last:])

    def _last_alone(self) -> tuple[str, list[Message]]:
        """The last message rendered alone, for templates that hide where it begins, and that message."""
        if self.messages and self.messages[-1]["role"] == "user":
            return self.render(self.messages[-1:]), self.messages[-1:]
        text = self.render([{"role": "user", "content": self.draft + _REST_OF_MESSAGE}]).partition(_REST_OF_MESSAGE)[0]
        return text, [{"role": "user", "content": self.draft}]

    @property
    def _told(self) -> list[Message]:
        """The messages, and what was read of the next one."""
        return [*self.messages, {"role": "user", "content": self.draft}] if self.draft else self.messages

    def _contents(self, want: str) -> dict[int, Span]:
        """Where messages stand in ``want``, by their number; what was read of the next one is one, too."""
        found = self._located(want, self._told, self.tools)
        return {x.message: x.span for x in reversed(found) if x.part == "content"}

    def _located(self, want: str, messages: Sequence[Message], tools: str) -> list[Located]:
        """All that was said in ``want``, which the template makes of these messages and tools."""
        if self._found[:3] != (want, [*messages], tools):
            rest = _REST_OF_MESSAGE if self.draft and messages and messages[-1]["content"] == self.draft else ""
            found = located(
                want, messages, tools, lambda said, about: self.render(said, tools=about), self._holds_marker, rest
            )
            self._found = want, [dict(message) for message in messages], tools, found
        return self._found[3]

    def _last_shared(self, want: str, n_alike: int) -> tuple[Place, int, bool]:
        """The last edge that ``want`` shares, where that is in ``want``, and whether it is the end of what was fed.

        n_alike: characters of what was fed in which white space, markers and empty thinking do not count.
        """
        start = max(min(n_common(self.fed, want), n_alike) - _LONGEST_MARKER, 0)  # a marker may begin before
        ours, theirs = self._kept(self.fed[:n_alike], start), self._kept(want, start)
        n_same = n_common(ours.text, theirs.text)
        differs = ours.starts_at(n_same)
        if n_same == len(ours.text):
            at = join(self.fed[:n_alike], ours.place(n_same), want, theirs.place(n_same))
            differs = n_alike + n_common(self.fed[n_alike:], want[at:])
            if differs == len(self.fed):
                return self.end, at + differs - n_alike, True
        edge = max(edge for edge in self._edges if edge.n_chars <= differs)
        if edge.n_chars <= start:
            return edge, edge.n_chars, False
        if edge.n_chars >= n_alike:
            return edge, at + edge.n_chars - n_alike, False
        n_before = ours.n_before(edge.n_chars)
        return edge, join(self.fed[: edge.n_chars], ours.place(n_before), want, theirs.place(n_before)), False

    def _kept(self, text: str, start: int) -> Kept:
        """The part of a text from ``start`` on that counts: no white space, no markers, no empty thinking."""
        return Kept(text, start, self._skipped, self._is_marker)

    @property
    def _skipped(self) -> re.Pattern[str]:
        form = self.model.reasoning_format
        closed = "|".join(re.escape(text) for text in form.answers if "*" not in text)
        opened = "|".join(re.escape(text.rstrip()) for text in form.opens if "*" not in text)
        empty = [rf"(?:(?:{opened})\s*)?(?:{closed})"] if opened and closed else []
        return re.compile("|".join([r"\s+", *empty, f"(?P<maybe>{_MAYBE_MARKER})"]))

    def _is_marker(self, text: str) -> bool:
        if text not in self._markers:
            form = self.model.reasoning_format  # its markers count: they tell thinking from speech
            self._markers[text] = text not in (*form.opens, *form.answers) and self.model.is_marker(text)
        return self._markers[text]

    def _rewrite(self, edge: Place, want: str, at: int, begin: int) -> int:
        """Go on from an edge with the text of ``want`` from ``at`` on; returns its tokens from ``begin`` on.

        Later steps get their places in the new text.
        """
        steps = self.steps
        inside = max((i for i, step in enumerate(steps) if step.begin <= edge), default=-1)
        self.cut(edge)
        self.steps = steps[: inside + 1]

        n_new = 0
        spans = self._contents(want)

        def content(i: int, n: int | None = None) -> int:
            """Where the first ``n`` characters of what a message says end, or all of them."""
            span = spans.get(i)
            return at if span is None else span.end if n is None else span.at(n)

        def queue_to(place: int) -> None:
            nonlocal at, n_new
            for end in (min(begin, place), place):
                if end > at:
                    n_queued = self.queue(want, at, end)
                    n_new += n_queued * (at >= begin)
                    at = end

        for i, step in enumerate(steps[max(inside, 0) :], max(inside, 0)):
            if i > inside:
                self.steps.append(replace(step, begin=self.end))
            after = steps[i + 1] if i + 1 < len(steps) else None
            said = self.messages[step.n_messages : after.n_messages if after else None]
            if not said:  # a document
                queue_to(content(step.n_messages, len(after.draft if after else self.draft)))
                continue
            if step.answer is None or step.answer > edge:
                queue_to(content(step.n_messages))
                if len(said) > 1:
                    queue_to(content(step.n_messages + 1, 0))
                self.steps[-1] = replace(self.steps[-1], answer=self.end)
            if len(said) > 1:
                queue_to(content(step.n_messages + 1))
        queue_to(len(want))
        return n_new

    def _go_on(self, want: str, at: int) -> int:
        """Queue ``want`` from ``at`` on; steps that are told and not placed yet get their places.

        Returns the number of tokens.
        """
        before = len(self.tokens)
        spans = self._contents(want) if any(step.begin == UNPLACED for step in self.steps) else {}
        for i, step in enumerate(self.steps):
            if step.begin != UNPLACED:
                continue
            begin, answer = self.end, None
            after = self.steps[i + 1].n_messages if i + 1 < len(self.steps) else len(self.messages)
            for k in range(step.n_messages, after):
                start, end, _ = spans.get(k, Span(at, at))
                if self.messages[k]["role"] == "assistant" and answer is None:
                    self.queue(want, at, max(start, at))
                    at, answer = max(start, at), self.end
                self.queue(want, at, max(end, at))
                at = max(end, at)
            self.steps[i] = replace(step, begin=begin, answer=answer)
        self.queue(want, at)
        return len(self.tokens) - before

    # -- text into tokens ---------------------------------------------------------------------------------------------

    def queue(
        self, text: str, start: int = 0, stop: int | None = None, messages: Sequence[Message] | None = None
    ) -> int:
        """Add a part of a text; returns the number of its tokens. messages: those of the text, if not all."""
        stop = len(text) if stop is None else stop
        if start == stop:  # not even what a transcript begins with
            return 0
        self.mark_edge()
        messages = self._told if messages is None else messages
        add_bos = not self.fed and self.adds_bos(text)
        tokens = self._tokenized(text, start, stop, messages, self.tools, add_bos=add_bos)
        self.tokens += tokens
        self.fed += text[start:stop]
        self.mark_edge()
        return len(tokens)

    def say(self, text: str) -> None:
        """Add a text in which no markers are."""
        self.mark_edge()
        self.tokens += self.model.tokenize(text, special=False)
        self.fed += text
        self.mark_edge()

    def _tokenized(
        self, text: str, start: int, stop: int, messages: Sequence[Message], tools: str, *, add_bos: bool
    ) -> list[int]:
        """A part of a text of these messages and tools as tokens, where markers that were said are text."""
        tokens, at = [], start
        for begin, end in [*self._said_with_markers(text, messages, tools), (stop, stop)]:
            begin, end = min(max(begin, at), stop), min(max(end, at), stop)
            tokens += self.model.tokenize(text[at:begin], add_bos=add_bos and at == start)
            tokens += self.model.tokenize(text[begin:end], special=False)
            at = end
        return tokens

    def mark_edge(self) -> None:
        """Let the next piece be tokenized by itself."""
        if self._edges[-1] != self.end:
            self._edges.append(self.end)

    def _said_with_markers(self, text: str, messages: Sequence[Message], tools: str) -> Iterator[tuple[int, int]]:
        """(begin, end) of all in a text of these messages and tools that was said and holds markers (``<|im_end|>``).

        Such markers are tokenized as text: a document must not be able to begin a turn of its own.
        """
        parts = [message.get(part, "") for message in messages for part in ("reasoning", "content", "name")]
        for told in filter(None, (tools, *(message.get("tool_calls") for message in messages))):
            if told not in self._decoded:  # a long conversation is looked at for each of its pieces
                self._decoded[told] = json.dumps(json.loads(told), ensure_ascii=False)
            parts.append(self._decoded[told])
        if any(map(self._holds_marker, parts)):
            for found in self._located(text, messages, tools):
                if self._holds_marker(found.text):
                    yield found.span.begin, found.span.end

    def _holds_marker(self, said: str) -> bool:
        if said and said not in self._held:
            self._held[said] = self.model.tokenize(said) != self.model.tokenize(said, special=False)
        return bool(said) and self._held[said]

    def adds_bos(self, text: str) -> bool:
        """Whether a transcript that begins with ``text`` begins with a token that is not in it."""
        bos = self.model.special_text("bos")
        return self.model.adds_bos and not (bos and text.lstrip().startswith(bos))
