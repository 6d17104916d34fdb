"""Checks who may ask, from where, and how much, before anything is read."""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvcompose_local.server.requests import Refused

log = logging.getLogger("kvcompose_local.server")

#: Bytes of a body: 20 times the longest conversation that models know.
LARGEST_BODY = 32 << 20
#: Seconds in which some of a body must come: who sends no more holds a connection.
BODY_SECONDS = 60.0
#: Paths that need no key: the page asks for it, and who watches the server has none.
_OPEN = re.compile(r"/|/page/.*|/health|/favicon\.ico")
_LOCAL = ("localhost", "127.0.0.1", "::1")
#: The page may use nothing that does not come from this server.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'self'; worker-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)


@dataclass(frozen=True)
class Access:
    """hosts: names by which the server may be called, empty for any; key: empty for none; origins: other pages' that
    may ask.
    """

    hosts: tuple[str, ...] = _LOCAL
    key: str = ""
    origins: tuple[str, ...] = ()

    @classmethod
    def of(cls, host: str, key: str, origins: Sequence[str], more_hosts: Sequence[str] = ()) -> Access:
        """What a server that listens on ``host`` lets in: by its own name, by loopback's, and by numbers.

        A page on the internet can have its own name mean this machine's number (DNS rebinding), not a number.
        """
        return cls((*_LOCAL, host.lower(), *map(str.lower, more_hosts)), key, tuple(origins))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_FORM = "application/x-www-form-urlencoded"


class Guard:
    """ASGI middleware that refuses what it must, and adds headers that keep browsers in order."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # some look so whether anybody is there; what is no header uvicorn leaves out
            scope = {**scope, "method": "GET"}
        headers = Headers(scope=scope)
        if (
            headers.get("content-type", _FORM) == _FORM
        ):  # what curl says of -d; pages of other origins are refused below
            others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
            scope = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
        origin = headers.get("origin", "")

        n_read, is_whole = 0, False
        cut: Refused | None = None  # why the rest of the body is not read

        async def guarded_send(message: Message) -> None:
            if cut is not None:  # whatever the application makes of a body that was cut off
                return
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                out["X-Content-Type-Options"] = "nosniff"
                out["Referrer-Policy"] = "no-referrer"
                out["Content-Security-Policy"] = POLICY
                out["Cross-Origin-Resource-Policy"] = (
                    "same-origin" if origin not in self._access.origins else "cross-origin"
                )
                out.setdefault("Cache-Control", "no-store")
                if origin in self._access.origins:
                    out["Access-Control-Allow-Origin"] = origin
                    out["Access-Control-Expose-Headers"] = "X-KVCompose-Chat, X-KVCompose-Cached, Retry-After"
                    out.add_vary_header("Origin")
            await send(message)

        try:
            self._check(scope["path"], scope["method"], headers, origin)
        except Refused as error:
            await _answer(guarded_send, error.status, refusal(scope["path"], error))
            return
        if scope["method"] == "OPTIONS" and origin in self._access.origins:
            await _preflight(guarded_send, headers.get("access-control-request-headers", ""))
            return

        async def bounded_receive() -> Message:
            nonlocal n_read, is_whole, cut
            try:  # not asyncio.wait_for: before Python 3.12 it can lose a cancellation
                with anyio.fail_after(None if is_whole else BODY_SECONDS):
                    message = await receive()
            except TimeoutError as error:
                cut = Refused(408, f"no more of the body came for {BODY_SECONDS:.0f} s")
                raise cut from error
            if message["type"] == "http.request":
                n_read += len(message.get("body", b""))
                is_whole = not message.get("more_body", False)
                if n_read > LARGEST_BODY:
                    cut = Refused(413, f"the body is larger than {LARGEST_BODY} bytes")
                    raise cut
            return message

        try:
            await self._app(scope, bounded_receive, guarded_send)
        except Refused:  # of a body, below
            pass
        except Exception as error:  # a fault of ours, of which the client was told; its words may be a user's
            log.error("%s %s failed: %s", scope["method"], scope["path"], type(error).__name__)
            log.debug("where it failed", exc_info=error)
        if cut is not None:
            await _answer(send, cut.status, refusal(scope["path"], cut))

    def _check(self, path: str, method: str, headers: Headers, origin: str) -> None:
        host = _name(headers.get("host", ""))
        if self._access.hosts and host not in self._access.hosts and not _is_number(host):
            raise Refused(403, f"this server is not called {host[:100]!r}: --allow-host lets it be")
        if origin and origin != "null" and origin not in self._access.origins:
            if urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
                raise Refused(403, "pages of other origins may not ask: --cors ORIGIN lets one")
        elif origin == "null":
            raise Refused(403, "pages without an origin may not ask")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > LARGEST_BODY:
            raise Refused(413, f"the body is larger than {LARGEST_BODY} bytes")
        if self._access.key and not _OPEN.fullmatch(path) and method != "OPTIONS":
            kind, _, told = headers.get("authorization", "").partition(" ")
            given = told if kind.lower() == "bearer" else headers.get("x-api-key", "")
            as_bytes = given.strip().encode("latin-1"), given.strip().encode()  # a header is bytes, read as Latin-1
            if not any(hmac.compare_digest(told, self._access.key.encode()) for told in as_bytes):
                what = "this is not the API key that this server wants" if given else "this server wants an API key"
                raise Refused(401, what, code="invalid_api_key")


def kind_of(error: Refused) -> str:
    """The type of an error, as both protocols name it."""
    kinds = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
    kinds |= {404: "not_found_error", 413: "request_too_large", 503: "overloaded_error"}
    return kinds.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")


def refusal(path: str, error: Refused) -> dict[str, object]:
    """An error in the shape that clients of the path's protocol expect."""
    kind = kind_of(error)
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": kind, "message": str(error)}}
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def _name(host: str) -> str:
    """A Host header without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _answer(send: Send, status: int, body: dict[str, object]) -> None:
    raw = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": raw})


async def _preflight(send: Send, wanted: str) -> None:
    """An allowed origin may send what headers it likes: clients add their own, such as ``x-stainless-os``."""
    allowed = ", ".join(
        name for name in map(str.strip, wanted.split(",")) if re.fullmatch(r"[A-Za-z0-9-]{1,100}", name)
    )
    headers = [
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-allow-headers", allowed.encode()),
        (b"access-control-max-age", b"600"),
        (b"content-length", b"0"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
