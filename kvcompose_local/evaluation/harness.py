"""Runs methods on items: the context is read and scored once, then every method and keep ratio starts from a snapshot.

Answers are greedy. Beside the score there are two figures that still tell methods apart where answers do not: the KL
divergence from the full cache, teacher-forced along its answer, and that answer's log-likelihood.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcompose_local import __version__
from kvcompose_local.arena import CELL_PADDING, VALUE_TYPES, padded, share_of_f16
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.engines.patched import PREFILL_MICRO_BATCH, SMALL_MICRO_BATCH, PatchedEngine
from kvcompose_local.errors import InvalidInput, KVComposeError
from kvcompose_local.evaluation.methods import find_method
from kvcompose_local.evaluation.quantized import quantized
from kvcompose_local.evaluation.statistics import Statistics
from kvcompose_local.evaluation.tasks import Item, Question
from kvcompose_local.interfaces import CacheSnapshot, ModelShape, Selection
from kvcompose_local.llama_ffi.model import Model
from kvcompose_local.profiles import Profile

#: The name of the uncompressed cache among the methods.
FULL = "full"
#: The chat itself: the context is fed in turns to a cache of the size that the keep ratio names, scratch included.
STREAMING = "streaming"
_N_TURNS = 16
#: Tokens of the longest answer that is measured at once.
MOST_OUTPUTS = 192
#: Types that a method's name may end in, as "+q8_0" or, for K and V, "+q8_0/q4_0": its cells are stored in them, and
#: take fewer bytes than the keep ratio says.
QUANTIZED_TYPES = {name for name, kind in VALUE_TYPES.items() if kind.is_quantized}
_GAP = "\x00"
#: The beginning of every record, by which a line that an interrupted run did not finish is known.
_BEGINNING = b'{"model": '


def engine_beside(
    engine: PatchedEngine, n_cells: int, cache_type: str, *, n_threads: int, n_ubatch: int = PREFILL_MICRO_BATCH
) -> PatchedEngine:
    """Another cache of the same model; ``close_context`` frees it."""
    return PatchedEngine(
        engine.model,
        n_cells=padded(n_cells),
        n_positions=engine.n_positions,
        n_threads=n_threads,
        cache_type=cache_type,
        n_ubatch=n_ubatch,
        n_outputs=min(n_ubatch, MOST_OUTPUTS),
    )


@dataclass(frozen=True)
class Answer:
    """An answer of the full cache: its tokens, and float32 (n, n_vocab) log-probabilities before each of them."""

    tokens: tuple[int, ...]
    log_probs: npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Start:
    """The start of a trial's questions: these cells of an engine, rewritten if there is a selection.

    kept: share of the full F16 cache's bytes; seconds: what the choice took.
    """

    engine: PatchedEngine
    cells: CacheSnapshot
    selection: Sequence[Selection] | None
    kept: float
    seconds: float


def check_method(name: str) -> None:
    """Raises InvalidInput, which lists all methods, where none has the name, with or without a cache type."""
    base, _ = _without_type(name)
    if base not in (FULL, STREAMING):
        find_method(base)


def _without_type(name: str) -> tuple[str, str]:
    """A method's name and the cache type that it ends in, if any."""
    base, _, kind = name.rpartition("+")
    types = kind.split("/")
    return (base, kind) if base and len(types) <= 2 and set(types) <= QUANTIZED_TYPES else (name, "")


def cell_share(name: str) -> float:
    """The share of bytes that a method's cells take of as many F16 cells."""
    _, kind = _without_type(name)
    return float(share_of_f16(kind or "f16"))


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The logarithm of the softmax along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), np.float32)


def kl_divergence(reference: npt.NDArray[np.float32], rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """KL divergence of log-probabilities (n, n_vocab) from a reference, in nats: float32 (n,)."""
    return np.asarray((np.exp(reference) * (reference - rows)).sum(axis=1))


def room_for(n_tokens: int, *, whole_replay: bool = False) -> int:
    """Cells that an item of ``n_tokens`` needs, with its questions and a replay."""
    cells = int(n_tokens * (2.2 if whole_replay else 1.15)) + 768
    return -(-cells // 256) * 256


def around_a_message(model: Model) -> tuple[str, str]:
    """The chat template's text before a message and after it, up to where the answer begins."""
    rendered = model.render_chat([{"role": "user", "content": _GAP}], add_generation_prompt=True)
    head, _, tail = rendered.partition(_GAP)
    return head, tail


class Evaluation:
    """Methods against each other on one model; results are JSON lines in a file, which a later run goes on from.

    engine: with an uncompressed cache of at least :func:`room_for` cells; facts: what every record says of the run.
    """

    def __init__(
        self,
        engine: PatchedEngine,
        output: Path,
        facts: dict[str, Any] | None = None,
        *,
        profile: Profile | None = None,
        left_out: Mapping[str, Profile] | None = None,
        n_threads: int = 1,
    ) -> None:
        """profile: the model's, None where it has none; left_out: by tasks, profiles that were fitted to none of their
        texts, for the method ``left-out``; n_threads: of the engines that quantized and streaming trials need beside
        this one.
        """
        self.engine = engine
        self._scorer = profile.scorer if profile else None
        self._kinds = set(profile.kinds.split(",")) if profile else set()
        self._left_out = left_out or {}
        self.n_threads = n_threads
        self.output = output
        self.facts = {"model": engine.model.name, "version": __version__, "engine": engine.name, **(facts or {})}
        self.records = read_records(output)
        self._done = {_key(record) for record in self.records}
        self._head, self._tail = around_a_message(engine.model)
        self._others: dict[str, PatchedEngine] = {}
        layout = engine.layout()
        self._n_cells = layout.n_live + layout.n_free

    def missing(self, item: Item, n_tokens: int, trials: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
        """The trials, (method, keep ratio), of an item that have no record yet."""
        return [
            (name, keep)
            for name, keep in trials
            if any(
                (item.task, item.seed, n_tokens, q, name, keep) not in self._done for q in range(len(item.questions))
            )
        ]

    def run(
        self,
        item: Item,
        n_tokens: int,
        trials: Sequence[tuple[str, float]],
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Run what is missing of an item's trials, and write a record for each question and trial.

        n_tokens: the length that was asked for, which names the item. A record holds the score in [0, 1], ``kl`` in
        nats a token, ``first_kl`` of the answer's first token, ``log_likelihood`` of the full cache's answer in nats a
        token, and ``kept``, the share of bytes.
        """
        trials = self.missing(item, n_tokens, trials)
        if not trials:
            return
        starts = self._starts(item, trials, progress)
        cells_of_all = {}
        for number, question in enumerate(item.questions):
            asked = self.engine.model.tokenize(question.text + self._tail + question.prefix)
            self.engine.restore(starts[FULL, 1.0].cells)
            reference = self._full_answer(asked, question.max_tokens)
            for name, keep in trials:
                progress(f"question {number + 1}/{len(item.questions)}: {name} {keep:g}")
                start = starts[name, keep]
                start.engine.restore(start.cells)
                if start.selection is not None:
                    start.engine.rewrite(start.selection, 0)
                if number == 0:
                    layout = start.engine.layout()
                    cells_of_all[name, keep] = [n + layout.n_live for n in layout.composed]
                record = {
                    **self.facts,
                    "task": item.task,
                    "fitted": item.task in self._kinds,
                    "seed": item.seed,
                    "n_tokens": n_tokens,
                    "question": number,
                    "method": name,
                    "keep": keep,
                    "kept": round(start.kept, 4),
                    **self._measure(start.engine, asked, question, reference),
                    "select_seconds": round(start.seconds, 3),
                }
                if number == 0:
                    record["layer_cells"] = cells_of_all[name, keep]
                self._write(record)

    def _starts(
        self, item: Item, trials: Sequence[tuple[str, float]], progress: Callable[[str], None]
    ) -> dict[tuple[str, float], _Start]:
        """The starts of each trial's questions, and of the full cache's."""
        engine, model = self.engine, self.engine.model
        engine.clear()
        progress("reading")
        tokens = model.tokenize(self._head + item.context + "\n\n", add_bos=model.adds_bos)
        left_out = self._left_out.get(item.task)
        stats = Statistics(engine, tokens, self._scorer, left_out.scorer if left_out else None)
        n_full = len(tokens) * len(engine.shape.layers)
        full = {"": (engine, engine.snapshot())}
        starts = {}
        progress("scoring")
        for name, keep in [(FULL, 1.0), *trials]:
            base, kind = _without_type(name)
            if base == STREAMING:
                starts[name, keep] = self._streamed(stats, keep, kind)
                continue
            started = time.perf_counter()
            selection = None if base == FULL else find_method(base)(stats, int(keep * n_full))
            seconds = time.perf_counter() - started
            if kind not in full:
                full[kind] = self._quantized(full[""][1], kind, tokens)
            other, cells = full[kind]
            kept = (
                1.0 if selection is None else _n_bytes(selection, engine.shape) / (len(tokens) * engine.shape.row_bytes)
            )
            kept *= other.shape.row_bytes / engine.shape.row_bytes
            starts[name, keep] = _Start(other, cells, selection, kept, seconds)
        return starts

    def _quantized(self, cells: CacheSnapshot, kind: str, tokens: Sequence[int]) -> tuple[PatchedEngine, CacheSnapshot]:
        """The context in a cache of another type."""
        other, found = self._engine_of(kind), quantized(cells, self.engine.shape, kind)
        if other.moves_on:  # windows are of that type, too: those of a cache that has read the text itself
            other.clear()
            other.decode(tokens, logits=False)
            found = replace(found, state=other.checkpoint())
        return other, found

    def _engine_of(self, kind: str) -> PatchedEngine:
        """An engine as large as this evaluation's, of another cache type."""
        if not kind:
            return self.engine
        if kind not in self._others:
            self._others[kind] = self._new_engine(self._n_cells, kind)
        return self._others[kind]

    def _streamed(self, stats: Statistics, keep: float, kind: str) -> _Start:
        """The context as a chat would read it, turn by turn, in a cache of ``keep`` of its cells."""
        tokens = stats.tokens
        n_cells = max(round(keep * len(tokens) / CELL_PADDING), 1) * CELL_PADDING  # the record says how many they are
        small = self._new_engine(n_cells, kind or "f16", SMALL_MICRO_BATCH)
        try:
            memory = CacheMemory(small, len(tokens), scorer=self._scorer)
            size = -(-len(tokens) // _N_TURNS)
            for start in range(0, len(tokens), size):
                memory.feed(tokens[start : start + size])
            seconds = sum(report.seconds for report in memory.reports)
            kept = n_cells / len(tokens) * small.shape.row_bytes / self.engine.shape.row_bytes
            return _Start(self._engine_of(kind), small.snapshot(), None, kept, seconds)
        finally:
            small.close_context()

    def _new_engine(self, n_cells: int, cache_type: str = "f16", n_ubatch: int = PREFILL_MICRO_BATCH) -> PatchedEngine:
        return engine_beside(self.engine, n_cells, cache_type, n_threads=self.n_threads, n_ubatch=n_ubatch)

    def close(self) -> None:
        """Free what was opened beside the engine."""
        for other in self._others.values():
            other.close_context()
        self._others.clear()

    def _full_answer(self, asked: Sequence[int], max_tokens: int) -> Answer:
        self.engine.decode(asked)
        tokens: list[int] = []
        rows = []
        while len(tokens) < max_tokens:
            rows.append(log_softmax(self.engine.logits()))
            tokens.append(int(rows[-1].argmax()))
            if self.engine.model.is_end(tokens[-1]):
                break
            if len(tokens) < max_tokens:
                self.engine.decode(tokens[-1:])
        return Answer(tuple(tokens), np.stack(rows))

    def _measure(
        self, engine: PatchedEngine, asked: Sequence[int], question: Question, reference: Answer
    ) -> dict[str, Any]:
        expected = reference.tokens
        if len(asked) > 1:
            engine.decode(asked[:-1])
        before = engine.checkpoint()
        rows = log_softmax(engine.decode_all([asked[-1], *expected[:-1]]))
        kl = kl_divergence(reference.log_probs, rows)
        likelihood = rows[np.arange(len(expected)), expected].mean()
        best = rows.argmax(axis=1)
        n_same = int(np.cumprod(best == expected).sum())
        tokens = list(expected[:n_same])
        if n_same < len(expected):  # the answer parts here: go on from what it says instead
            if engine.moves_on:
                engine.drop_tail(len(expected), before)
                engine.decode([asked[-1], *tokens])
            else:
                engine.drop_tail(len(expected) - 1 - n_same)
            token = int(best[n_same])
            while not engine.model.is_end(token):
                tokens.append(token)
                if len(tokens) >= question.max_tokens:
                    break
                engine.decode([token])
                token = int(engine.logits().argmax())
        text = b"".join(engine.model.token_bytes(t) for t in tokens if not engine.model.is_end(t))
        answer = text.decode("utf-8", "replace")
        return {
            "score": round(question.score(answer), 4),
            "kl": round(float(kl.mean()), 5),
            "first_kl": round(float(kl[0]), 5),
            "log_likelihood": round(float(likelihood), 5),
            "answer": answer,
        }

    def _write(self, record: dict[str, Any]) -> None:
        if _key(record) in self._done:
            return
        self._done.add(_key(record))
        self.records.append(record)
        try:
            with self.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            raise KVComposeError(
                f"cannot write {self.output} ({error.strerror}): free space or name another"
            ) from error


def _n_bytes(selection: Sequence[Selection], shape: ModelShape) -> int:
    """Bytes of the cells that a selection fills."""
    return sum(rows.shape[1] * layer.row_bytes for rows, layer in zip(selection, shape.layers, strict=True))


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("task", "seed", "n_tokens", "question", "method", "keep"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a run; a last line that an interrupted run left unfinished is skipped.

    Raises InvalidInput for a file that holds something else.
    """
    if not path.exists():
        return []
    records = []
    raw = path.read_bytes()
    lines = raw.split(b"\n")
    for i, line in enumerate(lines):
        try:
            record = json.loads(line) if line else None
            if record is not None:
                _key(record)
                records.append(record)
        except (ValueError, KeyError, TypeError) as error:
            begins = line[: len(_BEGINNING)] == _BEGINNING[: len(line)]
            if i < len(lines) - 1 or not begins:
                raise InvalidInput(f"{path} line {i + 1} is no record of an evaluation: name another file") from error
            os.truncate(path, len(raw) - len(line))
    return records
