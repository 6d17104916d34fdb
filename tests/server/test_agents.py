"""Agents, by requests that they were seen to send, shortened: Claude Code 2.1, opencode 1.18, LangChain 1.7."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from programs import PROSE, TinyModel, endless
from serving import Serving, serving
from tiny_models import write_tiny_model

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
READ = {
    "name": "Read",
    "description": "Reads a file.",
    "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"file_path": {"description": "The absolute path", "type": "string"}},
        "required": ["file_path"],
        "additionalProperties": False,
    },
}
#: A template that wants a user and an assistant to take turns, and one system prompt, as Mistral's and Gemma's do.
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('one system prompt') }}"
    "{% endif %}{% if not loop.first and m.role == messages[loop.index0 - 1].role %}{{ raise_exception('turns') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def claude_code(question: str, session: str, **more: Any) -> dict[str, Any]:
    """A request of Claude Code's; the first block of its system prompt differs in each session."""
    return {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>\nToday's date is 2026-11-30.\n</system-reminder>\n\n"},
                    {"type": "text", "text": question, "cache_control": {"type": "ephemeral"}},
                ],
            },
            {"role": "system", "content": "The following skills are available: none."},
        ],
        "system": [
            {
                "type": "text",
                "text": f"x-anthropic-billing-header: cc_version=2.1.197.{session}; cc_entrypoint=sdk-cli;",
            },
            {"type": "text", "text": "You are a Claude agent.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": PROSE[:500], "cache_control": {"type": "ephemeral"}},
        ],
        "tools": [READ, {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}],
        "metadata": {"user_id": json.dumps({"device_id": "0", "account_uuid": "", "session_id": session})},
        "max_tokens": 8,
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        **more,
    }


def ask(server: Serving, body: dict[str, Any]) -> dict[str, Any]:
    """An answer to a request of Anthropic's protocol."""
    response = server.client.post("/v1/messages?beta=true", json=body, headers={"anthropic-beta": "effort-2025-11-24"})
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    return told


def test_sessions_of_claude_code_share_their_header(tiny_model: TinyModel) -> None:
    with serving(endless(tiny_model), n_ctx=4096) as server:
        first = ask(server, claude_code("Say hello.", "1c0"))
        second = ask(server, claude_code("Tell me a joke.", "3d3"))
        assert first["usage"]["cache_read_input_tokens"] == 0
        assert second["usage"]["input_tokens"] < 200
        assert second["usage"]["cache_read_input_tokens"] > 900


@pytest.mark.parametrize("template", [None, STRICT])
def test_claude_codes_tool_results_may_be_images(tmp_path: Path, template: str | None) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", seed=7, **({"template": template} if template else {}))
    with serving(path, n_ctx=4096) as server:
        body = claude_code("Look at it.", "1c0")
        told = ask(server, body)
        use = {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"file_path": "/a.png"}}
        result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [IMAGE]}
        body["messages"] += [
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "", "signature": ""}, use]},
            {
                "role": "user",
                "content": [result, {"type": "text", "text": "<system-reminder>Go on.</system-reminder>"}],
            },
        ]
        after = ask(server, body)
        assert after["usage"]["cache_read_input_tokens"] >= told["usage"]["input_tokens"] - 20
        (chat,) = [c for c in server.chats().values() if c["n_messages"] > 3]
        messages = server.client.get(f"/kvc/chats/{chat['id']}").json()["messages"]
        (shown,) = [m["content"] for m in messages if m["role"] == "tool"]
        assert shown == "[image: left out, since this model reads text alone]"
        body["messages"][-1]["content"] = [IMAGE]  # what a user shows is not left out without a word
        assert server.client.post("/v1/messages", json=body).status_code == 400


def test_results_of_tools_may_be_images_in_openais_protocols_as_well(tiny_model: TinyModel) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
    with serving(endless(tiny_model)) as server:
        server.chat(
            [
                {"role": "user", "content": "Look."},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "Sunny"}, part]},
            ]
        )
        told = [
            {"role": "user", "content": "Look."},
            {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": "{}"},
            {
                "type": "function_call_output",
                "call_id": "call_1",
                "output": [{"type": "input_image", "image_url": "x"}],
            },
        ]
        assert server.post("/v1/responses", input=told, max_output_tokens=2).status_code == 200


@pytest.mark.parametrize("name", ["output_config", "output_format"])
def test_an_answer_of_claude_codes_has_the_form_that_it_asks_for(tiny_model: TinyModel, name: str) -> None:
    schema = {
        "type": "object",
        "properties": {"title": {"enum": ["Refactor payments", "Say hello"]}},
        "required": ["title"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "schema": schema}
    with serving(endless(tiny_model), n_ctx=4096) as server:
        body = claude_code("Say hello.", "1c0", max_tokens=100, tools=[])
        body[name] = {"effort": "high", "format": form} if name == "output_config" else form
        told = ask(server, body)
        assert json.loads(told["content"][0]["text"])["title"] in schema["properties"]["title"]["enum"]  # type: ignore[index]
        assert told["stop_reason"] == "end_turn"
        schema["properties"] = {"title": {"type": "integer", "minimum": 3}}
        refused = server.client.post("/v1/messages", json=body)
        assert refused.status_code == 400
        assert "minimum" in refused.json()["error"]["message"]


def test_agents_know_when_a_prompt_is_too_long(tiny_model: TinyModel) -> None:
    """By what Claude Code, opencode, Continue and LiteLLM look for, before they compact a conversation."""
    with serving(endless(tiny_model), n_ctx=512) as server:
        said = server.client.post("/v1/messages", json=claude_code("Say hello.", "1c0")).json()["error"]["message"]
        found = re.search(r"prompt is too long[^0-9]*(\d+)\s*tokens?\s*>\s*(\d+)", said, re.IGNORECASE)
        assert found is not None
        assert int(found[1]) > int(found[2]) == 512
        error = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "x" * 600}]).json()["error"]
        assert re.search(r"maximum context length is \d+ tokens", error["message"])
        assert error["code"] == "context_length_exceeded"


def test_a_beginning_that_was_read_in_part_is_gone_on_with(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that gives up waiting asks again, and so does its next chat: Claude Code waits for five minutes."""
    monkeypatch.setattr("kvcompose_local.server.service._PATIENCE", 0.01)
    monkeypatch.setattr("kvcompose_local.server.service.PROGRESS_SECONDS", 0.0)
    model = endless(tiny_model)
    system = {"role": "system", "content": PROSE[:3000]}
    body = {"messages": [system, {"role": "user", "content": "one"}], "max_tokens": 4}
    other = [system, {"role": "user", "content": "two"}]
    with serving(model, budget=1, n_ctx=4096, on_disk=False) as server:
        undisturbed = server.chat(other)
    with serving(model, budget=1, n_ctx=4096, on_disk=False) as server:
        with server.client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            for line in response.iter_lines():
                found = re.match(r": reading (\d+)/", line)
                if found and int(found[1]) > 500:
                    break
        told = server.chat(other)
        assert told["choices"] == undisturbed["choices"]
        assert 500 <= told["usage"]["prompt_tokens"] - told["timings"]["prompt_n"] < 2990
        again = server.chat([system, {"role": "user", "content": "three"}])
        assert again["kvc"]["cached"] > 2990  # it was kept when it was whole


def test_who_looks_whether_anybody_is_there_finds_somebody(tiny_model: TinyModel) -> None:
    with serving(endless(tiny_model)) as server:
        for path in ("/", "/health", "/v1/models"):
            response = server.client.head(path)
            assert (response.status_code, response.content) == (200, b"")
        assert server.client.head("/none").status_code == 404
        told = server.post("/v1/embeddings", input="x", model="x")
        assert told.status_code == 404
        assert "/v1/chat/completions" in told.json()["error"]["message"]
        with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as claude:
            (model,) = claude.models.list()
            assert (model.type, model.id, model.display_name) == ("model", server.name, server.name)
            assert model.created_at.year > 2024
            assert claude.models.retrieve(server.name).id == server.name


def test_what_would_change_the_answer_is_refused_and_the_rest_left_alone(tiny_model: TinyModel) -> None:
    question = [{"role": "user", "content": "x"}]
    refused: list[dict[str, Any]] = [
        {"logit_bias": {"5": -100}},
        {"functions": [{"name": "f"}]},
        {"audio": {"voice": "alloy", "format": "wav"}},
        {"web_search_options": {"search_context_size": "low"}},
    ]
    taken: list[dict[str, Any]] = [
        {"logit_bias": {}},
        {"logit_bias": None},
        {"store": False, "metadata": {"a": "b"}, "service_tier": "auto", "reasoning_effort": "low", "verbosity": "low"},
        {"stream_options": {"include_usage": True}, "top_k": -1, "prompt_cache_key": "a", "safety_identifier": "b"},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "stop": [], "response_format": None},
        {"prediction": {"type": "content", "content": "x"}, "modalities": ["text"], "seed": 2**63 - 1},
    ]
    with serving(endless(tiny_model), on_disk=False) as server:
        for more in refused:
            response = server.post("/v1/chat/completions", messages=question, max_tokens=2, **more)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == next(iter(more))
        for more in taken:
            server.chat(question, **more)
        assert server.chat(question, max_tokens=-1, stop=["\n"])["usage"]["completion_tokens"] > 0
        assert server.post("/v1/chat/completions", messages=question, max_tokens=0).status_code == 400


def test_half_a_character_is_told_as_none_everywhere(tiny_model: TinyModel) -> None:
    with serving(endless(tiny_model)) as server:

        def post(path: str, raw: str) -> httpx.Response:
            return server.client.post(path, content=raw.encode(), headers={"Content-Type": "application/json"})

        half = r"a\ud83d \\ud83d \ud83d\ude00"
        told = post(
            "/v1/chat/completions", f'{{"messages": [{{"role": "user", "content": "{half}"}}], "max_tokens": 2}}'
        )
        shown = server.client.get(f"/kvc/chats/{told.json()['kvc']['chat']}")
        assert shown.json()["messages"][0]["content"] == "a� \\ud83d 😀"
        for stream in ("true", "false"):
            body = f'{{"input": "{half}", "instructions": "{half}", "max_output_tokens": 2, "stream": {stream}}}'
            response = post("/v1/responses", body)
            assert response.status_code == 200
            assert "a�" in response.text
