"""What may be done to composed cells through llama.cpp's own interface, of which the program does little."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvcompose_local.errors import KVComposeError
from kvcompose_local.llama_ffi.cells import PerLayerCells, library_is_patched
from kvcompose_local.llama_ffi.context import Context
from kvcompose_local.llama_ffi.library import lib
from kvcompose_local.llama_ffi.model import Model

pytestmark = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")

TOKENS = np.random.default_rng(3).integers(3, 259, 100).tolist()
N_READ, N_COMPOSED = 40, 20  # attention adds cells in another order then, which is worth some 0.003


@pytest.fixture
def cells(tiny_model: Callable[..., Path]) -> Iterator[Callable[[], tuple[Context, PerLayerCells]]]:
    """Makes caches of a model that has read :data:`N_READ` tokens."""
    path = tiny_model("llama", n_layers=4)
    opened: list[Context] = []

    def make() -> tuple[Context, PerLayerCells]:
        context = Context(
            Model(path), n_ctx=256, n_ubatch=64, n_threads=1, flash_attention=True, cache_type="f32", n_outputs=64
        )
        opened.append(context)
        context.decode(TOKENS[:N_READ])
        return context, PerLayerCells(context)

    yield make
    for context in opened:
        context.close()


def compose(cells: PerLayerCells, n_forgotten: int = 0, first: int = 0) -> None:
    """Compose tokens from ``first`` on, each cell of its own token in all heads: attention is what it was."""
    which = np.arange(first, first + N_COMPOSED, dtype=np.uint16)
    sources = [np.tile(which, (cells.layer(i).n_head_kv, 1)) for i in range(cells.n_layers)]
    cells.rewrite(60, 0 if n_forgotten else N_READ - N_COMPOSED, sources, n_forgotten)


def logits_after(context: Context, tokens: list[int]) -> np.ndarray:
    context.decode(tokens)
    return context.logits().copy()


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (5, N_COMPOSED), (0, N_COMPOSED), (12, 30)])
def test_composed_cells_that_were_removed_are_not_looked_at(
    cells: Callable[[], tuple[Context, PerLayerCells]], start: int, stop: int
) -> None:
    found = []
    for composed in (True, False):
        context, table = cells()
        whole = logits_after(cells()[0], TOKENS[N_READ:50])
        if composed:
            compose(table)
        context.remove(start, stop)
        found.append(logits_after(context, TOKENS[N_READ:50]))
    assert np.abs(found[0] - found[1]).max() < 0.02 < 0.2 < np.abs(found[0] - whole).max()


def remove_all(memory: int) -> None:
    lib.llama_memory_seq_rm(memory, 0, 0, -1)


def give_away(memory: int) -> None:
    """Let another sequence have all cells."""
    lib.llama_memory_seq_cp(memory, 0, 3, -1, -1)
    lib.llama_memory_seq_keep(memory, 3)


@pytest.mark.parametrize("leave_none", [remove_all, give_away])
def test_cells_that_are_not_of_the_sequence_are_not_looked_at(
    cells: Callable[[], tuple[Context, PerLayerCells]], leave_none: Callable[[int], None]
) -> None:
    context, table = cells()
    compose(table)
    leave_none(lib.llama_get_memory(context._ctx))
    other, _ = cells()
    other.clear()
    again = [logits_after(x, TOKENS[50:60]) for x in (context, other)]
    assert np.abs(again[0] - again[1]).max() < 0.02


def test_what_is_forgotten_is_not_composed(cells: Callable[[], tuple[Context, PerLayerCells]]) -> None:
    context, table = cells()
    before = table.info()
    with pytest.raises(KVComposeError):
        compose(table, n_forgotten=N_READ - N_COMPOSED, first=1)  # the last of the cells is among them
    after = table.info()
    assert (after.composed, after.n_live, after.pos_next) == (before.composed, before.n_live, before.pos_next)
    compose(table, n_forgotten=N_READ - N_COMPOSED)
    whole, _ = cells()
    whole.remove(N_COMPOSED)
    assert np.abs(logits_after(context, TOKENS[50:60]) - logits_after(whole, TOKENS[50:60])).max() < 0.02


@pytest.mark.parametrize("end", [2**31 - 1, -1, N_COMPOSED - 1])
def test_a_layout_ends_where_a_token_may_follow(cells: Callable[[], tuple[Context, PerLayerCells]], end: int) -> None:
    context, table = cells()
    with pytest.raises(KVComposeError):
        table.set_layout(100, np.zeros(0, np.int64), end, np.full(table.n_layers, N_COMPOSED))
    assert np.isfinite(logits_after(context, TOKENS[50:60])).all()
