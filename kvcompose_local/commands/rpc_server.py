"""``kvcompose-local rpc-server``: this machine as a worker."""

from __future__ import annotations

import click

from kvcompose_local.commands.options import threads_option


@click.command("rpc-server", short_help="Let other machines compute on this one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=50052, show_default=True, help="Port to listen on.")
@threads_option
def rpc_server_command(host: str, port: int, n_threads: int | None) -> None:
    """Be a worker for `run --rpc HOST:PORT` on another machine, until Ctrl-C."""
    from kvcompose_local.install.threads import default_threads
    from kvcompose_local.llama_ffi.rpc import is_loopback, serve

    if not is_loopback(host):
        click.echo(
            f"warning: the RPC protocol has no authentication: whoever reaches {host}:{port} can use this machine",
            err=True,
        )
    serve(host, port, n_threads or default_threads())
