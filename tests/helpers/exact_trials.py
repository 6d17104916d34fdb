"""Exact trials of an architecture's tiny model: bytes against a gather, logits against attention that is masked.

``python tests/helpers/exact_trials.py NAME...`` tries what :mod:`kvcompose_local.architectures.trial` does, and these.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from kvcompose_local.architectures import trial
from kvcompose_local.architectures.fixtures import N_VOCAB, tiny
from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.errors import KVComposeError
from kvcompose_local.interfaces import ByteArray, FloatArray, IntArray, Sampling
from kvcompose_local.llama_ffi.random_models import RandomModel

#: Tokens of each round of reading; after each, cells are rewritten.
ROUNDS = (60, 40, 30)
N_TAIL = 8
TOKENS = np.random.default_rng(3).integers(0, N_VOCAB, 200).tolist()
#: Less is rounding.
_SINK = 1e-5
#: Of the logits' deviation: the same kernels over another order of cells, and flash attention in their place.
SAME_KERNELS, FLASH = 1e-3, 0.05


@contextmanager
def opened(model: RandomModel, cache_type: str = "f16") -> Iterator[PatchedEngine]:
    """An engine whose model outlives it."""
    engine = PatchedEngine(
        model, n_cells=256, n_threads=1, cache_type=cache_type, n_ubatch=64, sampling=Sampling(temperature=0)
    )
    try:
        yield engine
    finally:
        engine.close_context()


def uneven(rng: np.random.Generator, engine: PatchedEngine) -> list[IntArray]:
    """Random rows, another number in each layer: of every three one keeps all and one nothing."""
    layout, selection = engine.layout(), []
    for i, layer in enumerate(engine.shape.layers):
        n = layout.composed[i] + layout.n_live - N_TAIL
        k = (int(rng.integers(1, n)), n, 0)[i % 3]
        selection.append(np.stack([rng.permutation(n)[:k] for _ in range(layer.n_kv_heads)]).astype(np.int64))
    return selection


def exported(engine: PatchedEngine) -> list[list[ByteArray]]:
    """K and V of each layer, uint8 (rows, H, head bytes): composed cells, then live ones."""
    cells = engine.snapshot()
    return [
        [plane.reshape(len(plane), layer.n_kv_heads, -1) for plane in (keys, values) if plane.size]
        for keys, values, layer in zip(cells.keys, cells.values, engine.shape.layers, strict=True)
    ]


def check_bytes(model: RandomModel, cache_type: str) -> None:
    """A rewrite, and one of what it left, are what a gather of rows by head gives."""
    rng, read = np.random.default_rng(1), 0
    with opened(model, cache_type) as engine:
        for n in ROUNDS:
            engine.decode(TOKENS[read : read + n])
            read += n
            before, selection = exported(engine), uneven(rng, engine)
            engine.rewrite(selection, N_TAIL)
            for planes, rows, after in zip(before, selection, exported(engine), strict=True):
                for plane, found in zip(planes, after, strict=True):
                    composed = np.stack([plane[rows[h], h] for h in range(len(rows))], axis=1)
                    wanted = np.concatenate([composed, plane[len(plane) - N_TAIL :]])
                    assert np.array_equal(found, wanted), f"other bytes of {cache_type} cells than a gather gives"


def masked(kept: Sequence[IntArray], first_live: int, layer: int, weights: FloatArray) -> None:
    """Set softmax weights of what a head did not keep to 0, in place, and let the others share what is left.

    kept: of each layer the positions that its KV heads kept, (H, K); later ones, from ``first_live`` on, all count.
    """
    group = len(weights) // len(kept[layer])
    for head, positions in enumerate(kept[layer]):
        of_head = weights[head * group : (head + 1) * group]
        sink = 1 - of_head.sum(axis=2, keepdims=True, dtype=np.float64)  # what a sink, which is no cell, got of them
        of_head[:, :, np.setdiff1d(np.arange(first_live), positions)] = 0
        left = of_head.sum(axis=2, keepdims=True, dtype=np.float64) + np.where(sink > _SINK, sink, 0)
        of_head /= np.maximum(left, np.finfo(np.float32).tiny)


def check_attention(model: RandomModel, *, rewinds: bool) -> None:
    """After uneven rewrites the next logits equal the ones of a whole cache in which each head sees what it kept."""
    rng, read = np.random.default_rng(4), 0
    with opened(model, "f32") as engine, opened(model, "f32") as whole:
        n_layers = len(engine.shape.layers)
        kept = [np.zeros((layer.n_kv_heads, 0), np.int64) for layer in engine.shape.layers]
        n_live = 0

        def both(tokens: list[int], mask: Callable[[int, FloatArray], None]) -> None:
            with engine._cells.visible_softmax():
                engine.decode(tokens)
            with whole.watching(mask):
                whole.decode(tokens)

        for n in ROUNDS:
            mask = partial(masked, kept, read - n_live)
            both(TOKENS[read : read + n], mask)
            read, n_live = read + n, n_live + n
            _assert_close(engine.logits(), whole.logits(), SAME_KERNELS, f"after {read} tokens")
            selection = uneven(rng, engine)
            engine.rewrite(selection, N_TAIL)
            live = np.arange(read - n_live, read - N_TAIL)
            for i in range(n_layers):
                rows = np.concatenate([kept[i], np.tile(live, (len(kept[i]), 1))], axis=1)
                kept[i] = np.take_along_axis(rows, selection[i], axis=1)
            n_live = N_TAIL
        flash = None
        if rewinds:
            engine.decode(TOKENS[read : read + 1])
            flash = engine.logits()
            engine.drop_tail(1)
        both(TOKENS[read : read + 1], partial(masked, kept, read - n_live))
        _assert_close(engine.logits(), whole.logits(), SAME_KERNELS, "at the end")
        if flash is not None:
            _assert_close(flash, whole.logits(), FLASH, "with flash attention")


def _assert_close(one: FloatArray, two: FloatArray, allowed: float, when: str) -> None:
    assert np.isfinite(one).all(), f"logits are not finite {when}"
    assert two.std() > 0, f"all logits are equal {when}"
    off = float(np.abs(one - two).max() / two.std())
    assert off < allowed, f"logits differ by {off:.4f} of their deviation {when}"


def check_dropping_matters(model: RandomModel) -> None:
    """Else the masked comparison would say nothing."""
    with opened(model) as engine, opened(model) as whole:
        for each in (engine, whole):
            each.decode(TOKENS[:60])
        engine.rewrite([np.zeros((layer.n_kv_heads, 0), np.int64) for layer in engine.shape.layers], N_TAIL)
        for each in (engine, whole):
            each.decode(TOKENS[60:61])
        off = float(np.abs(engine.logits() - whole.logits()).max() / whole.logits().std())
        assert off > 5 * SAME_KERNELS, f"logits hardly change, by {off:.4f}, when all is dropped"


def check_turns(model: RandomModel, cache_type: str, allowed: float) -> None:
    """Of one token again and again, all rows are alike before they are turned.

    Attention to values that are all alike gives that value, so that this holds of every layer, unless sinks take a
    share or positions are learned.
    """
    with opened(model, cache_type) as engine:
        engine.decode([7] * 40)
        for i, (keys, values) in enumerate(engine.live_rows(40)):
            for name, rows in (("keys", keys), ("values", values)):
                off = float(np.abs(rows - rows[:, :1]).max(initial=0) / np.abs(rows).max(initial=1e-6))
                assert off < allowed, f"{cache_type} {name} of layer {i} differ by {off:.4f} before they are turned"
            stored = engine._cells.numbers(i, values=False, first=0, stop=40)
            turns = bool(np.abs(stored - stored[:, :1]).max() > 0.1 * np.abs(stored).max())
            assert turns == (engine._turns[i].rope.n_rotated > 0), f"layer {i} turns its keys, or not: {turns}"


#: Attention sinks take a share that depends on how many cells there are.
SINKS = frozenset({"gpt-oss", "mimo2", "granite_swa"})


def exact(arch: str, *, rewinds: bool) -> None:
    """All of these; rewinds: whether its memory goes back by itself. Raises AssertionError."""
    model = tiny(arch)
    try:
        for cache_type in ("f16", "q8_0"):
            check_bytes(model, cache_type)
        if rewinds and model.is_rotated and arch not in SINKS:
            check_turns(model, "f16", 4e-3)
            check_turns(model, "q8_0", 6e-2)
        check_attention(model, rewinds=rewinds)
        check_dropping_matters(model)
    finally:
        model.close()


def tried(arch: str) -> dict[str, Any]:
    """What the package's trial tells, and of what is composed how it went here."""
    found = trial.tried(arch)
    if not found["tried"]:
        return found
    try:
        exact(arch, rewinds=found["memory"].startswith("attention"))
    except (AssertionError, KVComposeError) as error:
        return found | {"why": f"FAILED: {error}", "tried": ""}
    return found | {"tried": f"{found['tried']}; bytes of a gather, logits of masked attention"}


if __name__ == "__main__":
    trial.main(sys.argv[1:], tried)
