"""Calls of tools: what families of models write is read, whole and in pieces, and nothing else is taken for one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llama_cpp_templates import templates

from kvcompose_local.chat.calls import CallReader, ToolFormat
from kvcompose_local.chat.notations import Call
from kvcompose_local.chat.template import ChatTemplate
from kvcompose_local.chat.tools import BARE, FORMATS, HERMES
from kvcompose_local.errors import ModelError

BY_NAME = {form.name: form for form in (*FORMATS, BARE)}
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


def read_by(form: ToolFormat, text: str, size: int, tools: Any = None) -> tuple[str, list[Call]]:
    """The text and the calls of an answer that comes in pieces of ``size`` characters."""
    reader = CallReader(form, tools or TYPED)
    parts = [p for i in range(0, len(text), size) for p in reader.take(text[i : i + size])] + [*reader.finish()]
    return "".join(p for p in parts if isinstance(p, str)), [p for p in parts if isinstance(p, Call)]


def read(form: str, text: str, size: int) -> tuple[str, list[Call]]:
    return read_by(BY_NAME[form], text, size, {"get_weather": {}})


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
        ("bare", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
        ("bare", '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
        (
            "bare",
            '{"name": "get_weather", "parameters": {"city": "Paris"}}; '
            '{"name": "get_weather", "parameters": {"city": "Oslo"}}',
            "",
            [PARIS, OSLO],
        ),
        ("bare", '{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
        ("bare", '{"name": "nobody", "parameters": {}}', '{"name": "nobody", "parameters": {}}', []),
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


#: Of each type, and strings of all that a notation might trip over.
TYPES = {"city": {"type": "string"}, "n": {"type": "integer"}, "ok": {"type": "boolean"}, "of": {"type": "object"}}
TWO_TOOLS = [
    {
        "type": "function",
        "function": {"name": n, "description": n, "parameters": {"type": "object", "properties": TYPES}},
    }
    for n in ("get_weather", "get")
]
TYPED = {"get_weather": {"properties": TYPES}, "get": {"properties": TYPES}}
#: Real ones are in the archive, but for these: their calls stand in no template, or bare in a list.
SMALL = {
    "phi": "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% if 'tools' in message %}"
    "<|tool|>{{ message['tools'] }}<|/tool|>{% endif %}<|end|>{% endfor %}<|assistant|>",
    "cogito": "{{ tools | tojson if tools }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}"
    "{% if message.tool_calls %}[{% for call in message.tool_calls %}{{ call.function | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}]{% endif %}<|end|>{% endfor %}<|assistant|>\n",
}
NATIVE = """GLM-4.6 GLM-4.7-Flash LFM2-8B-A1B LFM2.5-8B-A1B LFM2.5-Instruct google-gemma-4-31B-it MiniMax-M2 MiniMax-M1
    ibm-granite-granite-3.3-2B-Instruct ByteDance-Seed-OSS deepseek-ai-DeepSeek-V3.2 deepseek-ai-DeepSeek-V4
    tencent-Hy3 moonshotai-Kimi-K2 openbmb-MiniCPM5-1B NVIDIA-Nemotron-Nano-v2 unsloth-Apriel-1.5 Qwen3-Coder
    Apriel-1.6-15b-Thinker-fixed GigaChat3-10B-A1.8B GigaChat3.1-10B-A1.8B Apertus-8B-Instruct Qwen3.5-4B
    CohereForAI-c4ai-command-r7b-12-2024-tool_use meetkai-functionary-medium-v3.1 StepFun3.5-Flash
    NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 Qwen-Qwen3-0.6B meta-llama-Llama-3.1-8B-Instruct
    Mistral-Small-3.2-24B-Instruct-2506 openai-gpt-oss-120b""".split()


@pytest.mark.parametrize("name", [*NATIVE, *SMALL])
def test_what_a_template_writes_for_calls_is_read(name: str) -> None:
    template = ChatTemplate({**templates(), **SMALL}[name], bos="<s>", eos="</s>")
    form = template.tool_format
    asked = {"role": "user", "content": "How is the weather?"}
    prompt = template.render([asked], add_generation_prompt=True, tools=TWO_TOOLS)
    assert "You can call these functions" not in prompt, "it is told its own notation"
    marks = " and ".join(["<function=x> </parameter>", *form.opens, *form.closes, *form.heads])
    arguments: list[dict[str, Any]] = [
        {"city": "Paris", "n": 3, "ok": True, "of": {"a": [1, "x"], "b": None}},
        {"city": f'it\'s "quoted"\n\nin {{lines}} [of] (some) \\ {marks} end'},
        {},
    ]
    calls = [Call(("get", "get_weather")[i % 2], told) for i, told in enumerate(arguments)]
    ids = [{"id": f"abcdefgh{i}", "name": call.name, "arguments": call.arguments} for i, call in enumerate(calls)]
    for group in [[0], [1], [2], [0, 1, 2]]:
        calling = {"role": "assistant", "content": "", "tool_calls": json.dumps([ids[i] for i in group])}
        came = [
            {"role": "tool", "content": "Sunny", "tool_call_id": ids[i]["id"], "name": ids[i]["name"]} for i in group
        ]
        text = template.render([asked, calling, *came], add_generation_prompt=True, tools=TWO_TOOLS)
        start = next(i for i in range(len(text)) if prompt[: i + 1] != text[: i + 1])
        while start and not prompt[:start].endswith((">", "\n", "]")):
            start -= 1
        answer = text[start:].partition("Sunny")[0]
        if len(group) > 1 and not template._takes_several_calls:
            continue
        for size in (1, 5, len(answer)):
            assert read_by(form, answer, size)[1] == [calls[i] for i in group]


FILE = {"write_file": {"properties": {"path": {"type": "string"}, "content": {"type": "string"}}}}


def written(*parameters: str, end: str = "</tool_call>", begin: str = "<tool_call>\n") -> str:
    return f"{begin}<function=write_file>\n{''.join(parameters)}</function>\n{end}"


def parameter(name: str, value: str) -> str:
    return f"<parameter={name}>\n{value}\n</parameter>\n"


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, '{"name": "x"}', '{"name": "x"}'),
        ({"type": "string"}, "12345", "12345"),
        ({"type": "string"}, '"hello"', '"hello"'),
        ({"type": "string"}, "true", "true"),
        ({"type": "string"}, "  indented\n", "  indented\n"),
        ({"type": "string", "enum": ["1.10"]}, "1.10", "1.10"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"type": ["string", "null"]}, "null", None),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, "[1]", [1]),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, "1", "1"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": "integer"}, "12", 12),
        ({"type": "number"}, "1.10", 1.1),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "1e400", "1e400"),
        ({"type": "array"}, "['a', {'b': None}]", ["a", {"b": None}]),
        ({"type": "object"}, '{"a": [1, "x"]}', {"a": [1, "x"]}),
        ({"type": "object"}, "no object", "no object"),
        (None, '{"a": 1}', {"a": 1}),
        (None, "True", True),
        (None, '"quoted"', '"quoted"'),
        (None, "Paris", "Paris"),
    ],
)
def test_arguments_between_tags_have_the_types_of_the_schema(schema: Any, text: str, value: Any, size: int) -> None:
    tools = {"write_file": {"properties": {"it": schema}} if schema else None}
    said, calls = read_by(HERMES, written(parameter("it", text)), size, tools)
    assert (said, calls) == ("", [Call("write_file", {"it": value})])
    assert type(calls[0].arguments["it"]) is type(value)
    json.dumps(calls[0].arguments, allow_nan=False)


HTML = "<b></function></b> x </parameter> y\n<parameter=fake>\n</tool_call> <tool_call>"


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (written(parameter("content", HTML)), [HTML]),
        (written(parameter("path", "p"), parameter("content", HTML), end=""), [HTML]),
        (written("<parameter=content>\nlost\n"), ["lost"]),
        (written("<parameter=content>\nlost\n", parameter("path", "p")), ["lost"]),
        (written(parameter("content", "a"), end=written(parameter("content", "b"), begin="")), ["a", "b"]),
        (written(parameter("content", "a"), end=written(parameter("content", "b"))), ["a", "b"]),
        (written(parameter("content", "a"), begin="", end=""), ["a"]),
        (written(parameter("content", "a"), begin=""), ["a"]),
        (written('{"content": "a"}', begin="", end=""), ["a"]),
        (f"<tool_call>\n<function=write_file>\n{parameter('content', 'a')}", ["a"]),
    ],
)
def test_calls_between_tags_lose_nothing(text: str, contents: list[str], size: int) -> None:
    for before in ("", "I will.\n"):
        said, calls = read_by(HERMES, before + text, size, FILE)
        assert said == before
        assert [call.arguments["content"] for call in calls] == contents
    if "</function>" in text:
        assert read_by(HERMES, f"{text}\nDone,\n\nall of it.", size, FILE) == ("Done,\n\nall of it.", calls)


GO = '{"name": "get_weather", "arguments": {"city": "Paris"}}'


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("form", "text", "said", "calls"),
    [
        ("hermes", '<tool_call>{"name": "get", "arguments": null}</tool_call>', "", [{}]),
        ("hermes", '<tool_call>{"name": "get", "arguments": ""}</tool_call>', "", [{}]),
        ("hermes", '<tool_call>{"name": "get"}</tool_call>', "", [{}]),
        ("hermes", f"<tool_call>{GO}\n<tool_call>{GO}</tool_call>", "", [{"city": "Paris"}] * 2),
        ("hermes", f"<tool_call>{GO}\n{GO}</tool_call>", "", [{"city": "Paris"}] * 2),
        ("hermes", f"<tool_call>[{GO}, {GO}]</tool_call>", "", [{"city": "Paris"}] * 2),
        ("hermes", f"[{GO}, {GO}]", "", [{"city": "Paris"}] * 2),
        ("hermes", f"<tool_call>\n{GO}}}\n</tool_call>", "", [{"city": "Paris"}]),
        ("hermes", f"<tool_call>{GO}</tool_call>\n\nA\n\nB\n", "A\n\nB\n", [{"city": "Paris"}]),
        ("hermes", f"<tool_call>{GO}, is it", ", is it", [{"city": "Paris"}]),
        (
            "hermes",
            '<tool_call>{"name": "get", "arguments": {"city": "</tool_call> [1]"}}</tool_call>',
            "",
            [{"city": "</tool_call> [1]"}],
        ),
        ("mistral", '[TOOL_CALLS]get[ARGS]{"city": "[TOOL_CALLS] a"}', "", [{"city": "[TOOL_CALLS] a"}]),
        ("mistral", '[TOOL_CALLS]get_weather[ARGS]{}[TOOL_CALLS]get[ARGS]{"n": NaN}', "", [{}, {"n": "NaN"}]),
    ],
)
def test_no_call_is_lost(form: str, text: str, said: str, calls: list[Any], size: int) -> None:
    found = read_by(BY_NAME[form], text, size)
    assert (found[0], [call.arguments for call in found[1]]) == (said, calls)


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("form", [*FORMATS, BARE], ids=lambda form: form.name)
def test_marks_in_prose_are_text(form: ToolFormat, size: int) -> None:
    marks = (*form.opens, *form.heads, *form.closes)
    for mark in marks:
        for text in (f"Write {mark} before a call, and {mark}{{x}} so.\n", f"{mark}", f"`{mark}` get_weather, {mark}"):
            assert read_by(form, text, size) == (text, [])
    assert read_by(form, '{"name": "Ann", "age": 3} [1, 2] get_weather', size)[1] == []


@pytest.mark.parametrize("form", [*FORMATS, BARE], ids=lambda form: form.name)
def test_every_notation_reads_a_forced_call(form: ToolFormat) -> None:
    if form.name == "harmony":
        return  # its header alone forces one
    call = {form.named: "get", form.arguments: {"city": "Oslo"}}
    said, calls = read_by(form, form.forced + json.dumps([call] if form.is_list else call), 1)
    assert (said, calls) == ("", [Call("get", {"city": "Oslo"})])


@pytest.mark.parametrize("name", ["hermes", "gemma", "glm", "lfm", "deepseek", "minimax"])
def test_a_call_that_was_cut_off_is_none_and_no_text(name: str) -> None:
    texts = {
        "hermes": written(parameter("content", "abc"), end=""),
        "gemma": '<|tool_call>call:write_file{content:<|"|>abc<|"|>}',
        "glm": "<tool_call>write_file\n<arg_key>content</arg_key>\n<arg_value>abc</arg_value>\n</tool_call>",
        "lfm": "<|tool_call_start|>[write_file(content='abc')]",
        "deepseek": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>write_file<｜tool▁sep｜>{"content": "abc"}',
        "minimax": '<minimax:tool_call>\n<invoke name="write_file"><parameter name="content">abc</parameter></invoke>',
    }
    whole = texts[name]
    for n in range(len(whole) + 1):
        reader = CallReader(BY_NAME[name], FILE)
        parts = [*reader.take("Well. " + whole[:n]), *reader.finish(is_cut=True)]
        calls = [part for part in parts if isinstance(part, Call)]
        assert all(call.arguments == {"content": "abc"} for call in calls)
        assert "abc" not in "".join(part for part in parts if isinstance(part, str))
    assert calls


def test_text_is_not_held_back_longer_than_it_must() -> None:
    reader = CallReader(HERMES, {"get_weather": {}})
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
    found = {name: ChatTemplate(source).tool_format.name for name, source in templates().items()}
    assert found["Qwen-Qwen2.5-7B-Instruct"] == found["Qwen3-Coder"] == "hermes"
    assert found["meta-llama-Llama-3.1-8B-Instruct"] == "bare"
    assert found["mistralai-Mistral-Nemo-Instruct-2407"] == "mistral"
    assert found["openai-gpt-oss-120b"] == "harmony"
