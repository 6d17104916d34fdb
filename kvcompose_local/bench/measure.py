"""How fast, against the uncompressed cache and against llama.cpp without the patches, in one run.

Every mode has its own context, all hold the same text, and they take turns: these figures are ratios of medians of
interleaved rounds, since a laptop's clock wanders more between two runs than most changes are worth.
"""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
import psutil

from kvcompose_local.attention import AttentionMax
from kvcompose_local.budgets import allocate_bytes
from kvcompose_local.build import library_dir
from kvcompose_local.compaction import N_NEAREST, Policy
from kvcompose_local.engines import CELL_PADDING, physical_cores
from kvcompose_local.engines.base import LlamaEngine
from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.engines.stock import StockEngine
from kvcompose_local.errors import EngineError, InvalidInput, KVComposeError
from kvcompose_local.interfaces import CacheSnapshot, FloatArray, IntArray, Sampling
from kvcompose_local.llama_ffi import Model, library_path
from kvcompose_local.scores import token_scores
from kvcompose_local.selection import select_composites

UNPATCHED = "unpatched llama.cpp"
FULL = "uncompressed"
_WARM_UP = 3
_ANSWER_CELLS = 256


@dataclass
class Mode:
    """One way to decode: tokens a second of each round, and the size of its cache."""

    name: str
    kv_bytes: int
    rates: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return float(np.median(self.rates)) if self.rates else 0.0


@dataclass
class LengthResult:
    """Everything measured at one context length. Seconds are wall time, per compaction of the whole length."""

    n_tokens: int
    prefill_tokens_per_second: float
    modes: list[Mode]
    replay_seconds: float
    select_seconds: float
    rewrite_seconds: float
    first_token_seconds: float
    rss_bytes: int

    def mode(self, name: str) -> Mode:
        return next(mode for mode in self.modes if mode.name == name)


def memory_bandwidth() -> float:
    """Bytes a second that all cores together read, as the best of a few copies of 256 MiB."""
    source = np.ones(1 << 28, np.uint8)
    target = np.empty_like(source)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(target, source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - started))
    return best


def decode_rate(engine: LlamaEngine, n: int) -> float:
    """Tokens a second over ``n`` greedy tokens, sampling included, after a short warm-up; the tokens are dropped."""
    token = 1
    for i in range(_WARM_UP + n):
        if i == _WARM_UP:
            started = time.perf_counter()
        engine.decode([token])
        token = engine.sample()
    rate = n / (time.perf_counter() - started)
    engine.drop_tail(_WARM_UP + n)
    return rate


def scores_seen(engine: LlamaEngine, seen: AttentionMax) -> list[FloatArray]:
    """Token scores of the attention seen while reading: L arrays (H, T). What is kept does not change the speed."""
    layers = engine.shape.layers
    return [
        token_scores(attention[None], layer.n_kv_heads, add_mean_across_heads=False)[0]
        for attention, layer in zip(seen.result(), layers, strict=True)
    ]


class UnpatchedWorker:
    """The same decoding in a process with the library that was built without the patches."""

    def __init__(self, library: Path, model: Path, snapshot: CacheSnapshot, n_cells: int, n_threads: int) -> None:
        """library: the folder of libllama. Raises EngineError when the process cannot load it."""
        with ExitStack() as stack:
            file = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".cells"))
            pickle.dump((str(model), snapshot, n_cells, n_threads), file)
            file.flush()
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "kvcompose_local.bench.measure", file.name],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "LLAMA_CPP_LIB_PATH": str(library)},
                )
            )
            stack.callback(process.kill)
            self._to, self._from = cast(TextIO, process.stdin), cast(TextIO, process.stdout)
            self._process = process
            self._line("ready")
            self._stack = stack.pop_all()

    def _line(self, expected: str = "") -> str:
        line = self._from.readline().strip()
        if not line or (expected and line != expected):
            raise EngineError("the unpatched llama.cpp could not be measured: its process ended")
        return line

    def decode_rate(self, n: int) -> float:
        with suppress(BrokenPipeError):  # the missing answer tells it better
            self._to.write(f"{n}\n")
            self._to.flush()
        return float(self._line())

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._stack.close()


def _work(path: str) -> None:
    """The worker's side."""
    with open(path, "rb") as file:
        model, snapshot, n_cells, n_threads = pickle.load(file)  # written by our own parent process
    engine = StockEngine(
        Model(Path(model)), n_cells=n_cells, n_threads=n_threads, scoring=False, sampling=Sampling(temperature=0)
    )
    with engine:
        engine.restore(snapshot)
        print("ready", flush=True)
        for line in sys.stdin:
            print(decode_rate(engine, int(line)), flush=True)


@contextmanager
def _patched(model: Model, n_cells: int, n_threads: int) -> Iterator[PatchedEngine]:
    engine = PatchedEngine(model, n_cells=n_cells, n_threads=n_threads, sampling=Sampling(temperature=0))
    try:
        yield engine
    finally:
        engine.close_context()


def text_tokens(model: Model, sentences: Sequence[str], n_tokens: int) -> list[int]:
    """``n_tokens`` tokens of sentences, from the beginning again where they end."""
    tokens: list[int] = []
    for sentence in itertools.cycle(sentences):
        tokens += model.tokenize(sentence + " ", add_bos=model.adds_bos and not tokens)
        if len(tokens) >= n_tokens:
            return tokens[:n_tokens]
    raise InvalidInput("there are no sentences to read")


def padded(n_cells: int) -> int:
    """The next size of a cell table."""
    return -(-n_cells // CELL_PADDING) * CELL_PADDING


def measure(
    path: Path,
    sentences: Sequence[str],
    n_tokens: int,
    keeps: Sequence[float],
    *,
    rounds: int,
    n_decode: int,
    n_threads: int | None = None,
    progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
) -> LengthResult:
    """Measure one context length.

    sentences: the text, repeated where it is too short; keeps: keep ratios; rounds, n_decode: how often each mode
    decodes how many tokens. The unpatched library is measured where it was built (``kvcompose-local build --stock``).
    """
    threads = n_threads or physical_cores()
    with ExitStack() as stack:
        model = Model(path)
        stack.callback(model.close)
        tokens = text_tokens(model, sentences, n_tokens)
        n_cells = padded(n_tokens + _ANSWER_CELLS + 512)
        full = stack.enter_context(_patched(model, n_cells, threads))
        layers = full.shape.layers
        seen = AttentionMax.over(layers, exclude_nearest=N_NEAREST)
        started = time.perf_counter()
        full.decode(tokens, lambda done, total: progress("reading:", done, total), seen)
        prefill_seconds = time.perf_counter() - started
        whole = full.snapshot()

        replay_seconds = _replay_seconds(full, tokens)
        modes = [Mode(FULL, n_tokens * full.shape.row_bytes)]
        engines: dict[str, LlamaEngine | UnpatchedWorker] = {FULL: full}
        select, rewrite = [], []
        for keep in keeps:
            # What a chat of this budget would hold: the arena, its live cells and what is left for composed ones.
            arena = padded(int(keep * n_tokens))
            policy = Policy.for_cells(arena)
            n_composed = arena - policy.n_tail - policy.n_headroom - policy.n_scratch
            started = time.perf_counter()
            scores = scores_seen(full, seen)
            selection = _select(full, scores, n_composed)
            select.append(time.perf_counter() - started)
            for _ in range(3):
                full.restore(whole)
                started = time.perf_counter()
                full.rewrite(selection, policy.n_tail)
                rewrite.append(time.perf_counter() - started)
            small = stack.enter_context(_patched(model, arena, threads))
            small.restore(full.snapshot())
            name = f"keep {keep:g}"
            engines[name] = small
            modes.append(Mode(name, small.cache_bytes))
        full.restore(whole)
        library = library_dir(patched=False)
        if library is not None and library != library_path().parent:
            worker = UnpatchedWorker(library, path, whole, n_cells, threads)
            stack.callback(worker.close)
            engines[UNPATCHED] = worker
            modes.append(Mode(UNPATCHED, n_tokens * full.shape.row_bytes))

        for number in range(rounds + 1):
            for place, mode in enumerate(modes):
                progress("decoding:", number * len(modes) + place, (rounds + 1) * len(modes))
                engine = engines[mode.name]
                if isinstance(engine, UnpatchedWorker):
                    rate = engine.decode_rate(n_decode)
                else:
                    rate = decode_rate(engine, n_decode)
                if number:  # the first round warms up
                    mode.rates.append(rate)
        started = time.perf_counter()
        full.decode(tokens[:64])
        full.sample()
        first_token_seconds = time.perf_counter() - started
        return LengthResult(
            n_tokens,
            n_tokens / prefill_seconds,
            modes,
            replay_seconds,
            float(np.median(select)),
            float(np.median(rewrite)),
            first_token_seconds,
            psutil.Process().memory_info().rss,
        )


def _select(engine: LlamaEngine, scores: Sequence[FloatArray], n_composed: int) -> list[IntArray]:
    row_bytes = [layer.row_bytes for layer in engine.shape.layers]
    budgets = allocate_bytes(scores, row_bytes, n_composed * sum(row_bytes))
    return select_composites(scores, budgets)


def _replay_seconds(engine: LlamaEngine, tokens: Sequence[int]) -> float:
    """Seconds that replaying all tokens takes: five of the chat's chunks, their median times their number."""
    policy = Policy.for_cells(len(tokens))
    chunk = policy.n_scratch - policy.n_lead_in
    starts = np.linspace(policy.n_lead_in, max(len(tokens) - chunk, policy.n_lead_in), 5).astype(int)
    seconds = []
    seen = AttentionMax.over(engine.shape.layers)
    for start in starts.tolist():
        started = time.perf_counter()
        engine.replay(tokens[start - policy.n_lead_in : start + chunk], seen)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds)) * len(tokens) / chunk


def tables(results: Sequence[LengthResult], model_bytes: int, bandwidth: float) -> str:
    """The results as Markdown; the floor of a rate is reading the weights and the cache once a token."""
    lines = [
        "| tokens | mode | decode tokens/s (min–max) | × uncompressed | cache MiB | floor tokens/s | share of it |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        base = result.mode(FULL).median
        for mode in result.modes:
            floor = bandwidth / (model_bytes + mode.kv_bytes)
            lines.append(
                f"| {result.n_tokens} | {mode.name} | {mode.median:.1f} ({min(mode.rates):.1f}–{max(mode.rates):.1f}) "
                f"| {mode.median / base:.2f} | {mode.kv_bytes / 2**20:.0f} | {floor:.0f} | {mode.median / floor:.0%} |"
            )
    lines += [
        "",
        "| tokens | prefill tokens/s | replay, × prefill | select s | rewrite ms | first token of 64 s | RSS MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        prefill = r.n_tokens / r.prefill_tokens_per_second
        lines.append(
            f"| {r.n_tokens} | {r.prefill_tokens_per_second:.1f} | {r.replay_seconds / prefill:.2f} "
            f"| {r.select_seconds:.2f} | {1000 * r.rewrite_seconds:.0f} | {r.first_token_seconds:.2f} "
            f"| {r.rss_bytes / 2**20:.0f} |"
        )
    return "\n".join(lines)


def plot(results: Sequence[LengthResult], file: Path) -> None:
    """Decode speed against context length, a line a mode. Raises KVComposeError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise KVComposeError("plots need matplotlib: pip install 'kvcompose-local[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for mode in results[0].modes:
        rates = [r.mode(mode.name).median for r in results]
        axis.plot([r.n_tokens for r in results], rates, marker="o", label=mode.name)
    axis.set(xlabel="context, tokens", ylabel="decode, tokens/s", ylim=(0, None))
    axis.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def as_json(results: Sequence[LengthResult], model_bytes: int, bandwidth: float) -> dict[str, Any]:
    """The same as an object for programs."""
    return {
        "model_bytes": model_bytes,
        "memory_bandwidth_bytes_per_second": round(bandwidth),
        "lengths": [asdict(result) for result in results],
    }


if __name__ == "__main__":
    _work(sys.argv[1])
