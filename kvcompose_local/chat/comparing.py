"""Compares texts and messages, leaving out what does not count."""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

from kvcompose_local.chat.text_model import Message


class Kept:
    """The characters of a text that count, and where they stand in the whole text."""

    def __init__(self, text: str, start: int, skipped: re.Pattern[str], is_marker: Callable[[str], bool]) -> None:
        spans, place = [], start
        for found in skipped.finditer(text, start):
            if found.lastgroup == "maybe" and not is_marker(found.group()):
                continue
            if found.start() > place:
                spans.append((place, found.start()))
            place = found.end()
        if place < len(text):
            spans.append((place, len(text)))
        self.text = "".join(text[begin:end] for begin, end in spans)
        self._spans = spans
        self._sums = [0, *accumulate(end - begin for begin, end in spans)]
        self._start, self._end = start, len(text)

    def place(self, n: int) -> int:
        """Where the first ``n`` kept characters end in the whole text."""
        if n == 0:
            return self._start
        i = bisect_left(self._sums, n) - 1
        return self._spans[i][0] + n - self._sums[i]

    def starts_at(self, n: int) -> int:
        """Where kept character ``n`` stands in the whole text; the end of the text behind the last one."""
        if n >= len(self.text):
            return self._end
        i = bisect_right(self._sums, n) - 1
        return self._spans[i][0] + n - self._sums[i]

    def n_before(self, place: int) -> int:
        """How many kept characters stand before a place in the whole text."""
        i = bisect_right([begin for begin, _ in self._spans], place) - 1
        return self._sums[i] + min(place, self._spans[i][1]) - self._spans[i][0] if i >= 0 else 0


def join(fed: str, fed_at: int, want: str, at: int) -> int:
    """Where to go on in ``want``: behind ``at``, and behind white space and markers that end ``fed`` already."""
    tail = fed[fed_at:]
    n = next((n for n in range(min(len(tail), len(want) - at), 0, -1) if tail.endswith(want[at : at + n])), 0)
    return at + n


def n_common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many tokens or characters both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def n_same_messages(ours: Sequence[Message], theirs: Sequence[Message]) -> int:
    """How many messages two conversations begin with that are the same."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (one, other) in pairs if not _is_same(one, other)), min(len(ours), len(theirs)))


def _is_same(ours: Message, theirs: Message) -> bool:
    """Whether two messages are the same.

    Of answers the white space around them and the thinking before them do not count: clients and protocols drop both.
    """
    return ours["role"] == theirs["role"] and told(ours) == told(theirs)


def told(message: Message) -> tuple[str, list[tuple[str, str]]]:
    """What a message says: its text, and the names and arguments of its calls."""
    calls = [
        (c["name"], json.dumps(c["arguments"], sort_keys=True)) for c in json.loads(message.get("tool_calls") or "[]")
    ]
    return message["content"].strip() if message["role"] == "assistant" else message["content"], calls
