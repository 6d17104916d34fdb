"""Measures speed against the uncompressed cache and against llama.cpp without the patches, in one run.

Every mode has its own context, all contexts hold the same text, and modes take turns. Figures are ratios of medians of
interleaved rounds: a laptop's clock changes more between two runs than most changes of code matter.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from gguf import GGUFReader

from kvcompose_local import profiles
from kvcompose_local.arena import cells_for, default_cache_type, padded
from kvcompose_local.bench.decoding import QUESTION, Worker, time_round
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.engines import has_whole_blocks, micro_batch, token_of
from kvcompose_local.engines.base import LlamaEngine
from kvcompose_local.engines.patched import PREFILL_MICRO_BATCH, PatchedEngine
from kvcompose_local.errors import InvalidInput, KVComposeError
from kvcompose_local.install.pin import library_dir
from kvcompose_local.install.threads import default_threads
from kvcompose_local.interfaces import CacheSnapshot, LayerShape, Sampling
from kvcompose_local.llama_ffi.devices import gpus
from kvcompose_local.llama_ffi.library import library_path
from kvcompose_local.llama_ffi.model import Model

UNPATCHED = "unpatched llama.cpp"
TWIN = "the same, patched"
UNCOMPRESSED = "uncompressed"
_ANSWER_CELLS = 256


@dataclass
class Mode:
    """One way to read and decode: its cache, its compute buffers, what reading took, and what each round measured.

    Seconds are wall time over the whole text, compactions and the first token of an answer included; rates are tokens a
    second; question_seconds go from a question to the first token of its answer; device_bytes: of GPUs' memory that the
    context takes after reading.
    """

    name: str
    kv_bytes: int
    compute_bytes: int | None = None
    device_bytes: int | None = None
    read_seconds: float | None = None
    n_compactions: int = 0
    score_seconds: float = 0.0
    select_seconds: float = 0.0
    rewrite_seconds: float = 0.0
    rates: list[float] = field(default_factory=list)
    question_seconds: list[float] = field(default_factory=list)

    @property
    def compaction_seconds(self) -> float:
        return self.score_seconds + self.select_seconds + self.rewrite_seconds

    @property
    def median(self) -> float:
        return float(np.median(self.rates)) if self.rates else 0.0

    @property
    def median_question(self) -> float:
        return float(np.median(self.question_seconds))


@dataclass
class LengthResult:
    """Everything measured at one context length.

    rewrite_seconds: of one rewrite of the whole uncompressed cache that keeps a quarter, where it is on no GPU;
    multiply_adds, question_multiply_adds: the fewest that reading the text and reading a question take.
    """

    n_tokens: int
    modes: list[Mode]
    multiply_adds: int
    question_multiply_adds: int
    rewrite_seconds: float | None
    rss_bytes: int

    def mode(self, name: str) -> Mode:
        return next(mode for mode in self.modes if mode.name == name)


def memory_bandwidth() -> float:
    """Bytes a second that one core reads and writes, as the best of a few copies of 256 MiB."""
    source = np.ones(1 << 28, np.uint8)
    target = np.empty_like(source)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(target, source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - started))
    return best


def matmul_rate() -> float:
    """Multiply-adds a second of all cores together in float32, as the best of a few NumPy products."""
    n = 1536
    a = np.ones((n, n), np.float32)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        best = max(best, n**3 / (time.perf_counter() - started))
    return best


def reading_multiply_adds(model: Model, layers: Sequence[LayerShape], n_block_weights: int, n_tokens: int) -> int:
    """Multiply-adds that reading takes at least: each weight of the blocks once a token, and causal attention.

    Attention of sliding-window layers is left out.
    """
    width = model.n_embd // max(*model.heads, 1)  # of a head; larger in a few models, so that this stays a lower bound
    attention = sum(layer.n_heads * width * n_tokens**2 for layer in layers)
    return n_block_weights * n_tokens + attention


def block_weights(path: Path) -> int:
    """Weights of a GGUF's blocks, without embeddings and output."""
    return sum(int(t.n_elements) for t in GGUFReader(path).tensors if t.name.startswith("blk."))


@contextmanager
def _patched(
    model: Model,
    n_cells: int,
    n_threads: int,
    n_ubatch: int = PREFILL_MICRO_BATCH,
    cache_type: str = "f16",
    n_positions: int | None = None,
) -> Iterator[PatchedEngine]:
    engine = PatchedEngine(
        model,
        n_cells=n_cells,
        n_positions=n_positions,
        n_threads=n_threads,
        cache_type=cache_type,
        n_ubatch=n_ubatch,
        sampling=Sampling(temperature=0),
    )
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


def measure(
    path: Path,
    sentences: Sequence[str],
    n_tokens: int,
    budgets: Sequence[float],
    *,
    cache_type: str | None,
    rounds: int,
    n_decode: int,
    n_threads: int | None = None,
    gpu_layers: int = 0,
    progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
) -> LengthResult:
    """Measure one context length.

    sentences: the text, repeated where it is too short; budgets: shares of the uncompressed F16 cache, in cells of
    ``cache_type``, by default the chat's; rounds, n_decode: how often each mode decodes how many tokens; gpu_layers:
    the model's layers on a GPU, which reads as often. The unpatched library is measured where it was built (``build
    --stock``) and no layer is on a GPU. Raises InvalidInput, before anything is read, for a budget of too few cells.
    """
    threads = n_threads or default_threads()
    with ExitStack() as stack:
        model = Model(path, gpu_layers=gpu_layers)
        stack.callback(model.close)
        if n_tokens > model.n_ctx_train:
            raise InvalidInput(f"--ctx {n_tokens} is beyond the {model.n_ctx_train} positions {model.name} knows")
        profile = profiles.of_file(path)
        cache_type = cache_type or _usual_type(model, profile)
        token = token_of(model)
        cells = {budget: cells_for(n_tokens, budget, cache_type, token) for budget in budgets}
        tokens = text_tokens(model, sentences, n_tokens)
        n_cells = padded(n_tokens + _ANSWER_CELLS + 512)
        modes: list[Mode] = []
        engines: dict[str, LlamaEngine | Worker] = {}

        def read(name: str, opened: Callable[[], AbstractContextManager[PatchedEngine]]) -> PatchedEngine:
            earlier = []
            for _ in range(rounds if gpu_layers else 0):  # which reads in seconds, the first time with kernels to load
                with opened() as other:
                    earlier.append(_read(name, other, tokens, progress, profile))
            free = sum(gpu.free for gpu in gpus())
            engines[name] = engine = stack.enter_context(opened())
            modes.append(_median_of(earlier[1:], _read(name, engine, tokens, progress, profile)))
            modes[-1].device_bytes = free - sum(gpu.free for gpu in gpus()) if gpu_layers else None
            return engine

        full = read(UNCOMPRESSED, partial(_patched, model, n_cells, threads, micro_batch(model, 1)))
        if cache_type != "f16":
            read(
                f"{UNCOMPRESSED}, {cache_type}",
                partial(_patched, model, n_cells, threads, micro_batch(model, 1), cache_type),
            )
        library, whole, rewrite_seconds = library_dir(patched=False), None, None
        if not gpu_layers:  # from where gigabytes would cross, for nobody's use
            whole = full.snapshot()
            rewrite_seconds = _rewrite_seconds(full, whole)
        for budget, n in cells.items():
            read(
                f"budget {budget:g}",
                partial(_patched, model, n, threads, micro_batch(model, budget), cache_type, n_positions=n_cells),
            )
        if whole is not None:
            full.restore(whole)
        if library is not None and library != library_path().parent and whole is not None:
            # Both in a process of their own and through the same engine: only the library differs.
            for name, folder in ((UNPATCHED, library), (TWIN, library_path().parent)):
                worker = Worker(folder, path, whole, n_cells, threads)
                stack.callback(worker.close)
                engines[name] = worker
                modes.append(Mode(name, n_tokens * full.shape.row_bytes))
        _decode_in_turns([mode for mode in modes if mode.name in engines], engines, rounds, n_decode, progress)
        n_block_weights = block_weights(path)
        return LengthResult(
            n_tokens,
            modes,
            reading_multiply_adds(model, full.shape.layers, n_block_weights, n_tokens),
            n_block_weights * QUESTION,
            rewrite_seconds,
            psutil.Process().memory_info().rss,
        )


def _usual_type(model: Model, profile: profiles.Profile | None) -> str:
    """How a chat stores the cells of a budget."""
    whole_blocks, one_type = has_whole_blocks(model), model.one_type or model.gpu_layers > 0
    kl = profile.kl if profile else None
    return default_cache_type(0.5, whole_blocks=whole_blocks, one_type=one_type, patched=True, kl=kl)


def _decode_in_turns(
    modes: Sequence[Mode],
    engines: Mapping[str, LlamaEngine | Worker],
    rounds: int,
    n_decode: int,
    progress: Callable[[str, int, int], None],
) -> None:
    """Let the modes take turns, since a machine is not equally fast at all times; the first round warms up."""
    for number in range(rounds + 1):
        for place, mode in enumerate(modes):
            progress("decoding:", number * len(modes) + place, (rounds + 1) * len(modes))
            engine = engines[mode.name]
            timed = engine.time_round(n_decode) if isinstance(engine, Worker) else time_round(engine, n_decode)
            if number:
                mode.rates.append(timed[0])
                mode.question_seconds.append(timed[1])


def _read(
    name: str,
    engine: PatchedEngine,
    tokens: Sequence[int],
    progress: Callable[[str, int, int], None],
    profile: profiles.Profile | None,
) -> Mode:
    """Read tokens as a chat does, and leave a cache that is too small for them compacted."""
    n_positions = len(tokens) + _ANSWER_CELLS
    compose = engine.layout().n_free < n_positions
    memory = CacheMemory(engine, n_positions, compose=compose, scorer=profile.scorer if profile else None)
    started = time.perf_counter()
    memory.feed(tokens, lambda done, total: progress(f"reading, {name}:", done, total))
    engine.sample()
    seconds = time.perf_counter() - started
    reports = [*memory.reports]
    if compose:
        memory.compact()
    return Mode(
        name,
        engine.cache_bytes if compose else len(tokens) * engine.shape.row_bytes,
        engine.compute_bytes,
        read_seconds=seconds,
        n_compactions=len(reports),
        score_seconds=sum(r.score_seconds for r in reports),
        select_seconds=sum(r.select_seconds for r in reports),
        rewrite_seconds=sum(r.rewrite_seconds for r in reports),
    )


def _median_of(earlier: Sequence[Mode], last: Mode) -> Mode:
    """The reading that took as long as most, with the buffers of the last, which are those that are there."""
    readings = sorted([*earlier, last], key=lambda mode: mode.read_seconds or 0)
    return replace(readings[(len(readings) - 1) // 2], compute_bytes=last.compute_bytes)


def _rewrite_seconds(engine: PatchedEngine, whole: CacheSnapshot) -> float:
    """The median of three rewrites that keep every fourth cell, another one in each head."""
    selection = [
        np.stack([np.arange(head % 4, whole.n_live, 4)[: whole.n_live // 4] for head in range(layer.n_kv_heads)])
        for layer in engine.shape.layers
    ]
    seconds = []
    for _ in range(3):
        engine.restore(whole)
        started = time.perf_counter()
        engine.rewrite(selection, 0)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def _mib(n_bytes: int | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / 2**20:.0f}"


def tables(results: Sequence[LengthResult], model_bytes: int, bandwidth: float, matmul: float) -> str:
    """The results as Markdown, with the floor of what is measured and the share of that floor which is reached.

    Buffers hold what graphs compute, at their largest so far. Floors: decoding reads the weights and the
    cache once a token; reading computes its multiply-adds, attention to the uncompressed cache included; a question
    takes the longer of both, without attention; a rewrite reads and writes the quarter that it keeps.
    """
    lines = [
        "| tokens | mode | decode tokens/s (min–max) | × uncompressed | cache MiB | buffers MiB | GPU MiB "
        "| floor tokens/s | share of it "
        f"| question of {QUESTION} tokens ms | × uncompressed | floor ms | share of it |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        full = result.mode(UNCOMPRESSED)
        for mode in filter(lambda mode: mode.rates, result.modes):
            token_seconds = (model_bytes + mode.kv_bytes) / bandwidth
            question_seconds = max(token_seconds, result.question_multiply_adds / matmul)
            lines.append(
                f"| {result.n_tokens} | {mode.name} | {mode.median:.1f} ({min(mode.rates):.1f}–{max(mode.rates):.1f}) "
                f"| {mode.median / full.median:.2f} | {mode.kv_bytes / 2**20:.0f} | {_mib(mode.compute_bytes)} "
                f"| {_mib(mode.device_bytes)} "
                f"| {1 / token_seconds:.0f} | {mode.median * token_seconds:.0%} | {1000 * mode.median_question:.0f} "
                f"| {mode.median_question / full.median_question:.2f} "
                f"| {1000 * question_seconds:.0f} | {question_seconds / mode.median_question:.0%} |"
            )
    lines += [
        "",
        "| tokens | mode | reading s | × uncompressed | its floor s | share of it | compactions | their scores s "
        "| choices s | rewrites s | compactions, × uncompressed reading |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        base = result.mode(UNCOMPRESSED).read_seconds or 1.0
        floor = result.multiply_adds / matmul
        lines += [
            f"| {result.n_tokens} | {m.name} | {m.read_seconds:.2f} | {m.read_seconds / base:.2f} "
            f"| {floor:.1f} | {floor / m.read_seconds:.0%} | {m.n_compactions} | {m.score_seconds:.2f} "
            f"| {m.select_seconds:.2f} | {m.rewrite_seconds:.2f} "
            f"| {m.compaction_seconds / base:.2f} |"
            for m in result.modes
            if m.read_seconds is not None
        ]
    lines += [
        "",
        "| tokens | rewrite of the whole cache ms | floor ms | share of it | RSS MiB |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        if result.rewrite_seconds is None:
            continue
        floor = 2 * (result.mode(UNCOMPRESSED).kv_bytes / 4) / bandwidth
        lines.append(
            f"| {result.n_tokens} | {1000 * result.rewrite_seconds:.0f} | {1000 * floor:.1f} "
            f"| {floor / result.rewrite_seconds:.0%} | {result.rss_bytes / 2**20:.0f} |"
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
        if not any(rates):
            continue
        axis.plot([r.n_tokens for r in results], rates, marker="o", label=mode.name)
    axis.set(xlabel="context, tokens", ylabel="decode, tokens/s", ylim=(0, None))
    axis.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def as_json(results: Sequence[LengthResult], model_bytes: int, bandwidth: float, matmul: float) -> dict[str, Any]:
    """The same as an object for programs."""
    return {
        "model_bytes": model_bytes,
        "memory_bandwidth_bytes_per_second": round(bandwidth),
        "multiply_adds_per_second": round(matmul),
        "lengths": [asdict(result) for result in results],
    }
