"""The engine on the patched llama.cpp (``patches/``): each layer holds its own number of cells, in one arena a device.

Flash attention stays on; the explicit softmax is switched on for a replay alone, and no callback is installed
otherwise. The arena is the KV buffer that llama.cpp allocates for ``n_cells`` cells: it never grows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from kvcompose_local.arena import CELL_PADDING, SOFTMAX_SHARE
from kvcompose_local.composing.scorer import products
from kvcompose_local.engines.base import TILE, LlamaEngine, softmax_queries
from kvcompose_local.errors import ContextFull, EngineError, InvalidInput
from kvcompose_local.interfaces import (
    ByteArray,
    CacheLayout,
    CacheSnapshot,
    FloatArray,
    HalfArray,
    IntArray,
    LayerShape,
    Lazy,
    ModelShape,
    Sampling,
    Selection,
)
from kvcompose_local.llama_ffi.cells import PerLayerCells, Turn
from kvcompose_local.llama_ffi.context import Context
from kvcompose_local.llama_ffi.library import give_small_blocks_back, keep_big_blocks
from kvcompose_local.llama_ffi.memory import memory_of
from kvcompose_local.llama_ffi.model import Model

#: Tokens of the largest prefill micro-batch, of which most have a tile less: 512 read no faster on the processors
#: measured, and take 20 MiB more of work buffers (Qwen2.5 0.5B, 8,192 cells).
PREFILL_MICRO_BATCH = 320
#: The same under a budget: its work buffers come out of what the budget saves, and most of what is read there comes in
#: smaller pieces (:meth:`PatchedEngine.micro_batch`).
SMALL_MICRO_BATCH = 192
#: The strictest alignment of a buffer type that llama.cpp has, in bytes; K and V of each layer may lose as much.
ALIGNMENT = 256
#: What a device may add to K and to V of each layer, in bytes: CUDA fills quantized rows up to 512 numbers.
DEVICE_PADDING = 1024
#: Rows of a layer that a device's kernels take at a time: other numbers get slower ones (CUDA: ``FATTN_KQ_STRIDE``).
DEVICE_ROWS = 256


class PatchedEngine(LlamaEngine):
    """:class:`kvcompose_local.interfaces.Engine` with a budget of its own for each layer.

    n_cells: the arena's size in cells of an uncompressed cache, a multiple of 256; n_positions: what the chat may span,
    ``n_cells`` if not given. Raises ModelError where the model's cache cannot be composed.
    """

    name = "patched"
    per_layer = True
    reads_rows = True

    def __init__(
        self,
        model: Model,
        *,
        n_cells: int,
        n_threads: int,
        n_positions: int | None = None,
        cache_type: str = "f16",
        n_ubatch: int = PREFILL_MICRO_BATCH,
        n_outputs: int = 1,
        sampling: Sampling | None = None,
    ) -> None:
        context = Context(
            model,
            n_ctx=n_cells,
            n_ubatch=n_ubatch,
            n_threads=n_threads,
            flash_attention=True,
            cache_type=cache_type,
            n_outputs=n_outputs,
            n_positions=n_positions,
        )
        self.n_positions = n_positions or n_cells
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
                LayerShape(x.il, model.heads[x.il], x.n_head_kv, x.k_row_bytes + x.v_row_bytes, x.arena) for x in layers
            ),
            cache_type,
            sum(2 * x.n_head_kv * (x.head_dim_k + x.head_dim_v) for x in layers),
            context.rope_factors,
        )
        super().__init__(model, context, shape, sampling)
        owners = {il: self._cells.owner(il) for il in range(model.n_layers)}
        self._ordinal = {il: i for il, i in owners.items() if i is not None}  # of layers that read another's cells, too
        info = self._cells.info()
        self._has_window = bool(info.has_window)
        self._has_values = all(layer.v_row_bytes for layer in layers)
        self.moves_on = self._has_window or model.is_recurrent
        on_host = [self._cells.arena(i).name == b"CPU" for i in range(info.n_arenas)]
        self.row_steps = tuple(1 if host else DEVICE_ROWS for host in on_host)
        if not all(on_host):
            keep_big_blocks()
        slack = [
            2 * (ALIGNMENT + DEVICE_PADDING * (not on_host[i])) * sum(x.arena == i for x in layers)
            for i in range(info.n_arenas)
        ]
        sizes = [int(self._cells.arena(i).size) for i in range(info.n_arenas)]
        self.cache_bytes = sum(sizes)
        memory = memory_of(context)
        self._state_bytes = memory.window_bytes + memory.recurrent_bytes
        # A window cache overwrites what a replay of more than one micro-batch would have to give back. A recurrent
        # state gives nothing back: a replay restores it.
        self.max_replay = self._fitting_queries(n_cells) if self._has_window else n_cells
        self.max_drop = 0 if model.is_recurrent else self.max_replay
        self.arena_bytes = tuple(size - lost for size, lost in zip(sizes, slack, strict=True))
        self._composed = (0,) * len(layers)
        self._turns: list[Turn] = []

    @property
    def state_bytes(self) -> int:
        """As allocated."""
        return self._state_bytes

    @property
    def compute_bytes(self) -> int:
        """They grow with the largest graph so far."""
        return self._cells.compute_bytes()

    def layout(self) -> CacheLayout:
        info = self._cells.info()
        n_free = info.n_live_cap - info.n_live
        if not self.model.is_rotated:  # positions that were never learned are beyond the model's table of them
            n_free = min(n_free, max(self.shape.n_ctx_train - info.pos_next, 0))
        return CacheLayout(self._composed, info.n_live, n_free, info.pos_next)

    def _live_cells(self) -> IntArray:
        """int64 (n_live,): where the live cells stand, oldest first."""
        positions = self._cells.positions()[: self._cells.info().n_live_cap]
        order = np.argsort(positions, kind="stable")
        return order[positions[order] >= 0].astype(np.int64)

    def _live_columns(self) -> slice | IntArray:
        cells = self._live_cells()
        contiguous = (cells == np.arange(len(cells))).all()
        return slice(0, len(cells)) if contiguous else cells

    def _fitting_tokens(self) -> int:
        # The mask, of tokens × cells, is allocated for a cache with nothing composed, and the widest layer may come to
        # have several times as many cells: fewer tokens at a time then keep it at that size.
        n_ubatch = self._context.n_ubatch
        fitting = n_ubatch * self._context.n_ctx // max(int(self._cells.info().n_cells), 1)
        return min(n_ubatch, max(fitting, TILE))

    def micro_batch(self) -> int:
        """Tokens that :meth:`decode` takes at a time; on a device all that its graphs take."""
        return self._context.n_ubatch if max(self.row_steps) > 1 else super().micro_batch()

    def softmax_micro_batch(self, n_tokens: int) -> int:
        return self._fitting_queries(self._n_columns(n_tokens))

    def _n_columns(self, n_tokens: int) -> int:
        """Cells that attention looks at while ``n_tokens`` are decoded."""
        info = self._cells.info()
        if info.composed:
            return int(info.n_cells)
        # llama.cpp looks at the cells in use, rounded up to its padding
        return int(min(info.n_cells, info.n_live + n_tokens + CELL_PADDING))

    def _fitting_queries(self, n_columns: int) -> int:
        n_heads = max(layer.n_heads for layer in self.shape.layers)
        # What a small cache saves must not be spent on it.
        wanted = int(self.cache_bytes * SOFTMAX_SHARE)
        return softmax_queries(n_columns, n_heads, wanted, largest=self._context.n_ubatch)

    @contextmanager
    def _visible_softmax(self) -> Iterator[None]:
        with self._cells.visible_softmax():
            yield

    def live_rows(self, n: int) -> Sequence[tuple[FloatArray, FloatArray]]:
        if not self._turns:  # not before anything was decoded: only then are all of them chosen
            self._turns = [self._cells.turn(i) for i in range(self._cells.n_layers)]
        layout = self.layout()
        if not 0 <= n <= layout.n_live:
            raise InvalidInput(f"there are no {n} live cells, but {layout.n_live}")
        cells = self._live_cells()[:n]
        start, stop = (int(cells.min()), int(cells.max()) + 1) if n else (0, 0)
        in_order = bool((np.diff(cells) == 1).all())
        first = layout.position - layout.n_live

        def rows(layer: int) -> tuple[FloatArray, FloatArray]:
            turn = self._turns[layer]
            keys, values = (self._cells.numbers(layer, values=v, first=start, stop=stop) for v in (False, True))
            if not in_order:
                keys, values = keys[:, cells - start], values[:, cells - start]
            return turn.keys(keys, first), turn.values(values)

        return Lazy(len(self.shape.layers), rows)

    def live_products(self, weights: Sequence[FloatArray | HalfArray], n: int) -> FloatArray:
        """See :meth:`Engine.live_products`."""
        rows = self.live_rows(n)
        if any(turn.gain for turn in self._turns) or not self._has_values:
            return np.concatenate([products(of_layer, *rows[i]) for i, of_layer in enumerate(weights)])
        return self._cells.products(weights, n)

    def rewrite(
        self,
        selection: Sequence[Selection],
        n_tail: int,
        n_forgotten: int = 0,
        checkpoint: ByteArray | None = None,
    ) -> None:
        layout = self.layout()
        if not 0 <= n_tail <= layout.n_live:
            raise InvalidInput(f"cannot keep {n_tail} of {layout.n_live} live cells")
        if len(selection) != len(self.shape.layers):
            raise InvalidInput(f"{len(selection)} selections for {len(self.shape.layers)} layers")
        for rows in selection:
            if rows.ndim != 2:
                raise InvalidInput(f"a selection is of heads and cells, not {rows.shape}")
        composed = [rows.shape[1] for rows in selection]
        n_live_cap = self._fitting_live_cells(composed, n_tail)
        if checkpoint is not None:
            self._go_back(n_forgotten, checkpoint)
            n_forgotten = 0
        try:
            self._cells.rewrite(n_live_cap, n_tail, selection, n_forgotten)
        except BaseException:  # half-way it leaves the cache empty
            self.note_composed()
            raise
        self._composed = tuple(composed)
        if max(self.row_steps) == 1:  # what the choice of cells took; its milliseconds are many beside a device
            give_small_blocks_back()

    def note_composed(self) -> None:
        """Read how many composed cells each layer has, after the native cache was rewritten."""
        self._composed = tuple(int(self._cells.layer(i).n_composed) for i in range(self._cells.n_layers))

    def _go_back(self, n_forgotten: int, checkpoint: ByteArray) -> None:
        """Restore the moving part from a checkpoint, whose position is the cache's from now on."""
        position = self.layout().position - n_forgotten
        self._context.set_partial_state(checkpoint)
        if self.layout().position != position:
            raise EngineError(f"the checkpoint is of position {self.layout().position}, not {position}")

    def _fitting_live_cells(self, composed: Sequence[int], n_live: int) -> int:
        """Live cells that every arena holds beside the composed ones, of which ``n_live`` are in use."""
        fitting, odd = [], set()
        for device, size in enumerate(self.arena_bytes):
            layers = [(x, k) for x, k in zip(self.shape.layers, composed, strict=True) if x.device == device]
            if layers:
                left = size - sum(layer.row_bytes * k for layer, k in layers)
                fitting.append(left // sum(layer.row_bytes for layer, _ in layers))
            if self.row_steps[device] > 1:
                odd |= {-k % self.row_steps[device] for _, k in layers}
        n_fitting = int(min(fitting))
        if n_fitting < max(n_live, 1):
            raise ContextFull(f"the composed cells leave room for {n_fitting} live ones; {n_live} are to stay")
        if len(odd) == 1:  # one number of live cells rounds all layers
            n_rounded = n_fitting - (n_fitting - odd.pop()) % max(self.row_steps)
            n_fitting = n_rounded if n_rounded >= max(n_live, 1) else n_fitting
        return n_fitting

    def snapshot(self) -> CacheSnapshot:
        view = self.view()
        return replace(view, keys=tuple(view.keys), values=tuple(view.values))

    def view(self) -> CacheSnapshot:
        layout = self.layout()
        live, first_composed = self._live_cells(), self._cells.info().n_live_cap

        def plane(i: int, *, values: bool) -> npt.NDArray[np.uint8]:
            rows = self._cells.rows(i, values=values)
            return np.concatenate([rows[first_composed:][: layout.composed[i]], rows[live]])

        n = len(layout.composed)
        keys, values = Lazy(n, partial(plane, values=False)), Lazy(n, partial(plane, values=True))
        return CacheSnapshot(layout.composed, layout.n_live, layout.position, keys, values, self.checkpoint())

    def _put_back(self, snapshot: CacheSnapshot) -> None:
        n_live, end = snapshot.n_live, snapshot.position - snapshot.n_live
        if any(snapshot.composed):
            n_live_cap = self._fitting_live_cells(snapshot.composed, n_live)
        else:
            n_live_cap = self._context.n_ctx
        for i, (keys, values) in enumerate(zip(snapshot.keys, snapshot.values, strict=True)):
            layer = self._cells.layer(i)
            if (keys.shape[1], values.shape[1]) != (layer.k_row_bytes, layer.v_row_bytes):
                raise InvalidInput("these cells belong to another model or cache type")
        if n_live > n_live_cap:
            raise ContextFull(f"{n_live} cells do not fit in {n_live_cap}")
        if (snapshot.state.size > 0) != self.moves_on:
            raise InvalidInput(
                "these cells belong to another model: only one of the two has sliding windows or recurrent layers"
            )
        positions = np.arange(end, snapshot.position, dtype=np.int64)
        self._cells.set_layout(n_live_cap, positions, end, np.array(snapshot.composed, np.int64))
        self._composed = snapshot.composed
        for i, n_composed in enumerate(snapshot.composed):
            for planes, is_v in ((snapshot.keys, False), (snapshot.values, True)):
                rows = planes[i]
                self._cells.set_rows(i, rows[n_composed:], values=is_v)
                self._cells.set_rows(i, rows[:n_composed], values=is_v, first=n_live_cap)
        if self.moves_on:
            self._context.set_partial_state(snapshot.state)

    def clear(self) -> None:
        self._context.clear()
        self._composed = (0,) * len(self.shape.layers)
