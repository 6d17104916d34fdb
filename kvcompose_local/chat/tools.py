"""Tools that a model may call: how families of models write a call, and how a call is told from the rest of an answer.

The notations are facts of the published templates. Tools are dicts as OpenAI's protocol has them, ``{"type":
"function", "function": {"name", "description", "parameters"}}``. A message of an assistant that calls holds, beside its
content, ``tool_calls``: JSON of a list of ``{"id", "name", "arguments"}``; a message of role ``tool`` holds what came
of the call that ``tool_call_id`` names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]

#: The header of a call of gpt-oss: the recipient stands in that of a channel, or before it, and a content type behind.
_HARMONY = re.compile(
    r"(?:<\|channel\|>(?:commentary|analysis) to=|\s*to=(?=[\w.-]+<\|channel\|>))(?:functions\.)?([\w.-]+)"
    r"[^<]*(?:<\|(?:channel|constrain)\|>[^<]*){0,2}<\|message\|>"
)
#: A call as newer models of Qwen's write it.
_XML_CALL = re.compile(r"<function=([\w.-]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_XML_ARGUMENT = re.compile(r"<parameter=([\w.-]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes calls.

    keys: what a template of the family holds; opens: texts at which a call begins, empty where it is the whole answer;
    close: where one ends, empty for the end of the answer; arguments: what the arguments are called; shown: control
    tokens that are part of a call.
    """

    name: str
    keys: tuple[str, ...]
    opens: tuple[str, ...] = ()
    close: str = ""
    arguments: str = "arguments"
    shown: frozenset[str] = frozenset()


HERMES = ToolFormat("hermes", ("<tool_call>",), ("<tool_call>",), "</tool_call>", shown=frozenset({"<tool_call>"}))
#: The most particular first.
FORMATS = (
    ToolFormat(
        "harmony",
        ("<|channel|>", "functions."),
        ("<|channel|>commentary to=", "<|channel|>analysis to=", " to=functions."),
        shown=frozenset({"<|channel|>", "<|constrain|>", "<|message|>"}),
    ),
    ToolFormat(
        "mistral",
        ("[TOOL_CALLS]",),
        ("[TOOL_CALLS]",),
        shown=frozenset({"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"}),
    ),
    HERMES,
    ToolFormat(
        "llama", ('"parameters"',), ("<|python_tag|>",), arguments="parameters", shown=frozenset({"<|python_tag|>"})
    ),
)


def format_of(template: str) -> ToolFormat:
    """How the models write calls that a chat template is for; Hermes's where it does not tell."""
    return next((form for form in FORMATS if all(key in template for key in form.keys)), HERMES)


# -- what templates are given ------------------------------------------------------------------------------------------


def called(message: Message, *, as_text: bool) -> dict[str, Any]:
    """What a template looks at of a call or of what came of one; as_text: arguments as JSON, else as they are."""
    told: dict[str, Any] = {}
    if calls := json.loads(message.get("tool_calls") or "[]"):
        told["tool_calls"] = [
            {
                "id": _short(call["id"]),
                "type": "function",
                "function": {
                    "name": call["name"],
                    "arguments": json.dumps(call["arguments"], ensure_ascii=False) if as_text else call["arguments"],
                },
            }
            for call in calls
        ]
    if message["role"] == "tool":
        told |= {key: message[key] for key in ("name",) if key in message}
        told["tool_call_id"] = _short(message.get("tool_call_id", ""))
    return told


def _short(call_id: str) -> str:
    """An id as Mistral's templates want it: nine letters and digits."""
    if re.fullmatch(r"[A-Za-z0-9]{9}", call_id):
        return call_id
    return hashlib.blake2b(call_id.encode("utf-8", "replace"), digest_size=8).hexdigest()[:9]


def one_call_each(messages: Sequence[Message]) -> list[Message]:
    """The same conversation with a message of its own for each call, before what came of it."""
    result: list[Message] = []
    waiting: dict[str, Message] = {}
    for message in messages:
        calls = json.loads(message.get("tool_calls") or "[]")
        if len(calls) > 1:
            result += waiting.values()
            waiting = {}
            for i, call in enumerate(calls):
                content = message["content"] if i == 0 else ""
                waiting[call["id"]] = {**message, "content": content, "tool_calls": json.dumps([call])}
            continue
        if message["role"] == "tool" and message.get("tool_call_id", "") in waiting:
            result.append(waiting.pop(message["tool_call_id"]))
        elif waiting:
            result += waiting.values()
            waiting = {}
        result.append(message)
    return [*result, *waiting.values()]


# -- templates that know nothing of tools -----------------------------------------------------------------------------


def plain(messages: Sequence[Message], tools: Sequence[Any]) -> list[Message]:
    """The same conversation without tools: they stand in the system prompt, calls and what came of them in texts."""
    said: list[Message] = []
    for message in messages:
        calls = json.loads(message.get("tool_calls") or "[]")
        kept = {key: text for key, text in message.items() if key in ("role", "content", "reasoning")}
        if calls:
            kept["content"] = "\n".join(filter(None, [message["content"].strip(), *map(written, calls)]))
        elif message["role"] == "tool":
            kept = {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
            if said and said[-1]["role"] == "user":
                said[-1] = {"role": "user", "content": f"{said[-1]['content']}\n{kept['content']}"}
                continue
        said.append(kept)
    if tools:
        system = said.pop(0)["content"] if said and said[0]["role"] == "system" else ""
        said.insert(0, {"role": "system", "content": "\n\n".join(filter(None, [system, described(tools)]))})
    return said


def written(call: dict[str, Any]) -> str:
    """A call in Hermes's notation."""
    told = json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False)
    return f"<tool_call>\n{told}\n</tool_call>"


def described(tools: Sequence[Any]) -> str:
    """What a model is told that was taught no notation of its own."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"You can call these functions:\n<tools>\n{lines}\n</tools>\n"
        "To call one, answer with its name and arguments as a JSON object between tags, once for each call:\n"
        '<tool_call>\n{"name": "the function", "arguments": {"the argument": "its value"}}\n</tool_call>'
    )


# -- reading calls ----------------------------------------------------------------------------------------------------


def is_readable(text: str, form: ToolFormat, name: str) -> bool:
    """Whether a text of a template holds a call of that name that can be read, with arguments."""
    for start in (0, text.find("{")):
        reader = CallReader(form, [name])
        found = [*reader.take(text[max(start, 0) :]), *reader.finish()]
        if any(isinstance(part, Call) and part.arguments for part in found):
            return True
    return False


class CallReader:
    """Splits an answer, as it comes, into text and calls; names: of the tools that there are.

    What begins like a call is held back until it is one, or is none and comes as text.
    """

    def __init__(self, form: ToolFormat, names: Iterable[str]) -> None:
        self._form, self._names = form, frozenset(names)
        self._held = ""
        self._is_open = False
        self._at_start = True
        self.n_calls = 0

    def take(self, text: str) -> Iterator[str | Call]:
        """What is known by now that was not known before."""
        self._held += text
        while True:
            if self._is_open:
                if not self._form.close or self._form.close not in self._held:
                    return
                body, _, self._held = self._held.partition(self._form.close)
                self._is_open = False
                yield from self._closed(body + self._form.close)
                continue
            if self._may_be_bare():
                return
            found = [(at, opened) for opened in self._form.opens if (at := self._held.find(opened)) >= 0]
            if not found:
                keep = max((_beginning_at_end(opened, self._held) for opened in self._form.opens), default=0)
                said, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
                yield from self._say(said)
                return
            at, _ = min(found)
            said, self._held = self._held[:at], self._held[at:]
            yield from self._say(said)
            self._is_open = True

    def finish(self, *, is_cut: bool = False) -> Iterator[str | Call]:
        """What was held back. is_cut: the answer ended early; a call that was begun then is no call, and no text."""
        held, self._held, was_open, self._is_open = self._held, "", self._is_open, False
        if not held or (is_cut and was_open and "<function=" in held and "</function>" not in held):
            return
        for part in self._closed(held):
            if isinstance(part, Call) or not (is_cut and was_open):
                yield part

    def _may_be_bare(self) -> bool:
        """Whether the answer so far may be nothing but a call, without a mark before it."""
        held = self._held.lstrip()
        if not self._at_start or not held:
            return self._at_start and not held
        begun = re.match(r'\{\s*(?:"(?:(\w*)(?:"|\Z))?)?', held)
        if begun is None or held[0] != "{":
            return False
        rest = held[1:].lstrip()
        return any(rest.startswith(key) or key.startswith(rest) for key in ('"name"', '"type"', '"function"'))

    def _say(self, text: str) -> Iterator[str]:
        if self.n_calls and not text.strip():
            return
        if text:
            self._at_start = self._at_start and not text.strip()
            yield text

    def _closed(self, text: str) -> Iterator[str | Call]:
        calls = [call for call in self._calls(text) if call.name in self._names]
        if not calls:
            yield from self._say(_HARMONY.sub("", text, count=1) if self._form.name == "harmony" else text)
        self.n_calls += len(calls)
        self._at_start = False
        yield from calls

    def _calls(self, text: str) -> list[Call]:
        """The calls that a text holds, which begins like one."""
        text = text.strip()
        if self._form.name == "harmony" and (found := _HARMONY.match(text)):
            return _of({"name": found[1], "arguments": _value(text[found.end() :])})
        if text.startswith("[TOOL_CALLS]"):
            return _mistral(text)
        text = text.removeprefix("<|python_tag|>")
        text = text.removeprefix("<tool_call>").removesuffix("</tool_call>").strip()
        if found := _XML_CALL.search(text):
            return [Call(found[1], {name: _scalar(value) for name, value in _XML_ARGUMENT.findall(found[2])})]
        return [call for value in _values(text) for call in _of(value)]


def _mistral(text: str) -> list[Call]:
    calls = []
    for part in filter(None, map(str.strip, text.split("[TOOL_CALLS]"))):
        if named := re.match(r"([\w.-]+)\s*(?:\[CALL_ID\][^\[\{]*)?(?:\[ARGS\])?\s*(?=\{)", part):
            calls += _of({"name": named[1], "arguments": _value(part[named.end() :])})
        else:
            calls += [call for value in _values(part) for call in _of(value)]
    return calls


def _values(text: str) -> list[Any]:
    """JSON objects that stand one behind another, apart by white space, commas or semicolons, or in a list."""
    decoder, found, place = json.JSONDecoder(strict=False), [], 0
    while place < len(text):
        if text[place] in " \n\r\t;,":
            place += 1
            continue
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            break
        found += value if isinstance(value, list) else [value]
    return found


def _value(text: str) -> Any:
    values = _values(text)
    return values[0] if values else None


def _of(value: Any) -> list[Call]:
    """The call that a value tells; none where it tells none."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        return []
    name = value.get("name", value.get("function"))
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # JSON in JSON
        arguments = _value(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return []
    return [Call(name, arguments)]


def _scalar(text: str) -> Any:
    """An argument that stands between tags: JSON where it is, else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _beginning_at_end(text: str, end: str) -> int:
    return next((n for n in range(min(len(text), len(end)), 0, -1) if end.endswith(text[:n])), 0)
