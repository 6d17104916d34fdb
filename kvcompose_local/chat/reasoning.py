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

    keys: what a template of the family holds; opens, answers: markers behind which the thinking or the answer begins;
    hidden: markers that belong to neither; at_start: whether thinking can begin at the start of an answer only; calls:
    markers of tool calls, which are part of what is said, where there are tools.
    """

    name: str
    keys: tuple[str, ...]
    opens: tuple[str, ...]
    answers: tuple[str, ...]
    hidden: tuple[str, ...] = ()
    at_start: bool = False
    calls: tuple[str, ...] = ()

    @cached_property
    def markers(self) -> re.Pattern[str]:
        """Finds any whole marker; its kind is the name of the group that matched."""
        kinds = {"calls": self.calls, "opens": self.opens, "answers": self.answers, "hidden": self.hidden}
        groups = (f"(?P<{kind}>{'|'.join(map(_pattern, texts))})" for kind, texts in kinds.items() if texts)
        return re.compile("|".join(groups))

    @cached_property
    def begun(self) -> re.Pattern[str]:
        """Finds what stands at the end of a text and may be the beginning of a marker."""
        texts = (*self.calls, *self.opens, *self.answers, *self.hidden)
        return re.compile(rf"(?:{'|'.join(_beginning(text) for text in texts)})\Z")

    def is_part(self, text: str) -> bool:
        """Whether a control token of this text is part of a marker."""
        return any(text in marker for marker in (*self.calls, *self.opens, *self.answers, *self.hidden))

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


def _parts(marker: str) -> list[str]:
    return [f"[^<]{{0,{_LONGEST_HEADER}}}" if c == _ANYTHING else re.escape(c) for c in marker]


def _pattern(marker: str) -> str:
    return "".join(_parts(marker))


def _beginning(marker: str) -> str:
    """Matches any beginning of a marker."""
    first, *rest = _parts(marker)
    return first + "".join(f"(?:{part}" for part in rest) + ")?" * len(rest)


#: The most particular first. The last is for templates without any thinking: their models may think all the same.
FORMATS = (
    Format(
        "harmony",
        ("<|channel|>",),
        ("<|channel|>analysis*<|message|>",),
        ("<|channel|>final*<|message|>", "<|channel|>commentary*<|message|>"),
        ("<|start|>assistant", "<|end|>"),
    ),
    Format("gemma", ("<|channel>",), ("<|channel>thought",), ("<channel|>",)),
    Format("solar", ("<|think|>", "<|content|>"), ("<|think|>",), ("<|content|>",), ("<|end|>", "<|begin|>assistant")),
    Format(
        "muse",
        ("to=self",),
        (" to=self*<|message|>",),
        (" to=user*<|message|>",),
        ("<|eom|>", "<|start|>assistant"),
    ),
    Format(
        "command",
        ("<|START_THINKING|>",),
        ("<|START_THINKING|>",),
        ("<|END_THINKING|>",),
        ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
    ),
    Format(
        "kimi",
        ("<|open|>", "<|sep|>"),
        ("<|open|>think<|sep|>",),
        ("<|close|>think<|sep|>",),
        ("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>"),
    ),
    Format("mistral", ("[/THINK]",), ("[THINK]",), ("[/THINK]",)),
    Format("seed", ("</seed:think>",), ("<seed:think>",), ("</seed:think>",)),
    Format("minimax", ("</mm:think>",), ("<mm:think>",), ("</mm:think>",)),
    Format("hunyuan", ("hy_Assistant",), ("<think:opensource>",), ("</think:opensource>",)),
    Format("apertus", ("<|inner_prefix|>",), ("<|inner_prefix|>",), ("<|inner_suffix|>",)),
    Format(
        "apriel",
        ("[BEGIN FINAL RESPONSE]",),
        ("Here are my reasoning steps:\n", "<thinking>"),
        ("[BEGIN FINAL RESPONSE]", "</thinking>"),
        ("[END FINAL RESPONSE]",),
    ),
    Format("granite", ("<response></response>",), ("<think>",), ("</think>",), ("<response>", "</response>")),
    Format("answer", ("<answer>", "</think>"), ("<think>",), ("</think>",), ("<answer>", "</answer>")),
    *(Format(name, (f"</{name}>",), (f"<{name}>",), (f"</{name}>",)) for name in ("thought", "thinking", "reasoning")),
    Format("kimi-vl", ("◁think▷",), ("◁think▷",), ("◁/think▷",)),
    Format("functionary", (">>>all",), (), (), ("all\n",), at_start=True),
    Format("think", ("</think>",), ("<think>",), ("</think>",)),
    Format(
        "unknown",
        (),
        (OPEN, "<thinking>", "<thought>", "<reasoning>", "[THINK]"),
        (CLOSE, "</thinking>", "</thought>", "</reasoning>", "[/THINK]"),
        at_start=True,
    ),
)


def format_of(template: str) -> Format:
    """The format of the models that a chat template is for, by its source and whatever it was seen to render."""
    return next(form for form in FORMATS if all(key in template for key in form.keys))


class Reader:
    """Splits an answer, as it comes, into thinking and speech; markers belong to neither.

    ``is_reasoning`` begins true where the prompt has opened the thinking. A marker counts at the beginning of the
    answer, and anywhere once the model has used one. In the middle of an answer that held no thinking it is text,
    except at the beginning of a line for models that are known to use it.
    """

    def __init__(self, form: Format, *, is_reasoning: bool = False) -> None:
        self.form = form
        self.is_reasoning = is_reasoning
        self._held = ""  # what may be the beginning of a marker
        self._said = ""  # the line that is being said
        self._has_thought = is_reasoning
        self._at_start = True
        self.opened = ""  # the marker that the model began to think with
        self.has_answered = False  # whether a marker said that the answer begins

    def take(self, text: str) -> Iterator[Said]:
        """The pieces that can be told apart now that ``text`` has come."""
        text, place = self._held + text, 0
        while found := self.form.markers.search(text, place):
            place = found.end()
            if not self._counts(text, found):
                continue
            yield from self._say(text[: found.start()])
            text, place = text[found.end() :], 0
            if found.lastgroup == "calls":
                self.is_reasoning, self.has_answered = False, True
                yield from self._say(found.group())
            elif found.lastgroup != "hidden":
                self.is_reasoning = found.lastgroup == "opens"
                self.has_answered = self.has_answered or not self.is_reasoning
                self._has_thought = self._has_thought or self.is_reasoning
                self.opened = self.opened or found.group("opens") or ""
        begun = self.form.begun.search(text, place)
        end = begun.start() if begun else len(text)
        self._held = text[end:]
        yield from self._say(text[:end])

    def finish(self) -> Iterator[Said]:
        """The pieces that were held back."""
        held, self._held = self._held, ""
        yield from self._say(held)

    def _counts(self, text: str, found: re.Match[str]) -> bool:
        before = text[: found.start()]
        if self._has_thought or (self._at_start and not before.strip()):
            return True
        if self.form.at_start:
            return False
        return found.lastgroup == "hidden" or not (self._said + before).rpartition("\n")[2].strip()

    def _say(self, text: str) -> Iterator[Said]:
        if text:
            self._at_start = self._at_start and not text.strip()
            self._said = (self._said + text).rpartition("\n")[2]
            yield Said(text, self.is_reasoning)


def shown(reasoning: str, answer: str) -> str:
    """An answer as one text, its thinking between tags."""
    return f"{OPEN}{reasoning}{CLOSE}{answer}" if reasoning else answer
