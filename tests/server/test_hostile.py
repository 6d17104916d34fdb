"""Bodies and connections that nobody means well by: a refusal each, and others are served meanwhile."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from programs import TinyModel, endless
from serving import Serving, serving

from kvcompose_local.server.running import without_texts
from kvcompose_local.server.shapes import MOST_MESSAGES

CHAT, CLAUDE = "/v1/chat/completions", "/v1/messages"
NESTED_CALL = {"name": "f", "arguments": '{"a": ' * 5000 + "1" + "}" * 5000}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": NESTED_CALL}]},
    {"role": "tool", "tool_call_id": "1", "content": "y"},
]


@pytest.fixture(scope="module")
def server(tiny_model: TinyModel) -> Iterator[Serving]:
    with serving(endless(tiny_model), n_ctx=1024, on_disk=False) as server:
        yield server


def one(more: str, role: str = "user", content: str = '"hi"') -> str:
    """A request with a further field."""
    return f'{{"messages": [{{"role": "{role}", "content": {content}}}], "max_tokens": 2{more}}}'


def message(n: int) -> str:
    return '{"messages": [' + ", ".join(['{"role": "user", "content": ""}'] * n) + '], "max_tokens": 2}'


REFUSED = {
    "deep": '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep tools": one(', "tools": ' + '[{"a": ' * 5000 + "1" + "}]" * 5000),
    "deep schema": one(', "response_format": {"type": "json_schema", "json_schema": {"schema": '
                       + '{"properties": {"a": ' * 200 + "{}" + "}}" * 200 + "}}"),
    "infinite": one(', "temperature": 1e999'),
    "no number": one(', "temperature": NaN'),
    "minus infinity": one(', "top_p": -Infinity'),
    "a long number": one(', "seed": ' + "1" * 6000),
    "beyond 64 bits": one(', "seed": 99999999999999999999'),
    "a number with a point": one(', "top_k": 1.5'),
    "many messages": message(MOST_MESSAGES + 1),
    "a million messages": message(10**6)[: 31 << 20].rpartition(",")[0] + "]}",
    "a bad image": one("", content='[{"type": "image_url", "image_url": {"url": "data:image/png;base64,!!!"}}]'),
    "an image that is none": one("", content='[{"type": "image_url", "image_url": 5}]'),
    "half a character": one(', "tool_choice": {"type": "function", "function": {"name": "\\ud800"}}'),
    "nothing": "",
    "a list": "[]",
    "a number": "5",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_bodies_are_refused_at_once(server: Serving, name: str) -> None:
    started = time.monotonic()
    response = server.client.post(CHAT, content=REFUSED[name].encode(), headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text[:200]
    assert len(response.json()["error"]["message"]) < 1000
    assert time.monotonic() - started < 10
    assert server.client.get("/health").status_code == 200


def test_arguments_too_deep_to_be_read_are_none(server: Serving) -> None:
    assert server.post(CHAT, messages=HISTORY, max_tokens=2).status_code == 200


@pytest.mark.parametrize("name", ["deep", "nothing", "a number", "a bad image"])
def test_anthropics_clients_are_told_so_in_their_own_shape(server: Serving, name: str) -> None:
    response = server.client.post(CLAUDE, content=REFUSED[name].encode(), headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["type"]) == (400, "error")


@pytest.mark.parametrize("raw", [b"\xff\xfe{", b"{\xff}", b"\x00" * 100])
def test_what_is_no_text_is_refused(server: Serving, raw: bytes) -> None:
    assert server.client.post(CHAT, content=raw, headers={"Content-Type": "application/json"}).status_code == 400


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded"])
def test_a_body_is_json_where_nothing_else_is_said(server: Serving, kind: str | None) -> None:
    """As curl sends what stands behind -d. A page of another origin could do so, too, and is refused by its origin."""
    headers = {"Content-Type": kind} if kind else {}
    body = b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}'
    assert server.client.post(CHAT, content=body, headers=headers).status_code == 200
    headers |= {"Origin": "https://example.com"}
    assert server.client.post(CHAT, content=body, headers=headers).status_code == 403


def test_who_tells_another_content_type_is_told(server: Serving) -> None:
    response = server.client.post(CHAT, content=one("").encode(), headers={"Content-Type": "text/plain"})
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def exchange(server: Serving, raw: bytes, seconds: float = 20) -> bytes:
    """What comes back on a connection of its own, to its end or for so long."""
    host, port = server.url.removeprefix("http://").split(":")
    said = b""
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(raw)
        try:
            while part := connection.recv(1 << 16):
                said += part
        except TimeoutError:
            pass
    return said


def plain(body: str, version: str = "1.1", more: str = "") -> bytes:
    raw = body.encode()
    head = f"POST {CHAT} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_is_answered_and_closed(server: Serving, stream: bool) -> None:
    head, _, body = exchange(server, plain(one(', "stream": true' if stream else ""), "1.0")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"chunked" not in head.lower()
    assert body.endswith(b"data: [DONE]\n\n" if stream else b"}")


def test_a_connection_serves_several_requests(server: Serving) -> None:
    said = exchange(server, plain(one("")) + plain("{") + plain(one(""), more="Connection: close\r\n"))
    assert [said.count(f"HTTP/1.1 {code}".encode()) for code in (200, 400)] == [2, 1]


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", b"400"),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", b"40"),
        (b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", b"403"),
        (b"GET /v1/models HTTP/1.0\r\n\r\n", b"403"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"GET /page/%2e%2e/guard.py HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"404"),
        (b"GET /page/%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"404"),
        (b"GET /page/" + b"a" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"404"),
        (b"TRACE / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"405"),
    ],
)
def test_hostile_heads_are_refused(server: Serving, raw: bytes, code: bytes) -> None:
    assert exchange(server, raw, 3).startswith(b"HTTP/1.1 " + code)


def test_who_sends_no_more_of_a_body_is_cut_off(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcompose_local.server.guard.BODY_SECONDS", 0.3)
    whole = plain(one(""))
    said = exchange(server, whole[:-10])
    assert said.startswith(b"HTTP/1.1 408")
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as slow:  # slow, but it comes
        for i in range(0, len(whole), 40):
            slow.sendall(whole[i : i + 40])
            time.sleep(0.02)
        assert slow.recv(12) == b"HTTP/1.1 200"


def test_health_is_told_while_a_large_body_is_looked_at(server: Serving) -> None:
    waits: list[float] = []
    is_over = threading.Event()

    def look() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not is_over.wait(0.02):
                started = time.monotonic()
                client.get("/health")
                waits.append(time.monotonic() - started)

    thread = threading.Thread(target=look)
    thread.start()
    for content in ("x " * 1_000_000, "x"):
        assert server.post(CHAT, messages=[{"role": "user", "content": content}], max_tokens=2).status_code in (
            200,
            400,
        )
    is_over.set()
    thread.join()
    assert max(waits) < 2  # beside other tests


def test_what_goes_wrong_is_logged_without_what_was_said(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("kvcompose_local.server")
    without_texts(log)
    without_texts(log)
    try:
        int("a secret")
    except ValueError:
        log.exception("unexpected %s", "ValueError")
    (record,) = caplog.records
    text = logging.Formatter().format(record)
    assert "test_what_goes_wrong" in text
    assert "ValueError" in text
    assert text.count("secret") == 1  # the line of source
