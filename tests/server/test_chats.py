"""Chats are not read twice, and answer as if nothing had come between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from programs import PROSE, TinyModel, endless
from serving import Messages, Serving, serving, texts

SYSTEM = {"role": "system", "content": PROSE[:200]}


def held(told: dict[str, object]) -> int:
    """Tokens that the answer's chat had of its prompt."""
    usage = told["usage"]
    assert isinstance(usage, dict)
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def conversation(server: Serving, topic: str, n: int = 3) -> list[str]:
    messages: Messages = [SYSTEM]
    return [texts(server.say(messages, f"{topic} {i}")) for i in range(n)]


def test_a_chat_that_goes_on_reads_what_is_new(tiny_model: TinyModel) -> None:
    with serving(endless(tiny_model)) as server:
        messages: Messages = []
        first = server.say(messages, "one")
        second = server.say(messages, "two")
        assert first["kvc"]["chat"] == second["kvc"]["chat"]
        n_new = second["usage"]["prompt_tokens"] - first["usage"]["total_tokens"]
        assert 0 < n_new <= len("[/][user]two[/][assistant]") + 1
        assert second["timings"]["prompt_n"] <= n_new + 1  # the last token of an answer may not have been read


def test_two_chats_that_take_turns_answer_as_if_alone(tiny_model: TinyModel) -> None:
    model = endless(tiny_model)
    with serving(model, on_disk=False) as server:
        alone = conversation(server, "stars")
    with serving(model, on_disk=False) as server:
        other = conversation(server, "boats")
    with serving(model, on_disk=False) as server:
        stars: Messages = [SYSTEM]
        boats: Messages = [SYSTEM]
        said: tuple[list[str], list[str]] = ([], [])
        n_before = [0, 0]
        for i in range(3):
            for chat, (messages, topic) in enumerate(((stars, "stars"), (boats, "boats"))):
                told = server.say(messages, f"{topic} {i}")
                said[chat].append(texts(told))
                if i:
                    assert told["timings"]["prompt_n"] == told["usage"]["prompt_tokens"] - n_before[chat]
                n_before[chat] = told["usage"]["total_tokens"]
        assert said == (alone, other)
        assert len(server.chats()) == 2


def test_a_compressed_chat_that_was_away_goes_on_the_same(tiny_model: TinyModel) -> None:
    """Long enough to be compacted: what left the engine and came back answers as what stayed."""
    model = endless(tiny_model)
    document = PROSE[200:900]

    def chat(server: Serving, *, disturbed: bool) -> list[str]:
        messages: Messages = [{"role": "user", "content": document}]
        answers = []
        for i in range(3):
            told = server.chat(messages)
            answers.append(texts(told))
            messages += [{"role": "assistant", "content": answers[-1]}, {"role": "user", "content": f"more {i}"}]
            if disturbed:
                server.chat([{"role": "user", "content": PROSE[1000:1600] + str(i)}])
        return answers

    with serving(model, budget=0.25, on_disk=False) as server:
        alone = chat(server, disturbed=False)
        assert min(server.hosted.exchange.conversation.memory.engine.layout().composed) > 0
    with serving(model, budget=0.25, on_disk=False) as server:
        assert chat(server, disturbed=True) == alone


def test_chats_go_on_after_a_restart(tiny_model: TinyModel) -> None:
    model = endless(tiny_model)
    messages: Messages = [SYSTEM]
    with serving(model) as server:
        first = server.say(messages, "one")
        server.chat([{"role": "user", "content": "another chat between"}])
        kept = server.chats()
    with serving(model) as server:
        assert server.chats().keys() == kept.keys()
        second = server.say(messages, "two")
        assert second["kvc"]["chat"] == first["kvc"]["chat"]
        assert held(second) >= first["usage"]["total_tokens"] - 1


def test_a_chat_whose_cells_are_lost_is_read_again_and_stays_the_same_chat(tiny_model: TinyModel, state: Path) -> None:
    model = endless(tiny_model)
    messages: Messages = [SYSTEM]
    with serving(model) as server:
        first = server.say(messages, "one")
    for path in state.rglob("*.kvc"):
        path.write_bytes(path.read_bytes()[:-100])  # damaged
    with serving(model) as server:
        second = server.say(messages, "two")
        assert held(second) == 0
        assert second["kvc"]["chat"] == first["kvc"]["chat"]
        third = server.say(messages, "three")
        assert held(third) > 0


def test_the_text_is_on_disk_before_the_last_event(tiny_model: TinyModel, state: Path) -> None:
    with serving(endless(tiny_model)) as server:
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "stream": True}
        with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
            chat = response.headers["X-KVCompose-Chat"]
            said = ""
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    said += choice["delta"].get("content", "")
                    if choice["finish_reason"]:
                        (path,) = state.rglob(f"{chat}.json")
                        messages = json.loads(path.read_text())["messages"]
                        assert [m["role"] for m in messages] == ["user", "assistant"]
                        assert messages[1]["content"] == said


def test_another_answer_to_the_same_is_the_same_chat(tiny_model: TinyModel) -> None:
    with serving(endless(tiny_model)) as server:
        messages: Messages = [SYSTEM, {"role": "user", "content": "one"}]
        first, second = server.chat(messages), server.chat(messages)
        assert texts(first) == texts(second)
        assert second["timings"]["prompt_n"] == 1  # the last token, for its logits
        assert len(server.chats()) == 1


def test_what_goes_another_way_is_another_chat_and_both_stay(tiny_model: TinyModel) -> None:
    with serving(endless(tiny_model)) as server:
        messages: Messages = [SYSTEM]
        first = server.say(messages, "one")
        server.say(messages, "two")
        edited = [*messages[:3], {"role": "user", "content": "another"}]
        branch = server.chat(edited)
        assert branch["kvc"]["chat"] != first["kvc"]["chat"]
        assert held(branch) >= first["usage"]["total_tokens"] - 1
        server.say(messages, "three")
        told = server.client.get(f"/kvc/chats/{first['kvc']['chat']}").json()
        assert [m["content"] for m in told["messages"] if m["role"] == "user"] == ["one", "two", "three"]


def test_a_chat_that_is_named_stays_itself_where_it_is_edited(tiny_model: TinyModel) -> None:
    with serving(endless(tiny_model)) as server:
        messages: Messages = [SYSTEM]
        chat = server.say(messages, "one")["kvc"]["chat"]
        server.say(messages, "two")
        edited = [*messages[:3], {"role": "user", "content": "another"}]
        assert server.chat(edited, chat_id=chat)["kvc"]["chat"] == chat
        assert len(server.chats()) == 1
        assert server.chat(edited, chat_id="../../etc/passwd")["kvc"]["chat"] == chat  # a name is no path


def test_what_chats_begin_with_is_read_once(tiny_model: TinyModel) -> None:
    system = {"role": "system", "content": PROSE[:600]}
    with serving(endless(tiny_model), budget=0.25) as server:
        first = server.chat([system, {"role": "user", "content": PROSE[700:1000]}])
        assert first["timings"]["prompt_n"] == first["usage"]["prompt_tokens"]
        for i in range(4):  # the first is composed by now
            told = server.chat([system, {"role": "user", "content": f"chat {i}"}])
            assert told["timings"]["prompt_n"] <= len(f"[user]chat {i}[/][assistant]") + 2
            assert held(told) >= 600


def test_chats_that_do_not_fit_lose_cells_first_and_then_their_place(tiny_model: TinyModel, state: Path) -> None:
    model = endless(tiny_model)
    with serving(model, keep=600_000, cache_type="f16") as server:
        keeping = server.hosted.keeping
        assert keeping is not None
        chats: list[Messages] = []
        for i in range(6):
            chats.append([{"role": "user", "content": f"{i} " + PROSE[i * 300 : i * 300 + 300]}])
            server.chat(chats[-1])
            assert keeping.n_bytes <= keeping.bound
        kept = [chat for chat in keeping if chat.state is not None]
        assert any(chat.is_small for chat in kept)
        assert len(kept) >= 2
        for messages in chats:  # from disk, where they are not in memory
            assert held(server.chat(messages)) > 0
            assert keeping.n_bytes <= keeping.bound
    assert list(state.rglob("*.kvc"))


def test_the_disk_has_a_bound(tiny_model: TinyModel) -> None:
    with serving(endless(tiny_model), keep=0, keep_disk=400_000, cache_type="f16") as server:
        keeping = server.hosted.keeping
        assert keeping is not None
        for i in range(6):
            server.chat([{"role": "user", "content": f"{i} " + PROSE[i * 300 : i * 300 + 300]}])
        assert keeping.disk_bytes <= keeping.disk_bound
        assert len(server.chats()) == 6


def test_a_chat_can_be_forgotten(tiny_model: TinyModel, state: Path) -> None:
    with serving(endless(tiny_model)) as server:
        messages: Messages = [{"role": "user", "content": "a secret"}]
        chat = server.chat(messages)["kvc"]["chat"]
        server.chat([{"role": "user", "content": "another"}])
        assert server.client.delete(f"/kvc/chats/{chat}").status_code == 204
        assert chat not in server.chats()
        assert server.client.get(f"/kvc/chats/{chat}").status_code == 404
        assert not list(state.rglob(f"{chat}*"))
        assert held(server.chat(messages)) < 8


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_budget_1_and_sliding_windows(tiny_model: TinyModel, arch: str) -> None:
    with serving(endless(tiny_model, arch=arch) if arch == "llama" else tiny_model(arch), budget=1) as server:
        one: Messages = [SYSTEM]
        two: Messages = [SYSTEM]
        for i in range(3):
            a = server.say(one, f"stars {i}")
            b = server.say(two, f"boats {i}")
        assert held(a) > 250
        assert held(b) > 250
