"""Finds where what was said stands in the text that a template makes of it.

A search would find a short message in the template's own markers, and a marker that somebody typed in those before it.
So the template is asked: the same conversation with marks in place of all that was said tells what stands between.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvcompose_local.chat.text_model import Message
from kvcompose_local.errors import ModelError


class Span(NamedTuple):
    """A place in a text. n_trimmed: characters that were said before it and that the template leaves out."""

    begin: int
    end: int
    n_trimmed: int = 0

    def at(self, n: int) -> int:
        """Where the first ``n`` characters of what was said end."""
        return min(max(self.begin + n - self.n_trimmed, self.begin), self.end)


class Located(NamedTuple):
    """Where something stands that was said.

    part: ``content`` or ``reasoning`` of a message; or what its tools, calls and names hold, in which ``text`` is one
    string of many.
    """

    message: int
    part: str
    text: str
    span: Span


def located(
    want: str,
    messages: Sequence[Message],
    tools: str,
    render: Callable[[Sequence[Message], str], str],
    is_wanted: Callable[[str], bool],
    rest: str = "",
) -> list[Located]:
    """All that stands in ``want`` of what was said, in its order.

    want: what ``render`` makes of these messages and tools, or the beginning of it; is_wanted: which strings are looked
    for that tools, calls and names hold; rest: what else the last message holds.
    """
    name = f"said{secrets.token_hex(8)}at"  # which nobody says, and no template changes
    said: dict[tuple[int, str, str], int] = {}

    def mark(message: int, part: str, text: str) -> str:
        return f"{name}{said.setdefault((message, part, text), len(said))}."

    def marked_strings(message: int, part: str, value: Any) -> Any:
        if isinstance(value, str):
            return mark(message, part, value) if is_wanted(value) else value
        if isinstance(value, list):
            return [marked_strings(message, part, x) for x in value]
        if isinstance(value, dict):
            return {marked_strings(message, part, k): marked_strings(message, part, x) for k, x in value.items()}
        return value

    marked: list[Message] = []
    for i, message in enumerate(messages):
        marked.append({})
        for part, text in message.items():
            if part in ("reasoning", "content"):
                marked[i][part] = mark(i, part, text) if text else text
            elif part == "tool_calls":
                marked[i][part] = json.dumps(marked_strings(i, part, json.loads(text)))
            else:
                marked[i][part] = marked_strings(i, part, text) if part == "name" else text
    about = json.dumps(marked_strings(-1, "tools", json.loads(tools))) if tools else tools
    if rest:
        marked[-1]["content"] += rest
    try:
        pieces = re.split(rf"{name}(\d+)\.", render(marked, about))
    except ModelError:  # it refuses marks: then all is searched for
        pieces = [name, *(text for n in range(len(said)) for text in (str(n), name))]
    entries, found, at = [*said], [], 0  # at: in want, behind what was found last
    for before, n, after in zip(pieces[:-2:2], map(int, pieces[1::2]), pieces[2::2], strict=True):
        text, begin = entries[n][2], at + len(before)
        if want.startswith(before, at):
            span = _at(want, text, begin) or _until(want, after, begin)
        else:
            span = _searched(want, text, at)
        if span:
            found.append(Located(*entries[n], span))
            at = span.end
    return found


def _ways(text: str) -> list[tuple[str, int]]:
    """What a template may make of a text, trimmed or as JSON, and how many characters it takes from its beginning."""
    n_leading = len(text) - len(text.lstrip())
    ways = [(text, 0), (text.rstrip(), 0), (text.lstrip(), n_leading), (text.strip(), n_leading)]
    ways += [(json.dumps(text, ensure_ascii=ascii_alone)[1:-1], 0) for ascii_alone in (False, True)]
    return [(way, n) for way, n in ways if way]


def _at(want: str, text: str, begin: int) -> Span | None:
    """The text that stands at ``begin``."""
    found = ((way, n) for way, n in _ways(text) if want.startswith(way, begin))
    return next((Span(begin, begin + len(way), n) for way, n in found), None)


def _until(want: str, after: str, begin: int) -> Span | None:
    """Whatever the template makes of a text that stands at ``begin``, before what comes behind it."""
    end = want.find(after, begin) if after else -1
    return Span(begin, end) if end >= 0 else None


def _searched(want: str, text: str, start: int) -> Span | None:
    """The first place from ``start`` on where the text stands."""
    found = ((want.find(way, start), way, n) for way, n in _ways(text))
    return next((Span(begin, begin + len(way), n) for begin, way, n in found if begin >= 0), None)
