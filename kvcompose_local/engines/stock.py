"""The engine on an unpatched llama.cpp: one cell table, so every layer keeps the same number of cells.

The cache is rewritten through the public state functions: serialize, gather in NumPy, remove the cells, put the new
ones back. Flash attention would hide the softmax and cannot be switched at run time, so below budget 1 it stays off.
It is the fallback where nobody can compile, and the twin that the patched engine is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from kvcompose_local.attention import AttentionMax
from kvcompose_local.cells import parse_state, row_bytes, write_state
from kvcompose_local.errors import ContextFull, EngineError, InvalidInput, ModelError
from kvcompose_local.interfaces import (
    CacheLayout,
    FloatArray,
    IntArray,
    LayerShape,
    ModelShape,
    Progress,
    Sampling,
)
from kvcompose_local.llama_ffi import Context, Model

#: Bytes that one layer's explicit softmax, float32 (Q, queries, n_kv), may take in the compute buffer.
SOFTMAX_BYTES = 32 << 20
#: llama.cpp pads the cell table to this many cells.
CELL_PADDING = 256
F16 = 1


def micro_batch(n_cells: int, n_heads: int, *, largest: int = 512) -> int:
    """Queries that keep the softmax tensor of ``n_cells`` columns within SOFTMAX_BYTES, a power of two of at least 8."""
    fitting = SOFTMAX_BYTES // (4 * n_cells * n_heads)
    return min(largest, 1 << max(3, fitting.bit_length() - 1))


def uniform_shape(model: Model, cache_type: int) -> ModelShape:
    """The composable layers of a model whose layers are all alike, from its GGUF header.

    Raises ModelError where layers differ, which only the patched engine can tell apart.
    """
    arch = model.architecture
    for key in ("attention.head_count", "attention.head_count_kv"):
        if (model.metadata(f"{arch}.{key}") or "").startswith("["):
            raise ModelError(f"layers of {arch} differ in heads: the stock engine runs it only with --budget 1")
    head = model.n_embd // model.n_heads
    dims = [int(model.metadata(f"{arch}.attention.{key}") or head) for key in ("key_length", "value_length")]
    row = sum(row_bytes(cache_type, model.n_kv_heads * dim) for dim in dims)
    layers = tuple(LayerShape(i, model.n_heads, model.n_kv_heads, row) for i in range(model.n_layers))
    return ModelShape(model.name, arch, model.n_ctx_train, model.n_vocab, layers)


class StockEngine:
    """:class:`kvcompose_local.interfaces.Engine` with equal budgets; owns the model and the context.

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
        self.model = model
        self.shape = uniform_shape(model, cache_type)
        self.arena_bytes: tuple[int, ...] = (n_cells * self.shape.row_bytes,)
        self.max_replay = n_cells
        self._n_cells = n_cells
        self._n_composed = 0
        self._first_live = 0
        self._context = Context(
            model,
            n_ctx=n_cells,
            n_ubatch=n_ubatch or (micro_batch(n_cells, model.n_heads) if scoring else 512),
            n_threads=n_threads,
            flash_attention=not scoring,
            cache_type=cache_type,
            n_heads=[layer.n_heads for layer in self.shape.layers],
            host_tensors=model.gpu_layers == 0,
            callback_at_creation=scoring,
        )
        self._context.set_sampling(sampling or Sampling())

    def close(self) -> None:
        """Free the context and the model."""
        self._context.close()
        self.model.close()

    def __enter__(self) -> StockEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def micro_batch(self) -> int:
        """Tokens of a micro-batch, in prefill and in replay."""
        return self._context.n_ubatch

    def layout(self) -> CacheLayout:
        # Live cells hold consecutive positions and composed ones those just before, so counting needs no look inside.
        position = self._context.next_position
        n_live = position - self._first_live
        free = self._n_cells - self._n_composed - n_live
        return CacheLayout((self._n_composed,) * len(self.shape.layers), n_live, free, position)

    def decode(self, tokens: Sequence[int], progress: Progress | None = None) -> None:
        free = self.layout().n_free
        if len(tokens) > free:
            raise ContextFull(f"{len(tokens)} tokens do not fit in {free} free cells")
        step = self._context.n_ubatch
        for start in range(0, len(tokens), step):
            before = self._context.next_position
            try:
                self._context.decode(tokens[start : start + step])
                if progress is not None:
                    progress(min(start + step, len(tokens)), len(tokens))
            except KeyboardInterrupt:
                # Whatever was read stays read; the caller asks layout() how much that is.
                self._context.has_logits = False
                raise
            except BaseException:
                self._context.remove(before)
                raise

    def sample(self) -> int:
        return self._context.sample()

    def logits(self) -> FloatArray:
        """float32 (n_vocab,) logits of the last token decoded."""
        return self._context.logits()

    def set_sampling(self, sampling: Sampling) -> None:
        """How :meth:`sample` draws from now on."""
        self._context.set_sampling(sampling)

    def replay(self, tokens: Sequence[int]) -> list[FloatArray]:
        layout = self.layout()
        if len(tokens) > layout.n_free:
            raise ContextFull(f"a replay of {len(tokens)} tokens does not fit in {layout.n_free} free cells")
        seen = AttentionMax(len(self.shape.layers), self.model.n_heads)
        # Cells stand where they were put: composed ones first, then the live ones without a gap.
        live = slice(self._n_composed, self._n_composed + layout.n_live)
        self._context.tap = lambda layer, weights: seen.update(layer, weights, live)
        try:
            step = self._context.n_ubatch
            for start in range(0, len(tokens), step):
                self._context.decode(tokens[start : start + step])
        finally:
            self._context.tap = None
            self._context.has_logits = False
            self._context.remove(layout.position)
        return seen.result()

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
        if len(after.positions) > self._n_cells:
            raise ContextFull(f"{len(after.positions)} cells do not fit in {self._n_cells}")
        blob = write_state(after)
        self._context.remove(0)
        self._context.set_state(blob)
        self._n_composed = len(after.positions) - n_tail
        self._first_live = layout.position - n_tail

    def drop_tail(self, n: int) -> None:
        layout = self.layout()
        if not 0 <= n <= layout.n_live:
            raise InvalidInput(f"cannot drop {n} of {layout.n_live} live cells")
        if n:
            self._context.has_logits = False
            self._context.remove(layout.position - n)

    def clear(self) -> None:
        self._context.clear()
        self._n_composed = 0
        self._first_live = 0
