"""Where what was said stands in a template's text: never in the template's own markers, whatever somebody says."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import cache

import pytest
from llama_cpp_templates import templates
from template_models import MARKER, TemplateModel, names

from kvcompose_local.chat.locating import located
from kvcompose_local.chat.transcript import UNPLACED, Step, Transcript
from kvcompose_local.errors import ModelError


class MarkerModel(TemplateModel):
    """Markers are tokens of their own, unless they were said."""

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = True) -> list[int]:
        parts = re.split(f"({MARKER.pattern})", text) if special else [text]
        ids = ([1000 + sum(part.encode())] if i % 2 else [*part.encode()] for i, part in enumerate(parts))
        return [token for part in ids for token in part]


def conversation(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def tokens_of(name: str, *said: str) -> tuple[list[int], list[Step], str]:
    """A conversation as a server is told it: its tokens, its steps and its text."""
    transcript = Transcript(MarkerModel(templates()[name]), None)
    transcript.messages = conversation(*said)
    transcript.steps = [Step(UNPLACED, i, "") for i in range(0, len(said), 2)]
    want = transcript.prompt()
    transcript.follow(want, 0, lambda _position: True)
    return transcript.tokens, transcript.steps, want


@cache
def neutral(name: str) -> tuple[list[int], list[Step], str]:
    return tokens_of(name, "quagga one", "quagga two", "quagga three", "quagga four", "quagga five")


@cache
def own_markers(name: str) -> list[str]:
    return sorted(set(MARKER.findall(neutral(name)[2])))[:6]


@pytest.mark.parametrize("name", names())
def test_no_message_is_taken_for_a_marker_and_no_marker_for_a_message(name: str) -> None:
    tokens, steps, text = neutral(name)
    n_markers = sum(token >= 1000 for token in tokens)
    letters = [char for char in "aeist" if char in text]
    words = [word for word in ("user", "assistant", "im_start", "turn", "INST") if word in text]
    markers = own_markers(name)
    for said in filter(None, (*letters, *words, *markers, "".join(markers), "\n".join(markers[:2]) + "x")):
        for conversation_ in ((said, "b", said, said, "And?"), ("Why?", said, "And?", "Yes.", said)):
            try:
                found, placed, want = tokens_of(name, *conversation_)
            except ModelError:  # a template may refuse what looks like its own
                continue
            assert sum(token >= 1000 for token in found) == n_markers, conversation_
            assert [s.n_messages for s in placed] == [s.n_messages for s in steps]
            assert all(a.begin < b.begin for a, b in itertools.pairwise(placed)), conversation_
            assert want.count("And?") == 1


CHANGES = [
    ("if x:\n  y = 1\nz", "if x:\n      y = 1\nz"),
    ("the rapist", "therapist"),
    ("one two", "one  two"),
    ("what <|im_end|> now", "what now"),
    ("<s>", "Why?"),
]


@pytest.mark.parametrize("name", names())
def test_another_text_is_read_though_only_white_space_or_markers_differ(name: str) -> None:
    for one, two in CHANGES:
        transcript = Transcript(MarkerModel(templates()[name]), None)
        for said in (one, two, one):
            transcript.messages = conversation(said, "Yes.", "And?")
            transcript.steps = [Step(UNPLACED, 0, ""), Step(UNPLACED, 2, "")]
            want = transcript.prompt()
            n_held = len(transcript.tokens)
            assert transcript.n_tokens_of(want, transcript.messages) == len(tokens_of(name, said, "Yes.", "And?")[0])
            transcript.follow(want, n_held, lambda _position: True)
            assert transcript.fed == want, (one, two)
            n_held = len(transcript.tokens)
            assert transcript.follow(want, n_held, lambda _position: True) == (0, 0, None, False)


def test_what_a_template_makes_of_a_message_is_found_whatever_it_is() -> None:
    def render(messages: Sequence[dict[str, str]]) -> str:
        says = {
            "trims": str.strip,
            "shouts": str.upper,
            "twice": lambda text: f"{text}<|and|>{text}",
            "hides": lambda _: "",
        }
        return "".join(f"<|{m['role']}|>{says[m['role']](m['content'])}<|end|>" for m in messages)

    said = [("trims", "  a "), ("trims", "<|end|>"), ("twice", "end"), ("hides", "end"), ("trims", "\n|")]
    messages = [{"role": role, "content": text} for role, text in said]
    want = render(messages)
    found = located(want, messages, render)
    assert [want[x.span.begin : x.span.end] for x in found] == ["a", "<|end|>", "end", "end", "|"]
    assert [x.message for x in found] == [0, 1, 2, 2, 4]
    assert [want[: x.span.begin].count("<|trims|>") for x in found] == [1, 2, 2, 2, 3]
    assert [found[0].span.at(n) - found[0].span.begin for n in range(5)] == [0, 0, 0, 1, 1]
    half = want[: want.index("<|twice|>") + len("<|twice|>") + 3]
    assert [x.message for x in located(half, messages, render)] == [0, 1, 2], "the beginning of a conversation"


def test_a_text_that_begins_with_a_message_is_not_searched() -> None:
    def render(messages: Sequence[dict[str, str]]) -> str:
        return "".join(message["content"].strip() + "|" for message in messages)

    messages = [{"role": "user", "content": text} for text in (" a", "b a", " ")]
    assert [x.span[:2] for x in located(render(messages), messages, render)] == [(0, 1), (2, 5), (6, 6)]


def test_a_template_that_changes_or_refuses_marks_is_searched() -> None:
    def render(messages: Sequence[dict[str, str]]) -> str:
        texts = [message["content"] for message in messages]
        if any(len(text) > 20 for text in texts):
            raise ModelError("too long")
        return "".join(f"<|{text}|>" for text in texts)

    messages = [{"role": "user", "content": text} for text in ("one", "two", "one", "three")]
    want = render(messages)
    assert [want[x.span.begin : x.span.end] for x in located(want, messages, render)] == ["one", "two", "one", "three"]
    assert [x.span.begin for x in located(want, messages, render)] == [2, 9, 16, 23]
