"""Decoding, timed here and in a process of its own with another library."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TextIO, cast

from kvcompose_local.engines.base import LlamaEngine
from kvcompose_local.engines.stock import StockEngine
from kvcompose_local.errors import EngineError
from kvcompose_local.interfaces import CacheSnapshot, Sampling
from kvcompose_local.llama_ffi.model import Model

_WARM_UP = 3
#: Tokens of a question, as many as a line that a user types has.
QUESTION = 30


def time_round(engine: LlamaEngine, n: int) -> tuple[float, float]:
    """Tokens a second over ``n`` greedy tokens, sampling included, after a short warm-up, and seconds of a question.

    The latter is read at once, and one token sampled. The tokens are fewer where the cache has no room for so many; it
    is left as it was.
    """
    token, n = 1, min(n, engine.layout().n_free - _WARM_UP)
    before = engine.checkpoint()
    for i in range(_WARM_UP + n):
        if i == _WARM_UP:
            started = time.perf_counter()
        engine.decode([token])
        token = engine.sample()
    rate = n / (time.perf_counter() - started)
    engine.drop_tail(_WARM_UP + n, before)
    started = time.perf_counter()
    engine.decode([token] * QUESTION)
    engine.sample()
    seconds = time.perf_counter() - started
    engine.drop_tail(QUESTION, before)
    return rate, seconds


class Worker:
    """The same decoding in a process of its own with a library of choice."""

    def __init__(self, library: Path, model: Path, snapshot: CacheSnapshot, n_cells: int, n_threads: int) -> None:
        """library: the folder of libllama. Raises EngineError when the process cannot load it."""
        with ExitStack() as stack:
            file = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".cells"))
            pickle.dump((str(model), snapshot, n_cells, n_threads), file)
            file.flush()
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "kvcompose_local.bench.decoding", file.name],
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
            raise EngineError("the other llama.cpp could not be measured: its process ended")
        return line

    def time_round(self, n: int) -> tuple[float, float]:
        """:func:`time_round` over there."""
        with suppress(BrokenPipeError):  # the missing answer gives the clearer error
            self._to.write(f"{n}\n")
            self._to.flush()
        rate, seconds = map(float, self._line().split())
        return rate, seconds

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
            print(*time_round(engine, int(line)), flush=True)


if __name__ == "__main__":
    _work(sys.argv[1])
