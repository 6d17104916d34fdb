"""What models say, as events: thinking apart, calls of tools, stop texts; many chats within the memory of a few."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from programs import PROSE, TinyModel, endless
from scripted_model import write_scripted_model
from serving import Messages, serving, texts

QUESTION = [{"role": "user", "content": "What is it?"}]
TOOL: Any = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}


def stream(server: Any, **body: Any) -> list[dict[str, Any]]:
    """The deltas of a streamed answer."""
    told = {"messages": QUESTION, "max_tokens": 30, "stream": True, **body}
    lines = server.post("/v1/chat/completions", **told).text.splitlines()
    return [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]


def test_thinking_is_told_apart(tmp_path: Path) -> None:
    model = write_scripted_model(
        tmp_path / "thinks.gguf", ["<think>", "Let me", " see.", "</think>", "It is", " a cat."]
    )
    with serving(model) as server:
        message = server.chat(QUESTION, max_tokens=30)["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Let me see.", "It is a cat.")
        deltas = [choice["delta"] for choice in stream(server)]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Let me see."
        assert "".join(delta.get("content", "") for delta in deltas) == "It is a cat."
        told = server.post("/v1/messages", messages=QUESTION, max_tokens=30).json()["content"]
        assert [(block["type"], block.get("thinking", block.get("text"))) for block in told] == [
            ("thinking", "Let me see."),
            ("text", "It is a cat."),
        ]
        # protocols do not send thinking back; the chat goes on all the same
        history = [*QUESTION, {"role": "assistant", "content": "It is a cat."}, {"role": "user", "content": "Sure?"}]
        after = server.chat(history, max_tokens=30)
        assert after["kvc"]["cached"] > 20
        assert len({chat["id"] for chat in server.chats().values()}) == 1


def test_calls_that_are_not_forced(tmp_path: Path) -> None:
    pieces = ["I look.", "<tool_", "call>", '{"name": "look", ', '"arguments": {"at": "it"}}', "</tool_call>"]
    with serving(write_scripted_model(tmp_path / "calls.gguf", pieces)) as server:
        choice = server.chat(QUESTION, max_tokens=30, tools=[TOOL])["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "I look."
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "look", "arguments": '{"at": "it"}'}
        choices = stream(server, tools=[TOOL])
        assert choices[-1]["finish_reason"] == "tool_calls"
        assert "".join(c["delta"].get("content", "") for c in choices) == "I look."
        (streamed,) = [c["delta"]["tool_calls"][0] for c in choices if "tool_calls" in c["delta"]]
        assert (streamed["index"], streamed["function"]) == (0, call["function"])
        without = server.chat(QUESTION, max_tokens=30)["choices"][0]
        assert without["message"]["content"] == "".join(pieces)
        refused = server.chat(QUESTION, max_tokens=30, tools=[TOOL], tool_choice="none")["choices"][0]
        assert refused["message"]["content"] == "".join(pieces)
        # what came of it is read, and nothing else
        history = [*QUESTION, choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "a cat"}]
        server.chat(QUESTION, max_tokens=30, tools=[TOOL])
        after = server.chat(history, max_tokens=2, tools=[TOOL])
        assert after["timings"]["prompt_n"] < 80


def test_one_call_where_several_are_not_wanted_and_none_that_is_cut(tmp_path: Path) -> None:
    bare = ['{"name": "look", ', '"arguments": {"at": "it"}}', '\n{"name": "look", "arguments": ', '{"at": "that"}}']
    with serving(write_scripted_model(tmp_path / "bare.gguf", bare)) as server:
        calls = server.chat(QUESTION, max_tokens=30, tools=[TOOL])["choices"][0]["message"]["tool_calls"]
        assert [json.loads(call["function"]["arguments"])["at"] for call in calls] == ["it", "that"]
        one = server.chat(QUESTION, max_tokens=30, tools=[TOOL], parallel_tool_calls=False)["choices"][0]
        assert [call["function"]["arguments"] for call in one["message"]["tool_calls"]] == ['{"at": "it"}']
        claude = {"name": "look", "input_schema": TOOL["function"]["parameters"]}
        choice = {"type": "auto", "disable_parallel_tool_use": True}
        told = server.post("/v1/messages", messages=QUESTION, max_tokens=30, tools=[claude], tool_choice=choice).json()
        assert [block["type"] for block in told["content"]] == ["tool_use"]
        cut = server.chat(QUESTION, max_tokens=3, tools=[TOOL])["choices"][0]
        assert (cut["finish_reason"], len(cut["message"]["tool_calls"])) == ("length", 1), "another was begun"

    tagged = ["I look.", "<tool_call>", '{"name": "look", ', '"arguments": {"at": "it"}}', "</tool_call>"]
    with serving(write_scripted_model(tmp_path / "tagged.gguf", tagged)) as server:
        for n in (2, 3):
            cut = server.chat(QUESTION, max_tokens=n, tools=[TOOL])["choices"][0]
            assert (cut["message"]["content"], cut["finish_reason"]) == ("I look.", "length")
            assert "tool_calls" not in cut["message"]
        told = server.post(
            "/v1/responses", input="What is it?", max_output_tokens=3, tools=[{"type": "function", **TOOL["function"]}]
        ).json()
        assert [(item["type"], item["status"]) for item in told["output"]] == [("message", "incomplete")]
        assert told["output"][0]["content"][0]["text"] == "I look."


def test_an_answer_that_is_begun_goes_on(tmp_path: Path) -> None:
    with serving(write_scripted_model(tmp_path / "counts.gguf", ["one ", "two ", "three ", "four"])) as server:
        begun: Messages = [*QUESTION, {"role": "assistant", "content": "one two "}]
        told = server.post("/v1/messages", messages=begun, max_tokens=30, temperature=0).json()
        whole = "one two " + "".join(block["text"] for block in told["content"])
        (chat,) = server.chats().values()
        said = httpx.get(f"{server.url}/kvc/chats/{chat['id']}").json()["messages"]
        assert said[-1]["content"] == whole
        after: Messages = [*QUESTION, {"role": "assistant", "content": whole}, {"role": "user", "content": "More."}]
        held = server.post("/v1/messages", messages=after, max_tokens=2).json()["usage"]["cache_read_input_tokens"]
        assert held >= told["usage"]["input_tokens"] + told["usage"]["cache_read_input_tokens"]
        form = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
        refused = server.post("/v1/messages", messages=begun, max_tokens=30, output_config=form)
        assert refused.status_code == 400


def test_a_chat_that_differs_in_white_space_or_markers_is_another(tiny_model: TinyModel) -> None:
    def answers(*told: Messages) -> list[tuple[str, int]]:
        with serving(tiny_model("llama"), on_disk=False) as server:
            found = [server.chat(messages, max_tokens=12, temperature=0) for messages in told]
            return [(texts(answer), answer["usage"]["prompt_tokens"]) for answer in found]

    def chat(answer: str, at: str) -> Messages:
        call = {
            "id": "123456789",
            "type": "function",
            "function": {"name": "look", "arguments": json.dumps({"at": at})},
        }
        return [
            *QUESTION,
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "123456789", "content": "a cat"},
        ]

    told = [chat(answer, at) for answer in ("12 345", "1 2345", "12345") for at in ("x y", "x  y")]
    assert answers(*told) == [answers(messages)[0] for messages in told]


@pytest.mark.parametrize(("stop", "said"), [(["three"], "one two "), ([" two", "three"], "one"), (["ne tw"], "o")])
def test_stop_texts_end_an_answer_and_the_chat_goes_on(tmp_path: Path, stop: list[str], said: str) -> None:
    model = write_scripted_model(tmp_path / "counts.gguf", ["one ", "two ", "thr", "ee ", "four"])
    with serving(model) as server:
        messages: Messages = [*QUESTION]
        choice = server.chat(messages, max_tokens=30, stop=stop)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (said, "stop")
        anthropic = server.post("/v1/messages", messages=QUESTION, max_tokens=30, stop_sequences=stop).json()
        assert anthropic["stop_reason"] == "stop_sequence"
        assert anthropic["stop_sequence"] in stop
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "Go on."}]
        assert texts(server.chat(messages, max_tokens=30)) == "one two three four"


def test_an_answer_under_a_grammar_begins_when_the_thinking_ends(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}{# </think> #}"
    )
    from tiny_models import write_tiny_model

    model = write_tiny_model(tmp_path / "tiny.gguf", template=template, seed=3)
    with serving(model) as server:
        told = server.chat(
            QUESTION,
            max_tokens=40,
            tools=[TOOL],
            tool_choice="required",
        )["choices"][0]
        if told["finish_reason"] == "tool_calls":
            assert told["message"]["tool_calls"][0]["function"]["name"] == "look"
        thinking = server.chat(QUESTION, max_tokens=20, response_format={"type": "json_object"}, temperature=0)[
            "choices"
        ][0]["message"]
        assert thinking["content"] == ""  # it has not ended to think
        assert thinking["reasoning_content"]


def test_room_is_made_while_nobody_asks(tiny_model: TinyModel) -> None:
    model, n_tokens = endless(tiny_model), 600
    with serving(model, budget=0.5, keep=10**9, keep_ratio=0.13, on_disk=False) as server:
        keeping = server.hosted.keeping
        assert keeping is not None
        chats: list[Messages] = [[{"role": "user", "content": f"{i}." + "abc" * (n_tokens // 3)}] for i in range(4)]
        answers = [texts(server.chat(chat)) for chat in chats]
        before = {kept.id: kept.n_bytes for kept in keeping if kept.state is not None}
        assert len(before) == 3
        keeping.bound = keeping.n_bytes + 1000  # too little for the chat in the engine, too
        until = time.monotonic() + 20
        after: dict[str, int] = {}
        while after.keys() != before.keys() or keeping.bound - sum(after.values()) < max(before.values()):
            assert time.monotonic() < until, "no room was made"
            time.sleep(0.1)
            after = {kept.id: kept.n_bytes for kept in keeping if kept.state is not None}
        assert sum(after[chat] < before[chat] for chat in after) in (1, 2)  # no more than is needed
        chats[3] += [{"role": "assistant", "content": answers[3]}, {"role": "user", "content": "And?"}]
        told = server.chat(chats[3])  # the chat in the engine is as it was
        assert told["timings"]["prompt_n"] < 60
        assert told["kvc"]["reread"] == 0


def test_no_room_is_made_for_a_chat_that_is_kept_already(tiny_model: TinyModel) -> None:
    with serving(endless(tiny_model), budget=0.5, keep=10**9, keep_ratio=0.13, on_disk=False) as server:
        keeping = server.hosted.keeping
        assert keeping is not None
        chats: list[Messages] = [[{"role": "user", "content": f"{i}." + "abc" * 200}] for i in range(3)]
        _, second, _ = (server.chat(chat)["kvc"]["chat"] for chat in chats)
        view = server.client.get(f"/kvc/chats/{second}/memory", params={"budget": 0.2})  # takes it into the engine
        assert view.status_code == 200
        before = {kept.id: kept.n_bytes for kept in keeping}
        assert min(before.values()) > 0
        keeping.bound = keeping.n_bytes + 1000
        time.sleep(2.5)  # two rests
        assert {kept.id: kept.n_bytes for kept in keeping} == before


def test_24_chats_within_the_bytes_of_4(tiny_model: TinyModel) -> None:
    model = endless(tiny_model)
    n_tokens, f16_token_bytes = 600, 3 * 2 * 2 * 32 * 2  # layers, heads, K and V, numbers of a head, F16
    keep = 4 * n_tokens * f16_token_bytes
    # Scores, places and text are a larger part of cells as small as these.
    with serving(model, budget=0.5, keep=keep, keep_ratio=0.13, on_disk=False) as server:
        keeping = server.hosted.keeping
        assert keeping is not None
        text = PROSE.replace(" ", "")
        chats: list[Messages] = []
        answers: list[str] = []
        for i in range(24):
            chats.append([{"role": "user", "content": f"{i}.{text[i * 500 : i * 500 + n_tokens - 40]}"}])
            answers.append(texts(server.chat(chats[-1])))
            assert keeping.n_bytes <= keep
        assert all(chat["where"] in ("memory", "in use") for chat in server.chats().values())
        for messages, said in zip(chats, answers, strict=True):
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And?"}]
            told = server.chat(messages)
            assert told["timings"]["prompt_n"] == told["usage"]["prompt_tokens"] - told["kvc"]["cached"] < 60
            assert keeping.n_bytes <= keep
            another = server.chat(messages)  # what stood before the answer is read on to
            assert another["kvc"]["cached"] > 0.7 * n_tokens
        assert len(server.chats()) == 24
