"""The command line: its commands and exit codes."""

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
from click.shell_completion import shell_complete

from kvcompose_local.commands.bench import bench_command
from kvcompose_local.commands.build import build_command
from kvcompose_local.commands.compress import compress_command
from kvcompose_local.commands.doctor import doctor_command
from kvcompose_local.commands.eval import eval_command
from kvcompose_local.commands.inspect import inspect_command
from kvcompose_local.commands.models import models_command
from kvcompose_local.commands.profile import profile_command
from kvcompose_local.commands.rpc_server import rpc_server_command
from kvcompose_local.commands.run import run_command
from kvcompose_local.commands.serve import serve_command
from kvcompose_local.commands.sessions import sessions_command
from kvcompose_local.commands.version import version_option
from kvcompose_local.errors import KVComposeError, Stopped
from kvcompose_local.terminal.shown import show_on_terminals
from kvcompose_local.terminal.wrapping import n_columns, wrapped

#: Shells set this to ask for their completion script (``bash_source``, ``zsh_source``, ``fish_source``) or for words.
COMPLETION = "_KVCOMPOSE_LOCAL_COMPLETE"


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, invoke_without_command=True
)
@version_option
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


for command in (
    run_command,
    serve_command,
    compress_command,
    models_command,
    sessions_command,
    inspect_command,
    profile_command,
    eval_command,
    bench_command,
    rpc_server_command,
    build_command,
    doctor_command,
):
    cli.add_command(command)


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
        if instruction := os.environ.get(COMPLETION):
            return shell_complete(cli, {}, "kvcompose-local", COMPLETION, instruction)
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
        message, code = "stopped", Stopped.exit_code
    elif isinstance(error, MemoryError):
        message = "out of memory: lower --ctx or --budget"
    elif isinstance(error, BrokenPipeError):
        _give_up(sys.stdout)
        return 128 + signal.SIGPIPE  # the exit code of programs that the signal ends
    elif isinstance(error, OSError):
        message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        if isinstance(error, FileNotFoundError) and not error.filename:  # of os.getcwd
            message = "the folder that this was started in is gone: cd to another"
        _give_up(sys.stdout)
    else:
        message = f"unexpected {type(error).__name__}: {error} (`kvcompose-local --debug …` shows where)"
    try:
        told = "error: " + " ".join(message.split())
        sys.stderr.write((wrapped(told, n_columns(sys.stderr)) if sys.stderr.isatty() else told) + "\n")
        sys.stderr.flush()
    except OSError:  # it is full, or its reader has gone: the exit code must do
        _give_up(sys.stderr)
    return code


def _give_up(stream: TextIO) -> None:
    """Let the rest of a buffer vanish: Python's flush at exit would fail again, with a traceback."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
