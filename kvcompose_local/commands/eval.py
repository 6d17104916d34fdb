"""``kvcompose-local eval``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from kvcompose_local.commands.opening import fetched
from kvcompose_local.commands.options import cpu_first_option, gathered, model_argument, names, threads_option
from kvcompose_local.terminal.status import Status

if TYPE_CHECKING:
    from kvcompose_local.engines.patched import PatchedEngine
    from kvcompose_local.evaluation.harness import Evaluation
    from kvcompose_local.llama_ffi.model import Model
    from kvcompose_local.profiles import Profile

KEEPS = (0.75, 0.5, 0.25, 0.15, 0.1, 0.05)
#: The method of chats under a budget, with the type of their cells.
OURS = "kvcompose-local+q8_0/q4_0"
QUICK_TASKS = ("niah_multikey_1", "needles_8", "qa")
QUICK_BUDGETS = (0.5, 0.25, 0.1)
_QUICK_CHOOSES = {"tasks", "methods", "keeps", "length", "items", "left_out"}


def _refuse_beside_quick(context: click.Context) -> None:
    """Raises UsageError where an option is given that ``--quick`` chooses."""
    for parameter in context.command.params:
        if (
            parameter.name in _QUICK_CHOOSES
            and context.get_parameter_source(parameter.name) == ParameterSource.COMMANDLINE
        ):
            raise click.UsageError(f"--quick chooses {parameter.opts[-1]} itself: leave out one of the two")


def _numbers(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        keeps = tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value} is not a list of numbers") from error
    if not keeps or not all(0 < keep <= 1 for keep in keeps):
        raise click.BadParameter("keep ratios are in (0, 1]")
    return keeps


@dataclass(frozen=True)
class EvalRequest:
    """The options of ``eval``."""

    quick: bool
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    keeps: tuple[float, ...]
    length: int
    items: int
    first_seed: int
    output: Path | None
    profile: Path | None
    left_out: Path | None
    plot: Path | None
    gpu_layers: int
    n_threads: int | None
    as_json: bool

    def checked(self) -> EvalRequest:
        """The same with defaults filled in. Raises InvalidInput for unknown tasks and methods."""
        from kvcompose_local.errors import InvalidInput
        from kvcompose_local.evaluation.harness import check_method
        from kvcompose_local.evaluation.methods import method_names
        from kvcompose_local.evaluation.methods.kvcompose import LEFT_OUT
        from kvcompose_local.evaluation.tasks import TASKS

        if self.quick:
            return replace(self, tasks=QUICK_TASKS, methods=(OURS,), items=2, length=1024)
        tasks = self.tasks or tuple(TASKS)
        if set(tasks) - set(TASKS):
            raise InvalidInput(f"the tasks are {', '.join(TASKS)}")
        every = [name for name in method_names() if name != LEFT_OUT or self.left_out is not None]
        methods = tuple(name for part in self.methods for name in (every if part == "all" else [part]))
        if not methods:
            raise InvalidInput("name some --methods")
        for name in methods:
            check_method(name)
        return replace(self, tasks=tasks, methods=methods)

    def profiles_without(self) -> dict[str, Profile]:
        """For each task the profile that was fitted without its kind, where a method goes by them."""
        from kvcompose_local import profiles
        from kvcompose_local.errors import InvalidInput
        from kvcompose_local.evaluation.methods.kvcompose import LEFT_OUT

        if all(name.partition("+")[0] != LEFT_OUT for name in self.methods):
            return {}
        if self.left_out is None:
            raise InvalidInput(f"{LEFT_OUT} needs --left-out, a folder that `profile --left-out` wrote")
        return {task: profiles.read(self.left_out / f"{task}{profiles.SUFFIX}") for task in self.tasks}

    def plan(self) -> list[tuple[str, int]]:
        """(task, seed) of every text."""
        return [(task, seed) for seed in range(self.first_seed, self.first_seed + self.items) for task in self.tasks]


@click.command("eval", short_help="Measure answer quality against budget.")
@model_argument
@click.option(
    "--quick",
    is_flag=True,
    help="A few minutes: three tasks, our method, and a recommended budget; not beside what it chooses.",
)
@click.option("--tasks", callback=names, default="", help="Comma-separated; --tasks help lists them.  [default: all]")
@click.option(
    "--methods",
    callback=names,
    default=OURS,
    show_default=True,
    help="Comma-separated; `all`; `help` lists them. NAME+q8_0 keeps its cells in that "
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
@click.option(
    "--left-out",
    type=click.Path(path_type=Path),
    help="What `profile --left-out` wrote: the method `left-out` goes by what was fitted without a task's kind.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw figures into this folder.")
@cpu_first_option
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON object.")
@gathered(request=EvalRequest)
def eval_command(model: str | None, request: EvalRequest) -> None:
    """RULER-style tasks on MODEL: each text is compressed before its questions are known.

    Every figure is relative to the model's own answers from the full cache; tasks that it answers below 60% are left
    out. Results go to the output file as they come, Ctrl-C stops, and the same command goes on.
    """
    from kvcompose_local import profiles
    from kvcompose_local.errors import InvalidInput
    from kvcompose_local.evaluation.harness import Evaluation, room_for
    from kvcompose_local.evaluation.methods import method_names
    from kvcompose_local.evaluation.tasks import TASKS
    from kvcompose_local.install.files import check_folders
    from kvcompose_local.install.threads import default_threads

    if request.tasks == ("help",):
        click.echo("\n".join(TASKS))
        return
    if request.methods == ("help",):
        click.echo("\n".join(method_names()))
        return
    if request.quick:
        _refuse_beside_quick(click.get_current_context())
    request = request.checked()
    without = request.profiles_without()
    status = Status(sys.stderr)
    path = fetched(model, status)
    output = request.output or Path(f"{path.stem}.eval.jsonl")
    check_folders(output)
    n_cells = room_for(request.length, whole_replay=any(name.startswith("published") for name in request.methods))
    with open_uncompressed(path, request.length, n_cells, request.n_threads, request.gpu_layers) as engine:
        trials = Trials.of(request, engine.model)
        evaluation = Evaluation(
            engine,
            output,
            {"file": path.name},
            profile=profiles.of_file(path) if request.profile is None else profiles.read(request.profile),
            left_out=without,
            n_threads=request.n_threads or default_threads(),
        )
        if others := {r.get("file", path.name) for r in evaluation.records} - {path.name}:
            raise InvalidInput(f"{output} holds results of {', '.join(sorted(others))}: name another file with -o")
        try:
            go_through(evaluation, request, trials, status)
        except KeyboardInterrupt:
            status.line(f"stopped: what is done stands in {output}, and the same command goes on from it")
        finally:
            evaluation.close()
        records = [
            r
            for r in evaluation.records
            if (r["task"], r["seed"]) in request.plan()
            and r["n_tokens"] == request.length
            and (r["method"], r["keep"]) in trials.wanted
        ]
    if records:
        show(records, request, trials, status)


@dataclass(frozen=True)
class Trials:
    """The trials of each text.

    wanted: (method, keep ratio); ours: the method that a budget is recommended for; caches: the names of its trials.
    """

    wanted: tuple[tuple[str, float], ...]
    ours: str
    caches: dict[tuple[str, float], str]

    @classmethod
    def of(cls, request: EvalRequest, model: Model) -> Trials:
        """Raises InvalidInput for cache types that the model's heads do not fill."""
        from kvcompose_local.engines import has_whole_blocks
        from kvcompose_local.errors import InvalidInput
        from kvcompose_local.evaluation.harness import FULL, cell_share

        full = (FULL, 1.0)
        if request.quick:
            caches = chat_caches(model)
            found = cls((full, *caches), [*caches][-1][0], caches)
        else:
            methods = request.methods
            pairs = [(m, keep) for m in methods for keep in ((1.0,) if m.startswith(FULL) else request.keeps)]
            wanted = tuple(dict.fromkeys([full, *pairs]))
            ours = next((name for name in (OURS, OURS.partition("+")[0]) if name in methods), methods[0])
            caches = {(m, keep): f"{keep * cell_share(m):.2g} of its bytes" for m, keep in wanted if m == ours}
            found = cls(wanted, ours, caches)
        if not has_whole_blocks(model) and any(cell_share(name) < 1 for name, _ in found.wanted):
            raise InvalidInput(
                f"heads of {model.path.name} are no whole blocks of a quantized type: choose other --methods"
            )
        return found


def go_through(evaluation: Evaluation, request: EvalRequest, trials: Trials, status: Status) -> None:
    """Run what has no record yet, and tell how long the rest takes."""
    from kvcompose_local.evaluation.tasks import make_item

    plan, model = request.plan(), evaluation.engine.model
    started, done = time.monotonic(), 0
    for number, (task, seed) in enumerate(plan):
        item = make_item(task, seed, request.length, lambda text: len(model.tokenize(text)))
        if not evaluation.missing(item, request.length, trials.wanted):
            continue
        left = (time.monotonic() - started) / done * (len(plan) - number) if done else 0
        eta = f", about {left / 60:.0f} min left" if done else ""
        status.line(f"{number + 1}/{len(plan)} {task}, text {seed}{eta}")
        evaluation.run(item, request.length, trials.wanted)
        done += 1


def show(records: Sequence[dict[str, Any]], request: EvalRequest, trials: Trials, status: Status) -> None:
    """Print the results, and draw them where that is wanted."""
    from kvcompose_local.evaluation import report

    if request.as_json:
        found = [result.__dict__ for result in report.results(records)]
        click.echo(json.dumps({"tasks": report.tasks_that_count(records), "results": found}))
    else:
        click.echo(report.tables(records))
        recommendation = report.recommendation(records, trials.caches)
        click.echo(f"\n{'' if request.quick else f'{trials.ours}: '}{recommendation}")
    if request.plot is not None:
        for file in report.plot(records, request.plot, trials.ours):
            status.line(f"drew {file}")


def open_uncompressed(
    path: Path, length: int, n_cells: int, n_threads: int | None, gpu_layers: int = 0
) -> PatchedEngine:
    """An engine with room for texts of ``--length``. Raises InvalidInput for what is too long, and without patches."""
    from kvcompose_local.engines import open_engine
    from kvcompose_local.engines.patched import PatchedEngine
    from kvcompose_local.errors import InvalidInput
    from kvcompose_local.evaluation.harness import MOST_OUTPUTS

    try:
        engine, _ = open_engine(
            path, n_ctx=n_cells, budget=1.0, n_threads=n_threads, gpu_layers=gpu_layers, n_outputs=MOST_OUTPUTS
        )
    except InvalidInput as error:
        raise InvalidInput(f"--length {length} takes a cache of {n_cells} cells: {error}") from error
    if not isinstance(engine, PatchedEngine):
        engine.close()
        raise InvalidInput("this needs the patched engine: run `kvcompose-local build`")
    return engine


def chat_caches(model: Model) -> dict[tuple[str, float], str]:
    """The trials that keep what a chat does under a few budgets, and what to call them."""
    from kvcompose_local import profiles
    from kvcompose_local.arena import DEFAULT_CTX, cells_for, default_cache_type
    from kvcompose_local.engines import has_whole_blocks, token_of

    method, caches = OURS.partition("+")[0], {}
    token, whole_blocks = token_of(model), has_whole_blocks(model)
    profile = profiles.of_file(model.path)
    kl = profile.kl if profile else None
    for budget in QUICK_BUDGETS:
        kind = default_cache_type(budget, whole_blocks=whole_blocks, one_type=model.one_type, patched=True, kl=kl)
        keep = round(min(cells_for(DEFAULT_CTX, budget, kind, token) / DEFAULT_CTX, 1), 4)
        caches[method if kind == "f16" else f"{method}+{kind}", keep] = f"--budget {budget:g}"
    return caches
