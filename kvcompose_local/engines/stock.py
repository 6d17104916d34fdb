"""The engine on an unpatched llama.cpp: one cell table, so every layer keeps the same number of cells.

The cache is rewritten through the public state functions: serialize, gather in NumPy, remove the cells, put the new
ones back. Flash attention would hide the softmax and cannot be switched at run time, so below budget 1 it stays off.
It is the fallback where nobody can compile, and the twin that the patched engine is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvcompose_local.arena import value_types
from kvcompose_local.engines.base import LlamaEngine, softmax_queries
from kvcompose_local.engines.state_format import CellBlock, Plane, parse_state, row_bytes, write_state
from kvcompose_local.errors import ContextFull, EngineError, InvalidInput, ModelError
from kvcompose_local.interfaces import (
    ByteArray,
    CacheLayout,
    CacheSnapshot,
    LayerShape,
    ModelShape,
    Sampling,
    Selection,
)
from kvcompose_local.llama_ffi.context import Context
from kvcompose_local.llama_ffi.model import Model


def uniform_shape(model: Model, cache_type: str, *, scoring: bool) -> ModelShape:
    """The layers of a model from its GGUF header.

    Raises ModelError where layers differ, which only the patched engine can compose; without ``scoring`` they may.
    """
    arch, heads, kv_heads = model.architecture, model.heads, model.kv_heads
    if scoring and (len({*heads}) > 1 or len({*kv_heads}) > 1):
        raise ModelError(f"layers of {arch} differ in heads, which the stock engine cannot compose")
    sizes, types = model.head_sizes("key_length", "value_length"), [kind.ggml_type for kind in value_types(cache_type)]

    def layer(i: int) -> LayerShape:
        row = sum(row_bytes(kind, kv_heads[i] * size) for kind, size in zip(types, sizes, strict=True))
        return LayerShape(i, max(heads[i], 1), max(kv_heads[i], 1), row)  # recurrent layers have no heads

    layers = tuple(map(layer, range(model.n_layers)))
    f16_row_bytes = 2 * sum(sizes) * sum(kv_heads)
    return ModelShape(model.name, arch, model.n_ctx_train, model.n_vocab, layers, cache_type, f16_row_bytes)


def why_not_stock(model: Model) -> str:
    """Why this engine cannot compose a model's cells, empty where it can; :func:`uniform_shape` looks at heads."""
    kind = model.cache_kind()
    if kind == "attention":
        return ""
    return f"{model.architecture} has a {kind} cache, which the stock engine cannot compose"


class StockEngine(LlamaEngine):
    """:class:`kvcompose_local.interfaces.Engine` with equal budgets.

    n_cells: size of the cell table, a multiple of 256; n_positions: what the chat may span, ``n_cells`` if not given.
    ``scoring`` False (budget 1) turns flash attention on.
    """

    name = "stock"
    per_layer = False

    def __init__(
        self,
        model: Model,
        *,
        n_cells: int,
        n_threads: int,
        n_positions: int | None = None,
        scoring: bool = True,
        cache_type: str = "f16",
        n_ubatch: int | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        kind = model.cache_kind()
        if scoring and (obstacle := why_not_stock(model)):
            raise ModelError(f"{obstacle}: use --budget 1, or build the patched engine with `kvcompose-local build`")
        if scoring and cache_type != "f16":
            raise InvalidInput("the stock engine composes an F16 cache only; `kvcompose-local build` lifts that")
        shape = uniform_shape(model, cache_type, scoring=scoring)
        # A sixth of the cache, more than a budget is charged with, since all reading goes through the softmax here.
        scoring_queries = softmax_queries(n_cells, shape.layers[0].n_heads, n_cells * shape.row_bytes // 6)
        context = Context(
            model,
            n_ctx=n_cells,
            n_ubatch=n_ubatch or (scoring_queries if scoring else 512),
            n_threads=n_threads,
            flash_attention=not scoring,
            cache_type=cache_type,
            callback_at_creation=scoring,
            n_positions=n_positions,
        )
        wanted = context.wanted_rope_factors
        if scoring and context.rope_factors != wanted:
            context.close()
            raise ModelError(
                f"llama.cpp without the patches takes the {context.rope_factors} RoPE factors of {model.name} for "
                f"{n_cells} cells, and {n_positions} positions want the {wanted} ones: "
                "use --budget 1, or build the patched engine with `kvcompose-local build`"
            )
        super().__init__(model, context, replace(shape, rope_factors=context.rope_factors), sampling)
        self.cache_bytes = n_cells * shape.row_bytes
        self.arena_bytes = (self.cache_bytes,)
        # What moves on cannot be given back: a window by more than a micro-batch, a recurrent state at all.
        self.max_replay = context.n_ubatch if kind == "sliding-window" else n_cells
        self.max_drop = 0 if context.is_recurrent else self.max_replay
        self.moves_on = kind == "sliding-window" or context.is_recurrent
        # llama.cpp's own serialization of the others is not taken apart here.
        self.cannot_snapshot = (
            "" if kind in ("attention", "rotation-free") else f"{model.architecture} has a {kind} cache"
        )
        if not self.cannot_snapshot and not all(model.kv_heads):
            self.cannot_snapshot = f"some layers of {model.architecture} have no attention"
        self._n_cells = n_cells
        self._types = [kind.ggml_type for kind in value_types(cache_type)]
        self._transposed = scoring  # llama.cpp lays V out by element where flash attention is off
        self._n_composed = 0
        self._first_live = 0

    def layout(self) -> CacheLayout:
        # Live cells hold consecutive positions, and composed cells the positions just before: counting is enough.
        position = self._context.next_position
        n_live = position - self._first_live
        free = self._n_cells - self._n_composed - n_live
        return CacheLayout((self._n_composed,) * len(self.shape.layers), n_live, free, position)

    def _live_columns(self) -> slice:
        # Cells stand where they were put: composed ones first, then the live ones without a gap.
        return slice(self._n_composed, self._n_composed + self.layout().n_live)

    def softmax_micro_batch(self, n_tokens: int) -> int:
        return self._context.n_ubatch

    def _read_cells(self) -> CellBlock:
        cells = parse_state(self._context.state())
        expected = self._n_composed + self.layout().n_live
        if len(cells.positions) != expected:
            raise EngineError(f"llama.cpp holds {len(cells.positions)} cells where {expected} were put")
        return cells

    def _replace_cells(self, cells: CellBlock, n_live: int, position: int) -> None:
        blob = write_state(cells)
        self._context.remove(0)
        self._context.set_state(blob)
        self._n_composed = len(cells.positions) - n_live
        self._first_live = position - n_live

    def rewrite(
        self,
        selection: Sequence[Selection],
        n_tail: int,
        n_forgotten: int = 0,
        checkpoint: ByteArray | None = None,
    ) -> None:
        before = self._read_cells()
        layout = self.layout()
        if not 0 <= n_tail <= layout.n_live:
            raise InvalidInput(f"cannot keep {n_tail} of {layout.n_live} live cells")
        if n_forgotten < 0 or (n_tail and n_forgotten):
            raise InvalidInput(f"{n_forgotten} positions cannot be forgotten before a tail of {n_tail}")
        after = before.gather(selection, n_tail, n_forgotten)
        if not 0 < len(after.positions) <= self._n_cells:
            raise ContextFull(f"{len(after.positions)} cells do not fit in {self._n_cells}")
        self._replace_cells(after, n_tail, layout.position - n_forgotten)

    def snapshot(self) -> CacheSnapshot:
        if self.cannot_snapshot:
            raise ModelError(f"{self.cannot_snapshot}, which cannot be saved")
        layout = self.layout()
        cells = self._read_cells()
        empty = np.zeros(0, np.uint8)
        if not len(cells.positions):  # llama.cpp tells nothing of the layers then
            keys = tuple(np.zeros((0, layer.row_bytes), np.uint8) for layer in self.shape.layers)
            return CacheSnapshot(layout.composed, 0, 0, keys, (np.zeros((0, 0), np.uint8),) * len(keys), empty)
        keys = tuple(np.array(plane.rows()) for plane in cells.keys)
        values = tuple(np.array(plane.rows()) for plane in cells.values)
        return CacheSnapshot(layout.composed, layout.n_live, layout.position, keys, values, empty)

    def _put_back(self, snapshot: CacheSnapshot) -> None:
        if len(set(snapshot.composed)) > 1:
            raise InvalidInput("these cells have layers of different lengths, which only the patched engine can hold")
        n = len(snapshot.keys[0])
        if n > self._n_cells:
            raise ContextFull(f"{n} cells do not fit in {self._n_cells}")
        cells = CellBlock(
            np.arange(snapshot.position - n, snapshot.position, dtype=np.int32),
            tuple(Plane.of_rows(self._types[0], rows) for rows in snapshot.keys),
            tuple(Plane.of_rows(self._types[1], rows, transposed=self._transposed) for rows in snapshot.values),
        )
        self._replace_cells(cells, snapshot.n_live, snapshot.position)

    def clear(self) -> None:
        self._context.clear()
        self._n_composed = 0
        self._first_live = 0
