"""The engine on the patched llama.cpp (``patches/``): each layer holds its own number of cells, in one arena a device.

Flash attention stays on; the explicit softmax is switched on for a replay alone, and no callback is installed
otherwise. The arena is the KV buffer that llama.cpp allocates for ``n_cells`` cells: it never grows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from kvcompose_local.engines.base import LlamaEngine, micro_batch
from kvcompose_local.errors import ContextFull, InvalidInput
from kvcompose_local.interfaces import CacheLayout, IntArray, LayerShape, ModelShape, Sampling
from kvcompose_local.llama_ffi import F16, Context, Model, PerLayerCells

#: Tokens of a prefill micro-batch.
PREFILL_MICRO_BATCH = 512
#: The strictest alignment of a buffer type that llama.cpp has, in bytes; K and V of each layer may lose as much.
ALIGNMENT = 256


class PatchedEngine(LlamaEngine):
    """:class:`kvcompose_local.interfaces.Engine` with a budget of its own for each layer.

    n_cells: the arena's size in cells of an uncompressed cache, a multiple of 256. Raises ModelError where the model's
    cache cannot be composed.
    """

    name = "patched"
    per_layer = True

    def __init__(
        self,
        model: Model,
        *,
        n_cells: int,
        n_threads: int,
        cache_type: int = F16,
        n_ubatch: int = PREFILL_MICRO_BATCH,
        sampling: Sampling | None = None,
    ) -> None:
        context = Context(
            model,
            n_ctx=n_cells,
            n_ubatch=n_ubatch,
            n_threads=n_threads,
            flash_attention=True,
            cache_type=cache_type,
        )
        try:
            self._cells = PerLayerCells(context)
        except BaseException:
            context.close()
            raise
        layers = [self._cells.layer(i) for i in range(self._cells.n_layers)]
        shape = ModelShape(
            model.name,
            model.architecture,
            model.n_ctx_train,
            model.n_vocab,
            tuple(
                LayerShape(x.il, model.n_heads_of(x.il), x.n_head_kv, x.k_row_bytes + x.v_row_bytes, x.arena)
                for x in layers
            ),
        )
        super().__init__(model, context, shape, sampling)
        info = self._cells.info()
        # A window cache overwrites what a replay of more than one micro-batch would have to give back.
        self.max_replay = self._replay_micro_batch() if info.has_window else n_cells
        slack = [2 * ALIGNMENT * sum(x.arena == i for x in layers) for i in range(info.n_arenas)]
        sizes = [int(self._cells.arena(i).size) for i in range(info.n_arenas)]
        self.cache_bytes = sum(sizes)
        self.arena_bytes = tuple(size - lost for size, lost in zip(sizes, slack, strict=True))
        self._composed = (0,) * len(layers)

    def layout(self) -> CacheLayout:
        info = self._cells.info()
        return CacheLayout(self._composed, info.n_live, info.n_live_cap - info.n_live, info.pos_next)

    def _live_cells(self) -> IntArray:
        """int64 (n_live,): where the live cells stand, oldest first."""
        positions = self._cells.positions()[: self._cells.info().n_live_cap]
        order = np.argsort(positions, kind="stable")
        return order[positions[order] >= 0].astype(np.int64)

    def _live_columns(self) -> slice | IntArray:
        cells = self._live_cells()
        contiguous = (cells == np.arange(len(cells))).all()
        return slice(0, len(cells)) if contiguous else cells

    def _replay_micro_batch(self) -> int:
        widest = self._cells.info().n_cells
        n_heads = max(layer.n_heads for layer in self.shape.layers)
        return min(micro_batch(widest, n_heads), self._context.n_ubatch)

    @contextmanager
    def _visible_softmax(self) -> Iterator[None]:
        with self._cells.visible_softmax():
            yield

    def rewrite(self, selection: Sequence[IntArray], n_tail: int) -> None:
        layout = self.layout()
        if not 0 <= n_tail <= layout.n_live:
            raise InvalidInput(f"cannot keep {n_tail} of {layout.n_live} live cells")
        if len(selection) != len(self.shape.layers):
            raise InvalidInput(f"{len(selection)} selections for {len(self.shape.layers)} layers")
        live = self._live_cells()
        live_cap = self._cells.info().n_live_cap
        sources = []
        for rows, n_composed in zip(selection, layout.composed, strict=True):
            physical = np.concatenate([live_cap + np.arange(n_composed), live])
            if rows.size and not 0 <= rows.min() <= rows.max() < len(physical):
                raise InvalidInput(f"the selection names rows outside the {len(physical)} of its layer")
            sources.append(physical[rows])
        self._cells.rewrite(self._fitting_live_cells(selection, n_tail), live[len(live) - n_tail :], sources)
        self._composed = tuple(rows.shape[1] for rows in selection)

    def _fitting_live_cells(self, selection: Sequence[IntArray], n_tail: int) -> int:
        """Live cells that every arena holds beside the composed ones."""
        fitting = []
        for device, size in enumerate(self.arena_bytes):
            layers = [(x, s.shape[1]) for x, s in zip(self.shape.layers, selection, strict=True) if x.device == device]
            if layers:
                left = size - sum(layer.row_bytes * k for layer, k in layers)
                fitting.append(left // sum(layer.row_bytes for layer, _ in layers))
        n_live = int(min(fitting))
        if n_live < max(n_tail, 1):
            raise ContextFull(f"the selection leaves room for {n_live} live cells; {n_tail} are to stay")
        return n_live

    def clear(self) -> None:
        self._context.clear()
        self._composed = (0,) * len(self.shape.layers)
