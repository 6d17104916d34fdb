"""``kvcompose-local serve``: models for applications, over HTTP."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
from types import FrameType
from typing import Any

import click

from kvcompose_local.commands.options import CACHE_TYPE_NAMES, Real, threads_option
from kvcompose_local.errors import InvalidInput, KVComposeError

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


class Size(click.ParamType):
    """Bytes, such as ``500MB``, ``2GB`` or ``1.5GiB``."""

    name = "size"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is no size: 500MB, 2GB, 1.5GiB", parameter, context)
        return int(float(found[1]) * _UNITS[found[2] or ""])


@click.command("serve", short_help="Serve models to applications, and a page to chat on.")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--budget", type=float, default=0.25, show_default=True, help="Share of the full cache's bytes to use, in (0, 1]."
)
@click.option("--ctx", "n_ctx", type=int, help="Positions a chat may span.  [default: 8192, or what the model knows]")
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
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port to listen on.")
@click.option("--api-key", envvar="KVCOMPOSE_API_KEY", help="What clients must send.  [env: KVCOMPOSE_API_KEY]")
@click.option("--no-auth", is_flag=True, help="Let everybody in who reaches --host.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="A further name by which clients call this machine.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Let pages of this origin ask, such as http://host:3000.")
@click.option("--idle-unload", type=Real(0), default=0, help="Free a model that nobody asked for so many seconds.")
@click.option("--temp", type=Real(0, 10), default=0.7, show_default=True, help="Temperature where a request has none.")
@click.option("--template", metavar="NAME|FILE", help="As in run.")
@threads_option
@click.option("--gpu-layers", type=click.IntRange(0), help="Layers on the GPU.  [default: all with Metal, else 0]")
@click.option("--cache-type", type=click.Choice(CACHE_TYPE_NAMES), help="As in run.")
def serve_command(
    models: tuple[str, ...],
    budget: float,
    n_ctx: int | None,
    keep: int,
    keep_ratio: float,
    keep_disk: int,
    no_disk: bool,
    host: str,
    port: int,
    api_key: str | None,
    no_auth: bool,
    allow_host: tuple[str, ...],
    cors: tuple[str, ...],
    idle_unload: float,
    temp: float,
    template: str | None,
    threads: int | None,
    gpu_layers: int | None,
    cache_type: str | None,
) -> None:
    """Serve each MODEL, a GGUF file or a name of `kvcompose-local models list`, to OpenAI's and Anthropic's clients.

    A chat that goes on is not read again: the server keeps chats in memory, then on disk. A page to chat on is at
    http://127.0.0.1:8080/.
    """
    from kvcompose_local.commands.run import check_numbers

    check_numbers(budget, n_ctx)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        import fastapi
        import prometheus_client
        import uvicorn
    except ImportError as error:
        raise KVComposeError(f"serving needs {error.name}: pip install 'kvcompose-local[server]'") from error
    del fastapi, prometheus_client
    from kvcompose_local.install import models as known_models
    from kvcompose_local.install.model_files import check_gguf
    from kvcompose_local.interfaces import Sampling
    from kvcompose_local.server.app import application
    from kvcompose_local.server.guard import Access, is_loopback
    from kvcompose_local.server.hosted import Hosted, Options
    from kvcompose_local.server.service import Service
    from kvcompose_local.terminal.repl import Status

    if not is_loopback(host) and not api_key and not no_auth:
        raise InvalidInput(f"whoever reaches {host} could use this server: give --api-key, or --no-auth to mean it")
    if api_key is not None and not api_key.strip():
        raise InvalidInput("the API key is empty")
    if any(not re.fullmatch(r"https?://[^/\s]+", origin) for origin in cors):
        raise InvalidInput(f"{cors[0]!r} is no origin: http://host:3000 is one")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("kvcompose_local").setLevel(logging.INFO)
    options = Options(
        budget=budget,
        n_ctx=n_ctx,
        n_threads=threads,
        gpu_layers=gpu_layers,
        cache_type=cache_type,
        template=template,
        keep=keep,
        keep_disk=keep_disk,
        keep_ratio=keep_ratio,
        on_disk=not no_disk,
    )
    hosted: dict[str, Hosted] = {}
    status = Status(sys.stderr)
    for wanted in models or (None,):
        path = known_models.resolve(wanted, pull=True, progress=status.fetching)
        check_gguf(path)
        name = path.stem if wanted is None or os.sep in wanted or wanted.endswith(".gguf") else wanted
        if name in hosted:
            raise InvalidInput(f"two models are called {name}: rename one of the files")
        hosted[name] = Hosted(name, path, options)
    defaults = Sampling(temperature=temp)
    service = Service(hosted, idle_unload=idle_unload, defaults=defaults)
    app = application(service, Access.of(host, api_key or "", cors, allow_host))
    try:
        listener = _listener(host, port)
    except OSError as error:
        raise KVComposeError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"

    class _Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            service.worker.stop()  # what is said by now is kept
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=1,
        timeout_keep_alive=30,
        limit_concurrency=256,
        h11_max_incomplete_event_size=64 << 10,
    )
    click.echo(f"{address}  {', '.join(hosted)}", err=True)
    if no_auth and not is_loopback(host):
        click.echo(f"warning: whoever reaches {address} can use this server and read its chats", err=True)
    _Server(config).run(sockets=[listener])
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
