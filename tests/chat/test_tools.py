"""Calls of tools: what families of models write is read, whole and in pieces, and nothing else is taken for one."""

from __future__ import annotations

import json

import pytest
from llama_cpp_templates import templates

from kvcompose_local.chat.template import ChatTemplate
from kvcompose_local.chat.tools import FORMATS, HERMES, Call, CallReader, format_of
from kvcompose_local.errors import ModelError

BY_NAME = {form.name: form for form in FORMATS}
PARIS = Call("get_weather", {"city": "Paris"})
OSLO = Call("get_weather", {"city": "Oslo"})
BOTH = [PARIS, OSLO]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def read(form: str, text: str, size: int) -> tuple[str, list[Call]]:
    """The text and the calls of an answer that comes in pieces of ``size`` characters."""
    reader = CallReader(BY_NAME[form], ["get_weather"])
    parts = [p for i in range(0, len(text), size) for p in reader.take(text[i : i + size])] + [*reader.finish()]
    return "".join(p for p in parts if isinstance(p, str)), [p for p in parts if isinstance(p, Call)]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("form", "text", "said", "calls"),
    [
        ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", [PARIS]),
        (
            "hermes",
            'Let me see. <tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>\n'
            '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>',
            "Let me see. ",
            [PARIS, OSLO],
        ),
        ("hermes", '{"name": "get_weather", "arguments": {"city": "Paris"}}', "", [PARIS]),
        (
            "hermes",
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
            "",
            [PARIS],
        ),
        ("hermes", "A <tool is no <tool_ call", "A <tool is no <tool_ call", []),
        ("hermes", "<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
        ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None, []),
        ("hermes", '{"answer": 42}', '{"answer": 42}', []),
        ("llama", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
        ("llama", '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
        (
            "llama",
            '{"name": "get_weather", "parameters": {"city": "Paris"}}; '
            '{"name": "get_weather", "parameters": {"city": "Oslo"}}',
            "",
            [PARIS, OSLO],
        ),
        ("llama", '{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
        ("llama", '{"name": "nobody", "parameters": {}}', '{"name": "nobody", "parameters": {}}', []),
        ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", [PARIS]),
        ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', "", [PARIS]),
        (
            "mistral",
            '[TOOL_CALLS]get_weather{"city": "Paris"}[TOOL_CALLS]get_weather{"city": "Oslo"}',
            "",
            [PARIS, OSLO],
        ),
        ("mistral", "[TOOL_USE] is no call", "[TOOL_USE] is no call", []),
        *(
            ("harmony", f'{header}<|message|>{{"city": "Paris"}}', "", [PARIS])
            for header in (
                "<|channel|>commentary to=functions.get_weather json",
                "<|channel|>commentary to=functions.get_weather <|constrain|>json",
                "<|channel|>commentary to=get_weather <|constrain|>json",
                "<|channel|>analysis to=functions.get_weather code",
                "<|channel|>commentary to=functions.get_weather<|channel|>commentary json",
                " to=functions.get_weather<|channel|>commentary json",
                " to=functions.get_weather<|channel|>analysis <|constrain|>json",
            )
        ),
        ("harmony", "<|channel|>commentary to=python code<|message|>print(1)", "print(1)", []),
        ("harmony", "Say to=me or to=functions.get_weather.", "Say to=me or to=functions.get_weather.", []),
    ],
)
def test_calls_are_told_from_text(form: str, text: str, said: str | None, calls: list[Call], size: int) -> None:
    text_said, found = read(form, text, size)
    assert found == calls
    assert said is None or text_said == said


def test_text_is_not_held_back_longer_than_it_must() -> None:
    reader = CallReader(HERMES, ["get_weather"])
    assert "".join(p for p in reader.take("Well, ") if isinstance(p, str)) == "Well, "
    assert [*reader.take("<tool")] == []
    assert [*reader.take(" box>")] == ["<tool box>"]


@pytest.mark.parametrize("name", sorted(templates()))
def test_every_template_shows_tools_calls_and_results(name: str) -> None:
    """As it does itself, where its calls can be read here; else in the system prompt and in texts."""
    template = ChatTemplate(templates()[name], bos="<s>", eos="</s>")
    call = json.dumps([{"id": "abcdefgh1", "name": "get_weather", "arguments": {"city": "Paris"}}])
    asked = {"role": "user", "content": "How is the weather?"}
    try:
        template.render([{"role": "system", "content": "Be kind."}, asked], add_generation_prompt=True)
    except ModelError:
        pytest.skip("it takes no system prompt, with tools or without")
    calling = {"role": "assistant", "content": "", "tool_calls": call}
    came = {"role": "tool", "content": "Sunny all day", "tool_call_id": "abcdefgh1", "name": "get_weather"}
    first = template.render([asked], add_generation_prompt=True, tools=TOOLS)
    assert "get_weather" in first
    assert "How is the weather?" in first
    text = template.render([asked, calling, came], add_generation_prompt=True, tools=TOOLS)
    assert "Sunny all day" in text
    assert "Paris" in text.partition("How is the weather?")[2]
    later = [asked, calling, came, {"role": "assistant", "content": "It is sunny."}, {"role": "user", "content": "Ta."}]
    assert "It is sunny." in template.render(later, add_generation_prompt=True, tools=TOOLS)
    two = json.dumps([json.loads(call)[0], {"id": "abcdefgh2", "name": "get_weather", "arguments": {"city": "Oslo"}}])
    results = [came, {**came, "content": "Rain", "tool_call_id": "abcdefgh2"}]
    both = template.render([asked, {**calling, "tool_calls": two}, *results], add_generation_prompt=True, tools=TOOLS)
    assert "Oslo" in both
    assert "Rain" in both


def test_the_families_are_found() -> None:
    found = {name: format_of(source).name for name, source in templates().items()}
    assert found["Qwen-Qwen2.5-7B-Instruct"] == found["Qwen3-Coder"] == "hermes"
    assert found["meta-llama-Llama-3.1-8B-Instruct"] == "llama"
    assert found["mistralai-Mistral-Nemo-Instruct-2407"] == "mistral"
    assert found["openai-gpt-oss-120b"] == "harmony"
