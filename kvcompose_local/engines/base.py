"""The part that both engines share: decoding, sampling and replay on a llama.cpp context."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import numpy as np
from typing_extensions import Self

from kvcompose_local.arena import SOFTMAX_BYTES
from kvcompose_local.errors import ContextFull, EngineError, InvalidInput, ModelError
from kvcompose_local.interfaces import (
    AttentionSink,
    ByteArray,
    CacheLayout,
    CacheSnapshot,
    FloatArray,
    HalfArray,
    IntArray,
    ModelShape,
    Progress,
    Sampling,
    Selection,
    even_parts,
)
from kvcompose_local.interrupts import uninterrupted
from kvcompose_local.llama_ffi.context import Context, SoftmaxTap
from kvcompose_local.llama_ffi.model import Model

#: Rows that a CPU multiplies repacked weights by at a time; remaining rows are multiplied one by one.
ROWS = 4
#: Queries that a CPU's flash attention takes together; fewer go one by one, which is slower than the whole tile.
TILE = 64


def softmax_queries(n_cells: int, n_heads: int, wanted_bytes: int, *, largest: int = 512) -> int:
    """The most queries whose softmax, float32 (heads, queries, n_cells), fits ``wanted_bytes`` and SOFTMAX_BYTES.

    A multiple of 4, and at least 4.
    """
    low, high = SOFTMAX_BYTES
    fitting = min(max(wanted_bytes, low), high) // (4 * n_cells * n_heads)
    return min(largest, max(fitting // 4 * 4, 4))


class LlamaEngine(ABC):
    """:class:`kvcompose_local.interfaces.Engine` without the cells; it owns the model and the context."""

    name: str
    per_layer: bool
    arena_bytes: tuple[int, ...]
    row_steps: tuple[int, ...] = (1,)
    cache_bytes: int
    max_replay: int
    max_drop: int
    #: Whether a part of the cache moves on: sliding windows, recurrent states.
    moves_on = False
    #: Why there is no :meth:`snapshot` of this cache, empty where there is.
    cannot_snapshot = ""
    reads_rows = False

    def __init__(self, model: Model, context: Context, shape: ModelShape, sampling: Sampling | None) -> None:
        self.model = model
        self.shape = shape
        self._context = context
        self._ordinal = {layer.index: i for i, layer in enumerate(shape.layers)}
        context.set_sampling(sampling or Sampling())

    @property
    def state_bytes(self) -> int:
        """See :meth:`Engine.state_bytes`; an unpatched llama.cpp tells only what there is now."""
        return self._context.partial_bytes() if self.moves_on else 0

    @property
    def compute_bytes(self) -> int | None:
        """None: an unpatched llama.cpp does not tell."""
        return None

    def close(self) -> None:
        """Free the context and the model."""
        self.close_context()
        self.model.close()

    def close_context(self) -> None:
        """Free the context alone, where engines share a model."""
        self._context.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def layout(self) -> CacheLayout:
        """What stands in the cache now."""

    def live_rows(self, n: int) -> Sequence[tuple[FloatArray, FloatArray]]:
        """See :meth:`Engine.live_rows`."""
        raise EngineError(f"the {self.name} engine does not tell how keys were turned")

    def live_products(self, weights: Sequence[FloatArray | HalfArray], n: int) -> FloatArray:
        """See :meth:`Engine.live_products`."""
        raise EngineError(f"the {self.name} engine does not tell how keys were turned")

    @abstractmethod
    def rewrite(
        self,
        selection: Sequence[Selection],
        n_tail: int,
        n_forgotten: int = 0,
        checkpoint: ByteArray | None = None,
    ) -> None:
        """See :meth:`Engine.rewrite`."""

    def checkpoint(self) -> ByteArray:
        """See :meth:`Engine.checkpoint`."""
        return self._context.partial_state() if self.moves_on else np.zeros(0, np.uint8)

    @abstractmethod
    def snapshot(self) -> CacheSnapshot:
        """See :meth:`Engine.snapshot`."""

    def view(self) -> CacheSnapshot:
        """See :meth:`Engine.view`."""
        return self.snapshot()

    def restore(self, snapshot: CacheSnapshot) -> None:
        """See :meth:`Engine.restore`."""
        layers = self.shape.layers
        counts = snapshot.composed, snapshot.keys, snapshot.values
        fits = all(len(x) == len(layers) for x in counts) and 0 <= snapshot.n_live <= snapshot.position
        for layer, k, keys, values in zip(layers, *counts, strict=False):
            n = k + snapshot.n_live
            fits &= 0 <= k <= snapshot.position - snapshot.n_live
            fits &= keys.dtype == values.dtype == np.uint8 and keys.ndim == values.ndim == 2
            fits = fits and len(keys) == len(values) == n and keys.shape[1] + values.shape[1] == layer.row_bytes
        if not fits:
            raise InvalidInput("these cells belong to another model or cache type")
        if any(snapshot.composed) or snapshot.n_live:
            self._put_back(snapshot)
        else:
            self.clear()

    @abstractmethod
    def _put_back(self, snapshot: CacheSnapshot) -> None:
        """Restore a snapshot of matching shape that is not empty."""

    @abstractmethod
    def clear(self) -> None:
        """Forget everything."""

    @abstractmethod
    def _live_columns(self) -> slice | IntArray:
        """The columns of a softmax that are the live cells, oldest first."""

    def micro_batch(self) -> int:
        """Tokens that :meth:`decode` takes at a time; fewer than a tile more join them at the end."""
        fitting = self._fitting_tokens()
        return (fitting - 1) // TILE * TILE or fitting

    def _fitting_tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        return self._context.n_ubatch

    @abstractmethod
    def softmax_micro_batch(self, n_tokens: int) -> int:
        """The most queries of one explicit softmax while ``n_tokens`` are decoded."""

    @contextmanager
    def _visible_softmax(self) -> Iterator[None]:
        """In this block the tap sees every softmax."""
        yield

    @contextmanager
    def watching(self, tap: SoftmaxTap) -> Iterator[None]:
        """In this block :meth:`decode` shows every softmax: ``tap(l, weights)``, l the place in ``shape.layers``.

        Layers that read another's cells show theirs as that one's. weights: float32 (Q, queries of a micro-batch,
        n_kv), native memory that dies with the call.
        """

        def composable(layer: int, weights: FloatArray) -> None:
            if layer in self._ordinal:
                tap(self._ordinal[layer], weights)

        with self._visible_softmax():
            self._context.tap = composable
            try:
                yield
            finally:
                self._context.tap = None

    def decode(self, tokens: Sequence[int], progress: Progress | None = None, *, logits: bool = True) -> None:
        """See :meth:`Engine.decode`. Raises ModelError where the model's file is another one by now."""
        layout = self.layout()
        if self.model.files.are_changed():  # a file that was cut would end the program, and all that was said with it
            name = self.model.path.name
            raise ModelError(f"{name} was written to while it is in use: leave, and start again when it is whole")
        if len(tokens) > layout.n_free:
            raise ContextFull(f"{len(tokens)} tokens do not fit in {layout.n_free} free cells")
        for start, stop in self._micro_batches(len(tokens)):
            before = self._context.next_position
            try:
                self._context.decode(tokens[start:stop], logits=logits and stop == len(tokens))
                if progress is not None:
                    progress(stop, len(tokens))
            except KeyboardInterrupt:
                # Whatever was read stays read; the caller asks layout() how much that is.
                self._context.has_logits = False
                raise
            except BaseException:
                self._context.has_logits = False
                if self._context.is_recurrent:  # there is no state of before to go back to
                    if self._context.next_position != before:
                        self.clear()
                else:
                    self._context.remove(before)
                raise

    def _micro_batches(self, n: int) -> list[tuple[int, int]]:
        """(start, stop) of the micro-batches that ``n`` tokens are decoded in."""
        if self._context.tap:
            return even_parts(n, self.softmax_micro_batch(n), ROWS)
        edges = [*range(0, n, self.micro_batch()), n]
        if len(edges) > 2 and n - edges[-2] < TILE and n - edges[-3] <= self._fitting_tokens():
            del edges[-2]
        return list(itertools.pairwise(edges))

    def sample(self) -> int:
        return self._context.sample()

    def logits(self) -> FloatArray:
        """float32 (n_vocab,) logits of the last token decoded."""
        return self._context.logits()

    def decode_all(self, tokens: Sequence[int]) -> FloatArray:
        """Like :meth:`decode`, for at most a micro-batch; returns the logits after each token, float32 (n, n_vocab)."""
        if len(tokens) > self.layout().n_free:
            raise ContextFull(f"{len(tokens)} tokens do not fit in {self.layout().n_free} free cells")
        self._context.decode(tokens, all_logits=True)
        return self._context.all_logits(len(tokens))

    def set_sampling(self, sampling: Sampling) -> None:
        """Let :meth:`sample` draw like this from now on."""
        self._context.set_sampling(sampling)

    def set_grammar(self, gbnf: str, markers: frozenset[str] = frozenset()) -> None:
        """What :meth:`sample` may draw from now on, anything where it is empty. Raises InvalidInput for no grammar.

        markers: texts of control tokens that may be a part of it.
        """
        self._context.set_grammar(gbnf, markers)

    def replay(self, tokens: Sequence[int], seen: AttentionSink) -> None:
        layout = self.layout()
        if len(tokens) > layout.n_free:
            raise ContextFull(f"a replay of {len(tokens)} tokens does not fit in {layout.n_free} free cells")
        columns = self._live_columns()
        state = self.checkpoint() if self._context.is_recurrent else None

        with self.watching(lambda layer, weights: seen.update(layer, weights, columns)):
            try:
                for start, stop in even_parts(len(tokens), self.softmax_micro_batch(len(tokens)), ROWS):
                    self._context.decode(tokens[start:stop], logits=False)
            finally:
                self._drop_from(layout.position, state)

    def drop_tail(self, n: int, checkpoint: ByteArray | None = None) -> None:
        layout = self.layout()
        if not 0 <= n <= layout.n_live:
            raise InvalidInput(f"cannot drop {n} of {layout.n_live} live cells")
        if n:
            self._drop_from(layout.position - n, checkpoint)

    def _drop_from(self, position: int, checkpoint: ByteArray | None) -> None:
        """Forget the cells from ``position`` on: what moves on first, which then finds nothing more to drop."""
        with uninterrupted():
            self._context.has_logits = False
            if checkpoint is not None and checkpoint.size:
                self._context.set_partial_state(checkpoint)
            self._context.remove(position)
            if self._context.next_position != position:
                raise EngineError(f"the cache went back to position {self._context.next_position}, not {position}")
