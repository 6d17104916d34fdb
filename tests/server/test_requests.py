"""Requests in a queue, clients that hang up, pings, models that come and go."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from programs import PROSE, TinyModel, endless
from serving import Serving, serving, texts

from kvcompose_local.server.requests import PIECE_SECONDS, Job, Piece, Refused, Result, TokenChance
from kvcompose_local.server.responses import ResponsesRequest
from kvcompose_local.server.worker import FairQueue


def test_the_queue_takes_clients_in_turn() -> None:
    async def run() -> list[str]:
        queue = FairQueue(bound=8, bound_of_one=4)
        jobs = [Job(name) for name in "aaabac"]
        for job in jobs:
            queue.put(job, lambda _job: None)
        assert [queue.before(job) for job in jobs] == [0, 3, 4, 1, 5, 2]
        with pytest.raises(Refused, match="wait already") as error:
            queue.put(Job("a"), lambda _job: None)
        assert (error.value.status, error.value.retry_after > 0) == (503, True)
        for name in "bd":
            queue.put(Job(name), lambda _job: None)
        with pytest.raises(Refused):
            queue.put(Job("e"), lambda _job: None)
        taken = []
        while (next_job := queue.take(0)) is not None:
            taken.append(next_job[0].client)
        assert queue.take(0) is None
        return taken

    assert "".join(asyncio.run(run())) == "abcdabaa"


def test_thinking_before_a_call_stays_before_it() -> None:
    told = [
        {"role": "user", "content": "What time is it?"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "I must look."}]},
        {"type": "function_call", "call_id": "c1", "name": "clock", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "9"},
        {"role": "assistant", "content": "It is 9."},
    ]
    messages = ResponsesRequest.model_validate({"input": told})._messages()
    assert [message.get("reasoning") for message in messages] == [None, "I must look.", None, None]


def test_pieces_that_come_fast_go_together_and_nothing_is_lost_or_changes_places() -> None:
    def chance(raw: bytes) -> TokenChance:
        return TokenChance(raw, -1.0, ())

    async def run() -> list[object]:
        job = Job("one")

        def engine() -> None:
            for text in ("I ", "th", "ink"):
                job.emit(Piece(text, True))
            for raw in (b"4", b"2", b"!"):
                job.emit(Piece(raw.decode(), False, (chance(raw),)))
            time.sleep(1.5 * PIECE_SECONDS)
            job.emit(Piece(" Slowly"))
            job.emit(Result(None))

        thread = threading.Thread(target=engine)
        thread.start()
        events = [event async for event in job.events(5)]
        thread.join()
        return [*events]

    *pieces, last = asyncio.run(run())
    assert isinstance(last, Result)
    told = [(piece.text, piece.is_reasoning, [c.raw for c in piece.chances]) for piece in pieces]  # type: ignore[attr-defined]
    assert told == [
        ("I ", True, []),
        ("think", True, []),
        ("42! Slowly", False, [b"4", b"2", b"!"]),
    ]


def hang_up_in_the_middle(server: Serving, body: dict[str, object]) -> str:
    """Take three pieces of an endless answer; returns its chat."""
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        chat = response.headers["X-KVCompose-Chat"]
        pieces = 0
        for line in response.iter_lines():
            pieces += line.startswith("data: {")
            if pieces == 4:
                break
    return chat


def idle(server: Serving, seconds: float = 5) -> None:
    until = time.monotonic() + seconds
    while server.client.get("/props").json()["queue"]["running"]:
        assert time.monotonic() < until, "it is still at work"
        time.sleep(0.02)


def test_who_hangs_up_stops_the_answer_and_what_was_said_stays(tiny_model: TinyModel) -> None:
    with serving(endless(tiny_model), budget=1, n_ctx=4096) as server:
        body = {"messages": [{"role": "user", "content": "go on"}], "max_tokens": 4000, "stream": True}
        chat = hang_up_in_the_middle(server, body)
        idle(server)
        told = server.client.get(f"/kvc/chats/{chat}").json()
        assert 3 <= len(told["messages"][1]["content"].encode()) < 2000
        assert [m["role"] for m in told["messages"]] == ["user", "assistant"]
        again = server.chat([*body["messages"]])  # type: ignore[misc]
        assert again["kvc"]["chat"] == chat


def test_who_hangs_up_without_a_stream_stops_the_answer(tiny_model: TinyModel) -> None:
    with serving(endless(tiny_model), budget=1, n_ctx=4096) as server:
        body = {"messages": [{"role": "user", "content": "go on"}], "max_tokens": 4000}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.3)
        idle(server)
        assert server.chat([{"role": "user", "content": "next"}])["usage"]["completion_tokens"] == 8


def test_health_does_not_wait_and_others_are_told_that_they_do(tiny_model: TinyModel) -> None:
    with serving(endless(tiny_model), budget=1, n_ctx=4096) as server:
        body = {"messages": [{"role": "user", "content": "go on"}], "max_tokens": 3000, "stream": True}
        thread = threading.Thread(target=lambda: httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60))
        thread.start()
        while not server.client.get("/props").json()["queue"]["running"]:
            time.sleep(0.01)
        slowest = 0.0
        for _ in range(20):
            started = time.monotonic()
            assert httpx.get(f"{server.url}/health").status_code == 200
            slowest = max(slowest, time.monotonic() - started)
        assert slowest < 0.5  # beside other tests; scripts/soak measures it
        waiting = server.chat([{"role": "user", "content": "and me"}])
        assert texts(waiting)
        thread.join()


def test_a_long_prompt_is_read_with_pings(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcompose_local.server.service.PING_SECONDS", 0.05)
    monkeypatch.setattr("kvcompose_local.server.service.PROGRESS_SECONDS", 0.0)
    with serving(endless(tiny_model), n_ctx=4096) as server:
        body = {"messages": [{"role": "user", "content": PROSE[:1500]}], "max_tokens": 2, "stream": True}
        with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = [*response.iter_lines()]
        reading = [line for line in lines if line.startswith(": reading ")]
        assert len(reading) > 2
        done, total = reading[-1].split()[-1].split("/")
        assert 0 < int(done) <= int(total)
        assert lines[-2] == "data: [DONE]"


def test_too_long_is_refused_with_both_numbers_and_nothing_is_lost(tiny_model: TinyModel) -> None:
    with serving(endless(tiny_model), n_ctx=512) as server:
        kept = server.chat([{"role": "user", "content": "short"}])
        response = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "x" * 600}])
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "621 tokens > 512 maximum" in error["message"]
        again = server.chat([{"role": "user", "content": "short"}])
        assert again["kvc"] == {**kept["kvc"], "cached": again["usage"]["prompt_tokens"] - 1, "read": 1}
        full = server.chat([{"role": "user", "content": "x" * 400}], max_tokens=400)
        assert full["choices"][0]["finish_reason"] == "length"


def test_models_come_when_they_are_asked_and_go_when_they_are_not(tiny_model: TinyModel) -> None:
    one, two = endless(tiny_model, name="One"), tiny_model(seed=9, name="Two")
    with serving(one, two, idle_unload=0.5) as server:
        messages = [{"role": "user", "content": "hello " * 20}]
        first = server.chat(messages)
        assert server.chat(messages, model=two.stem)["model"] == two.stem
        until = time.monotonic() + 20
        while any(model["loaded"] for model in server.client.get("/props").json()["models"]):
            assert time.monotonic() < until
            time.sleep(0.1)
        again = server.chat(messages)
        assert again["kvc"]["cached"] == first["usage"]["prompt_tokens"] - 1  # its cells were written down
        assert texts(again) == texts(first)


def test_a_model_that_does_not_fit_now_gets_503_and_the_others_go_on(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = endless(tiny_model, name="One"), tiny_model(seed=9, name="Two")
    with serving(one, two) as server:
        monkeypatch.setattr("kvcompose_local.server.hosted.size_of", lambda _path: 1 << 60)
        for stream in (False, True):
            body = {"messages": [{"role": "user", "content": "x"}], "model": two.stem, "stream": stream}
            response = server.post("/v1/chat/completions", **body)
            assert (response.status_code, response.headers["Retry-After"]) == (503, "60")
            assert "GiB are free" in response.json()["error"]["message"]
        refused = server.post("/v1/messages", model=two.stem, max_tokens=2, messages=[{"role": "user", "content": "x"}])
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded_error")
        assert server.chat([{"role": "user", "content": "x"}])["usage"]["completion_tokens"] == 8


def test_a_queue_that_is_full_gets_503(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(endless(tiny_model), budget=1, n_ctx=4096) as server:
        monkeypatch.setattr(server.service.worker.queue, "bound", 1)
        body = {"messages": [{"role": "user", "content": "go on"}], "max_tokens": 3900, "stream": True}
        with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()  # which end the answer when they are forgotten
            next(lines)
            with ThreadPoolExecutor() as pool:
                waiting = pool.submit(server.chat, [{"role": "user", "content": "and me"}])
                while not httpx.get(f"{server.url}/props").json()["queue"]["waiting"]:
                    assert not waiting.done()
                    time.sleep(0.01)
                refused = httpx.post(f"{server.url}/v1/chat/completions", json=body)
                assert refused.status_code == 503
                assert int(refused.headers["Retry-After"]) > 0
                response.close()
                assert texts(waiting.result())


def test_who_hangs_up_stops_the_answer_within_a_token(real_model: Callable[[str], Path]) -> None:
    """By what a model says that takes a while for each: what comes between is the way of a hang-up through sockets."""
    with serving(real_model("smollm2-135m"), on_disk=False) as server:
        body = {"messages": [{"role": "user", "content": "Count to a thousand."}], "max_tokens": 1000, "stream": True}
        chat = hang_up_in_the_middle(server, body)
        idle(server)
        told = server.client.get(f"/kvc/chats/{chat}").json()["messages"][1]["content"]
        said = server.chat([*body["messages"]], max_tokens=3 + 12)  # type: ignore[misc]
        assert len(told) <= len(texts(said))


def test_metrics_and_props_tell_the_ceiling(tiny_model: TinyModel) -> None:
    with serving(endless(tiny_model), keep=10**6) as server:
        for _ in range(3):
            server.chat([{"role": "user", "content": PROSE[:300]}])
            server.chat([{"role": "user", "content": PROSE[300:600]}])
        lines = server.client.get("/metrics").text.splitlines()
        figures = {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}
        ceiling = server.client.get("/props").json()["ceiling"]
        assert figures["kvcompose_cells_bytes"] == ceiling["cells"]["bytes"] > 0
        assert figures["kvcompose_kept_bound_bytes"] == 10**6
        assert 0 < figures["kvcompose_kept_bytes"] <= 10**6
        assert figures['kvcompose_answers_total{finish="length"}'] == 6
        assert figures["kvcompose_prompt_tokens_total"] > figures["kvcompose_cached_tokens_total"] > 0
        assert ceiling["total_bound"] >= ceiling["cells"]["bytes"] + ceiling["compute"]["bytes"] + 10**6


def test_logs_hold_no_text_of_users(tiny_model: TinyModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "kvcompose_local"), serving(endless(tiny_model)) as server:
        server.chat([{"role": "user", "content": "a secret word"}])
        server.post("/v1/chat/completions", messages=[{"role": "user", "content": "a secret" * 999}])
        server.post("/v1/chat/completions", messages="a secret")
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("kvcompose_local"))
    assert "chat" in ours
    assert "secret" not in ours


def test_two_servers_do_not_share_a_folder(
    tiny_model: TinyModel, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = endless(tiny_model)
    with serving(model) as one, serving(model) as two:
        one.chat([{"role": "user", "content": "one"}])
        two.chat([{"role": "user", "content": "two"}])
        assert len(one.chats()) == len(two.chats()) == 1
        assert len([*state.rglob("*.json")]) == 1
        (chat,) = two.chats()
        assert two.client.get(f"/kvc/chats/{chat}").json()["messages"][0]["content"] == "two"
    assert "another server" in caplog.text


def test_what_is_remembered_adds_up(tiny_model: TinyModel) -> None:
    with serving(endless(tiny_model), budget=0.25) as server:
        text = PROSE[:1500].replace(" ", "")  # which is no text of bytes in this vocabulary
        told = server.chat([{"role": "system", "content": "Keep this."}, {"role": "user", "content": text}])
        chat = told["kvc"]["chat"]
        memory = server.client.get(f"/kvc/chats/{chat}/memory").json()
        layout = server.hosted.exchange.conversation.memory.engine.layout()
        assert layout.composed[0] > 0
        n_heads = memory["n_heads"]
        n_cells = sum(2 * k for k in layout.composed)  # of each layer's two heads
        composed = sum(memory["shares"][: -layout.n_live]) * n_heads
        assert composed == pytest.approx(n_cells, rel=0.02)
        assert set(memory["shares"][-layout.n_live :]) == {1.0}
        assert len(memory["texts"]) == memory["n_tokens"] == layout.position
        span = next(s for s in memory["spans"] if s["role"] == "user")
        assert "".join(memory["texts"][span["start"] : span["stop"]]).strip() == text.strip()
        less = server.client.get(f"/kvc/chats/{chat}/memory", params={"budget": 0.05}).json()
        assert less["bytes"] <= 0.05 * less["f16_bytes"] or less["n_live"] == 8
        assert sum(less["shares"]) < sum(memory["shares"])
        assert server.client.get(f"/kvc/chats/{chat}/memory").json() == memory  # nothing was changed
        start = less["shares"].index(min(less["shares"]))
        pins = server.client.post(f"/kvc/chats/{chat}/pins", json={"start": start, "stop": start + 8}).json()
        assert [start, start + 8] in pins["pins"]
        pinned = server.client.get(f"/kvc/chats/{chat}/memory", params={"budget": 0.05}).json()
        assert pinned["shares"][start : start + 8] == [1.0] * 8
        left = server.client.delete(f"/kvc/chats/{chat}/pins").json()["pins"]
        assert [start, start + 8] not in left
        assert len(left) == 1  # the system prompt's
