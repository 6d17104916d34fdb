"""Where what was said stands in a template's text: never in the template's own markers, whatever somebody says."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
from llama_cpp_templates import templates
from template_models import MARKER, TemplateModel, names

from kvcompose_local.chat.locating import Located, located
from kvcompose_local.chat.steps import UNPLACED, Step
from kvcompose_local.chat.transcript import Transcript
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
        for before, after in (((), ("Yes.", "And?")), (("Why?",), ("And?",))):  # of a user, and of an answer
            transcript = Transcript(MarkerModel(templates()[name]), None)
            for said in (one, two, one):
                messages = conversation(*before, said, *after)
                want = transcript.render(messages)
                assert transcript.n_tokens_of(want, messages, "") == len(tokens_of(name, *before, said, *after)[0])
                transcript.tell(messages, "")
                transcript.follow(want, len(transcript.tokens), lambda _position: True)
                assert transcript.fed == want, (one, two)
                assert not transcript.tell(messages[:-1], "")
                assert transcript.tell(messages, "")
                transcript.follow(want, len(transcript.tokens), lambda _position: True)
                assert transcript.fed == want, (one, two)


def tool(described: str) -> dict[str, Any]:
    of = {"type": "string", "description": described, "enum": ["a", described]}
    parameters = {"type": "object", "properties": {"path": of, described: {"type": "string"}}, "required": ["path"]}
    return {"type": "function", "function": {"name": "look", "description": described, "parameters": parameters}}


@pytest.mark.parametrize("name", names())
def test_markers_in_tools_and_calls_are_text(name: str) -> None:
    def tokens_with(said: str) -> tuple[list[int], str]:
        transcript = Transcript(MarkerModel(templates()[name]), None)
        calls = [{"id": "123456789", "name": "look", "arguments": {"path": said, "more": [{said: said}]}}]
        answer = {"role": "assistant", "content": "", "tool_calls": json.dumps(calls)}
        came = {"role": "tool", "content": said, "tool_call_id": "123456789", "name": "look"}
        tools = json.dumps([tool(said)])
        messages = [{"role": "user", "content": "Go."}, answer, came, {"role": "user", "content": "And?"}]
        transcript.tell(messages, tools)
        transcript.follow(transcript.prompt(), 0, lambda _position: True)
        return transcript.tokens, transcript.fed

    tokens, text = tokens_with("quagga")
    markers = sorted(set(MARKER.findall(text)))[:4]
    for said in (*markers, "".join(markers), f'\\ "{"".join(markers[:2])}"\n\u00e9'):
        found, fed = tokens_with(said)
        ways = {said, json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1]}
        if sum(map(fed.count, ways)) < text.count("quagga"):
            continue  # a template that takes out what looks like its own
        assert sum(token >= 1000 for token in found) == sum(token >= 1000 for token in tokens), (said, fed)


def found_in(
    want: str, messages: Sequence[dict[str, str]], render: Callable[[Sequence[dict[str, str]]], str]
) -> list[Located]:
    return located(want, messages, "", lambda said, _tools: render(said), lambda _text: False)


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
    found = found_in(want, messages, render)
    assert [want[x.span.begin : x.span.end] for x in found] == ["a", "<|end|>", "end", "end", "|"]
    assert [x.message for x in found] == [0, 1, 2, 2, 4]
    assert [want[: x.span.begin].count("<|trims|>") for x in found] == [1, 2, 2, 2, 3]
    assert [found[0].span.at(n) - found[0].span.begin for n in range(5)] == [0, 0, 0, 1, 1]
    half = want[: want.index("<|twice|>") + len("<|twice|>") + 3]
    assert [x.message for x in found_in(half, messages, render)] == [0, 1, 2], "the beginning of a conversation"


def test_a_text_that_begins_with_a_message_is_not_searched() -> None:
    def render(messages: Sequence[dict[str, str]]) -> str:
        return "".join(message["content"].strip() + "|" for message in messages)

    messages = [{"role": "user", "content": text} for text in (" a", "b a", " ")]
    assert [x.span[:2] for x in found_in(render(messages), messages, render)] == [(0, 1), (2, 5), (6, 6)]


def test_a_template_that_changes_or_refuses_marks_is_searched() -> None:
    def render(messages: Sequence[dict[str, str]]) -> str:
        texts = [message["content"] for message in messages]
        if any(len(text) > 20 for text in texts):
            raise ModelError("too long")
        return "".join(f"<|{text}|>" for text in texts)

    messages = [{"role": "user", "content": text} for text in ("one", "two", "one", "three")]
    want = render(messages)
    assert [want[x.span.begin : x.span.end] for x in found_in(want, messages, render)] == ["one", "two", "one", "three"]
    assert [x.span.begin for x in found_in(want, messages, render)] == [2, 9, 16, 23]
