"""``kvcompose-local bench``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from kvcompose_local.commands.opening import fetched
from kvcompose_local.commands.options import gpu_layers_option, model_argument, threads_option
from kvcompose_local.terminal.status import Status

_PICTURES = (".png", ".svg", ".pdf")


def _lengths(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value} is not a list of numbers") from error
    if not all(512 <= n <= 1 << 20 for n in lengths):
        raise click.BadParameter("lengths are from 512 tokens to 1048576")
    return lengths


def _budgets(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        budgets = tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value} is not a list of numbers") from error
    if not all(0.05 <= budget < 1 for budget in budgets):
        raise click.BadParameter("budgets are from 0.05 up to, not including, 1")
    return budgets


@click.command("bench", short_help="Measure speed and memory against the uncompressed cache.")
@model_argument
@click.option(
    "--lengths", callback=_lengths, default="2048", show_default=True, help="Context lengths, comma-separated."
)
@click.option("--budgets", callback=_budgets, default="0.5,0.25,0.1", show_default=True, help="As --budget of run.")
@click.option(
    "--cache-type",
    type=click.Choice(["q8_0/q4_0", "q8_0", "f16"]),
    help="How cells are stored under a budget; in f16 a budget of 0.25 is a quarter of the tokens.  "
    "[default: as in run]",
)
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True, help="Rounds of each mode.")
@click.option("--tokens", type=click.IntRange(4, 200), default=24, show_default=True, help="Tokens decoded in a round.")
@threads_option
@gpu_layers_option
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw decode speed against length into this PNG, SVG or PDF file."
)
def bench_command(
    model: str | None,
    lengths: tuple[int, ...],
    budgets: tuple[float, ...],
    cache_type: str | None,
    rounds: int,
    tokens: int,
    n_threads: int | None,
    gpu_layers: int | None,
    plot: Path | None,
) -> None:
    """Reading, compaction and decoding on MODEL, in one run; the last line is JSON.

    Every mode holds the same text in a context of its own, the modes take turns, and medians are shown. llama.cpp
    without the patches takes part where `kvcompose-local build --stock` has built it.
    """
    from kvcompose_local.bench import measure
    from kvcompose_local.errors import InvalidInput
    from kvcompose_local.evaluation.tasks import prose
    from kvcompose_local.install.files import check_folders
    from kvcompose_local.install.model_files import size_of
    from kvcompose_local.llama_ffi.cells import library_is_patched
    from kvcompose_local.llama_ffi.devices import layers_to_offload

    check_folders(plot)
    if plot is not None and plot.suffix.lower() not in _PICTURES:
        raise InvalidInput(f"{plot} is no {', '.join(_PICTURES[:-1])} or {_PICTURES[-1]} file")
    status = Status(sys.stderr)
    path = fetched(model, status)
    if not library_is_patched():
        raise InvalidInput("the benchmark needs the patched engine: run `kvcompose-local build`")
    bandwidth, matmul = measure.memory_bandwidth(), measure.matmul_rate()
    results: list[measure.LengthResult] = []
    try:
        for length in lengths:
            results.append(
                measure.measure(
                    path,
                    prose(),
                    length,
                    budgets,
                    cache_type=cache_type,
                    rounds=rounds,
                    n_decode=tokens,
                    n_threads=n_threads,
                    gpu_layers=layers_to_offload(path, gpu_layers, n_ctx=length, budget=1),
                    progress=lambda what, done, total: status.progress(what, done, total, ""),
                )
            )
    except InvalidInput as error:  # it names options of a chat
        raise InvalidInput(str(error).replace("--budget", "--budgets").replace("--ctx", "--lengths")) from error
    finally:  # what was measured is shown, whatever stopped the rest
        if results:
            click.echo(measure.tables(results, size_of(path), bandwidth, matmul))
            click.echo(json.dumps(measure.as_json(results, size_of(path), bandwidth, matmul)))
            if plot is not None:
                measure.plot(results, plot)
                status.line(f"drew {plot}")
