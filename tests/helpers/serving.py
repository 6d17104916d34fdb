"""The server on a port of its own, in a thread of this process, and what tests ask it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from kvcompose_local.chat_options import ChatOptions, Sampling
from kvcompose_local.server.app import application
from kvcompose_local.server.guard import Access
from kvcompose_local.server.hosted import Hosted, Options
from kvcompose_local.server.service import Service

Messages = list[dict[str, Any]]


class Serving:
    """A server that runs: ``url``, an httpx ``client``, and its ``service``."""

    def __init__(self, service: Service, url: str) -> None:
        self.service, self.url = service, url
        self.client = httpx.Client(base_url=url, timeout=120)

    @property
    def name(self) -> str:
        return self.service.default

    @property
    def hosted(self) -> Hosted:
        return self.service.models[self.name]

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def chat(self, messages: Messages, **options: Any) -> dict[str, Any]:
        """A chat completion's body; greedy, eight tokens, unless told otherwise."""
        body = {"messages": messages, "max_tokens": 8, "temperature": 0, **options}
        response = self.post("/v1/chat/completions", **body)
        assert response.status_code == 200, response.text
        told: dict[str, Any] = response.json()
        return told

    def say(self, messages: Messages, text: str, **options: Any) -> dict[str, Any]:
        """Go on with a chat: its messages grow by this one and its answer."""
        messages.append({"role": "user", "content": text})
        told = self.chat(messages, **options)
        messages.append({"role": "assistant", "content": told["choices"][0]["message"]["content"] or ""})
        return told

    def chats(self) -> dict[str, dict[str, Any]]:
        """What is kept, by id."""
        return {chat["id"]: chat for chat in self.client.get("/kvc/chats").json()["chats"]}


def texts(told: dict[str, Any]) -> str:
    """An answer's text."""
    return str(told["choices"][0]["message"]["content"])


@contextlib.contextmanager
def serving(
    *models: Path,
    budget: float = 0.5,
    n_ctx: int = 2048,
    keep: int = 1 << 30,
    keep_disk: int = 1 << 30,
    keep_ratio: float = 0.15,
    on_disk: bool = True,
    access: Access | None = None,
    cache_type: str | None = None,
    **service_options: Any,
) -> Iterator[Serving]:
    """Serve these models; where chats are kept is for ``XDG_STATE_HOME`` to say."""
    chat = ChatOptions(budget=budget, n_ctx=n_ctx, n_threads=1, cache_type=cache_type)
    options = Options(chat, keep=keep, keep_disk=keep_disk, keep_ratio=keep_ratio, on_disk=on_disk)
    hosted = {path.stem: Hosted(path.stem, path, options) for path in models}
    service = Service(hosted, defaults=Sampling(temperature=0), **service_options)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(application(service, access or Access()), log_level="warning", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    here = Serving(service, f"http://127.0.0.1:{listener.getsockname()[1]}")
    try:
        while not server.started or not service.models[service.default].is_loaded:
            assert thread.is_alive()
            assert service.failure is None, service.failure
            time.sleep(0.01)
        yield here
    finally:
        here.client.close()
        service.worker.stop()
        server.should_exit = True
        thread.join(30)
        listener.close()
