"""Tells a model's thinking from its answer, while it speaks.

Models mark their thinking in a dozen ways. A :class:`Format` names the markers of one of them, :func:`format_of` finds
the format that a chat template speaks, and :class:`Reader` splits the stream of an answer by it. The markers are facts
of the published templates; llama.cpp keeps them in ``models/templates``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

#: Tags around thinking in place of the model's own markers; scripts know how to cut them out.
OPEN, CLOSE = "<think>", "</think>"
#: A placeholder in markers for what a header says, such as a recipient or a content type.
_ANYTHING = "*"
_LONGEST_HEADER = 64


class Said(str):
    """A piece of an answer; ``is_reasoning`` tells whether it is a piece of the thinking before it."""

    __slots__ = ("is_reasoning",)
    is_reasoning: bool

    def __new__(cls, text: str, is_reasoning: bool = False) -> Said:
        said = super().__new__(cls, text)
        said.is_reasoning = is_reasoning
        return said


@dataclass(frozen=True)
class Format:
    """How one family of models marks its thinking.

    keys: what a template of the family holds; opens, answers: markers behind which the thinking or the answer begins,
    in pairs where there are as many of both; hidden: markers that belong to neither, before an answer; ends: such that
    end one; anywhere: whether the markers are tokens that part an answer wherever they stand, so that it can have many
    parts; calls: markers of tool calls, which are part of what is said, where there are tools.
    """

    name: str
    keys: tuple[str, ...]
    opens: tuple[str, ...]
    answers: tuple[str, ...]
    hidden: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    anywhere: bool = False
    calls: tuple[str, ...] = ()

    @cached_property
    def _kinds(self) -> dict[str, list[str]]:
        """All markers, by what they mean; what counts first where several match comes first."""
        kinds = {"calls": self.calls, "opens": self.opens, "answers": self.answers}
        kinds |= {"hidden": self.hidden, "ends": self.ends}
        return {kind: [way for text in texts for way in _ways(text)] for kind, texts in kinds.items() if texts}

    @cached_property
    def markers(self) -> re.Pattern[str]:
        """Finds any whole marker; its kind is the name of the group that matched."""
        groups = (f"(?P<{kind}>{'|'.join(map(_pattern, texts))})" for kind, texts in self._kinds.items())
        return re.compile("|".join(groups))

    @cached_property
    def begun(self) -> re.Pattern[str]:
        """Finds what stands at the end of a text and may be the beginning of a marker."""
        return re.compile(rf"(?:{'|'.join(_beginning(text) for texts in self._kinds.values() for text in texts)})\Z")

    def is_part(self, text: str) -> bool:
        """Whether a control token of this text is part of a marker."""
        return any(text in marker for texts in self._kinds.values() for marker in texts)

    def closes(self, opened: str, text: str) -> bool:
        """Whether the marker ``text`` ends the thinking that ``opened`` began."""
        is_paired = len(self.opens) == len(self.answers) and opened in self.opens
        return not is_paired or text == self.answers[self.opens.index(opened)]

    def marked(self, reasoning: str, answer: str) -> str:
        """An answer as the model says it, its thinking between its own markers."""
        opened, closed = (self.opens or (OPEN,))[0], (self.answers or (CLOSE,))[0]
        return opened.replace(_ANYTHING, "") + reasoning + closed.replace(_ANYTHING, "") + answer

    def of(self, opened: str) -> Format:
        """This format reduced to the marker ``opened`` and the marker that ends such thinking."""
        i = self.opens.index(opened)
        return replace(self, opens=(opened,), answers=self.answers[i : i + 1])

    def opens_at_end(self, prompt: str) -> str:
        """The marker by which ``prompt`` has begun the thinking already, empty where it has not."""
        end = prompt.rstrip()
        return next((text for text in self.opens if end.endswith(text.rstrip())), "")


def _ways(marker: str) -> list[str]:
    """A marker, and the same with a content type in its header, as gpt-oss names it."""
    before, anything, after = marker.rpartition(_ANYTHING)
    return [marker, f"{before}*<|constrain|>*{after}"] if anything else [marker]


def _parts(marker: str) -> list[str]:
    return [f"[^<]{{0,{_LONGEST_HEADER}}}" if c == _ANYTHING else re.escape(c) for c in marker]


def _pattern(marker: str) -> str:
    return "".join(_parts(marker))


def _beginning(marker: str) -> str:
    """Matches any beginning of a marker."""
    first, *rest = _parts(marker)
    return first + "".join(f"(?:{part}" for part in rest) + ")?" * len(rest)


#: Tags that are words; a template may know several of them, of which the first is its own.
_TAGS = ("think", "thinking", "thought", "reasoning")
#: The most particular first. The last is for templates without any thinking: their models may think all the same.
FORMATS = (
    Format(
        "harmony",
        ("<|channel|>",),
        (
            "<|channel|>analysis*<|message|>",
            "<|channel|>*<|channel|>analysis*<|message|>",
            " to=*<|channel|>analysis*<|message|>",
        ),
        (
            "<|channel|>final*<|message|>",
            "<|channel|>commentary*<|message|>",
            "<|channel|>*<|channel|>final*<|message|>",
            "<|channel|>*<|channel|>commentary*<|message|>",
            " to=*<|channel|>commentary*<|message|>",
        ),
        ("<|start|>assistant", "<|end|>"),
        anywhere=True,
    ),
    Format("gemma", ("<|channel>",), ("<|channel>thought",), ("<channel|>",), anywhere=True),
    Format(
        "solar",
        ("<|think|>", "<|content|>"),
        ("<|think|>",),
        ("<|content|>",),
        ("<|end|>", "<|begin|>assistant"),
        anywhere=True,
    ),
    Format(
        "muse",
        ("to=self",),
        (" to=self*<|message|>",),
        (" to=user*<|message|>",),
        ("<|eom|>", "<|start|>assistant"),
        anywhere=True,
    ),
    Format(
        "command",
        ("<|START_THINKING|>",),
        ("<|START_THINKING|>",),
        ("<|END_THINKING|>",),
        ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
        anywhere=True,
    ),
    Format(
        "kimi",
        ("<|open|>", "<|sep|>"),
        ("<|open|>think<|sep|>",),
        ("<|close|>think<|sep|>",),
        ("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>"),
        anywhere=True,
    ),
    Format("mistral", ("[/THINK]",), ("[THINK]",), ("[/THINK]",)),
    Format("seed", ("</seed:think>",), ("<seed:think>",), ("</seed:think>",)),
    Format("minimax", ("</mm:think>",), ("<mm:think>",), ("</mm:think>",)),
    Format("hunyuan", ("hy_Assistant",), ("<think:opensource>",), ("</think:opensource>",)),
    Format("apertus", ("<|inner_prefix|>",), ("<|inner_prefix|>",), ("<|inner_suffix|>",), anywhere=True),
    Format(
        "apriel",
        ("[BEGIN FINAL RESPONSE]",),
        ("Here are my reasoning steps:\n", "<thinking>"),
        ("[BEGIN FINAL RESPONSE]", "</thinking>"),
        ends=("[END FINAL RESPONSE]",),
    ),
    *(
        Format(name, keys, ("<think>",), ("</think>",), (f"<{tag}>",), (f"</{tag}>",))
        for name, keys, tag in (
            ("granite", ("<response></response>",), "response"),
            ("answer", ("<answer>", "</think>"), "answer"),
        )
    ),
    Format("kimi-vl", ("◁think▷",), ("◁think▷",), ("◁/think▷",)),
    Format("functionary", (">>>all",), (), (), ("all\n",)),
    *(Format(tag, (f"</{tag}>",), (f"<{tag}>",), (f"</{tag}>",)) for tag in _TAGS),
    Format(
        "unknown",
        (),
        (OPEN, "<thinking>", "<thought>", "<reasoning>", "[THINK]"),
        (CLOSE, "</thinking>", "</thought>", "</reasoning>", "[/THINK]"),
    ),
)


def format_of(template: str) -> Format:
    """The format of the models that a chat template is for, by its source and whatever it was seen to render."""
    form = next(form for form in FORMATS if all(key in template for key in form.keys))
    if form.name not in _TAGS:
        return form
    tags = [tag for tag in _TAGS if f"</{tag}>" in template]  # one that cuts other models' tags out, too, knows several
    return replace(form, opens=tuple(f"<{tag}>" for tag in tags), answers=tuple(f"</{tag}>" for tag in tags))


class Reader:
    """Splits an answer, as it comes, into thinking and speech; markers belong to neither.

    opened: the marker by which the prompt has begun the thinking, empty where it has not. Thinking is the first part of
    an answer and ends once; behind its end, or in an answer that begins without it, markers are text, and so are they
    in the arguments of calls. Markers of formats that have them anywhere count once the model has used one, and at the
    beginning of a line.
    """

    def __init__(self, form: Format, *, opened: str = "") -> None:
        self.form = form
        self.opened = opened  # the marker that the thinking began with
        self.is_reasoning = bool(opened)
        self.has_answered = False  # whether a marker said that the answer begins
        self._held = ""  # what may be the beginning of a marker
        self._said = ""  # the line that is being said
        self._has_marked = bool(opened)
        self._is_blank = True  # whether nothing was said since the last marker

    def take(self, text: str) -> Iterator[Said]:
        """The pieces that can be told apart now that ``text`` has come."""
        text, place = self._held + text, 0
        while found := self.form.markers.search(text, place):
            place = found.end()
            if found.lastgroup == "ends" and not self.is_reasoning and not text[place:].strip():
                break  # what ends an answer, unless more comes
            if not self._counts(text, found):
                continue
            yield from self._say(text[: found.start()])
            text, place = text[found.end() :], 0
            self._is_blank = self._has_marked = True
            if found.lastgroup == "calls":
                self.is_reasoning = False
                yield from self._say(found.group())
            elif found.lastgroup != "hidden":
                self.is_reasoning = found.lastgroup == "opens"
                self.has_answered = self.has_answered or not self.is_reasoning
                self.opened = found.group("opens") or self.opened
        held = found or self.form.begun.search(text, place)
        end = held.start() if held else len(text)
        self._held = text[end:]
        yield from self._say(text[:end])

    def finish(self) -> Iterator[Said]:
        """The pieces that were held back."""
        held, self._held = self._held, ""
        if not (held.strip() in self.form.ends and not self.is_reasoning):
            yield from self._say(held)

    def _counts(self, text: str, found: re.Match[str]) -> bool:
        before, kind = text[: found.start()], found.lastgroup
        is_first = self._is_blank and not before.strip()
        if self.form.anywhere:
            line = (self._said + before).rpartition("\n")[2]
            return self._has_marked or is_first or kind == "hidden" or not line.strip()
        if kind == "calls":
            return self.is_reasoning
        if kind == "answers" and self.is_reasoning:
            return self.form.closes(self.opened, found.group())
        if kind == "hidden":
            return is_first and not self.is_reasoning
        return kind != "ends" and is_first and not self.has_answered

    def _say(self, text: str) -> Iterator[Said]:
        if text:
            self._is_blank = self._is_blank and not text.strip()
            self._said = (self._said + text).rpartition("\n")[2]
            yield Said(text, self.is_reasoning)


def shown(reasoning: str, answer: str) -> str:
    """An answer as one text, its thinking between tags."""
    return f"{OPEN}{reasoning}{CLOSE}{answer}" if reasoning else answer
