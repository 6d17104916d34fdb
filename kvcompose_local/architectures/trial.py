"""A trial of an architecture: a chat of a tiny model under a budget, as ``run`` would have it.

``python -m kvcompose_local.architectures.trial NAME...`` makes each and prints one line of JSON of it: its name before
anything is done, and then what was found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvcompose_local.architectures.fixtures import N_VOCAB, tiny
from kvcompose_local.arena import CELL_PADDING
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.chat.state import MemoryState
from kvcompose_local.engines import open_engine
from kvcompose_local.engines.base import LlamaEngine
from kvcompose_local.errors import EngineError, KVComposeError, ModelError
from kvcompose_local.interfaces import ByteArray, FloatArray, Sampling
from kvcompose_local.llama_ffi.context import Context
from kvcompose_local.llama_ffi.memory import Memory, memory_of
from kvcompose_local.llama_ffi.model import Model

#: The share of the bytes of F16 cells: with few positions it buys the least arena that llama.cpp has, so that little
#: text compacts often.
BUDGET = 0.25
#: Tolerances, as shares of the logits' deviation: for sums in another order, and for 4-bit cells that are made anew.
ALLOWED = 0.05


@dataclass(frozen=True)
class Length:
    """The length of a trial: positions, tokens to read, and the fewest compactions where a replay teaches a scorer."""

    n_ctx: int = 576
    n_tokens: int = 480
    n_compactions: int = 5


def chat(load: Callable[..., Model], n_vocab: int, length: Length, gpu_layers: int = 0) -> tuple[str, int]:
    """Read under a budget, go back, save and restore. Raises EngineError where that fails.

    load: as :class:`Model`, without a path. Returns how cells were stored, and how often they were compacted.
    """
    n = length.n_tokens
    tokens = np.random.default_rng(1).integers(0, n_vocab, n + 8).tolist()
    budget = 2 * BUDGET if gpu_layers else BUDGET  # cells of a GPU are larger, and so few positions buy no 256
    engine, positions = open_engine(
        Path("trial"),
        n_ctx=length.n_ctx,
        budget=budget,
        cache_type="f16" if gpu_layers else None,
        n_threads=1,
        gpu_layers=gpu_layers,
        sampling=Sampling(temperature=0),
        load=lambda _path, **loading: load(**loading),
    )
    with engine:
        memory = CacheMemory(engine, positions)
        memory.feed(tokens[: n // 2])
        memory.feed(tokens[n // 2 : n - 4])
        memory.mark()
        memory.feed(tokens[n - 4 : n])
        whole = length.n_ctx * engine.shape.uncompressed_row_bytes
        _check(engine.cache_bytes <= budget * whole, "more than the budget")
        n_compactions = len(memory.reports)
        _check(n_compactions >= length.n_compactions, f"{n_compactions} compactions")
        _check(memory.used_bytes < engine.shape.row_bytes * memory.position, "nothing was dropped")

        answers = []
        for _ in range(2):
            _check(memory.rewind(n - 4), "all was read again")
            _check(memory.position == n - 4, f"back at {memory.position}")
            memory.feed(tokens[n - 4 : n])
            answers.append([_logits(engine, memory, [engine.sample()]) for _ in range(3)])
        _check_close(np.array(answers[0]), np.array(answers[1]), "after going back")

        state = memory.state()
        before = _logits(engine, memory, tokens[n:])
        memory.clear()
        memory.restore(state)
        for one, two in zip(_planes(state), _planes(memory.view()), strict=True):
            _check(np.array_equal(one, two), "other cells from a saved state")
        _check_close(before, _logits(engine, memory, tokens[n:]), "from a saved state")
        return engine.shape.cache_type, n_compactions


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise EngineError(otherwise)


def _check_close(one: FloatArray, two: FloatArray, when: str) -> None:
    _check(bool(np.isfinite(one).all()), f"logits are not finite {when}")
    _check(float(one.std()) > 0, f"all logits are equal {when}")
    off = float(np.abs(one - two).max() / one.std())
    _check(off < ALLOWED, f"logits differ by {off:.3f} of their deviation {when}")


def _planes(state: MemoryState) -> list[ByteArray]:
    return [*state.cells.keys, *state.cells.values, state.cells.state]


def _logits(engine: LlamaEngine, memory: CacheMemory, tokens: Sequence[int]) -> FloatArray:
    memory.feed(tokens)
    return engine.logits()


def _memory(model: Model) -> Memory:
    """The memory of the model as ``run`` would open it."""
    with Context(model, n_ctx=CELL_PADDING, n_ubatch=64, n_threads=1, flash_attention=True, n_outputs=64) as context:
        return memory_of(context)


def tried(arch: str) -> dict[str, Any]:
    """Try one architecture: whether llama.cpp makes a model, its memory, whether it is composed, how a chat went."""
    found: dict[str, Any] = {"architecture": arch, "memory": "", "why": "", "tried": ""}
    try:
        model = tiny(arch)
    except ModelError as error:
        return found | {"why": f"not made: {str(error).partition(': ')[2] or error}"}
    try:
        generates, memory = model.can_generate, _memory(model)
    finally:
        model.close()
    found["memory"] = memory.words
    if not generates:
        return found | {"why": "no language model that writes one token after another"}
    if memory.obstacle:
        return found | {"why": memory.obstacle}
    try:
        cells, n_compactions = chat(partial(tiny, arch), N_VOCAB, Length())
    except KVComposeError as error:
        return found | {"why": f"FAILED: {error}"}
    return found | {"tried": f"{n_compactions} compactions of {cells} cells, back, saved and restored"}


def main(names: Sequence[str], trial: Callable[[str], dict[str, Any]] = tried) -> None:
    """Try these architectures; print a line before and a line after each."""
    for name in names:
        print(json.dumps({"begun": name}), flush=True)
        print(json.dumps(trial(name)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
