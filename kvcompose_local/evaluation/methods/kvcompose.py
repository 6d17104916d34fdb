"""KVCompose as published (arXiv 2509.05165), as the program has it, and variants of that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcompose_local.composing.budgets import allocate_bytes
from kvcompose_local.composing.choice import Levels, choose, competing
from kvcompose_local.composing.policy import LEAST_TAIL
from kvcompose_local.composing.scorer import Scorer
from kvcompose_local.composing.scores import token_scores
from kvcompose_local.composing.selection import select_composites
from kvcompose_local.evaluation.methods import method
from kvcompose_local.evaluation.statistics import Statistics
from kvcompose_local.interfaces import FloatArray, ModelShape, Selection

#: The program by a profile that does not know the kind of text.
LEFT_OUT = "left-out"


def as_the_program(stats: Statistics, scorer: Scorer | None, scores: Sequence[FloatArray]) -> list[Levels]:
    """The levels at which cells compete in a chat: L uint16 arrays (H, T). The newest tokens stay, like a tail."""
    positions = np.arange(stats.n_tokens)
    newest = positions >= stats.n_tokens - LEAST_TAIL
    return [competing(scorer, i, rows, positions, stats.n_tokens, newest) for i, rows in enumerate(scores)]


def chosen(shape: ModelShape, levels: Sequence[Levels], n_cells: int, *, per_layer: bool = True) -> list[Selection]:
    """Composite tokens as the program chooses them, in the bytes of ``n_cells`` cells of all layers' mean size."""
    row_bytes = np.array([layer.row_bytes for layer in shape.layers], np.int64)
    room = np.array([n_cells * shape.row_bytes // len(row_bytes)], np.int64)
    return choose([(rows,) for rows in levels], row_bytes, room, np.zeros_like(row_bytes), per_layer=per_layer)


@method("published")
def published(stats: Statistics, n_cells: int) -> list[Selection]:
    """One replay of the whole text, mean over the group, plus the mean over KV heads."""
    layers = zip(stats.whole_replay, stats.engine.shape.layers, strict=True)
    scores = [token_scores(attention[None], layer.n_kv_heads)[0] for attention, layer in layers]
    return [*select_composites(scores, allocate_bytes(scores, [1] * len(scores), n_cells))]


@method("replay")
def replay(stats: Statistics, n_cells: int) -> list[Selection]:
    """The program with ``--scoring replay``."""
    return chosen(stats.engine.shape, as_the_program(stats, None, stats.replay), n_cells)


@method("kvcompose-local")
def ours(stats: Statistics, n_cells: int) -> list[Selection]:
    """The program."""
    return chosen(stats.engine.shape, as_the_program(stats, *stats.cells), n_cells)


@method(LEFT_OUT)
def left_out(stats: Statistics, n_cells: int) -> list[Selection]:
    """The program with a profile that was fitted to no text of this kind."""
    return chosen(stats.engine.shape, as_the_program(stats, *stats.unseen), n_cells)


@method("uniform")
def uniform(stats: Statistics, n_cells: int) -> list[Selection]:
    """The program, with equally many cells in every layer."""
    return chosen(stats.engine.shape, as_the_program(stats, *stats.cells), n_cells, per_layer=False)
