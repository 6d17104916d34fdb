"""``kvcompose-local serve``: models for applications, over HTTP."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from dataclasses import dataclass
from typing import Any

import click

from kvcompose_local.chat_options import ChatOptions, Sampling
from kvcompose_local.commands.opening import fetched
from kvcompose_local.commands.options import (
    Positions,
    Real,
    Share,
    cache_type_option,
    gathered,
    gpu_layers_option,
    thinking_option,
    threads_option,
)
from kvcompose_local.errors import InvalidInput, KVComposeError
from kvcompose_local.terminal.status import Status

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


class Size(click.ParamType):  # type: ignore[type-arg]
    """Bytes, such as ``500MB``, ``2GB`` or ``1.5GiB``."""

    name = "size"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is no size: 500MB, 2GB, 1.5GiB", parameter, context)
        return int(float(found[1]) * _UNITS[found[2] or ""])


@dataclass(frozen=True)
class Door:
    """Where a server listens, and to whom. api_key: empty for none; cors: origins of pages that may ask."""

    host: str
    port: int
    api_key: str | None
    no_auth: bool
    allow_host: tuple[str, ...]
    cors: tuple[str, ...]

    def check(self) -> None:
        """Raises InvalidInput for a door that nobody can have meant."""
        from kvcompose_local.server.guard import is_loopback

        if not is_loopback(self.host) and not self.api_key and not self.no_auth:
            raise InvalidInput(
                f"whoever reaches {self.host} could use this server: give --api-key, or --no-auth to mean it"
            )
        if self.api_key is not None and not self.api_key.strip():
            raise InvalidInput("the API key is empty")
        for origin in self.cors:
            if not re.fullmatch(r"https?://[^/\s]+", origin):
                raise InvalidInput(f"{origin!r} is no origin: http://host:3000 is one")


@click.command("serve", short_help="Serve models to applications, and a page to chat on.")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--budget", type=Share(), default=0.25, show_default=True, help="Share of the full cache's bytes to use, in (0, 1]."
)
@click.option(
    "--ctx", "n_ctx", type=Positions(), help="Positions a chat may span.  [default: 8192, or what the model knows]"
)
@click.option("--keep", type=Size(), default="2GB", show_default=True, help="Memory for chats that wait.")
@click.option(
    "--keep-ratio",
    type=Real(0, 1, min_open=True),
    default=0.15,
    show_default=True,
    help="What a chat that waits is compressed to where --keep is short: a share of its own tokens' F16 bytes.",
)
@click.option("--keep-disk", type=Size(), default="8GB", show_default=True, help="Disk for chats beyond --keep.")
@click.option("--no-disk", is_flag=True, help="Write nothing: chats are forgotten when the server ends.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port; 0 takes a free one."
)
@click.option("--api-key", envvar="KVCOMPOSE_API_KEY", help="What clients must send.  [env: KVCOMPOSE_API_KEY]")
@click.option("--no-auth", is_flag=True, help="Let everybody in who reaches --host.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="A further name by which clients call this machine.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Let pages of this origin ask, such as http://host:3000.")
@click.option("--idle-unload", type=Real(0), default=0, help="Free a model that nobody asked for so many seconds.")
@click.option("--temp", type=Real(0, 10), default=0.7, show_default=True, help="Temperature where a request has none.")
@click.option("--template", metavar="NAME|FILE", help="As in run.")
@thinking_option
@threads_option
@gpu_layers_option
@cache_type_option
@gathered(options=ChatOptions, door=Door)
def serve_command(
    models: tuple[str, ...],
    keep: int,
    keep_ratio: float,
    keep_disk: int,
    no_disk: bool,
    idle_unload: float,
    temp: float,
    options: ChatOptions,
    door: Door,
) -> None:
    """Serve each MODEL, a GGUF file or a name of `kvcompose-local models list`, to OpenAI's and Anthropic's clients.

    A chat that goes on is not read again: the server keeps chats in memory, then on disk. A page to chat on is at
    http://127.0.0.1:8080/.
    """
    options.check()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise KVComposeError(f"serving needs {error.name}: pip install 'kvcompose-local[server]'") from error
    from kvcompose_local.install.models import DEFAULT_MODEL
    from kvcompose_local.server.app import application
    from kvcompose_local.server.guard import Access, is_loopback
    from kvcompose_local.server.hosted import Hosted, Options
    from kvcompose_local.server.running import run
    from kvcompose_local.server.service import Service

    door.check()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("kvcompose_local").setLevel(logging.INFO)
    n_models = len(models) or 1
    served = Options(
        options,
        keep=keep // n_models,
        keep_disk=keep_disk // n_models,
        keep_ratio=keep_ratio,
        on_disk=not no_disk,
    )
    hosted: dict[str, Hosted] = {}
    status = Status(sys.stderr)
    for wanted in models or (DEFAULT_MODEL,):
        path = fetched(wanted, status)
        name = path.stem if os.sep in wanted or wanted.endswith(".gguf") else wanted
        if name in hosted:
            raise InvalidInput(f"two models are called {name}: rename one of the files")
        hosted[name] = Hosted(name, path, served)
    service = Service(hosted, idle_unload=idle_unload, defaults=Sampling(temperature=temp))
    app = application(service, Access.of(door.host, door.api_key or "", door.cors, door.allow_host))
    try:
        listener = _listener(door.host, door.port)
    except OSError as error:
        raise KVComposeError(f"cannot listen on {door.host}:{door.port}: {error.strerror or error}") from error
    shown = f"[{door.host}]" if ":" in door.host else door.host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    click.echo(f"{address}  {', '.join(hosted)}", err=True)
    if not is_loopback(door.host) and not door.api_key:
        click.echo(f"warning: whoever reaches {address} can use this server and read its chats", err=True)
    run(app, service, listener)


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens there: what is wrong is told before a model is loaded."""
    family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener
