"""A trial of an architecture: a chat of a tiny model under a budget, as ``run`` would have it.

``python -m kvcompose_local.architectures.trial NAME...`` makes each and prints one line of JSON of it: its name before
anything is done, and then what was found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvcompose_local.architectures.fixtures import N_VOCAB, tiny
from kvcompose_local.chat.memory import CacheMemory, MemoryState
from kvcompose_local.engines import open_engine
from kvcompose_local.engines.base import LlamaEngine
from kvcompose_local.errors import EngineError, KVComposeError, ModelError
from kvcompose_local.interfaces import ByteArray, FloatArray, Sampling
from kvcompose_local.llama_ffi.context import Context
from kvcompose_local.llama_ffi.memory import Memory, memory_of
from kvcompose_local.llama_ffi.model import Model

#: Positions, and the share of their F16 bytes: the least arena that llama.cpp has, so that little text compacts often.
N_CTX, BUDGET = 576, 0.25
N_TOKENS = 480
#: The least that these tokens compact, in a chat that learns its scorer by itself.
N_COMPACTIONS = 5
#: Of the logits' deviation: sums of floats in another order, and cells of 4 bits that are made anew.
ALLOWED = 0.05


def chat(arch: str) -> str:
    """Read under a budget, go back, save and restore, and say what was done. Raises EngineError where that fails."""
    tokens = np.random.default_rng(1).integers(0, N_VOCAB, N_TOKENS + 8).tolist()
    engine, positions = open_engine(
        Path(arch),
        n_ctx=N_CTX,
        budget=BUDGET,
        n_threads=1,
        sampling=Sampling(temperature=0),
        load=lambda _path, **loading: tiny(arch, **loading),
    )
    with engine:
        memory = CacheMemory(engine, positions)
        memory.feed(tokens[:N_TOKENS])
        _check(engine.cache_bytes <= BUDGET * N_CTX * engine.shape.uncompressed_row_bytes, "more than the budget")
        n_compactions = len(memory.reports)
        _check(n_compactions >= N_COMPACTIONS, f"{n_compactions} compactions")
        _check(memory.used_bytes < engine.shape.row_bytes * memory.position, "nothing was dropped")

        question, answers = tokens[N_TOKENS - 4 : N_TOKENS], []
        for _ in range(2):
            memory.rewind(N_TOKENS - 4)
            _check(memory.position == N_TOKENS - 4, f"back at {memory.position}")
            memory.feed(question)
            answers.append([_logits(engine, memory, [engine.sample()]) for _ in range(3)])
        _check_close(np.array(answers[0]), np.array(answers[1]), "after going back")

        state = memory.state()
        before = _logits(engine, memory, tokens[N_TOKENS:])
        memory.clear()
        memory.restore(state)
        for one, two in zip(_planes(state), _planes(memory.view()), strict=True):
            _check(np.array_equal(one, two), "other cells from a saved state")
        _check_close(before, _logits(engine, memory, tokens[N_TOKENS:]), "from a saved state")
        return f"{n_compactions} compactions of {engine.shape.cache_type} cells, back, saved and restored"


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise EngineError(otherwise)


def _check_close(one: FloatArray, two: FloatArray, when: str) -> None:
    _check(bool(np.isfinite(one).all()), f"logits are not finite {when}")
    _check(float(one.std()) > 0, f"all logits are equal {when}")
    off = float(np.abs(one - two).max() / one.std())
    _check(off < ALLOWED, f"logits differ by {off:.3f} of their deviation {when}")


def _planes(state: MemoryState) -> list[ByteArray]:
    return [*state.cells.keys, *state.cells.values, state.cells.window]


def _logits(engine: LlamaEngine, memory: CacheMemory, tokens: Sequence[int]) -> FloatArray:
    memory.feed(tokens)
    return engine.logits()


def _memory(model: Model) -> Memory:
    """Of the model as it would be run."""
    with Context(model, n_ctx=N_CTX, n_ubatch=64, n_threads=1, flash_attention=True, n_outputs=64) as context:
        return memory_of(context)


def tried(arch: str) -> dict[str, Any]:
    """Whether llama.cpp makes a model of it, what memory that has, whether it is composed, and what was done."""
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
        return found | {"tried": chat(arch)}
    except KVComposeError as error:
        return found | {"why": f"FAILED: {error}"}


def main(names: Sequence[str], trial: Callable[[str], dict[str, Any]] = tried) -> None:
    """Try these, each in a line before and a line after."""
    for name in names:
        print(json.dumps({"begun": name}), flush=True)
        print(json.dumps(trial(name)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
