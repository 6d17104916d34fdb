"""What is told to a model, as its chat template has it.

Templates differ in what they take: some refuse a system prompt or put it before the last message, some want content
as a list of parts, some want the thinking of earlier answers and some drop it. :class:`ChatTemplate` finds out by
rendering small conversations, gives each template what it takes, and renders no prompt that lacks what was said.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from kvcompose_local.chat.calls import ToolFormat
from kvcompose_local.chat.notations import Call
from kvcompose_local.chat.reasoning import format_of
from kvcompose_local.chat.rendering import ANOTHER, SWITCHES, EndlessTemplate, Renderer, jinja_renderer, names_in
from kvcompose_local.chat.tools import (
    HERMES,
    called,
    completed,
    format_in,
    formats_of,
    one_call_each,
    plain,
    with_calls_said,
    with_tools_told,
)
from kvcompose_local.errors import TemplateError

#: A conversation's message: role, content, and what the model thought before an answer, if anything, as "reasoning".
Message = dict[str, str]

#: Names under which templates look for the thinking of an earlier answer.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
#: Texts that are kept for being asked for again.
_KEPT_TEXTS = 2
#: Contents of the conversations that a template renders to show what it takes.
_SYSTEM, _USER, _ANSWER, _THOUGHT, _USER_2, _TOOL, _ARGUMENT = (
    "kvcprobe" + name for name in "system user answer thought again tool argument".split()
)
#: Words that turn thinking on and off, which some templates take out of what was said.
_SWITCH = re.compile("/(?:no_)?think")
#: A list of parts that a template printed as a Python list, in place of its text.
_PRINTED_PART = re.compile(r"""['"]type['"]\s*:\s*['"](?:text|thinking)""")


@dataclass(frozen=True)
class _Takes:
    """What a template takes.

    parts: the roles whose content is a list of parts; system: a system prompt as a message of its own; reasoning: the
    thinking of earlier answers under names of its own ("keys"), as a part of the content ("part"), between the model's
    markers in the text of the answer ("marked"), or not at all (""); tools: with a call's arguments as an "object" or a
    "text", or not at all (""), which is found out when there are some.
    """

    parts: frozenset[str] = frozenset()
    system: bool = True
    reasoning: str = ""
    tools: str = ""


class ChatTemplate:
    """One template and what it takes.

    source: its text, which tells the names that it looks for. Raises TemplateError, when it is made or rendered, with
    what Jinja or the template says.
    """

    def __init__(
        self,
        source: str,
        *,
        bos: str = "",
        eos: str = "",
        thinking: str | None = None,
        renderer: Renderer | None = None,
    ) -> None:
        self.source = source
        self._render = renderer or jinja_renderer(source, bos=bos, eos=eos, thinking=thinking)
        self._reasoning_keys = [key for key in _REASONING_KEYS if re.search(rf"""[.'"]{key}\b(?!\s\w)""", source)]
        self.format = format_of(source)
        self._kept: list[tuple[Any, str]] = []  # what was rendered last, and its text
        self._is_jinja = renderer is None

    @cached_property
    def has_switch(self) -> bool:
        """Whether its thinking can be turned on and off, or measured."""
        return self._is_jinja and not names_in(self.source).isdisjoint(SWITCHES)

    @property
    def tool_format(self) -> ToolFormat:
        """How the model is told to write calls: as its template does, or as Hermes where that does not tell."""
        return self._takes_tools[1]

    @property
    def folds_system(self) -> bool:
        """Whether a system prompt is put before the first message, since the template has no place for it."""
        return not self._takes.system

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        now: datetime | None = None,
        tools: Sequence[Any] = (),
    ) -> str:
        """The text of ``messages``, with the beginning of an answer if wanted; now: the date, for use by templates.

        tools: functions that the model may call, as OpenAI's protocol has them.

        Raises TemplateError also where the text does not hold what the user said, or the system prompt.
        """
        now = now or datetime.now()
        asked = [*messages], add_generation_prompt, now if "strftime_now" in self.source else None, [*tools]
        text = next((text for kept, text in self._kept if kept == asked), None)
        if text is None:
            text = self._rendered(messages, add_generation_prompt, now, tools)
            messages_then = [dict(message) for message in messages]
            self._kept = [((messages_then, *asked[1:]), text), *self._kept][:_KEPT_TEXTS]
        return text

    def _rendered(
        self, messages: Sequence[Message], add_generation_prompt: bool, now: datetime, tools: Sequence[Any]
    ) -> str:
        try:
            return self._whole(messages, add_generation_prompt, now, tools)
        except EndlessTemplate:
            raise
        except TemplateError:
            if (alternating := in_turns(messages)) == [*messages]:
                raise
            return self._whole(alternating, add_generation_prompt, now, tools)

    def _whole(
        self, messages: Sequence[Message], add_generation_prompt: bool, now: datetime, tools: Sequence[Any]
    ) -> str:
        """The text of messages, checked for what was said."""
        takes, place = self._takes, 0
        tools = completed(tools)
        has_tools = bool(tools) or any(m["role"] == "tool" or "tool_calls" in m for m in messages)
        if not has_tools:
            text = self._adapted(messages, takes, add_generation_prompt, now)
        elif not self._takes_tools[0]:
            text = self._adapted(plain(messages, tools), takes, add_generation_prompt, now)
        else:
            text = self._with_tools(messages, self._takes_tools, add_generation_prompt, now, tools)
        for message in messages:
            if message["role"] in ("system", "user"):
                before, place = place, _end_of(message["content"], text, place)
                if place < 0 and _SWITCH.search(self.source):
                    place = _end_of(_SWITCH.sub("", message["content"]), text, before)
                if place < 0:
                    what = "the system prompt" if message["role"] == "system" else "your message"
                    raise TemplateError(f"the model's chat template leaves out {what}, or a part of it: {ANOTHER}")
        return text

    def _with_tools(
        self,
        messages: Sequence[Message],
        ways: tuple[str, ToolFormat],
        prompt: bool,
        now: datetime,
        tools: Sequence[Any],
    ) -> str:
        kind, form = ways
        if form.tells_system:
            messages = with_tools_told(messages, tools)
        if kind == "said":
            messages = with_calls_said(messages, form)
        elif not self._takes_several_calls:
            messages = one_call_each(messages)
        return self._adapted(messages, replace(self._takes, tools=kind), prompt, now, tools)

    def _tried(
        self, messages: Sequence[Message], takes: _Takes, *, prompt: bool = True, tools: Sequence[Any] = ()
    ) -> str:
        """The text of messages, empty where the template refuses them."""
        try:
            return self._adapted(messages, takes, prompt, datetime.now(), tools)
        except EndlessTemplate:
            raise
        except TemplateError:
            return ""

    @cached_property
    def _takes_several_calls(self) -> bool:
        """Whether the template shows all calls of a message: some refuse more than one, some leave them out."""
        calls = [{"id": f"kvcprobe{i}", "name": _TOOL, "arguments": {"of": f"{_ARGUMENT}{i}"}} for i in (1, 2)]
        results: list[Message] = [
            {**_message("tool", _ANSWER), "tool_call_id": str(call["id"]), "name": _TOOL} for call in calls
        ]
        calling = {**_message("assistant", ""), "tool_calls": json.dumps(calls)}
        takes = replace(self._takes, tools=self._takes_tools[0])
        text = self._tried([_message("user", _USER), calling, *results], takes)
        return all(f"{_ARGUMENT}{i}" in text for i in (1, 2))

    @cached_property
    def _takes_tools(self) -> tuple[str, ToolFormat]:
        """How the template takes tools, calls and what came of them, and how it writes calls.

        Empty where it leaves out any of these, or writes calls as nobody here can read them.
        """
        taken = {"type": "object", "properties": {"of": {"type": "string"}, "more": {"type": "object"}}}
        of = {"name": _TOOL, "description": _TOOL, "parameters": taken}
        tools = [{"type": "function", "function": of}]
        call = json.dumps([{"id": "kvcprobe1", "name": _TOOL, "arguments": {"of": _ARGUMENT}}])
        calling, came = {**_message("assistant", ""), "tool_calls": call}, _message("tool", _ANSWER)
        came |= {"tool_call_id": "kvcprobe1", "name": _TOOL}
        asked, now = _message("user", _USER), datetime.now()
        for kind in ("object", "text"):
            takes = replace(self._takes, tools=kind)
            first = self._tried([asked], takes, tools=tools)
            text = self._tried([asked, calling, came], takes).partition(_USER)[2]
            if _TOOL not in first or _ANSWER not in text:
                continue
            if form := format_in(self.source, first, text.partition(_ANSWER)[0], Call(_TOOL, {"of": _ARGUMENT})):
                return kind, form
        for form in formats_of(self.source):
            try:
                text = self._with_tools([asked, calling, came], ("said", form), True, now, tools) if form.says else ""
            except EndlessTemplate:
                raise
            except TemplateError:
                continue
            if _TOOL in text.partition(_USER)[0] and _ARGUMENT in text and _ANSWER in text:
                return "said", form
        return "", HERMES

    @cached_property
    def _takes(self) -> _Takes:
        def renders(takes: _Takes, *messages: Message, prompt: bool = True) -> str:
            text = self._tried(messages, takes, prompt=prompt)
            return "" if _PRINTED_PART.search(text) else text

        user, answer, again = _message("user", _USER), _message("assistant", _ANSWER), _message("user", _USER_2)
        system = _message("system", _SYSTEM)
        takes = _Takes()
        for message, said in ((user, (user,)), (answer, (user, answer, again)), (system, (system, user))):
            parts = replace(takes, parts=takes.parts | {message["role"]})
            if message["content"] not in renders(takes, *said) and message["content"] in renders(parts, *said):
                takes = parts
        text, later = renders(takes, system, user), renders(takes, system, user, answer, again)
        # A system prompt before the last message would move at each turn, and be read again each time.
        stays = not later or -1 < later.find(_SYSTEM) < later.find(_USER)
        takes = replace(takes, system=_SYSTEM in text and stays)
        thought = answer | {"reasoning": _THOUGHT}
        keys, part = replace(takes, reasoning="keys"), replace(takes, reasoning="part")
        shown = {way.reasoning: _THOUGHT in renders(way, user, thought, prompt=False) for way in (keys, part)}
        if shown["part"] and not shown["keys"] and _ANSWER in renders(part, user, thought, again):
            return part
        if self._reasoning_keys:
            return keys
        marked = replace(takes, reasoning="marked")
        return marked if _ANSWER in renders(marked, user, thought, again) else takes

    def _adapted(
        self,
        messages: Sequence[Message],
        takes: _Takes,
        add_generation_prompt: bool,
        now: datetime,
        tools: Sequence[Any] = (),
    ) -> str:
        options = (tools,) if tools else ()
        said = [self._given(message, takes) for message in messages]
        if not takes.system and len(said) > 1 and said[0]["role"] == "system":
            first = next((i for i, message in enumerate(said) if message["role"] == "user"), 0)
            said[first] = self._given(
                _message("user", f"{messages[0]['content']}\n\n{messages[first]['content']}"), takes
            )
            del said[0]
        failure: TemplateError | None = None
        thought = [self._as_thought(message) for message in said]
        mute = [message | {"content": "…"} if message["content"] == "" else message for message in thought]
        for given in [said, *[thought] * (thought != said), *[mute] * (mute != thought)]:
            try:
                return self._render(given, add_generation_prompt, now, *options)
            except EndlessTemplate:
                raise
            except TemplateError as error:
                failure = failure or error
        raise failure or TemplateError("")

    def _as_thought(self, given: dict[str, Any]) -> dict[str, Any]:
        """The same with what was said before a call as the end of the thinking: gpt-oss's takes one of both alone."""
        thoughts = [given[key] for key in self._reasoning_keys if given.get(key)]
        if not (thoughts and given.get("tool_calls") and given["content"] and isinstance(given["content"], str)):
            return given
        return given | {"content": ""} | dict.fromkeys(self._reasoning_keys, f"{thoughts[0]}\n\n{given['content']}")

    def _given(self, message: Message, takes: _Takes) -> dict[str, Any]:
        """A message as this template looks at it."""
        content, reasoning = message["content"], message.get("reasoning", "")
        given: dict[str, Any] = {"role": message["role"], "content": content}
        if message["role"] in takes.parts:
            given["content"] = [{"type": "text", "text": content}]
        if takes.tools:
            given |= called(message, as_text=takes.tools == "text")
        if not (reasoning and takes.reasoning):
            return given
        if takes.reasoning == "keys":
            return given | dict.fromkeys(self._reasoning_keys, reasoning)
        if takes.reasoning == "part":
            return given | {"content": [{"type": "thinking", "thinking": reasoning}, {"type": "text", "text": content}]}
        return given | {"content": self.format.marked(reasoning, content)}


def in_turns(messages: Sequence[Message]) -> list[Message]:
    """The same conversation for a template whose users and assistants take turns, and that takes one system prompt.

    A later system prompt is the user's, and what follows a message of its own role, or comes with a tool's result, is
    part of that. Who was greeted had said nothing.
    """
    said: list[Message] = []
    for i, message in enumerate(messages):
        told = {**message, "role": "user"} if message["role"] == "system" and i else message
        before = said[-1] if said else {"role": ""}
        follows = before["role"] in ("user", "tool") if told["role"] == "user" else before["role"] == told["role"]
        if follows and told["role"] in ("user", "assistant") and "tool_calls" not in before:
            said[-1] = {
                **before,
                **told,
                "role": before["role"],
                "content": f"{before['content']}\n\n{told['content']}",
            }
        else:
            said.append(told)
    if said and all(message["role"] == "system" for message in said):
        said = [{**said[0], "role": "user"}]
    first = next((i for i, message in enumerate(said) if message["role"] != "system"), 0)
    if said and said[first]["role"] == "assistant":
        said.insert(first, _message("user", ""))
    return said


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _end_of(said: str, text: str, start: int) -> int:
    """Where ``said`` ends in ``text``, looked for from ``start`` on and then anywhere; white space does not count.

    -1 where it is not there.
    """
    said = said.strip()
    for begin in (start, 0):
        if (found := text.find(said, begin)) >= 0:
            return found + len(said)
    # Some templates escape it, some write it in capitals.
    forms = [text, html.unescape(text), text.replace(json.dumps(said, ensure_ascii=False)[1:-1], said)]
    wanted = "".join(said.split()).casefold()
    return start if any(wanted in "".join(form.split()).casefold() for form in forms) else -1
