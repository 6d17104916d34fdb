"""Tools that a model may call: how families of models write a call, and how a call is told from the rest of an answer.

The notations are facts of the published templates. Tools are dicts as OpenAI's protocol has them, ``{"type":
"function", "function": {"name", "description", "parameters"}}``. A message of an assistant that calls holds, beside its
content, ``tool_calls``: JSON of a list of ``{"id", "name", "arguments"}``; a message of role ``tool`` holds what came
of the call that ``tool_call_id`` names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvcompose_local.chat.calls import CallReader, ToolFormat
from kvcompose_local.chat.notations import (
    Call,
    Ending,
    Found,
    Literals,
    Named,
    Schemas,
    Tagged,
    as_json,
    bare_json,
    calls_of,
    decoded,
    expected,
)

Message = dict[str, str]

#: The header of a call of gpt-oss: the recipient stands in that of a channel, or before it, and a content type behind.
_HARMONY = re.compile(
    r"(?:<\|channel\|>(?:commentary|analysis) to=|\s*to=(?=[\w.-]+<\|channel\|>))(?:functions\.)?([\w.-]+)"
    r"[^<]*(?:<\|(?:channel|constrain)\|>[^<]*){0,2}<\|message\|>"
)


def written(call: dict[str, Any]) -> str:
    """A call in Hermes's notation."""
    return f"<tool_call>\n{_json_of([call])[1:-1]}\n</tool_call>"


def _json_of(calls: Sequence[Any]) -> str:
    return json.dumps([{key: call[key] for key in ("name", "arguments")} for call in calls], ensure_ascii=False)


def _python_of(calls: Sequence[Any]) -> str:
    def literal(value: Any) -> str:
        return str(value) if value is None or isinstance(value, bool) else json.dumps(value, ensure_ascii=False)

    said = []
    for call in calls:
        arguments = ", ".join(f"{key}={literal(value)}" for key, value in call["arguments"].items())
        said.append(f"{call['name']}({arguments})")
    return f"[{', '.join(said)}]"


def _harmony(text: str, at: int, tools: Schemas, ending: Ending) -> Found:
    found = expected(text, at, _HARMONY, ending)
    if found and found[1] not in tools:  # its header is no text, whatever it calls
        return [], found.end()
    value = decoded(text, found.end(), ending) if found else None
    if not found or not value or not isinstance(value[0], dict):
        return None
    return [Call(found[1], value[0])], value[1]


def _function(then: str, *, lines: bool) -> Tagged:
    """Calls as newer models of Qwen's write them."""
    return Tagged(
        ("<function=",),
        r"\s*>",
        "<parameter=",
        ">",
        "</parameter>",
        "</function>",
        f"{then}|<function=",
        lines,
    )


def _invoke(prefix: str, then: str) -> Tagged:
    """Calls as MiniMax and DeepSeek write them, with a prefix before their tags."""
    tags = (f'<{prefix}parameter name="', r'"[^<>]*>', f"</{prefix}parameter>", f"</{prefix}invoke>")
    return Tagged((f'<{prefix}invoke name="',), r'"\s*>', *tags, f"{then}|<{prefix}invoke")


def _keys(suffix: str = "") -> ToolFormat:
    """GLM's notation; Hunyuan has a suffix behind each tag."""
    tags = [f"{name}{suffix}>" for name in ("tool_call", "arg_key", "arg_value", "tool_sep", "tool_calls")]
    call, key, value, apart, calls = tags
    shape = Tagged(
        ("",),
        rf"\s*(?:<{apart})?(?=\s*(?:<{key}|</?{call}))",
        rf"<{key}",
        rf"</{key}\s*<{value}",
        f"</{value}",
        rf"</{call}|(?=<{call})",
    )
    inner = tuple(f"{end}{tag}" for end in ("<", "</") for tag in (key, value, apart))
    opens = (f"<{call}", f"<{calls}")
    return ToolFormat(
        f"glm{suffix}", (f"<{key}",), opens, (f"</{call}", f"</{calls}"), shapes=(as_json, shape), inner=inner
    )


_PYTHON = Literals(("[",), "(", ")", "=", ('"', "'"), escapes=True, list_end="]")
HERMES = ToolFormat(
    "hermes",
    (),
    ("<tool_call>",),
    ("</tool_call>",),
    ("<function=",),
    (as_json, _function("</?tool_call>", lines=True)),
    gap="\n",
)
#: Llama's, for templates that write no marks.
BARE = ToolFormat("bare", (), ("<|python_tag|>", "<|python_start|>"), ("<|python_end|>",), is_bare=True)
#: The most particular first.
FORMATS = (
    ToolFormat(
        "harmony",
        ("<|channel|>", "functions."),
        heads=("<|channel|>commentary to=", "<|channel|>analysis to=", "to=functions."),
        shapes=(_harmony,),
        inner=("<|channel|>", "<|constrain|>", "<|message|>"),
    ),
    ToolFormat(
        "mistral",
        ("[TOOL_CALLS]",),
        ("[TOOL_CALLS]",),
        shapes=(as_json, Named(behind=r"\s*(?:\[CALL_ID\][^\[\{]*)?(?:\[ARGS\])?")),
        inner=("[ARGS]", "[CALL_ID]"),
    ),
    _keys(),
    _keys(":opensource"),
    ToolFormat(
        "seed",
        ("<seed:tool_call>",),
        ("<seed:tool_call>",),
        ("</seed:tool_call>",),
        ("<function=",),
        (as_json, _function("</?seed:tool_call>", lines=False)),
    ),
    ToolFormat(
        "minimax",
        ("<minimax:tool_call>",),
        ("<minimax:tool_call>",),
        ("</minimax:tool_call>",),
        shapes=(as_json, _invoke("", "</minimax:tool_call>")),
    ),
    *(
        ToolFormat(
            "dsml",
            (f"<｜DSML｜{name}>",),
            (f"<｜DSML｜{name}>",),
            (f"</｜DSML｜{name}>",),
            shapes=(as_json, _invoke("｜DSML｜", f"</｜DSML｜{name}>")),
            inner=("｜DSML｜",),
        )
        for name in ("function_calls", "tool_calls")
    ),
    ToolFormat(
        "minicpm",
        ("<param name=",),
        heads=('<function name="',),
        shapes=(
            Tagged(
                ('<function name="',), r'"\s*>', '<param name="', r'"\s*>', "</param>", "</function>", r"<function|\S"
            ),
        ),
    ),
    ToolFormat(
        "deepseek",
        ("<｜tool▁call▁begin｜>",),
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        ("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
        shapes=(as_json, Named(("", "function<｜tool▁sep｜>"), r"(?:<｜tool▁sep｜>)?\s*(?:```json)?", r"\s*```")),
        inner=("<｜tool▁sep｜>",),
    ),
    ToolFormat(
        "kimi",
        ("<|tool_call_argument_begin|>",),
        ("<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
        ("<|tool_call_end|>", "<|tool_calls_section_end|>"),
        shapes=(as_json, Named(("functions.", ""), r"(?::\d+)?\s*<\|tool_call_argument_begin\|>")),
        inner=("<|tool_call_argument_begin|>",),
    ),
    ToolFormat(
        "gemma",
        ("<|tool_call>call:",),
        ("<|tool_call>",),
        ("<tool_call|>",),
        shapes=(as_json, Literals(("call:",), "{", "}", ":", ('<|"|>', '"'))),
        inner=('<|"|>',),
    ),
    ToolFormat(
        "lfm",
        ("List of tools: ",),
        ("<|tool_call_start|>",),
        ("<|tool_call_end|>",),
        shapes=(as_json, _PYTHON),
        bare=(bare_json, _PYTHON),
        says=lambda calls: f"<|tool_call_start|>{_python_of(calls)}<|tool_call_end|>",
    ),
    ToolFormat(
        "granite",
        ("<|tool_call|>", "<|start_of_role|>"),
        ("<|tool_call|>", "<tool_call>"),
        ("</tool_call>",),
        says=lambda calls: f"<|tool_call|>{_json_of(calls)}",
        is_list=True,
    ),
    ToolFormat(
        "phi",
        ("message['tools']", "<|/tool|>"),
        ("<|tool_call|>",),
        ("<|/tool_call|>",),
        says=lambda calls: f"<|tool_call|>{_json_of(calls)}<|/tool_call|>",
        tells_system=True,
        is_list=True,
    ),
    HERMES,
)


def formats_of(template: str) -> list[ToolFormat]:
    """The notations that a template may be of, by its source and what it was seen to render."""
    return [form for form in FORMATS if all(key in template for key in form.keys)]


def format_in(template: str, prompt: str, text: str, call: Call) -> ToolFormat | None:
    """The notation in which a template wrote a call, by its source; None where nobody here can read it.

    prompt: the end of what asks for an answer; text: what the template made of the call.
    """
    for form in formats_of(template + text):
        reader = CallReader(form, {call.name: {}})
        if [part for part in (*reader.take(text), *reader.finish()) if isinstance(part, Call)] == [call]:
            return form
    return _json_format(prompt, text, call)


def _json_format(prompt: str, text: str, call: Call) -> ToolFormat | None:
    """A notation with JSON between whatever markers the template writes there."""
    value: Any
    for begun in re.finditer(r"[\[{]", text[: text.find(call.name)]):
        value, end = decoded(text, begun.start(), "end") or (None, 0)
        if calls_of(value, {call.name: {}}) == [call]:
            break
    else:
        return None
    one = value[0] if isinstance(value, list) else value
    one = one["function"] if isinstance(one.get("function"), dict) else one
    named = next((key for key in one if one[key] == call.name), "name")
    arguments = next((key for key in ("arguments", "parameters") if key in one), "arguments")
    opened = re.search(r"([^<>\n]*<[^<>\n]+>|\[[A-Z_]+\])(\s*)\Z", text[: begun.start()])
    closed = re.match(r"\s*(</?[^<>\n]+>|\[/?[A-Z_]+\])", text[end:])
    keys: dict[str, Any] = {"named": named, "arguments": arguments, "is_list": isinstance(value, list)}
    is_header = opened and (prompt.rstrip().endswith(opened[1].strip()) or re.search(r"</|end\b|END", opened[1]))
    if not opened or is_header:
        return replace(BARE, **keys)
    return ToolFormat("json", opens=(opened[1].strip(),), closes=(closed[1],) if closed else (), gap=opened[2], **keys)


# -- what templates are given ------------------------------------------------------------------------------------------


def called(message: Message, *, as_text: bool) -> dict[str, Any]:
    """What a template looks at of a call or of what came of one; as_text: arguments as JSON, else as they are."""
    told: dict[str, Any] = {}
    if calls := json.loads(message.get("tool_calls") or "[]"):
        told["tool_calls"] = [
            {
                "id": _short(call["id"]),
                "type": "function",
                "function": {
                    "name": call["name"],
                    "arguments": json.dumps(call["arguments"], ensure_ascii=False) if as_text else call["arguments"],
                },
            }
            for call in calls
        ]
    if message["role"] == "tool":
        told |= {key: message[key] for key in ("name",) if key in message}
        told["tool_call_id"] = _short(message.get("tool_call_id", ""))
    return told | {key: message[key] for key in ("tools",) if key in message}


def _short(call_id: str) -> str:
    """An id as Mistral's templates want it: nine letters and digits."""
    if re.fullmatch(r"[A-Za-z0-9]{9}", call_id):
        return call_id
    return hashlib.blake2b(call_id.encode("utf-8", "replace"), digest_size=8).hexdigest()[:9]


def completed(tools: Sequence[Any]) -> list[Any]:
    """Tools with all that templates look for: clients leave out what is empty."""
    return [{**tool, "function": _completed(tool["function"])} for tool in tools]


def _completed(function: dict[str, Any]) -> dict[str, Any]:
    told = {key: value for key, value in function.items() if value is not None}
    schema = told.get("parameters") or {}
    if isinstance(schema, dict) and schema.get("type", "object") == "object":
        schema = {"type": "object", "properties": {}, **schema}
    return {"description": "", **told, "parameters": schema}


def one_call_each(messages: Sequence[Message]) -> list[Message]:
    """The same conversation with a message of its own for each call, before what came of it."""
    result: list[Message] = []
    waiting: dict[str, Message] = {}
    for message in messages:
        calls = json.loads(message.get("tool_calls") or "[]")
        if len(calls) > 1:
            result += waiting.values()
            waiting = {}
            for i, call in enumerate(calls):
                content = message["content"] if i == 0 else ""
                waiting[call["id"]] = {**message, "content": content, "tool_calls": json.dumps([call])}
            continue
        if message["role"] == "tool" and message.get("tool_call_id", "") in waiting:
            result.append(waiting.pop(message["tool_call_id"]))
        elif waiting:
            result += waiting.values()
            waiting = {}
        result.append(message)
    return [*result, *waiting.values()]


# -- templates that know something of tools ----------------------------------------------------------------------------


def with_calls_said(messages: Sequence[Message], form: ToolFormat) -> list[Message]:
    """The same conversation with calls in the texts of the answers, for a template that leaves them out."""
    result = []
    for message in messages:
        if form.says and (calls := json.loads(message.get("tool_calls") or "[]")):
            kept = {key: text for key, text in message.items() if key != "tool_calls"}
            message = {**kept, "content": message["content"] + form.says(calls)}
        result.append(message)
    return result


def with_tools_told(messages: Sequence[Message], tools: Sequence[Any]) -> list[Message]:
    """The same conversation for a template that looks for tools in the system prompt."""
    if not tools:
        return [*messages]
    has_system = bool(messages) and messages[0]["role"] == "system"
    system = messages[0] if has_system else {"role": "system", "content": ""}
    functions = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    return [{**system, "tools": functions}, *messages[has_system:]]


# -- templates that know nothing of tools -----------------------------------------------------------------------------


def plain(messages: Sequence[Message], tools: Sequence[Any]) -> list[Message]:
    """The same conversation without tools: they stand in the system prompt, calls and what came of them in texts."""
    said: list[Message] = []
    for message in messages:
        calls = json.loads(message.get("tool_calls") or "[]")
        kept = {key: text for key, text in message.items() if key in ("role", "content", "reasoning")}
        if calls:
            kept["content"] = "\n".join(filter(None, [message["content"].strip(), *map(written, calls)]))
        elif message["role"] == "tool":
            kept = {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
            if said and said[-1]["role"] == "user":
                said[-1] = {"role": "user", "content": f"{said[-1]['content']}\n{kept['content']}"}
                continue
        said.append(kept)
    if tools:
        system = said.pop(0)["content"] if said and said[0]["role"] == "system" else ""
        said.insert(0, {"role": "system", "content": "\n\n".join(filter(None, [system, described(tools)]))})
    return said


def described(tools: Sequence[Any]) -> str:
    """What a model is told that was taught no notation of its own."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"You can call these functions:\n<tools>\n{lines}\n</tools>\n"
        "To call one, answer with its name and arguments as a JSON object between tags, once for each call:\n"
        '<tool_call>\n{"name": "the function", "arguments": {"the argument": "its value"}}\n</tool_call>'
    )
