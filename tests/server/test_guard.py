"""Who may ask, from where, and how much; what is refused, in the words of each protocol."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from programs import TinyModel
from serving import Serving, serving

from kvcompose_local.server.guard import LARGEST_BODY, Access, is_loopback
from kvcompose_local.server.service import Service

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server(tiny_model: TinyModel) -> Iterator[Serving]:
    access = Access.of("127.0.0.1", "the key", ["http://localhost:3000"])
    with serving(tiny_model(), access=access, on_disk=False) as server:
        yield server


@pytest.fixture
def client(server: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer the key"}) as client:
        yield client


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer another"}, {"x-api-key": ""}])
@pytest.mark.parametrize("path", ["/v1/models", "/props", "/metrics", "/kvc/chats", "/v1/messages"])
def test_without_the_key_nothing_is_told(server: Serving, headers: dict[str, str], path: str) -> None:
    response = httpx.get(server.url + path, headers=headers)
    assert response.status_code == 401
    error = response.json()["error"]
    assert "API key" in error["message"]
    assert error["type"] == "authentication_error"
    assert (response.json().get("type") == "error") == (path == "/v1/messages")


def test_the_key_is_taken_as_each_protocol_sends_it(server: Serving) -> None:
    for headers in ({"Authorization": "Bearer the key"}, {"x-api-key": "the key"}):
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(("host", "status"), [("evil.example", 403), ("localhost", 200), ("192.168.1.7:8080", 200)])
def test_another_name_of_this_machine_is_refused(client: httpx.Client, host: str, status: int) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"), [("http://evil.example", 403), ("null", 403), ("http://localhost:3000", 200)]
)
def test_pages_of_others_may_not_ask(client: httpx.Client, origin: str, status: int) -> None:
    response = client.post("/v1/chat/completions", json=HELLO, headers={"Origin": origin})
    assert response.status_code == status
    assert response.headers.get("access-control-allow-origin") == (origin if status == 200 else None)


def test_the_page_itself_may_ask(client: httpx.Client, server: Serving) -> None:
    assert client.post("/v1/chat/completions", json=HELLO, headers={"Origin": server.url}).status_code == 200


def test_a_preflight_is_answered_for_whom_it_is_allowed(server: Serving) -> None:
    wanted = "authorization, x-stainless-os, anthropic-dangerous-direct-browser-access"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": f"{wanted}, a:b"}
    allowed = httpx.options(f"{server.url}/v1/models", headers={"Origin": "http://localhost:3000", **asked})
    assert allowed.status_code == 204
    assert allowed.headers["access-control-allow-headers"] == wanted, "clients add headers of their own"
    assert (
        httpx.options(f"{server.url}/v1/models", headers={"Origin": "http://evil.example", **asked}).status_code == 403
    )


def test_bodies_are_bounded(client: httpx.Client) -> None:
    assert client.post("/v1/chat/completions", content=b" " * (LARGEST_BODY + 1)).status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(LARGEST_BODY // (1 << 20) + 2):
            yield b" " * (1 << 20)

    assert client.post("/v1/chat/completions", content=pieces()).status_code == 413


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", b"{"),
        ("/v1/chat/completions", b'{"messages": []}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "king", "content": "x"}]}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "n": 2}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "stop": [""]}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "metadata": {"a": 1e999}}'),
        (
            "/v1/responses",
            b'{"input": "x", "tools": [{"type": "function", "name": "f", "parameters": {"a": -Infinity}}]}',
        ),
        ("/v1/completions", b'{"prompt": ""}'),
        ("/v1/completions", b'{"prompt": "x", "echo": true}'),
        ("/v1/responses", b'{"input": []}'),
        ("/v1/messages", b'{"messages": [{"role": "user", "content": "x"}]}'),
        ("/v1/messages", b'{"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "image"}]}]}'),
        ("/v1/messages/count_tokens", b"[]"),
        ("/kvc/chats/none/pins", b'{"start": -1, "stop": 2}'),
    ],
)
def test_bad_bodies_are_told_in_the_protocols_own_shape(client: httpx.Client, path: str, body: bytes) -> None:
    response = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    told = response.json()
    assert told["error"]["type"] == "invalid_request_error"
    assert told["error"]["message"]
    assert (told.get("type") == "error") == path.startswith("/v1/messages")


@pytest.mark.parametrize(
    "path", ["/page/../app.py", "/page/..%2fapp.py", "/page/%2e%2e/%2e%2e/api.py", "/page/none.js"]
)
def test_nothing_but_the_page_is_served(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 404


def test_a_key_may_hold_any_character(tiny_model: TinyModel) -> None:
    with serving(tiny_model(), access=Access.of("127.0.0.1", "sécret", []), on_disk=False) as server:
        for told in ("sécret".encode(), b"s?cret", "sécre".encode()):
            response = httpx.get(f"{server.url}/v1/models", headers={b"Authorization": b"Bearer " + told})
            assert response.status_code == (200 if told == "sécret".encode() else 401)


def test_a_fault_of_ours_is_told_and_the_connection_stays(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a user's words")

    monkeypatch.setattr(Service, "props", fail)
    for _ in range(2):
        response = client.get("/props")
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "api_error"
    assert client.get("/health").status_code == 200
    assert "RuntimeError" in caplog.text
    assert "a user's words" not in caplog.text


def test_a_models_name_is_no_path(client: httpx.Client) -> None:
    for name in ("../../etc/passwd", "/etc/passwd", "C:\\x", "a" * 5000):
        response = client.post("/v1/chat/completions", json={**HELLO, "model": name})
        assert response.status_code == 404
        assert len(response.json()["error"]["message"]) < 300


def test_browsers_are_kept_in_order(client: httpx.Client) -> None:
    headers = client.get("/props").headers
    assert "script-src 'self'" in headers["content-security-policy"]
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"


def test_loopback() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "box", "10.0.0.1")] == [
        True,
        True,
        True,
        False,
        False,
        False,
        False,
    ]
