"""Damaged recurrent states and sliding windows: an error, a cache that still works, and never an abort.

``python damaged_states.py SHAPE SEED`` tries one, in a process of its own, because what it looks for is an abort; under
a sanitizer where the library was built with one.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

import numpy as np
from hybrid_shapes import SMALL, WINDOWS
from random_models import N_VOCAB, RandomModel

from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.errors import KVComposeError
from kvcompose_local.interfaces import ByteArray, Sampling

SHAPES = SMALL | WINDOWS
N_TRIES = 200


def damaged(state: ByteArray, rng: np.random.Generator) -> ByteArray:
    """Bytes that are others, missing or too many; most of what tells of the rest stands at the beginning."""
    state = state.copy()
    kind = int(rng.integers(4))
    if kind == 0:
        return state[: int(rng.integers(len(state)))]
    if kind == 1:
        return np.concatenate([state, rng.integers(0, 256, int(rng.integers(1, 50))).astype(np.uint8)])
    span = 64 if kind == 2 else len(state)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(min(span, len(state)) - 4))
        number = int(rng.choice([0, 1, 2, 255, 2**31 - 1, 2**32 - 1, int(rng.integers(2**32))]))
        state[at : at + 4] = np.array([number], "<u4").view(np.uint8)
    return state


def main(name: str, seed: str) -> None:
    rng, tokens = np.random.default_rng(int(seed)), np.random.default_rng(1).integers(0, N_VOCAB, 200).tolist()
    outcomes: Counter[str] = Counter()
    with PatchedEngine(
        RandomModel(SHAPES[name]), n_cells=256, n_threads=1, n_ubatch=64, sampling=Sampling(temperature=0)
    ) as engine:
        engine.decode(tokens[:50])
        checkpoint = engine.checkpoint()
        engine.decode(tokens[50:70])
        good = engine.snapshot()
        for i in range(N_TRIES):
            try:
                if i % 2:
                    engine.restore(replace(good, state=damaged(good.state, rng)))
                else:
                    engine.restore(good)
                    engine.drop_tail(20, damaged(checkpoint, rng))
                outcomes["taken"] += 1
            except KVComposeError:
                outcomes["refused"] += 1
            position = engine.layout().position
            if 0 < position <= 4096 - 10:
                try:
                    engine.decode(tokens[:10])
                except KVComposeError:
                    outcomes["not gone on with"] += 1
            engine.clear()
            engine.decode(tokens[:10])
            assert np.isfinite(engine.logits()).all()
        engine.restore(good)
        engine.decode(tokens[70:80])
        logits = engine.logits()
        engine.clear()
        engine.decode(tokens[:50])
        engine.decode(tokens[50:70])
        engine.decode(tokens[70:80])
        np.testing.assert_allclose(engine.logits(), logits, atol=1e-2 * logits.std())
    print(N_TRIES, "states:", dict(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
