"""Tells the calls of tools in an answer from what is said, while it comes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kvcompose_local.chat.notations import Call, Ending, Found, Schemas, Shape, Unfinished, as_json, bare_json


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes calls.

    keys: what a template of the family holds; opens, closes: markers around calls, which stand before and behind each
    or all; heads: texts at which a call begins without them; shapes: how a call is written between them, and bare
    where an answer begins with one; inner: markers within calls; says: writes calls where the template leaves them
    out; tells_system: whether it looks for tools in the system prompt; named, arguments, is_list: how JSON of a call
    is told; gap: what stands between a mark and a call; is_bare: whether calls need no marks.
    """

    name: str
    keys: tuple[str, ...] = ()
    opens: tuple[str, ...] = ()
    closes: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    shapes: tuple[Shape, ...] = (as_json,)
    bare: tuple[Shape, ...] = (bare_json,)
    inner: tuple[str, ...] = ()
    says: Callable[[Sequence[Any]], str] | None = None
    tells_system: bool = False
    named: str = "name"
    arguments: str = "arguments"
    is_list: bool = False
    gap: str = ""
    is_bare: bool = False

    @property
    def forced(self) -> str:
        """What a call begins with that must be one, in JSON."""
        return self.opens[0] + self.gap if self.opens and not self.is_bare else ""

    @property
    def shown(self) -> frozenset[str]:
        """Control tokens that are part of a call."""
        texts = (*self.opens, *self.closes, *self.inner)
        return frozenset(found for text in texts for found in (text, *re.findall(r"<[^<>]+>", text)))

    @cached_property
    def around(self) -> re.Pattern[str]:
        """Finds what may stand between two calls, or before the first and behind the last."""
        marks = "|".join(map(re.escape, (*self.opens, *self.closes)))
        return re.compile(rf"(?:[\s,;]|[}}\]]+(?=\s*(?:{marks}))|{marks})*" if marks else r"[\s,;]*")

    @cached_property
    def behind(self) -> re.Pattern[str]:
        """Finds what belongs to a call and stands behind it, where no other follows."""
        marks = "|".join(map(re.escape, self.closes))
        return re.compile(rf"(?:\s|[}}\]]+(?=\s*(?:{marks}))|{marks})*" if marks else r"\s*")


class CallReader:
    """Splits an answer, as it comes, into text and calls; tools: schemas of the arguments by the tool's name.

    What begins like a call is held back until it is one, or is none and comes as text.
    """

    def __init__(self, form: ToolFormat, tools: Schemas) -> None:
        self._form, self._tools = form, tools
        self._marks = (*form.opens, *form.heads)
        self._held = ""
        self._at_start = True  # nothing was said
        self._is_behind = False  # nothing was said since a call

    def take(self, text: str) -> Iterator[str | Call]:
        """What is known by now that was not known before."""
        self._held += text
        return self._read("")

    def finish(self, *, is_cut: bool = False) -> Iterator[str | Call]:
        """What was held back. is_cut: the answer ended early; a call that was begun then is no call, and no text."""
        return self._read("cut" if is_cut else "end")

    def _read(self, ending: Ending) -> Iterator[str | Call]:
        while self._held:
            start, is_marked = self._start()
            if start is None:
                keep = 0 if ending else max((_beginning_at_end(mark, self._held) for mark in self._marks), default=0)
                yield from self._say(len(self._held) - keep)
                return
            try:
                found = self._found(start, is_marked, ending)
            except Unfinished:
                yield from self._say(start)
                if ending:  # the beginning of a call was cut off
                    self._held = ""
                return
            if found:
                yield from self._say(start)
                calls, end = found
                self._held = self._held[end - start :]
                self._at_start, self._is_behind = False, True
                yield from calls
            elif self._is_behind:
                behind = self._form.behind.match(self._held)
                self._held, self._is_behind = self._held[behind.end() if behind else 0 :], False
            elif is_marked:
                mark = max((mark for mark in self._marks if self._held.startswith(mark, start)), key=len)
                yield from self._say(start + len(mark))
            else:
                self._at_start = False

    def _start(self) -> tuple[int | None, bool]:
        """Where the next call may begin, and whether a mark says so."""
        if self._at_start or self._is_behind:
            return 0, self._is_behind
        return min((at for mark in self._marks if (at := self._held.find(mark)) >= 0), default=None), True

    def _found(self, start: int, is_marked: bool, ending: Ending) -> Found:
        """The calls at a place of what is held. Raises Unfinished where more may make one."""
        around = self._form.around.match(self._held, start)
        at = around.end() if around else start
        is_marked = is_marked or any(mark in self._held[start:at] for mark in self._form.opens)
        is_marked = is_marked or any(self._held.startswith(head, at) for head in self._form.heads)
        rest = re.sub(r"\A[\s\]}]+", "", self._held[at:])
        marks = (*self._marks, *(self._form.closes if is_marked else ()))
        if not ending and (not rest or any(mark.startswith(rest) for mark in marks)):
            raise Unfinished
        shapes, is_unfinished = self._form.shapes if is_marked else self._form.bare, False
        for how in (ending,) if ending != "cut" or not is_marked else (ending, ""):
            for shape in shapes:
                try:
                    if found := shape(self._held, at, self._tools, how):
                        return found
                except Unfinished:
                    is_unfinished = True
        if is_unfinished:
            raise Unfinished
        return None

    def _say(self, n: int) -> Iterator[str]:
        """Give away that much of what is held as text."""
        said, self._held = self._held[:n], self._held[n:]
        if said:
            self._is_behind = False
            self._at_start = self._at_start and not said.strip()
            yield said


def _beginning_at_end(mark: str, text: str) -> int:
    """How many characters at the end of a text may be the beginning of a mark."""
    return next((n for n in range(min(len(text), len(mark)), 0, -1) if mark.startswith(text[-n:])), 0)
