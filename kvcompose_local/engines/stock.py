"""The engine on an unpatched llama.cpp: one cell table, so every layer keeps the same number of cells.

The cache is rewritten through the public state functions: serialize, gather in NumPy, remove the cells, put the new
ones back. Flash attention would hide the softmax and cannot be switched at run time, so below budget 1 it stays off.
It is the fallback where nobody can compile, and the twin that the patched engine is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcompose_local.cells import parse_state, row_bytes, write_state
from kvcompose_local.engines.base import LlamaEngine, micro_batch
from kvcompose_local.errors import ContextFull, EngineError, InvalidInput, ModelError
from kvcompose_local.interfaces import CacheLayout, IntArray, LayerShape, ModelShape, Sampling
from kvcompose_local.llama_ffi import F16, Context, Model


def uniform_shape(model: Model, cache_type: int) -> ModelShape:
    """The layers of a model whose layers are all alike, from its GGUF header.

    Raises ModelError where layers differ, which only the patched engine can tell apart.
    """
    arch = model.architecture
    for key in ("attention.head_count", "attention.head_count_kv"):
        if (model.metadata(f"{arch}.{key}") or "").startswith("["):
            raise ModelError(f"layers of {arch} differ in heads, which the stock engine cannot tell apart")
    head = model.n_embd // max(model.n_heads, 1)
    dims = [int(model.metadata(f"{arch}.attention.{key}") or head) for key in ("key_length", "value_length")]
    row = sum(row_bytes(cache_type, model.n_kv_heads * dim) for dim in dims)
    layers = tuple(LayerShape(i, model.n_heads, model.n_kv_heads, row) for i in range(model.n_layers))
    return ModelShape(model.name, arch, model.n_ctx_train, model.n_vocab, layers)


class StockEngine(LlamaEngine):
    """:class:`kvcompose_local.interfaces.Engine` with equal budgets.

    n_cells: size of the cell table, a multiple of 256. ``scoring`` False (budget 1) turns flash attention on.
    """

    name = "stock"
    per_layer = False

    def __init__(
        self,
        model: Model,
        *,
        n_cells: int,
        n_threads: int,
        scoring: bool = True,
        cache_type: int = F16,
        n_ubatch: int | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        kind = model.cache_kind()
        if scoring and kind != "attention":
            raise ModelError(
                f"{model.architecture} has a {kind} cache, which the stock engine cannot compose: "
                "use --budget 1, or build the patched engine with `kvcompose-local build`"
            )
        if scoring and cache_type != F16:
            raise InvalidInput("the stock engine composes an F16 cache only; `kvcompose-local build` lifts that")
        shape = uniform_shape(model, cache_type)
        context = Context(
            model,
            n_ctx=n_cells,
            n_ubatch=n_ubatch or (micro_batch(n_cells, model.n_heads) if scoring else 512),
            n_threads=n_threads,
            flash_attention=not scoring,
            cache_type=cache_type,
            callback_at_creation=scoring,
        )
        super().__init__(model, context, shape, sampling)
        self.cache_bytes = n_cells * shape.row_bytes
        self.arena_bytes = (self.cache_bytes,)
        self.max_replay = n_cells
        self._n_cells = n_cells
        self._n_composed = 0
        self._first_live = 0

    def layout(self) -> CacheLayout:
        # Live cells hold consecutive positions and composed ones those just before: counting needs no look inside.
        position = self._context.next_position
        n_live = position - self._first_live
        free = self._n_cells - self._n_composed - n_live
        return CacheLayout((self._n_composed,) * len(self.shape.layers), n_live, free, position)

    def _live_columns(self) -> slice:
        # Cells stand where they were put: composed ones first, then the live ones without a gap.
        return slice(self._n_composed, self._n_composed + self.layout().n_live)

    def _replay_micro_batch(self) -> int:
        return self._context.n_ubatch

    def rewrite(self, selection: Sequence[IntArray], n_tail: int) -> None:
        before = parse_state(self._context.state())
        layout = self.layout()
        if len(before.positions) != self._n_composed + layout.n_live:
            raise EngineError(
                f"llama.cpp holds {len(before.positions)} cells where {self._n_composed + layout.n_live} were put"
            )
        if not 0 <= n_tail <= layout.n_live:
            raise InvalidInput(f"cannot keep {n_tail} of {layout.n_live} live cells")
        after = before.gather(selection, n_tail)
        if not 0 < len(after.positions) <= self._n_cells:
            raise ContextFull(f"{len(after.positions)} cells do not fit in {self._n_cells}")
        blob = write_state(after)
        self._context.remove(0)
        self._context.set_state(blob)
        self._n_composed = len(after.positions) - n_tail
        self._first_live = layout.position - n_tail

    def clear(self) -> None:
        self._context.clear()
        self._n_composed = 0
        self._first_live = 0
