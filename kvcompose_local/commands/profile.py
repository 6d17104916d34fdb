"""``kvcompose-local profile``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from kvcompose_local.commands.eval import open_uncompressed
from kvcompose_local.commands.options import names, threads_option
from kvcompose_local.terminal.status import Status


@click.command("profile", short_help="Measure a model once, so that its chats forget less.")
@click.argument("model", required=False)
@click.option("--texts", type=click.IntRange(1, 1000), default=38, show_default=True, help="Texts to measure on.")
@click.option("--length", type=click.IntRange(512, 131072), default=2048, show_default=True, help="Tokens of a text.")
@click.option("--tasks", callback=names, default="", help="Comma-separated kinds of text.  [default: many]")
@click.option(
    "--text", "files", multiple=True, type=click.Path(path_type=Path), help="A text of your own to measure on first."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: one in the cache folder]"
)
@threads_option
def profile_command(
    model: str | None,
    texts: int,
    length: int,
    tasks: tuple[str, ...],
    files: tuple[Path, ...],
    output: Path | None,
    n_threads: int | None,
) -> None:
    """What questions about a text make MODEL look at, told from its cells alone.

    That is nearly the same for every text, so it is measured once, on texts made for it and `--text` of your own.
    Afterwards `run MODEL` chooses the cells that stay by it, at once and better. The file is small, holds no text and
    may be shared: it belongs to the GGUF file's sha256, and counts from the cache folder's `profiles`. Ctrl-C stops,
    and the same command goes on.
    """
    from kvcompose_local import profiles
    from kvcompose_local.chat import inputs
    from kvcompose_local.errors import InvalidInput
    from kvcompose_local.evaluation.harness import room_for
    from kvcompose_local.evaluation.tasks import TASKS as ALL_TASKS
    from kvcompose_local.install import models
    from kvcompose_local.install.files import own_folder, replacing
    from kvcompose_local.install.model_files import check_gguf, model_digest
    from kvcompose_local.profiling.measure import TASKS, measure_profile

    if set(tasks) - set(ALL_TASKS):
        raise InvalidInput(f"the tasks are {', '.join(ALL_TASKS)}")
    own_texts = [text for _, text in inputs.read_all(files)[0]]
    status = Status(sys.stderr)
    path = models.resolve(model, pull=True, progress=status.fetching)
    check_gguf(path)
    digest = model_digest(path, status.checking)
    started = time.monotonic()

    def progress(done: int, total: int, what: str) -> None:
        if what == "texts" and done == 1:
            minutes = (time.monotonic() - started) * total / 60
            status.line(f"{total} texts take about {minutes:.0f} minutes; Ctrl-C stops, the same command goes on")
        status.progress("measuring:", done, total, what)

    with open_uncompressed(path, length, room_for(length), n_threads) as engine:
        profile = measure_profile(
            engine,
            digest,
            n_texts=texts,
            n_tokens=length,
            tasks=tasks or TASKS,
            own_texts=own_texts,
            progress=progress,
        )
    file = output or profiles.user_path(digest)
    if output is None:
        own_folder(file.parent)
    with replacing(file) as stream:
        stream.write(profile.dump())
    status.line(f"wrote {file}")
