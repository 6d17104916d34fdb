"""``kvcompose-local profile``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvcompose_local.commands.eval import open_uncompressed
from kvcompose_local.commands.opening import fetched
from kvcompose_local.commands.options import cpu_first_option, model_argument, names, threads_option
from kvcompose_local.terminal.status import Status

if TYPE_CHECKING:
    from kvcompose_local.profiles import Profile


@click.command("profile", short_help="Measure a model once, so that its chats forget less.")
@model_argument
@click.option("--texts", type=click.IntRange(1, 1000), default=40, show_default=True, help="Texts to measure on.")
@click.option("--length", type=click.IntRange(512, 131072), default=2048, show_default=True, help="Tokens of a text.")
@click.option("--tasks", callback=names, default="", help="Comma-separated kinds of text.  [default: many]")
@click.option(
    "--text", "files", multiple=True, type=click.Path(path_type=Path), help="A text of your own to measure on first."
)
@click.option(
    "--left-out",
    type=click.Path(path_type=Path),
    help="Also write into this folder, for each kind of text, a profile of all the others: `eval --left-out` tries it.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: one in the cache folder]"
)
@cpu_first_option
@threads_option
def profile_command(
    model: str | None,
    texts: int,
    length: int,
    tasks: tuple[str, ...],
    files: tuple[Path, ...],
    left_out: Path | None,
    output: Path | None,
    gpu_layers: int,
    n_threads: int | None,
) -> None:
    """What questions about a text make MODEL look at, told from its cells alone.

    That is nearly the same for every text, so it is measured once, on texts made for it and `--text` of your own.
    Afterwards `run MODEL` chooses the cells that stay by it, at once and better, and stores them as the model bears it.
    The file is small, holds no text and may be shared: it belongs to the GGUF file's sha256, and counts from the cache
    folder's `profiles`. Ctrl-C stops, and the same command goes on.
    """
    from kvcompose_local import profiles
    from kvcompose_local.arena import QUANTIZED, QUANTIZED_ALIKE, default_cache_type
    from kvcompose_local.chat import inputs
    from kvcompose_local.engines import has_whole_blocks
    from kvcompose_local.errors import InvalidInput
    from kvcompose_local.evaluation.harness import engine_beside, room_for
    from kvcompose_local.evaluation.tasks import TASKS
    from kvcompose_local.install.files import check_cache, check_folders
    from kvcompose_local.install.model_files import model_digest
    from kvcompose_local.install.threads import default_threads
    from kvcompose_local.profiling import measure

    if set(tasks) - set(TASKS):
        raise InvalidInput(f"the tasks are {', '.join(TASKS)}")
    check_folders(output, folder=left_out)
    check_cache("profiles")  # what is measured stands there until all is done, even where -o names another
    own_texts = [text for _, text in inputs.read_all(files)[0]]
    status = Status(sys.stderr)
    path = fetched(model, status)
    digest = model_digest(path, status.checking)

    def progress(done: int, total: int, what: str) -> None:
        status.progress("measuring:", done, total, what)

    with ExitStack() as stack:
        engine = stack.enter_context(open_uncompressed(path, length, room_for(length), n_threads, gpu_layers))
        measurement = measure.plan(
            engine, digest, n_texts=texts, n_tokens=length, tasks=tasks or measure.PROFILED_TASKS, own_texts=own_texts
        )
        left = measure.seconds_left(engine, measurement)
        earlier = f", {measurement.n_done} of them are done" if measurement.n_done else ""
        time = f"{left / 60:.0f} minutes" if left >= 90 else f"{left:.0f} seconds"
        n_texts = len(measurement.items)
        texts_left = f"{n_texts} text{'s' if n_texts > 1 else ''}{earlier}"
        status.line(f"{texts_left}: about {time}; Ctrl-C stops, and the same command goes on")
        whole_blocks, one_type = has_whole_blocks(engine.model), engine.model.one_type or gpu_layers > 0
        types = (QUANTIZED_ALIKE,) if one_type else (QUANTIZED, QUANTIZED_ALIKE)
        with ExitStack() as compared:
            beside = {}
            for kind in types if whole_blocks else ():
                beside[kind] = engine_beside(engine, room_for(length), kind, n_threads=n_threads or default_threads())
                compared.callback(beside[kind].close_context)
            measure.watch(engine, measurement, beside=beside, progress=progress)
        fit = measure.fitted(measurement, progress=progress)
        lost = measure.lost(engine, measurement, fit, progress=progress)
    profile, others = measure.weighed(fit, lost), {}
    if left_out is not None:
        left_out.mkdir(parents=True, exist_ok=True)
        for number, kind in enumerate(measurement.kinds):
            status.progress("leaving out:", number, len(measurement.kinds), "kinds")
            without = measure.weighed(measure.fitted(measurement, without=kind), lost, without=kind)
            others[left_out / f"{kind}{profiles.SUFFIX}"] = without
        status.progress("leaving out:", len(others), len(others), "kinds")
    file = _written(output, profile, others)
    measure.forget(measurement)
    for kind, cost in profile.kl.items():
        status.line(f"{kind} cells cost {cost:.4f} nats a token beside F16")
    kind = default_cache_type(0.5, whole_blocks=whole_blocks, one_type=one_type, patched=True, kl=profile.kl)
    if output is None:
        status.line(f"wrote {file}: chats of this model keep their cells in {kind}{_beside_the_shipped(profile)}")
    else:
        status.line(f"wrote {file}: chats go by it once it stands at {profiles.user_path(digest)}")


def _written(output: Path | None, profile: Profile, others: Mapping[Path, Profile]) -> Path:
    """Write profiles, the first to ``output`` or where chats look for it; returns its file."""
    from kvcompose_local import profiles
    from kvcompose_local.install.files import own_folder, replacing

    file = output or profiles.user_path(profile.model_sha256)
    if output is None:
        own_folder(file.parent)
    for target, found in {file: profile, **others}.items():
        with replacing(target) as stream:
            stream.write(found.dump())
    return file


def _beside_the_shipped(profile: Profile) -> str:
    """Tells of the profile that comes with the program, where that was measured on more."""
    from kvcompose_local import profiles

    shipped = profiles.shipped(profile.model_bytes, profile.model_sha256)
    if shipped is None or shipped.n_tokens <= profile.n_tokens:
        return ""
    return (
        f". It was measured on {profile.n_tokens} tokens, and the one that comes with the program, which counts again "
        f"once this file is removed, on {shipped.n_tokens}"
    )
