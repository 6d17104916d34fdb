"""Thinking, talk and calls in one answer, by models that speak as real templates have it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_cpp_templates import templates
from scripted_model import write_scripted_model
from serving import Messages, Serving, serving, texts
from tiny_models import TEMPLATE, write_tiny_model

TEMPLATES = templates()
QUESTION = [{"role": "user", "content": "What is it?"}]
TOOL: Any = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}


def test_gpt_oss_thinks_talks_and_calls_again_and_again(tmp_path: Path) -> None:
    template = TEMPLATES["openai-gpt-oss-120b"]
    again = "<|end|><|start|>assistant"
    pieces = [f"<|channel|>analysis<|message|>I must.{again}", f"<|channel|>commentary<|message|>I look.{again}"]
    pieces += ["<|channel|>commentary to=functions.look ", "<|constrain|>json", '<|message|>{"at": ', '"it"}']
    model = write_scripted_model(tmp_path / "oss.gguf", pieces, template=template, last="t")
    with serving(model, n_ctx=4096) as server:
        messages: Messages = [{"role": "system", "content": "Be terse."}, *QUESTION]
        for sends_thinking in (False, True, True):
            choice = server.chat(messages, max_tokens=30, tools=[TOOL])["choices"][0]
            said = choice["message"]
            (call,) = said["tool_calls"]
            assert call["function"] == {"name": "look", "arguments": '{"at": "it"}'}
            assert (said["reasoning_content"], said["content"]) == ("I must.", "I look.")
            if not sends_thinking:
                del said["reasoning_content"]
            messages += [said, {"role": "tool", "tool_call_id": call["id"], "content": "a cat"}]
    model = write_scripted_model(tmp_path / "forced.gguf", ['{"at": ', '"it"}'], template=template, last=">")
    with serving(model, n_ctx=4096) as server:
        for choice in ("required", {"type": "function", "function": {"name": "look"}}):
            forced = server.chat(QUESTION, max_tokens=30, tools=[TOOL], tool_choice=choice)["choices"][0]
            assert forced["message"]["tool_calls"][0]["function"]["arguments"] == '{"at": "it"}'
    pieces = ["<|channel|>final ", "<|constrain|>json", "<|message|>", '{"at": "it"}']
    model = write_scripted_model(tmp_path / "json.gguf", pieces, template=template, last="t")
    with serving(model) as server:
        for form in ({"type": "text"}, {"type": "json_object"}):
            assert texts(server.chat(QUESTION, max_tokens=30, response_format=form)) == '{"at": "it"}'


def test_tags_of_thinking_are_text_in_what_a_call_writes(tmp_path: Path) -> None:
    code = '\nOPEN = "<think>"\n<think>\nx\n</think>\n'
    call = {"name": "look", "arguments": {"at": code}}
    for thinking in ("hm</think>\n\n", "hm\n"):  # some models call before they have ended to think
        pieces = [thinking, "<tool_call>", "\n", json.dumps(call)[:30], json.dumps(call)[30:], "</tool_call>"]
        model = write_scripted_model(tmp_path / "q.gguf", pieces, template=TEMPLATES["Qwen3.5-4B"] + "{# #} ", last=" ")
        with serving(model) as server:
            message = server.chat(QUESTION, max_tokens=30, tools=[TOOL])["choices"][0]["message"]
            assert message["reasoning_content"].strip() == "hm"
            assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"at": code}
            assert not (message["content"] or "").strip()


def test_a_call_with_bad_arguments_does_not_end_the_chat(tmp_path: Path) -> None:
    with serving(write_scripted_model(tmp_path / "says.gguf", ["It is ", "a cat."])) as server:
        for arguments in ("null", '{"at": ', "[1]", ""):
            call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": arguments}}
            messages: Messages = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}]
            messages.append({"role": "tool", "tool_call_id": "a", "content": "bad arguments"})
            assert texts(server.chat(messages, tools=[TOOL])) == "It is a cat."


def test_what_a_template_refuses_is_no_reason_to_ask_again(tmp_path: Path) -> None:
    """Also where it takes the messages, and not what else is asked of it, as what stands before the first one."""
    refuses = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if messages[0].role == 'system' and 'rest of the message' in messages[-1].content %}"
        "{{ raise_exception('no greetings') }}{% endif %}[assistant]"
    )
    model = write_scripted_model(tmp_path / "says.gguf", ["It is ", "a cat."], template=refuses)
    with serving(model) as server:
        told = server.post("/v1/chat/completions", messages=[{"role": "system", "content": "Hi"}, *QUESTION])
        assert told.status_code == 400
        assert "no greetings" in told.json()["error"]["message"]


#: Tells by the length of its prompts how much is thought.
SWITCHED = (
    TEMPLATE + "{{ 'off' if enable_thinking is false else 'on' if enable_thinking else '' }}{{ reasoning_effort }}"
)
ASKED = {
    "/v1/chat/completions": {"messages": QUESTION},
    "/v1/responses": {"input": "What is it?"},
    "/v1/messages": {"messages": QUESTION},
}


@pytest.fixture(scope="module")
def switched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("models")
    with serving(write_tiny_model(folder / "switched.gguf", template=SWITCHED), on_disk=False) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "more", "told"),
    [
        ("/v1/chat/completions", {}, ""),
        ("/v1/chat/completions", {"chat_template_kwargs": {"enable_thinking": False}}, "offlow"),
        ("/v1/chat/completions", {"chat_template_kwargs": {"enable_thinking": True}}, "on"),
        ("/v1/chat/completions", {"chat_template_kwargs": {"thinking": True, "reasoning_effort": "high"}}, "onhigh"),
        ("/v1/chat/completions", {"chat_template_kwargs": "?"}, ""),
        ("/v1/chat/completions", {"reasoning_effort": "none"}, "offlow"),
        ("/v1/chat/completions", {"reasoning_effort": "medium"}, "onmedium"),
        ("/v1/chat/completions", {"reasoning_effort": ["?"]}, ""),
        ("/v1/responses", {"reasoning": {"effort": "high"}}, "onhigh"),
        ("/v1/responses", {"reasoning": None}, ""),
        ("/v1/messages", {"thinking": {"type": "disabled"}}, "offlow"),
        ("/v1/messages", {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "on"),
        ("/v1/messages", {}, ""),
    ],
)
def test_a_request_turns_thinking_on_and_off(switched: Serving, path: str, more: dict[str, Any], told: str) -> None:
    def n_read(**more: Any) -> int:
        longest = "max_output_tokens" if path.endswith("responses") else "max_tokens"
        body = {"model": "switched", **ASKED[path], longest: 2, **more}
        response = switched.client.post(path, json=body)
        assert response.status_code == 200, response.text
        usage = response.json()["usage"]
        return int(usage.get("prompt_tokens") or usage["input_tokens"] + usage.get("cache_read_input_tokens", 0))

    assert n_read(**more) - n_read() == len(told)


def test_where_there_is_no_switch_a_request_is_answered_as_usual(tmp_path: Path) -> None:
    with serving(write_tiny_model(tmp_path / "plain.gguf"), on_disk=False) as server:
        usual, told = (server.chat(QUESTION, max_tokens=2, **more) for more in ({}, {"reasoning_effort": "high"}))
        assert usual["usage"]["prompt_tokens"] == told["usage"]["prompt_tokens"]
