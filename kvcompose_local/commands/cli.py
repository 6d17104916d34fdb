"""The command line: its commands, those of a few lines, and exit codes."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import TextIO

import click

from kvcompose_local import __version__
from kvcompose_local.commands.bench import bench_command
from kvcompose_local.commands.eval import eval_command, profile_command
from kvcompose_local.commands.options import CACHE_TYPE_NAMES, threads_option
from kvcompose_local.commands.run import compress_command, run_command
from kvcompose_local.commands.serve import serve_command
from kvcompose_local.errors import KVComposeError
from kvcompose_local.terminal.shown import show_on_terminals


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, invoke_without_command=True
)
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Chat with a local GGUF model whose KV cache stays inside the memory you give it.

    \b
    kvcompose-local run                               the small default model, in a REPL
    kvcompose-local run model.gguf --budget 0.5       your model, half the cache
    kvcompose-local run -f notes.txt -p "Who wrote this?"
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command("rpc-server", short_help="Let other machines compute on this one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=50052, show_default=True, help="Port to listen on.")
@threads_option
def rpc_server(host: str, port: int, threads: int | None) -> None:
    """Be a worker for `run --rpc HOST:PORT` on another machine, until Ctrl-C."""
    from kvcompose_local.install.threads import default_threads
    from kvcompose_local.llama_ffi.rpc import is_loopback, serve

    if not is_loopback(host):
        click.echo(
            f"warning: the RPC protocol has no authentication: whoever reaches {host}:{port} can use this machine",
            err=True,
        )
    serve(host, port, threads or default_threads())


@cli.group("models", invoke_without_command=True, short_help="List, fetch and locate the models known by name.")
@click.pass_context
def models_group(context: click.Context) -> None:
    """The models that `run` knows by name."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@models_group.command("list")
def models_list() -> None:
    """What models take, which fit now, and which are here."""
    import psutil

    from kvcompose_local.install import models

    click.echo(models.table(psutil.virtual_memory().available))


@models_group.command("pull")
@click.argument("names", nargs=-1, required=True)
def models_pull(names: tuple[str, ...]) -> None:
    """Fetch models into the cache; goes on where an earlier try stopped."""
    from kvcompose_local.install import models
    from kvcompose_local.terminal.repl import Status

    entries = [models.find(name) for name in names]
    status = Status(sys.stderr)
    for entry in entries:
        untold = [models.told_source(entry)]

        def progress(done: int, total: int, untold: list[str] = untold) -> None:
            while untold:  # what is not fetched needs no explanation
                status.line(untold.pop())
            status.fetching(done, total)

        click.echo(str(models.fetch_model(entry, progress=progress)))


@models_group.command("path")
@click.argument("name")
def models_path(name: str) -> None:
    """Print where a fetched model is."""
    from kvcompose_local.install import models

    click.echo(str(models.resolve(name, pull=False)))


@cli.command(short_help="Build the patched llama.cpp; nothing to do when it is there.")
@click.option("--jobs", type=click.IntRange(1), help="Parallel compiler runs.  [default: all cores]")
@click.option("--stock", is_flag=True, help="Build llama.cpp without the patches.")
def build(jobs: int | None, stock: bool) -> None:
    """Build the patched llama.cpp into the cache folder; does nothing when it is there."""
    from kvcompose_local.install import build as builder
    from kvcompose_local.terminal.repl import Status

    status = Status(sys.stderr)

    def progress(what: str, done: int, total: int) -> None:
        if total:
            status.progress(f"{what}:", done, total, "steps")
        else:
            status.line(what)

    click.echo(str(builder.build(patched=not stock, jobs=jobs, progress=progress)))


@cli.command(short_help="Say what is installed and what to mend.")
def doctor() -> None:
    """Say what is installed, which engine will run, and what to do about the rest."""
    from kvcompose_local.commands import doctor as examiner

    checks = examiner.report()
    for check in checks:
        remedy = f"\n        → {check.remedy}" if check.remedy else ""
        click.echo(f"{check.state:>5}  {check.name}: {check.text}{remedy}")
    if any(check.state == "fail" for check in checks):
        raise KVComposeError("something above needs mending before a chat can run")


for command in (run_command, serve_command, compress_command, bench_command, eval_command, profile_command):
    cli.add_command(command)


@cli.command("inspect", short_help="What a model's cache takes at each budget.")
@click.argument("model", required=False)
@click.option("--ctx", "n_ctx", type=int, help="Positions to reckon with.  [default: 8192, or what the model knows]")
@click.option("--cache-type", type=click.Choice(CACHE_TYPE_NAMES), help="As in run.")
def inspect_command(model: str | None, n_ctx: int | None, cache_type: str | None) -> None:
    """Layers, heads, bytes a token, and memory at each budget, from the header of MODEL alone."""
    from kvcompose_local.commands.inspect import inspect
    from kvcompose_local.install import models
    from kvcompose_local.install.model_files import check_gguf
    from kvcompose_local.terminal.repl import Status

    path = models.resolve(model, pull=True, progress=Status(sys.stderr).fetching)
    check_gguf(path)
    click.echo(inspect(path, n_ctx=n_ctx, cache_type=cache_type).text())


def main(arguments: list[str] | None = None) -> None:
    """The entry point: runs the command and turns failures into one line and an exit code."""
    sys.exit(_exit_code(sys.argv[1:] if arguments is None else arguments))


def _exit_code(arguments: Sequence[str]) -> int:
    try:
        if sys.stdout is None:
            raise KVComposeError("standard output is closed: nowhere to print to")
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? and the chat goes on
        show_on_terminals()
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # some locales would let any bytes through
        # Not cli.main: it ends without a word on a broken pipe, and prints an empty line for Ctrl-C.
        with cli.make_context("kvcompose-local", list(arguments)) as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as error:
        return int(error.exit_code)
    except BaseException as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _told(error)


def _told(error: BaseException) -> int:
    """Say in one line on stderr what went wrong; returns the exit code."""
    code = 1
    if isinstance(error, click.ClickException):
        message, code = error.format_message(), error.exit_code
    elif isinstance(error, KVComposeError):
        message, code = str(error), error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        message = "stopped"
    elif isinstance(error, MemoryError):
        message = "out of memory: lower --ctx or --budget"
    elif isinstance(error, BrokenPipeError):
        _give_up(sys.stdout)
        return 128 + signal.SIGPIPE  # as programs end that say nothing of it
    elif isinstance(error, OSError):
        message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        _give_up(sys.stdout)
    else:
        message = f"unexpected {type(error).__name__}: {error} (`kvcompose-local --debug …` shows where)"
    try:
        sys.stderr.write("error: " + " ".join(message.split()) + "\n")
        sys.stderr.flush()
    except OSError:  # it is full, or its reader has gone: the exit code must do
        _give_up(sys.stderr)
    return code


def _give_up(stream: TextIO) -> None:
    """Let what is left in a buffer vanish: Python's flush at exit would fail again, with a traceback."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
