"""``kvcompose-local compress``: a document as a session that answers about it at once."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from kvcompose_local.chat import inputs
from kvcompose_local.chat_options import ChatOptions
from kvcompose_local.commands.opening import fetched, open_chat
from kvcompose_local.commands.options import (
    Positions,
    Real,
    Share,
    cache_type_option,
    gathered,
    gpu_layers_option,
    threads_option,
)
from kvcompose_local.errors import InvalidInput, Stopped
from kvcompose_local.interrupts import Interrupts
from kvcompose_local.terminal.figures import MIB
from kvcompose_local.terminal.status import Status


@click.command("compress", short_help="Read a document once and keep its compressed cache.")
@click.argument("model")
@click.argument("file")
@click.option("-o", "--output", required=True, metavar="NAME|FILE", help="Session to write, such as notes.kvc.")
@click.option(
    "--budget", type=Share(), default=0.5, show_default=True, help="Share of the full cache's bytes to use, below 1."
)
@click.option(
    "--ctx", "n_ctx", type=Positions(), help="Positions: text and chat.  [default: 8192, or what the model knows]"
)
@click.option(
    "--keep",
    type=Real(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="Share to keep of the bytes that the document takes under the budget.",
)
@cache_type_option
@click.option("--system", help="System prompt, which stands before the document.")
@threads_option
@gpu_layers_option
@gathered(options=ChatOptions)
def compress_command(model: str, file: str, output: str, keep: float, options: ChatOptions) -> None:
    """Let MODEL read FILE (- is standard input) and write a session that answers about it at once.

    \b
    kvcompose-local compress model.gguf notes.txt -o notes.kvc
    kvcompose-local run --session notes.kvc --no-autosave -p "Who wrote this?"
    """
    from kvcompose_local.chat import sessions

    options.check()
    if options.budget == 1:
        raise click.BadParameter("a budget of 1 never compresses", param_hint="--budget")
    if output == "-":
        raise InvalidInput(
            "a session cannot be written to standard output: give -o a name or a file, such as notes.kvc"
        )
    path = sessions.path_of(output)
    sessions.check_writable(path)
    if path.is_file() and path.stat().st_size:
        raise InvalidInput(f"{path} exists, and may hold a chat by now: remove it, or give another name")
    ((_, text),), _ = inputs.read_all([Path(file)])
    interrupts = Interrupts()
    status = Status(sys.stderr, should_stop=interrupts)
    with (
        open_chat(fetched(model, status), options, interrupts=interrupts, status=status) as local,
        interrupts.caught(),
    ):
        stats = local.read(text)
        if stats.stopped:
            raise Stopped("stopped while reading; nothing is written")
        memory = local.memory
        least = 2 * memory.policy.n_tail / memory.position
        if least < keep:
            memory.compact(keep)
        elif least < 0.5:
            status.line(f"--keep {keep:g} leaves too little of this text to read on by: {least:.2f} of it is kept")
            memory.compact(least)
        else:
            status.line("the text is too short to compress: it is kept whole")
        n_bytes = sessions.save(path, local.chat, local.setup, status.checking)
        full = memory.position * memory.engine.shape.uncompressed_row_bytes
    click.echo(
        f"{path}: {stats.prompt_tokens} tokens in {n_bytes / MIB:.1f} MiB (uncompressed: {full / MIB:.1f} MiB)\n"
        f"ask about it: kvcompose-local run --session {shlex.quote(output)}\n"
        "the chat is saved to it at the end; with --no-autosave it stays as it is"
    )
