"""Tables and plots from the records of a run."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcompose_local.errors import KVComposeError
from kvcompose_local.evaluation.harness import FULL

Record = dict[str, Any]
FloatList = npt.NDArray[np.float64]

#: A task counts where the full cache scores at least this: below it there is nothing to lose.
GATE = 0.6
_RESAMPLES = 1000


@dataclass(frozen=True)
class Result:
    """One method at one keep ratio over all tasks that count.

    kept: share of the full cache's bytes, which for a quantized cache is less than the keep ratio; share: score as a
    share of the full cache's, each task weighing the same; low, high: its 95% bootstrap interval over items; kl: nats a
    token; first_kl: of the answers' first tokens, where the records have it; n: questions.
    """

    method: str
    keep: float
    kept: float
    score: float
    share: float
    low: float
    high: float
    kl: float
    first_kl: float | None
    n: int


def tasks_that_count(records: Iterable[Record]) -> dict[str, float]:
    """The full cache's mean score of each task where it is at least :data:`GATE`."""
    scores: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record["method"] == FULL:
            scores[record["task"]].append(record["score"])
    return {task: float(np.mean(values)) for task, values in sorted(scores.items()) if np.mean(values) >= GATE}


def results(records: Sequence[Record], *, seed: int = 0) -> list[Result]:
    """All methods and keep ratios, on the items that each of them shares with the full cache."""
    tasks = tasks_that_count(records)
    full = {_question(r): r["score"] for r in records if r["method"] == FULL}
    groups: dict[tuple[str, float], list[Record]] = defaultdict(list)
    for record in records:
        if record["task"] in tasks and _question(record) in full:
            groups[record["method"], record["keep"]].append(record)
    rng = np.random.default_rng(seed)
    found = []
    for (method, keep), group in groups.items():
        # items (task, seed) are what is resampled: questions about one text are not independent
        items: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        for r in group:
            items[r["task"]][r["seed"]].append((r["score"], full[_question(r)]))
        tables = [np.array([np.mean(pairs, axis=0) for pairs in seeds.values()]) for seeds in items.values()]
        score, whole = np.mean([table.mean(axis=0) for table in tables], axis=0)
        if whole == 0:  # the score cannot be a share of nothing
            continue
        drawn = np.mean([_resample(table, rng) for table in tables], axis=0)  # (resamples, 2)
        low, high = np.quantile(drawn[:, 0] / np.maximum(drawn[:, 1], 1e-9), [0.025, 0.975])
        kl = float(np.mean([r["kl"] for r in group]))
        kept = float(np.mean([r["kept"] for r in group]))
        share = float(score / whole)
        firsts = [r["first_kl"] for r in group if "first_kl" in r]
        first_kl = float(np.mean(firsts)) if firsts else None
        found.append(Result(method, keep, kept, float(score), share, float(low), float(high), kl, first_kl, len(group)))
    return sorted(found, key=lambda r: (r.method != FULL, r.method, -r.keep))


def _resample(table: FloatList, rng: np.random.Generator) -> FloatList:
    """Means of bootstrap samples of items (n, 2): (resamples, 2)."""
    rows = rng.integers(0, len(table), (_RESAMPLES, len(table)))
    return np.asarray(table[rows].mean(axis=1))


def _question(record: Record) -> tuple[Any, ...]:
    return record["task"], record["seed"], record["n_tokens"], record["question"]


def curve(found: Sequence[Result], method: str) -> tuple[FloatList, FloatList]:
    """Shares of the full cache's bytes, ascending up to 1, and the share of the full score at each."""
    points = {1.0: 1.0} | {min(r.kept, 1.0): r.share for r in found if r.method == method}
    kept = np.array(sorted(points))
    return kept, np.array([points[share] for share in kept])


def least_kept(found: Sequence[Result]) -> dict[str, float]:
    """The fewest bytes that each method was measured at, as a share.

    Methods that keep all tokens, as quantized caches may, are points and no curves: they are left out.
    """
    ratios = {r.method for r in found if r.keep < 1 and r.kept < 1}
    return {method: float(curve(found, method)[0][0]) for method in ratios}


def area(found: Sequence[Result], method: str, low: float) -> float:
    """Area under the share of the full score over the shares of bytes from ``low`` to 1; 1 for the full cache."""
    kept, shares = curve(found, method)
    ends = np.array([low, *kept[kept > low]])
    heights = np.interp(ends, kept, shares)
    return float(((heights[1:] + heights[:-1]) / 2 * np.diff(ends)).sum() / (1 - low))


def most_removed(found: Sequence[Result], method: str, within: float) -> float:
    """The most bytes removed, as a share, with a score within ``within`` of the full one; interpolated."""
    kept, shares = curve(found, method)
    floor = 1 - within
    for i in range(len(kept) - 1, 0, -1):
        if shares[i - 1] < floor:
            part = (shares[i] - floor) / (shares[i] - shares[i - 1])
            return float(1 - (kept[i] + part * (kept[i - 1] - kept[i])))
    return float(1 - kept[0])


def tables(records: Sequence[Record]) -> str:
    """Everything as Markdown."""
    counted = tasks_that_count(records)
    if not counted:
        return "The full cache answers no task well enough to lose anything: try a larger model or shorter texts."
    found = results(records)
    keeps = sorted({r.keep for r in found if r.method != FULL}, reverse=True)
    lines = ["Tasks that count (full-cache score): " + ", ".join(f"{t} {s:.2f}" for t, s in counted.items()) + "."]
    missing = sorted({r["task"] for r in records} - set(counted))
    if missing:
        lines += [f"Under {GATE:g} with the full cache, left out: {', '.join(missing)}."]
    heads = [f"keep {keep:g}" for keep in keeps]
    lines += ["", "Share of the full-cache score (95% interval) / KL in nats a token:", ""]
    least = least_kept(found)
    low = max(least.values(), default=1.0)
    columns = [f"area from {low:.0%} of the bytes", "bytes removed within 20%", "within 1%"]
    lines += ["| " + " | ".join(["method", "questions", *heads, *columns]) + " |"]
    lines += ["|---" * (len(heads) + 5) + "|"]
    areas = {method: area(found, method, low) for method in least}
    others = {r.method for r in found} - {FULL, *areas}
    best_first = [*sorted(areas, key=lambda method: (-areas[method], method)), *sorted(others)]
    for method in best_first:
        by_keep = {r.keep: r for r in found if r.method == method}
        cells = [
            f"{r.share:.2f} ({r.low:.2f}–{r.high:.2f}) / {r.kl:.3f}{_bytes(r)}" if (r := by_keep.get(keep)) else ""
            for keep in keeps
        ]
        ends = ["", "", ""]
        if method in areas:
            ends = [f"{areas[method]:.2f}", *(f"{most_removed(found, method, x):.0%}" for x in (0.2, 0.01))]
        fewest, most = min(r.n for r in by_keep.values()), max(r.n for r in by_keep.values())
        asked = f"{most}" if fewest == most else f"{fewest}–{most}"
        lines.append(f"| {method} | {asked} | " + " | ".join(cells + ends) + " |")
    fitted = {r["task"]: ", fitted to" if r["fitted"] else ", not fitted to" for r in records if "fitted" in r}
    lines += [
        "",
        "Score of each task (the full cache's; whether the profile was fitted to its kind):",
        "",
        "| task | method | " + " | ".join(heads) + " |",
    ]
    lines += ["|---" * (len(heads) + 2) + "|"]
    for task, full in counted.items():
        for method in best_first:
            shown = []
            for keep in keeps:
                scores = [r["score"] for r in records if (r["task"], r["method"], r["keep"]) == (task, method, keep)]
                shown.append(f"{np.mean(scores):.2f}" if scores else "")
            lines.append(f"| {task} ({full:.2f}{fitted.get(task, '')}) | {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _bytes(result: Result) -> str:
    """A note on a method's bytes, where they differ from the keep ratio."""
    return "" if 0.95 * result.keep < result.kept <= result.keep + 1e-3 else f" at {result.kept:.0%} of the bytes"


def recommendation(records: Sequence[Record], caches: Mapping[tuple[str, float], str], within: float = 0.05) -> str:
    """One line: the smallest cache that stays, as do all larger ones, within ``within`` of the full cache's score.

    caches: the name of each, by method and keep ratio.
    """
    found = [r for r in results(records) if (r.method, r.keep) in caches]
    good = list(itertools.takewhile(lambda r: r.share >= 1 - within, sorted(found, key=lambda r: -r.kept)))
    if not good:
        return f"no budget that was tried keeps {1 - within:.0%} of the full cache's score"
    best = good[-1]
    cache = caches[best.method, best.keep]
    return f"{cache} keeps {best.share:.0%} of the full cache's score on these {best.n} questions"


def plot(records: Sequence[Record], folder: Path, method: str) -> list[Path]:
    """Score and KL against bytes, and the layer budgets of one method as a heat map; returns the files.

    Raises KVComposeError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise KVComposeError("plots need matplotlib: pip install 'kvcompose-local[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    found = results(records)
    methods = [m for m in dict.fromkeys(r.method for r in found) if m != FULL]
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.4), layout="constrained")
    for axis in axes:
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for name in methods:
        points = sorted((r for r in found if r.method == name), key=lambda r: r.kept)
        kept = [100 * r.kept for r in points]
        axes[0].plot(kept, [r.share for r in points], marker="o", markersize=3, label=name)
        axes[1].plot(kept, [max(r.kl, 1e-5) for r in points], marker="o", markersize=3, label=name)
    axes[0].set(xlabel="bytes kept, %", ylabel="share of the full-cache score", ylim=(0, 1.05))
    axes[1].set(xlabel="bytes kept, %", ylabel="KL to the full cache, nats a token", yscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    files = [folder / "quality.png"]
    figure.savefig(files[0], dpi=120)
    plt.close(figure)

    cells: dict[float, list[list[float]]] = defaultdict(list)
    for record in records:
        layers = record.get("layer_cells", [])
        if record["method"] == method and sum(layers):
            cells[record["keep"]].append([n / max(layers) for n in layers])
    if cells:
        keeps = sorted(cells, reverse=True)
        rows = [np.mean(cells[keep], axis=0) for keep in keeps]
        figure, axis = plt.subplots(figsize=(9, 0.45 * len(rows) + 1.4), layout="constrained")
        shown = axis.imshow(rows, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axis.set(
            title=method, xlabel="layer", yticks=range(len(keeps)), yticklabels=[f"keep {keep:g}" for keep in keeps]
        )
        figure.colorbar(shown, label="cells ÷ largest layer")
        files.append(folder / "layers.png")
        figure.savefig(files[1], dpi=120)
        plt.close(figure)
    return files
