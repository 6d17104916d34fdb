"""``kvcompose-local eval``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvcompose_local.commands.options import names, threads_option
from kvcompose_local.terminal.status import Status

if TYPE_CHECKING:
    from kvcompose_local.engines.patched import PatchedEngine
    from kvcompose_local.llama_ffi.model import Model

KEEPS = (0.75, 0.5, 0.25, 0.15, 0.1, 0.05)
#: What the chat does under a budget, in the registry of methods, and how it stores cells.
OURS = "kvcompose-local+q8_0/q4_0"
QUICK_TASKS = ("niah_multikey_1", "needles_8", "qa")
QUICK_BUDGETS = (0.5, 0.25, 0.1)


def _numbers(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        keeps = tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value} is not a list of numbers") from error
    if not keeps or not all(0 < keep <= 1 for keep in keeps):
        raise click.BadParameter("keep ratios are in (0, 1]")
    return keeps


@click.command("eval", short_help="Measure answer quality against budget.")
@click.argument("model", required=False)
@click.option("--quick", is_flag=True, help="A few minutes: three tasks, our method, and a recommended budget.")
@click.option("--tasks", callback=names, default="", help="Comma-separated; --tasks help lists them.  [default: all]")
@click.option(
    "--methods",
    callback=names,
    default=OURS,
    show_default=True,
    help="Comma-separated; `all`. NAME+q8_0 keeps its cells in that "
    "type, NAME+q8_0/q4_0 keys and values in two (full+q8_0: all of them), `streaming` reads turn by turn as the chat "
    "does.",
)
@click.option(
    "--keep", "keeps", callback=_numbers, default=",".join(map(str, KEEPS)), show_default=True, help="Keep ratios."
)
@click.option("--length", type=click.IntRange(256, 131072), default=2048, show_default=True, help="Tokens of a text.")
@click.option("--items", type=click.IntRange(1, 1000), default=8, show_default=True, help="Texts a task.")
@click.option("--first-seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the first text.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="JSON lines; a run goes on from it.  [default: MODEL.eval.jsonl]",
)
@click.option("--profile", type=click.Path(path_type=Path), help="Go by this profile.  [default: the model's]")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw figures into this folder.")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON object.")
def eval_command(
    model: str | None,
    quick: bool,
    tasks: tuple[str, ...],
    methods: tuple[str, ...],
    keeps: tuple[float, ...],
    length: int,
    items: int,
    first_seed: int,
    output: Path | None,
    profile: Path | None,
    plot: Path | None,
    n_threads: int | None,
    as_json: bool,
) -> None:
    """RULER-style tasks on MODEL: each text is compressed before its questions are known.

    Every figure is relative to the model's own answers from the full cache; tasks that it answers below 60% are left
    out. Results go to the output file as they come, Ctrl-C stops, and the same command goes on.
    """
    from kvcompose_local import profiles
    from kvcompose_local.engines import has_whole_blocks
    from kvcompose_local.errors import InvalidInput
    from kvcompose_local.evaluation import report
    from kvcompose_local.evaluation.harness import FULL, Evaluation, cell_share, check_method, room_for
    from kvcompose_local.evaluation.methods import method_names
    from kvcompose_local.evaluation.tasks import TASKS, make_item
    from kvcompose_local.install import models
    from kvcompose_local.install.model_files import check_gguf, model_digest, size_of
    from kvcompose_local.install.threads import default_threads

    if quick:
        tasks, methods, items, length = QUICK_TASKS, (OURS,), 2, 1024
    tasks = tasks or tuple(TASKS)
    if set(tasks) - set(TASKS):
        raise InvalidInput(f"the tasks are {', '.join(TASKS)}")
    methods = tuple(name for part in methods for name in (method_names() if part == "all" else [part]))
    if not methods:
        raise InvalidInput("name some --methods")
    for name in methods:
        check_method(name)
    status = Status(sys.stderr)
    path = models.resolve(model, pull=True, progress=status.fetching)
    check_gguf(path)
    output = output or Path(f"{path.stem}.eval.jsonl")
    n_cells = room_for(length, whole_replay=any(name.startswith("published") for name in methods))
    with open_uncompressed(path, length, n_cells, n_threads) as engine:
        if quick:
            caches = chat_caches(engine.model)
            trials = [(FULL, 1.0), *caches]
            ours = trials[-1][0]
        else:
            trials = [(FULL, 1.0)]
            for name in methods:
                trials += [(name, keep) for keep in ((1.0,) if name.startswith(FULL) else keeps)]
            trials = list(dict.fromkeys(trials))
            ours = next((name for name in (OURS, OURS.partition("+")[0]) if name in methods), methods[0])
            caches = {(n, k): f"{k * cell_share(n):.2g} of its bytes" for n, k in trials if n == ours}
        if not has_whole_blocks(engine.model) and any(cell_share(name) < 1 for name, _ in trials):
            raise InvalidInput(f"heads of {path.name} are no whole blocks of a quantized type: choose other --methods")
        own = None if profile is None else profiles.read(profile)
        scorer = own.scorer if own else profiles.scorer_of(size_of(path), lambda: model_digest(path))
        evaluation = Evaluation(
            engine, output, {"file": path.name}, scorer=scorer, n_threads=n_threads or default_threads()
        )
        if others := {r.get("file", path.name) for r in evaluation.records} - {path.name}:
            raise InvalidInput(f"{output} holds results of {', '.join(sorted(others))}: name another file with -o")
        plan = [(task, seed) for seed in range(first_seed, first_seed + items) for task in tasks]
        started, done = time.monotonic(), 0
        try:
            for number, (task, seed) in enumerate(plan):
                item = make_item(task, seed, length, lambda text: len(engine.model.tokenize(text)))
                if not evaluation.missing(item, length, trials):
                    continue
                left = (time.monotonic() - started) / done * (len(plan) - number) if done else 0
                eta = f", about {left / 60:.0f} min left" if done else ""
                status.line(f"{number + 1}/{len(plan)} {task}, text {seed}{eta}")
                evaluation.run(item, length, trials)
                done += 1
        except KeyboardInterrupt:
            status.line(f"stopped: what is done stands in {output}, and the same command goes on from it")
        finally:
            evaluation.close()
        wanted = set(trials)
        records = [
            r
            for r in evaluation.records
            if (r["task"], r["seed"]) in plan and r["n_tokens"] == length and (r["method"], r["keep"]) in wanted
        ]
    if not records:
        return
    if as_json:
        found = [result.__dict__ for result in report.results(records)]
        click.echo(json.dumps({"tasks": report.tasks_that_count(records), "results": found}))
    else:
        click.echo(report.tables(records))
        click.echo(f"\n{'' if quick else f'{ours}: '}{report.recommendation(records, caches)}")
    if plot is not None:
        for file in report.plot(records, plot, ours):
            status.line(f"drew {file}")


def open_uncompressed(path: Path, length: int, n_cells: int, n_threads: int | None) -> PatchedEngine:
    """An engine with room for texts of ``--length``. Raises InvalidInput for what is too long, and without patches."""
    from kvcompose_local.engines import open_engine
    from kvcompose_local.engines.patched import PatchedEngine
    from kvcompose_local.errors import InvalidInput
    from kvcompose_local.evaluation.harness import MOST_OUTPUTS

    try:
        engine, _ = open_engine(path, n_ctx=n_cells, budget=1.0, n_threads=n_threads, n_outputs=MOST_OUTPUTS)
    except InvalidInput as error:
        raise InvalidInput(f"--length {length} takes a cache of {n_cells} cells: {error}") from error
    if not isinstance(engine, PatchedEngine):
        engine.close()
        raise InvalidInput("this needs the patched engine: run `kvcompose-local build`")
    return engine


def chat_caches(model: Model) -> dict[tuple[str, float], str]:
    """The trials that keep what a chat does under a few budgets, and what to call them."""
    from kvcompose_local.arena import DEFAULT_CTX, cells_for, default_cache_type
    from kvcompose_local.engines import has_whole_blocks, token_of

    method, caches = OURS.partition("+")[0], {}
    token, whole_blocks = token_of(model), has_whole_blocks(model)
    for budget in QUICK_BUDGETS:
        kind = default_cache_type(budget, whole_blocks=whole_blocks, on_gpu=False, patched=True)
        keep = round(min(cells_for(DEFAULT_CTX, budget, kind, token) / DEFAULT_CTX, 1), 4)
        caches[method if kind == "f16" else f"{method}+{kind}", keep] = f"--budget {budget:g}"
    return caches
