"""The shapes in which models write calls of tools, each with a reader that tells a call from none and from a part.

A shape is called with a text, the place where a call may begin, the schemas of the arguments by the name of the tool,
and how the text ends. It returns the calls that stand there and where they end, or None where there are none, and
raises :class:`Unfinished` where more text may make one.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

#: Whether more text comes, the answer was cut off, or the model ended it.
Ending = Literal["", "cut", "end"]
Schemas = Mapping[str, Any]


class Unfinished(Exception):
    """What was read so far may become a call."""


@dataclass(frozen=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: dict[str, Any]


Found = tuple[list[Call], int] | None
Shape = Callable[[str, int, Schemas, Ending], Found]

_SPACE = re.compile(r"\s*")
#: Characters within which the head of a call ends.
_LONGEST_HEAD = 200
_WORDS = {"True": True, "False": False, "None": None}


def _number(text: str) -> Any:
    """JSON has no infinity: a number too large for a float, and what is none, stays text."""
    return value if math.isfinite(value := float(text)) else text


#: Line breaks in strings, which models forget to escape, are taken.
_DECODER = json.JSONDecoder(strict=False, parse_float=_number, parse_constant=str)


def decoded(text: str, at: int, ending: Ending) -> tuple[Any, int] | None:
    """The JSON at a place and where it ends."""
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        return None
    except json.JSONDecodeError as error:
        # A string without an end, or a word or number that the next piece may go on with.
        if not ending and (error.msg.startswith("Unterminated") or error.pos > len(text) - len("\\u0000-")):
            raise Unfinished from None
        return None


def _past_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def expected(text: str, at: int, pattern: re.Pattern[str], ending: Ending) -> re.Match[str] | None:
    """A match at a place; what is short may become one."""
    if not (found := pattern.match(text, at)) and not ending and len(text) - at < _LONGEST_HEAD:
        raise Unfinished
    return found


# -- types of arguments ------------------------------------------------------------------------------------------------


def typed(text: str, schema: Any) -> Any:
    """An argument that stands unquoted: the schema tells whether it is a string or JSON; a guess where it does not."""
    kinds = _kinds(schema)
    if kinds == {"string"}:
        return text
    try:
        value, end = _DECODER.raw_decode(text.strip())
        if text.strip()[end:]:
            raise ValueError
    except (ValueError, RecursionError):
        value = _of_python(text.strip())
    if kinds and _kind(value) not in kinds | ({"integer"} if "number" in kinds else set()) and "string" in kinds:
        return text
    return text if isinstance(value, str) else value


def _of_python(text: str) -> Any:
    """The value of a Python literal, as which some templates write lists and booleans; else the text."""
    try:
        value = ast.literal_eval(text) if text[:1] in ("{", "[") else _WORDS.get(text, text)
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text
    return value


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    kinds: dict[type, str] = {str: "string", int: "integer", float: "number", dict: "object", list: "array"}
    return kinds.get(type(value), "null")


def _kinds(schema: Any) -> set[str]:
    """The types that a schema allows; empty where it does not tell."""
    if not isinstance(schema, dict):
        return set()
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            parts = [_kinds(part) for part in schema[key]]
            return set().union(*parts) if all(parts) else set()
    kinds = schema.get("type")
    if kinds is None and isinstance(schema.get("enum"), list):
        return {_kind(value) for value in schema["enum"]}
    if kinds is None and "const" in schema:
        return {_kind(schema["const"])}
    return {kinds} if isinstance(kinds, str) else {k for k in kinds or () if isinstance(k, str)}


def _properties(schema: Any) -> dict[str, Any]:
    found = schema.get("properties") if isinstance(schema, dict) else None
    return found if isinstance(found, dict) else {}


# -- JSON --------------------------------------------------------------------------------------------------------------

_NAMES, _ARGUMENTS = ("name", "tool_name", "function"), ("arguments", "parameters")
#: What a call begins with that nothing announces.
_BEGINNINGS = ('{"name"', '{"type"', '{"function"', '{"tool_name"', '{"tool_call_id"')


def as_json(text: str, at: int, tools: Schemas, ending: Ending) -> Found:
    """``{"name": …, "arguments": …}``, or a list of such."""
    head = re.sub(r"\s", "", text[at : at + _LONGEST_HEAD])[:3]
    if not any(start.startswith(head) or head.startswith(start) for start in ('{"', '[{"', "[]")):
        return None
    found = decoded(text, at, ending)
    calls = calls_of(found[0], tools) if found else []
    return (calls, found[1]) if found and calls else None


def bare_json(text: str, at: int, tools: Schemas, ending: Ending) -> Found:
    """The same where nothing announces it: it must begin like a call, or every answer in JSON was held back."""
    head = re.sub(r"\s", "", text[at : at + _LONGEST_HEAD]).removeprefix("[")
    if not any(start.startswith(head) or head.startswith(start) for start in _BEGINNINGS):
        return None
    return as_json(text, at, tools, ending)


def calls_of(value: Any, tools: Schemas) -> list[Call]:
    """The calls of known tools that a value tells."""
    if isinstance(value, list):
        return [call for part in value for call in calls_of(part, tools)]
    if not isinstance(value, dict):
        return []
    if isinstance(value.get("function"), dict):
        value = value["function"]
    if len(value) == 1 and isinstance(arguments := next(iter(value.values())), dict):
        name = next(iter(value))  # Apertus
    else:
        name = next((value[key] for key in _NAMES if isinstance(value.get(key), str)), "")
        arguments = next((value[key] for key in _ARGUMENTS if key in value), None)
    if isinstance(arguments, str):  # JSON in JSON
        try:
            arguments = _DECODER.decode(arguments) if arguments.strip() else None
        except (ValueError, RecursionError):
            return []
    arguments = {} if arguments is None else arguments
    return [Call(name, arguments)] if name in tools and isinstance(arguments, dict) else []


# -- a name, then arguments --------------------------------------------------------------------------------------------


def _named(text: str, at: int, leads: Sequence[str], tools: Schemas, ending: Ending) -> tuple[str, int] | None:
    """The known tool whose name stands behind one of these texts, and where the name ends."""
    heads = {lead + name: name for lead in leads for name in tools}
    if not ending and any(head.startswith(text[at:]) for head in heads):
        raise Unfinished
    longest = max((head for head in heads if text.startswith(head, at)), key=len, default="")
    return (heads[longest], at + len(longest)) if longest else None


@dataclass(frozen=True)
class Named:
    """A name, then the arguments as one JSON object.

    leads: what may stand before the name; behind: what stands between name and arguments; after: behind these.
    """

    leads: tuple[str, ...] = ("",)
    behind: str = r"\s*"
    after: str = ""

    def __call__(self, text: str, at: int, tools: Schemas, ending: Ending) -> Found:
        named = _named(text, at, self.leads, tools, ending)
        found = named and expected(text, named[1], re.compile(rf"{self.behind}\s*(?=\{{)"), ending)
        value = decoded(text, found.end(), ending) if found else None
        if not named or not value or not isinstance(value[0], dict):
            return None
        closed = re.compile(self.after).match(text, value[1])
        return [Call(named[0], value[0])], closed.end() if closed else value[1]


@dataclass(frozen=True)
class Tagged:
    """A name, then each argument between tags of its own, as it is where it is a string.

    leads: what may stand before the name; behind: what follows it; before, between: what stands before and behind the
    name of an argument; shut: what ends an argument; end: what ends the call; then: what follows that, which tells it
    from the same within an argument; lines: whether an argument stands on lines of its own. All are patterns but leads.
    """

    leads: tuple[str, ...]
    behind: str
    before: str
    between: str
    shut: str
    end: str
    then: str = ""
    lines: bool = False

    def __call__(self, text: str, at: int, tools: Schemas, ending: Ending) -> Found:
        named = _named(text, at, self.leads, tools, ending)
        found = named and expected(text, named[1], re.compile(self.behind), ending)
        if not named or not found:
            return None
        at, known, arguments = found.end(), _properties(tools[named[0]]), dict[str, Any]()
        place = _past_space(text, at)
        if text.startswith("{", place) and (whole := decoded(text, place, ending)) and isinstance(whole[0], dict):
            arguments, at = whole
        part = re.compile(rf"\s*(?:{self._argument()}|(?P<end>{self.end}{self._at_end(ending)}))")
        while found := expected(text, at, part, ending):
            if found["key"] is None:
                return [Call(named[0], arguments)], found.end()
            key, start = found["key"].strip(), found.end()
            left = tuple(name for name in known if name != key and name not in arguments)
            ways = _endings(self, left, ending) if ending or self._may_end(text, start) else []
            if not (closed := next(filter(None, (way.search(text, start) for way in ways)), None)):
                break
            value = text[start : closed.start()]
            if value.startswith("<![CDATA[") and value.endswith("]]>"):
                value = value[len("<![CDATA[") : -len("]]>")]
            arguments[key] = typed(value.removeprefix("\n") if self.lines else value, known.get(key))
            at = closed.end()
        if found and not ending:
            raise Unfinished
        return None

    def _may_end(self, text: str, start: int) -> bool:
        """Whether patterns are worth trying, which takes long where a file is written in small pieces."""
        marks = (self.shut, self.end, self.before) if self.then else (self.shut,)
        return any(text.find(mark, start) >= 0 for mark in marks)

    @staticmethod
    def _at_end(ending: Ending) -> str:
        return r"|\Z" if ending == "end" else ""

    def _argument(self, names: str = r"(?P<key>[^<>\n]{1,200}?)") -> str:
        return self.before + names + self.between

    def ways(self, left: Sequence[str], ending: Ending) -> Iterator[str]:
        """Patterns of where an argument ends, the surest first: at its tag, or without it before what comes next.

        left: names of arguments that are still to come.
        """
        line = r"\n?" if self.lines else ""
        another = rf"|\n(?={self._argument('(?:' + '|'.join(map(re.escape, left)) + ')')})" if left else ""
        then = rf"(?=\s*(?:{self.then}{self._at_end(ending)}))" if self.then else ""
        sure, any_end = rf"(?:{self.end}){then}", f"(?:{self.end}{self._at_end(ending)})"

        def shut(end: str) -> str:
            return rf"{line}{self.shut}(?=\s*(?:{self._argument('[^<>]{1,200}?')}|{end}))"

        def missing(end: str) -> str:
            return rf"\n?(?={end}){another}"

        yield f"{shut(sure)}|{missing(sure)}" if self.then else shut(sure)
        if ending:
            yield shut(any_end)
            yield missing(any_end)


@lru_cache(256)
def _endings(shape: Tagged, left: tuple[str, ...], ending: Ending) -> list[re.Pattern[str]]:
    return [re.compile(way) for way in shape.ways(left, ending)]


# -- literals ----------------------------------------------------------------------------------------------------------


#: The name of an argument or of a key.
_KEY = r"[^\s:=,{}\[\]()]{1,200}"


@dataclass(frozen=True)
class Literals:
    """A name, then named arguments, whose values are literals of the notation.

    leads: what may stand before the name; opened, shut: what stands around the arguments; sets: what stands between
    the name of an argument and its value; quotes: what strings stand between; escapes: whether they are escaped as
    Python's are; list_end: what ends a list of calls, which are apart by commas.
    """

    leads: tuple[str, ...]
    opened: str
    shut: str
    sets: str
    quotes: tuple[str, ...]
    escapes: bool = False
    list_end: str = ""

    def __call__(self, text: str, at: int, tools: Schemas, ending: Ending) -> Found:
        calls: list[Call] = []
        try:
            while named := _named(text, at, ("", *self.leads) if calls else self.leads, tools, ending):
                at = self._past(text, named[1], self.opened)
                arguments, at = self._items(text, at, self.sets, self.shut, ending)
                calls.append(Call(named[0], arguments))
                if not self.list_end:
                    return calls, at
                at = _past_space(text, at)
                if text.startswith(self.list_end, at):
                    return calls, at + len(self.list_end)
                at = _past_space(text, self._past(text, at, ","))
        except Unfinished:
            if not ending:
                raise
        except (ValueError, RecursionError):
            pass
        return None

    @staticmethod
    def _past(text: str, at: int, expected: str) -> int:
        """Behind a text that must stand here. Raises ValueError where another does."""
        if at >= len(text):
            raise Unfinished
        if not text.startswith(expected, at):
            raise ValueError(text[at : at + 20])
        return at + len(expected)

    def _items(self, text: str, at: int, sets: str, shut: str, ending: Ending) -> tuple[dict[str, Any], int]:
        """Names and values up to ``shut``; raises ValueError where there are none."""
        items: dict[str, Any] = {}
        head = re.compile(rf"(?P<key>{_KEY})\s*{sets}\s*")
        follows = re.compile(rf"\s*(?:,\s*{_KEY}\s*{sets}|{re.escape(shut)})")
        while not text.startswith(shut, at := _past_space(text, at)):
            at = _past_space(text, self._past(text, at, ",")) if items else at
            if not (found := expected(text, at, head, ending)):
                raise ValueError(text[at : at + 20])
            key = found["key"]
            quote = next((q for q in self.quotes if key.startswith(q) and key.endswith(q) and len(key) > len(q)), "")
            items[key[len(quote) : len(key) - len(quote)]], at = self._value(text, found.end(), follows, ending)
        return items, at + len(shut)

    def _value(self, text: str, at: int, follows: re.Pattern[str], ending: Ending) -> tuple[Any, int]:
        rest = text[at : at + _LONGEST_HEAD]
        if quote := next((quote for quote in self.quotes if rest.startswith(quote)), ""):
            return self._string(text, at + len(quote), quote, follows)
        if not rest or any(quote.startswith(rest) for quote in self.quotes):
            raise Unfinished
        if rest[0] == "{":
            return self._items(text, at + 1, ":", "}", ending)
        if rest[0] == "[":
            values: list[Any] = []
            at += 1
            while not text.startswith("]", at := _past_space(text, at)):
                at = _past_space(text, self._past(text, at, ",")) if values else at
                value, at = self._value(text, at, re.compile(r"\s*[,\]]"), ending)
                values.append(value)
            return values, at + 1
        found = re.compile(r"[^\s,{}\[\]()<>]+").match(text, at)
        if not found:
            raise ValueError(rest)
        if found.end() == len(text) and not ending:
            raise Unfinished
        word = found.group()
        return (_WORDS[word] if word in _WORDS else _DECODER.decode(word)), found.end()

    def _string(self, text: str, start: int, quote: str, follows: re.Pattern[str]) -> tuple[str, int]:
        """A string up to the first quote behind which its notation goes on: some templates escape none."""
        for found in re.compile(rf"{re.escape(quote)}(?={follows.pattern})").finditer(text, start):
            before = re.search(r"\\*\Z", text[max(start, found.start() - _LONGEST_HEAD) : found.start()])
            if not (self.escapes and before and len(before.group()) % 2):
                said = text[start : found.start()]
                return (_unescaped(said, quote) if self.escapes else said), found.end()
        raise Unfinished


def _unescaped(said: str, quote: str) -> str:
    """What Python means by a string that stands between quotes; the same text where it is not one of Python's."""
    try:
        return str(ast.literal_eval(quote + said.replace("\n", "\\n").replace("\r", "\\r") + quote))
    except (ValueError, SyntaxError):
        return said
