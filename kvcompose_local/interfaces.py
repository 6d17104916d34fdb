"""The vocabulary shared by everything above and below the engine.

Axes: ``L`` layers with a composable cache, ``H`` KV heads of a layer, ``Q`` query heads of a layer (``G = Q // H``
of them share a KV head), ``T`` tokens, ``K_l`` composed cells of layer ``l``.

Rows of layer ``l`` are numbered for :meth:`Engine.rewrite` as ``0 … K_l - 1`` for its composed cells, best first,
then ``K_l … K_l + n_live - 1`` for the live cells, which every layer has, oldest first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from kvcompose_local.chat_options import Sampling as Sampling

FloatArray = npt.NDArray[np.float32]
HalfArray = npt.NDArray[np.float16]
IntArray = npt.NDArray[np.int64]
#: Rows by head, (H, K).
Selection = npt.NDArray[np.integer[Any]]
ByteArray = npt.NDArray[np.uint8]

#: Called with (tokens done, tokens in all); may raise KeyboardInterrupt to stop between micro-batches.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LayerShape:
    """One layer of the cache.

    index: the layer's number in the model; n_heads, n_kv_heads: Q and H; row_bytes: bytes of one cell, K and V of all
    KV heads; device: which of the engine's arenas holds it.
    """

    index: int
    n_heads: int
    n_kv_heads: int
    row_bytes: int
    device: int = 0


@dataclass(frozen=True)
class ModelShape:
    """What the policy and the reports need to know of a loaded model; ``layers`` are the composable ones.

    cache_type: how cells are stored; f16_row_bytes: bytes of one token in F16, None where cells are F16 already;
    rope_factors: ``short`` or ``long``, the set of RoPE factors that turned the keys, where the model has both.
    """

    name: str
    architecture: str
    n_ctx_train: int
    n_vocab: int
    layers: tuple[LayerShape, ...]
    cache_type: str = "f16"
    f16_row_bytes: int | None = None
    rope_factors: str = ""

    @property
    def row_bytes(self) -> int:
        """Bytes that one token takes while it is live, over all composable layers."""
        return sum(layer.row_bytes for layer in self.layers)

    @property
    def uncompressed_row_bytes(self) -> int:
        """Bytes that one token takes in llama.cpp's own F16 cache, of which a budget is a share."""
        return self.row_bytes if self.f16_row_bytes is None else self.f16_row_bytes


@dataclass(frozen=True)
class CacheLayout:
    """What stands in the cache now.

    composed: K_l of each layer; n_live: live cells in use; n_free: live cells that are free; position: of the next
    token, which is also the number of tokens seen.
    """

    composed: tuple[int, ...]
    n_live: int
    n_free: int
    position: int


T = TypeVar("T")


class Lazy(Sequence[T]):
    """A sequence of arrays that are made when they are looked at, so that a cache is never in memory twice."""

    def __init__(self, n: int, make: Callable[[int], T]) -> None:
        self._n, self._make = n, make

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._n:
            raise IndexError(index)
        return self._make(index)


@dataclass(frozen=True)
class CacheSnapshot:
    """All cells of a cache, to be put back later, by either engine.

    keys, values: for each composable layer uint8 (K_l + n_live, bytes of a row) in the numbering of rows above, V not
    transposed; state: a checkpoint of that position (:meth:`Engine.checkpoint`).
    """

    composed: tuple[int, ...]
    n_live: int
    position: int
    keys: Sequence[ByteArray]
    values: Sequence[ByteArray]
    state: ByteArray


def even_parts(n: int, largest: int, rows: int = 1) -> list[tuple[int, int]]:
    """Cut ``n`` tokens into as few parts as ``largest`` allows, nearly equal in length: their (start, stop).

    llama.cpp reads all weights for each part, so short parts cost most a token. Every part except the last is a
    multiple of ``rows``, where ``largest`` allows that.
    """
    rows = rows if largest >= rows else 1
    n_rows, n_parts = -(-n // rows), -(-n // (largest // rows * rows))
    edges = [min(n_rows * i // n_parts * rows, n) for i in range(n_parts + 1)] if n else [0]
    return list(itertools.pairwise(edges))


class AttentionSink(Protocol):
    """Takes softmax weights as they stream by (:class:`kvcompose_local.composing.attention.AttentionMax`)."""

    def update(self, layer: int, weights: FloatArray, columns: slice | IntArray) -> None: ...


class Engine(Protocol):
    """A loaded model with one sequence and a cache of fixed size (:mod:`kvcompose_local.engines`)."""

    name: str
    shape: ModelShape
    #: True where each layer may keep its own number of cells; otherwise ``rewrite`` wants equal numbers.
    per_layer: bool
    #: Bytes that the composable layers' cells may take on each device; never grows.
    arena_bytes: tuple[int, ...]
    #: Bytes allocated for these layers over all devices: ``arena_bytes`` and what alignment may cost.
    cache_bytes: int
    #: Most tokens that one ``replay`` takes.
    max_replay: int
    #: Why there is no ``snapshot`` of this cache, empty where there is.
    cannot_snapshot: str
    #: Of each device, what it wants the number of a layer's rows to be a multiple of: its fast kernels need that.
    row_steps: tuple[int, ...]
    #: Whether there are :meth:`live_rows`.
    reads_rows: bool
    #: How far ``drop_tail`` may go back without a checkpoint, in tokens from the furthest one that was decoded. Where a
    #: part of the cache moves on and does not come back by itself, this is less than all.
    max_drop: int

    @property
    def state_bytes(self) -> int:
        """Bytes of what moves on beside the cells: sliding windows, recurrent states; 0 where there are none."""
        ...

    @property
    def compute_bytes(self) -> int | None:
        """Bytes of the buffers that graphs, the explicit softmax included, are computed in; None where not known."""
        ...

    def layout(self) -> CacheLayout:
        """What stands in the cache now."""
        ...

    def decode(self, tokens: Sequence[int], progress: Progress | None = None, *, logits: bool = True) -> None:
        """Append tokens as live cells. Raises ContextFull, with nothing changed, when they exceed ``n_free``.

        Without ``logits`` the last token gets none, which is faster.
        """
        ...

    def sample(self) -> int:
        """Draw the next token from the logits of the last token decoded."""
        ...

    def replay(self, tokens: Sequence[int], seen: AttentionSink) -> None:
        """Feed tokens after the context, and forget them again.

        ``seen`` is given the attention that they pay to the live cells, column by column, oldest first. Needs
        ``len(tokens)`` free cells; leaves the cache as it was and the logits undefined.
        """
        ...

    def live_rows(self, n: int) -> Sequence[tuple[FloatArray, FloatArray]]:
        """Keys and values of each layer's first ``n`` live cells: float32 (H, n, D) each, read when looked at.

        They are as the model made them, before a position or a quantized type turned them.
        """
        ...

    def live_products(self, weights: Sequence[FloatArray | HalfArray], n: int) -> FloatArray:
        """What each layer's weights, float (H, numbers of key and value), make of these rows: float32 (all heads, n).

        The sums of each head's key and value times their weights, computed where the cells are; the heads of all layers
        stand below each other.
        """
        ...

    def rewrite(
        self,
        selection: Sequence[Selection],
        n_tail: int,
        n_forgotten: int = 0,
        checkpoint: ByteArray | None = None,
    ) -> None:
        """Put composed cells in the place of all cells except the newest ``n_tail`` live ones.

        selection: for each composable layer int (H, K_l): head ``h`` of the layer's new composed cell ``r`` is head
        ``h`` of old row ``selection[l][h, r]``. n_forgotten: without a tail, how many positions to go back by, with a
        checkpoint of the position where that ends, if a part of the cache moves on. Raises when the layout does not
        fit: before anything is changed, unless there is a checkpoint.
        """
        ...

    def checkpoint(self) -> ByteArray:
        """What moves on, as llama.cpp serializes it: uint8 (at most about ``state_bytes``,), empty without any."""
        ...

    def snapshot(self) -> CacheSnapshot:
        """A copy of all cells."""
        ...

    def view(self) -> CacheSnapshot:
        """A snapshot whose layers are read when they are looked at: it is valid until anything changes."""
        ...

    def restore(self, snapshot: CacheSnapshot) -> None:
        """Put the cells of a snapshot in the place of all cells; the logits are gone.

        Raises InvalidInput, before anything is changed, where it belongs to another model or cache type, and
        ContextFull where it does not fit.
        """
        ...

    def drop_tail(self, n: int, checkpoint: ByteArray | None = None) -> None:
        """Forget the newest ``n`` live tokens; beyond ``max_drop``, with a checkpoint of the position before them."""
        ...

    def clear(self) -> None:
        """Forget everything."""
        ...
