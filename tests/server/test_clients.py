"""Real clients: what they ask in each protocol, whole and as streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from serving import Serving, serving

QUESTION = {"role": "user", "content": "What is the weather in Paris?"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "of a city", "parameters": PARAMETERS}}
]
#: Others' code may warn of what it likes.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def server(real_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        with serving(real_model("smollm2-135m")) as server:
            yield server


@pytest.fixture
def client(server: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(server: Serving) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


# -- openai -----------------------------------------------------------------------------------------------------------


def test_openai_lists_models(client: openai.OpenAI, server: Serving) -> None:
    assert [model.id for model in client.models.list()] == [server.name]
    assert client.models.retrieve(server.name).id == server.name


def test_openai_streams_what_it_answers_whole(client: openai.OpenAI, server: Serving) -> None:
    options: Any = {"model": server.name, "messages": [QUESTION], "max_tokens": 12, "temperature": 0}
    client.chat.completions.create(**options)  # a prompt that was read in one piece may be answered otherwise
    whole = client.chat.completions.create(**options)
    stream = [*client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})]
    assert whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == whole.choices[0].message.content
    assert stream[-1].usage is not None
    assert whole.usage is not None
    assert stream[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert stream[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    details = stream[-1].usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens == whole.usage.prompt_tokens - 1


def test_openai_sampling_options(client: openai.OpenAI, server: Serving) -> None:
    def said(**options: Any) -> str:
        answer = client.chat.completions.create(
            model=server.name,
            messages=[QUESTION],
            max_completion_tokens=10,
            **options,  # type: ignore[arg-type]
        )
        return answer.choices[0].message.content or ""

    assert said(temperature=1, seed=5) == said(temperature=1, seed=5)
    assert len({said(temperature=1.5, seed=seed) for seed in range(5)}) > 1
    assert said(temperature=1, seed=1, extra_body={"top_k": 1}) == said(temperature=0)
    assert said(temperature=1, seed=1, top_p=0) == said(temperature=0)
    assert said(temperature=1, seed=1, extra_body={"min_p": 1}) == said(temperature=0)
    plain = said(temperature=0)
    stop = plain.split()[2]
    assert said(temperature=0, stop=[stop]) == plain[: plain.index(stop)]
    repeated = client.chat.completions.create(
        model=server.name,
        messages=[{"role": "user", "content": "Say: no no no no no no no no"}],
        max_tokens=40,
        temperature=0,
        presence_penalty=2,
        frequency_penalty=2,
    )
    words = (repeated.choices[0].message.content or "").split()
    assert len(set(words)) > len(words) * 2 // 3


def test_openai_logprobs_are_those_of_what_was_said(client: openai.OpenAI, server: Serving) -> None:
    options: Any = {"model": server.name, "messages": [QUESTION], "max_tokens": 6, "temperature": 0}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=3).choices[0]
    assert answer.logprobs is not None
    told = answer.logprobs.content
    assert told is not None
    assert len(told) == 6
    assert b"".join(bytes(token.bytes or []) for token in told).decode() == answer.message.content
    for token in told:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        assert token.logprob <= 0


def test_openai_tools_that_are_forced(client: openai.OpenAI, server: Serving) -> None:
    options: Any = {"model": server.name, "messages": [QUESTION], "tools": TOOLS, "temperature": 0}
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        answer = client.chat.completions.create(**options, tool_choice=choice).choices[0]
        assert answer.finish_reason == "tool_calls"
        (call,) = answer.message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "get_weather"
        assert set(json.loads(call.function.arguments)) == {"city"}
    with client.chat.completions.stream(**options, tool_choice="required") as stream:
        final = stream.get_final_completion().choices[0].message
    assert final.tool_calls is not None
    assert final.tool_calls[0].function.arguments == call.function.arguments
    history = [QUESTION, final.model_dump(exclude_none=True)]
    history.append({"role": "tool", "tool_call_id": final.tool_calls[0].id, "content": "Sunny, 21 °C"})
    after = client.chat.completions.create(**options | {"messages": history}, max_tokens=8)
    assert after.usage is not None
    details = after.usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens is not None
    assert after.usage.prompt_tokens - details.cached_tokens < 60  # the result, and no more of the call than its end


def test_openai_schema(client: openai.OpenAI, server: Serving) -> None:
    answer = client.chat.completions.create(
        model=server.name,
        messages=[QUESTION],
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": PARAMETERS, "strict": True}},
    ).choices[0]
    assert answer.finish_reason == "stop"
    assert set(json.loads(answer.message.content or "")) == {"city"}
    with pytest.raises(openai.BadRequestError, match="minimum"):
        client.chat.completions.create(
            model=server.name,
            messages=[QUESTION],  # type: ignore[list-item]
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "integer", "minimum": 3}},
            },
        )


def test_openai_errors(client: openai.OpenAI, server: Serving) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.chat.completions.create(model="gpt-9", messages=[QUESTION])  # type: ignore[list-item]
    with pytest.raises(openai.BadRequestError, match="4031 tokens > 2048 maximum") as error:
        client.chat.completions.create(
            model=server.name, messages=[{"role": "user", "content": "word " * 4000}], max_tokens=4
        )
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=server.name, messages=[QUESTION], temperature=99)  # type: ignore[list-item]
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError, match="text alone"):
        client.chat.completions.create(
            model=server.name,
            messages=[{"role": "user", "content": [image]}],  # type: ignore[misc,list-item]
        )


def test_openai_completions(client: openai.OpenAI, server: Serving) -> None:
    options: Any = {"model": server.name, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**options, logprobs=2)
    assert whole.choices[0].text == "".join(
        c.choices[0].text for c in client.completions.create(**options, stream=True)
    )
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == whole.choices[0].text


def test_openai_responses(client: openai.OpenAI, server: Serving) -> None:
    options: Any = {"model": server.name, "input": "Say hello.", "instructions": "Be brief.", "temperature": 0}
    client.responses.create(**options)  # a prompt that was read in one piece may be answered otherwise
    whole = client.responses.create(**options)
    assert whole.status == "completed"
    with client.responses.stream(**options) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == whole.output_text != ""
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert final.usage is not None
    assert final.usage.input_tokens_details.cached_tokens > 0
    tool = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}
    called = client.responses.create(
        model=server.name,
        input="Weather in Oslo?",
        tools=[tool],
        tool_choice="required",  # type: ignore[list-item]
    )
    (call,) = called.output
    assert call.type == "function_call"
    history: Any = [
        {"role": "user", "content": "Weather in Oslo?"},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "Rain"},
    ]
    after = client.responses.create(model=server.name, input=history, tools=[tool], max_output_tokens=8)  # type: ignore[list-item]
    assert after.status in ("completed", "incomplete")
    with pytest.raises(openai.BadRequestError, match="keeps no responses"):
        client.responses.create(model=server.name, input="more", previous_response_id=whole.id)


# -- anthropic --------------------------------------------------------------------------------------------------------


def test_anthropic_streams_what_it_answers_whole(claude: anthropic.Anthropic, server: Serving) -> None:
    options: Any = {"model": server.name, "max_tokens": 12, "system": "Be brief.", "messages": [QUESTION]}
    options["extra_body"] = {"temperature": 0}
    claude.messages.create(**options)
    whole = claude.messages.create(**options)
    with claude.messages.stream(**options) as stream:
        said = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].type == "text"
    assert said == whole.content[0].text != ""
    assert (whole.stop_reason, final.stop_reason) == ("max_tokens", "max_tokens")
    usage = final.usage
    counted = claude.messages.count_tokens(model=server.name, system="Be brief.", messages=[QUESTION])  # type: ignore[list-item]
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert usage.input_tokens == 1


def test_anthropic_tools(claude: anthropic.Anthropic, server: Serving) -> None:
    tools: Any = [{"name": "get_weather", "description": "of a city", "input_schema": PARAMETERS}]
    options: Any = {"model": server.name, "max_tokens": 60, "tools": tools}
    with claude.messages.stream(**options, messages=[QUESTION], tool_choice={"type": "any"}) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    (use,) = final.content
    assert use.type == "tool_use"
    assert set(use.input) == {"city"}
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "Sunny"}
    history: Any = [QUESTION, {"role": "assistant", "content": [use.model_dump(exclude_none=True)]}]
    after = claude.messages.create(**options, messages=[*history, {"role": "user", "content": [result]}])
    assert after.usage.input_tokens < 60
    assert (after.usage.cache_read_input_tokens or 0) > 100


def test_anthropic_errors(claude: anthropic.Anthropic, server: Serving) -> None:
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: 4031 tokens > 2048 maximum") as error:
        claude.messages.create(model=server.name, max_tokens=4, messages=[{"role": "user", "content": "word " * 4000}])
    assert error.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index,call-overload]
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="claude", max_tokens=4, messages=[QUESTION])  # type: ignore[list-item]


# -- others -----------------------------------------------------------------------------------------------------------


def test_litellm(server: Serving, tmp_path: Path) -> None:
    """In a process of its own: it changes much that is everybody's."""
    code = f"""
import litellm
options = dict(model="openai/{server.name}", api_base="{server.url}/v1", api_key="none", temperature=0, max_tokens=8,
               messages=[{{"role": "user", "content": "Say hello."}}])
litellm.completion(**options)
whole = litellm.completion(**options).choices[0].message.content
stream = "".join(c.choices[0].delta.content or "" for c in litellm.completion(**options, stream=True))
assert whole and whole == stream, (whole, stream)
"""
    env = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env, check=False
    )
    assert done.returncode == 0, done.stderr


def test_llm(server: Serving, tmp_path: Path) -> None:
    """Simon Willison's, by the three lines that it needs."""
    models = f"- model_id: local\n  model_name: {server.name}\n  api_base: {server.url}/v1\n  api_key_name: none\n"
    (tmp_path / "extra-openai-models.yaml").write_text(models)
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    said = []
    for options in ([], [], ["--no-stream"]):
        command = [sys.executable, "-m", "llm", "-m", "local", "-o", "temperature", "0", "-o", "max_tokens", "8"]
        done = subprocess.run(
            [*command, *options, "Say hello."], capture_output=True, text=True, timeout=120, env=env, check=False
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.strip())
    assert said[1] == said[2] != ""


def test_curl(server: Serving) -> None:
    body = {"messages": [QUESTION], "max_tokens": 6, "temperature": 0, "stream": True}
    command = ["curl", "-sN", f"{server.url}/v1/chat/completions", "-H", "content-type: application/json", "-d", "@-"]
    done = subprocess.run(command, input=json.dumps(body), capture_output=True, text=True, timeout=60, check=True)
    events = [line for line in done.stdout.split("\n\n") if line and not line.startswith(":")]
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
