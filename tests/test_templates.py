"""Real chat templates: conversations with every template that llama.cpp ships, to the byte that the cache is fed.

What a template says of the past changes from turn to turn. Whatever it does, all that was said stands in the transcript
once, the transcript says what the template says, and nothing is read again without being told.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cache

import pytest
from fake_engine import FakeEngine, FakeModel
from llama_cpp_templates import templates

from kvcompose_local.chat import Chat
from kvcompose_local.chat.reasoning import Format
from kvcompose_local.chat.template import ChatTemplate
from kvcompose_local.compaction import CacheMemory

#: It adds a list of functions to a text before it looks whether there is one.
_NEEDS_TOOLS = {"fireworks-ai-llama-3-firefunction-v2"}
#: It repeats its instructions after the last message, and takes those of the turn before back.
_MOVES_INSTRUCTIONS = {"CohereForAI-c4ai-command-r-plus-tool_use"}
_MARKER = re.compile(
    r"<\|[^<>\s]+\|?>|<[^<>\s]+\|>|</?s>|\[/?[A-Z_]+\]|<｜[^<>]+｜>|<(?:start|end)_of_turn>|<SPECIAL_\d+>"
)


@cache
def names() -> list[str]:
    return sorted(set(templates()) - _NEEDS_TOOLS)


class TemplateModel(FakeModel):
    """Bytes as tokens, and a real template."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = ChatTemplate(source, bos="<s>", eos="</s>")

    @property
    def folds_system(self) -> bool:  # type: ignore[override]
        return self.source.folds_system

    @property
    def reasoning_format(self) -> Format:  # type: ignore[override]
        return self.source.format

    def is_marker(self, text: str) -> bool:
        return bool(_MARKER.fullmatch(text))

    def render_chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool, now: datetime | None = None
    ) -> str:
        return self.source.render(messages, add_generation_prompt=add_generation_prompt, now=now)


def as_the_model_says_it(form: Format, prompt: str, thought: str, answer: str) -> str:
    """An answer in the format of its model, with thinking or without."""
    opened = form.opens_at_end(prompt)
    opens, closes = ((texts or ("",))[0].replace("*", "") for texts in (form.opens, form.answers))
    if form.name == "functionary":
        return "all\n" + answer
    if form.name in ("harmony", "solar", "muse"):  # each channel is a message of its own
        again = {"harmony": "<|end|><|start|>assistant", "solar": "<|end|><|begin|>assistant"}
        between = again.get(form.name, "<|eom|><|start|>assistant")
        return (opens + thought + between if thought else "") + closes + answer
    if not thought and not opened:
        return answer
    ends = {"command": "<|START_RESPONSE|>", "kimi": "<|open|>response<|sep|>"}.get(form.name, "")
    return f"{'' if opened else opens}{thought}{closes}{ends}{answer}"


class Conversation:
    """Four questions with documents between them, answered by a script."""

    said = (
        "DOCUMENT one",
        "Question a?",
        "Question b?",
        "DOCUMENT two",
        "DOCUMENT three",
        "Question c?",
        "Question d?",
    )

    def __init__(
        self, name: str, *, answer: str, thought: str = "", system: str | None = None, extra: str = ""
    ) -> None:
        self.model = TemplateModel(templates()[name])
        self.engine = FakeEngine(200_000)
        self.notes: list[str] = []
        self.chat = Chat(  # the cache takes all, so that only the template decides
            self.model,
            CacheMemory(self.engine, 200_000, compose=False),
            system=system,
            on_note=self.notes.append,
        )
        self.shown: list[str] = []
        for i, text in enumerate(self.said):
            if text.startswith("DOCUMENT"):
                self.chat.read(f"{text} is here. {extra}")
                continue
            k = len(self.shown) + 1
            self.engine.answers = []
            asked = self.chat.ask(f"{text} {extra}", max_tokens=9999)
            self._answer_with(k, answer, thought)
            self.shown.append("".join(asked))
        self.stands = bytes(self.chat.memory.tokens).decode()

    def _answer_with(self, k: int, answer: str, thought: str) -> None:
        engine, sample = self.engine, FakeEngine.sample

        def say() -> int:
            if not engine._answer:
                form, fed = self.model.reasoning_format, self.chat.transcript.fed
                engine.answers = [as_the_model_says_it(form, fed, thought.format(k), answer.format(k))]
            return sample(engine)

        engine.sample = say  # type: ignore[method-assign]

    @property
    def n_extra(self) -> int:
        """Tokens that were fed and are not in the transcript."""
        return len(self.engine.fed) - len(self.chat.memory.tokens)


def squeezed(text: str) -> str:
    return "".join(text.split())


def check_said_once(c: Conversation, system: str | None = None) -> None:
    places = [c.stands.find(text) for text in c.said]
    assert places == sorted(places)
    assert [c.stands.count(text) for text in (*c.said, system or "DOCUMENT one")] == [1] * (len(c.said) + 1)
    assert [c.stands.count(f"Answer {k}.") for k in range(1, 5)] == [1] * 4


ANSWERS = {"tidy": "Answer {}.", "untidy": "\n Answer {}. \n\n", "tools": 'Answer {}. {{"name": "f"}}'}


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("system", [None, "Speak Dutch."])
@pytest.mark.parametrize("name", names())
def test_nothing_is_fed_twice(name: str, system: str | None, kind: str) -> None:
    tools = '<tool_call>{"name": "f", "arguments": {}}</tool_call> [TOOL_CALLS] <|tool|>' if kind == "tools" else ""
    c = Conversation(name, answer=ANSWERS[kind], system=system, extra=tools)
    check_said_once(c, system)
    assert c.shown == [c.shown[0].replace("1", str(k)) for k in range(1, 5)]
    assert squeezed(c.shown[0]) == squeezed(ANSWERS[kind].format(1)), "no marker is shown"
    if name not in _MOVES_INSTRUCTIONS:
        assert (c.n_extra, c.notes) == (0, [c.notes[0]] if c.model.folds_system and system else [])


@pytest.mark.parametrize("name", names())
def test_thinking_is_told_apart_and_given_back_as_the_template_wants_it(name: str) -> None:
    c = Conversation(name, answer="Answer {}.", thought="\nhm {}\n")
    if c.model.reasoning_format.name == "functionary":
        return
    check_said_once(c)
    assert [squeezed(s) for s in c.shown] == [f"<think>hm{k}</think>Answer{k}." for k in range(1, 5)]
    answers = [m for m in c.chat.messages if m["role"] == "assistant"]
    assert answers == [{"role": "assistant", "content": f"Answer {k}.", "reasoning": f"hm {k}"} for k in range(1, 5)]
    says = c.model.render_chat(c.chat.messages[:-1], add_generation_prompt=True)
    assert [f"hm {k}" in c.stands for k in (1, 2, 3)] == [f"hm {k}" in says for k in (1, 2, 3)]
