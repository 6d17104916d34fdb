"""An HTTP server on the loopback address that can be told to fail as real ones do."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Site:
    """What a server holds and how it behaves; ``requests`` records (path, Range header or "") of each request."""

    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    knows_ranges: bool = True
    sends_length: bool = True
    #: Status codes of the next answers, instead of the file.
    failures: list[int] = field(default_factory=list)
    #: Bytes after which the next answers end, one entry an answer.
    cuts: list[int] = field(default_factory=list)
    #: Bytes that a ranged answer starts too late.
    range_slip: int = 0
    #: Where set, "user:password" in base64 that a request must bring.
    credentials: str = ""
    #: Where set, answers stop after their first half until the event comes.
    hold: threading.Event | None = None
    halfway: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    def url(self, path: str) -> str:
        return f"http://{self.address}{path}"

    def wheel_index(self, wheels: dict[str, bytes]) -> str:
        """Put wheels behind a package index; returns what pip's index-url must be."""
        import hashlib

        for name, content in wheels.items():
            project = name.split("-")[0].replace("_", "-")
            sha256 = hashlib.sha256(content).hexdigest()
            self.files[f"/wheels/{name}"] = content
            self.files[f"/simple/{project}/"] = f'<a href="../../wheels/{name}#sha256={sha256}">{name}</a>'.encode()
        return self.url("/simple/")


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        site, wanted = self.site, self.headers.get("Range", "")
        site.requests.append((self.path, wanted))
        if site.credentials and self.headers.get("Authorization") != f"Basic {site.credentials}":
            return self._end(401)
        content = site.files.get(self.path)
        if content is None:
            return self._end(404)
        if site.failures:
            return self._end(site.failures.pop(0))
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and site.knows_ranges else 0
        if start and start >= len(content):
            return self._end(416, {"Content-Range": f"bytes */{len(content)}"})
        self.send_response(206 if start else 200)
        if start:
            start += site.range_slip
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Type", "text/html" if self.path.startswith("/simple/") else "application/gguf")
        body = content[start:]
        if site.sends_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if site.cuts:
            body = body[: site.cuts.pop(0)]
        half = len(body) // 2
        self.wfile.write(body[:half])
        if site.hold is not None:
            self.wfile.flush()
            site.halfway.set()
            site.hold.wait(30)
        self.wfile.write(body[half:])
        return None

    def _end(self, code: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away in the middle is what some tests are about


class Serving:
    """``with Serving() as site``: a running server."""

    def __enter__(self) -> Site:
        self.site = Site()
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": self.site}))
        self.site.address = f"127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        return self.site

    def __exit__(self, *_error: object) -> None:
        if self.site.hold is not None:
            self.site.hold.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
