"""The largest attention weight that each token ever got, kept up while the softmax tensors stream by.

Source: arXiv 2509.05165, steps 2 to 4 of the method. A maximum is associative, so it is taken one
micro-batch at a time, and no tensor of queries × tokens is ever held. Axes: layer L, query head Q, KV head H, token
(column) T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompose_local.errors import InvalidInput
from kvcompose_local.interfaces import FloatArray, IntArray, LayerShape

#: A float16 of at most 1 has two upper bits of 0; of its ten bits of fraction these are dropped.
_LOST_BITS = 6
#: Columns that are reserved for those to come: of a large cache a quarter would be memory for nothing.
_MOST_SPARE = 1024


class AttentionMax:
    """Running maximum over queries of the softmax weight on each token, by layer and head.

    ``n_heads`` is the number of heads that are told apart, one for all layers or one each. Where it is that of the KV
    heads, the query heads that share one count with the mean of their maxima in a micro-batch: their score, but for
    tokens that they need at different times, in a fraction of the memory. With ``exclude_nearest`` = n > 0 a query
    at position p counts for a token at position c only when ``p - c >= n``: every token looks at its neighbours, which
    says nothing about who else needs them. Memory is that of the result in ``dtype``, up to a quarter or what
    :meth:`pick` reserves for columns to come, and one layer's weights while it is updated. ``dtype`` is float32,
    float16, or uint8, which holds the middle bits of a float16: rounded down by a sixteenth at most, what is above 1
    to 1.

    >>> seen = AttentionMax(n_layers=24, n_heads=14)
    >>> seen.update(0, weights, slice(0, n_context))  # for every layer and micro-batch
    >>> scores = token_scores(seen.stacked(), n_kv_heads=2)
    """

    def __init__(
        self,
        n_layers: int,
        n_heads: int | Sequence[int],
        exclude_nearest: int = 0,
        dtype: type[Any] = np.float32,
        *,
        group: int | Sequence[int] = 1,
    ) -> None:
        """``group``: query heads that share one of the ``n_heads``, one number for all layers or one each.

        Raises InvalidInput when a count is out of range or belongs to another number of layers.
        """
        heads = list(n_heads) if isinstance(n_heads, Sequence) else [n_heads] * n_layers
        groups = list(group) if isinstance(group, Sequence) else [group] * n_layers
        if n_layers < 1 or {len(heads), len(groups)} != {n_layers} or min(heads + groups) < 1:
            raise InvalidInput(f"attention needs layers and heads, not {n_layers} layers of {n_heads} heads")
        if exclude_nearest < 0:
            raise InvalidInput(f"exclude_nearest must be 0 or more tokens, not {exclude_nearest}")
        self._exclude_nearest = exclude_nearest
        self._dtype = np.dtype(dtype)
        self._group = groups
        self._room = [np.zeros((n, 0), dtype) for n in heads]  # the first _n columns are in use
        self._n = [0] * n_layers

    @classmethod
    def over(
        cls, layers: Sequence[LayerShape], exclude_nearest: int = 0, dtype: type[Any] = np.float16
    ) -> AttentionMax:
        """For the KV heads of an engine's layers."""
        heads = [layer.n_kv_heads for layer in layers]
        group = [layer.n_heads // layer.n_kv_heads for layer in layers]
        return cls(len(layers), heads, exclude_nearest, dtype, group=group)

    def update(
        self,
        layer: int,
        weights: FloatArray,
        columns: slice | IntArray,
        query_positions: IntArray | None = None,
        column_positions: IntArray | None = None,
        first: int = 0,
        head: int = 0,
    ) -> None:
        """Take in the softmax weights of one micro-batch: float32 (Q, n_queries, n_kv).

        They may be those of fewer query heads, from ``head`` on, in whole groups.

        They may be a strided view of foreign memory; they are never copied whole, and not kept. ``columns``
        (a slice, or int (T,)) says which of the n_kv columns to keep and in which order; column ``first`` + j of
        the result is the j-th of them. An update that goes beyond any before appends the new ones, with 0 for
        those that were left out; others stay as they are. ``query_positions`` int (n_queries,) and
        ``column_positions`` int (T,) are looked at only with ``exclude_nearest``, and without them all pairs count;
        a pair that does not leaves the 0 that columns start with.

        Raises InvalidInput for shapes, dtype or columns that do not fit, missing positions, and for NaN or
        infinite weights (looked for in the maximum, which carries them). After an error the layer is as it
        was before.
        """
        if not 0 <= layer < len(self._room):
            raise InvalidInput(f"layer {layer} is not one of {len(self._room)}")
        if first < 0:
            raise InvalidInput(f"there is no column {first}")
        largest, group = self._columns(layer), self._group[layer]
        n_heads = largest.shape[0] * group
        fits = weights.ndim == 3 and weights.dtype == np.float32
        if not fits or not 0 <= head <= n_heads - len(weights) < n_heads or head % group or len(weights) % group:
            raise InvalidInput(
                f"weights must be float32 ({n_heads}, queries, cells), not {weights.dtype} {weights.shape} "
                f"from head {head}"
            )
        kept = _kept_columns(columns, weights.shape[2])
        if isinstance(columns, slice):
            seen = weights[:, :, columns].max(axis=1, initial=0)  # (Q, T)
        else:
            seen = weights.max(axis=1, initial=0)[:, kept]  # reduced before it is picked from: no copy
        if self._exclude_nearest and query_positions is not None:
            self._redo_nearest(seen, weights, kept, query_positions, column_positions)
        if group > 1:
            seen = seen.reshape(-1, group, seen.shape[1]).mean(axis=1)
        if not np.isfinite(seen).all():
            raise InvalidInput(f"attention weights of layer {layer} hold NaN or infinite values")

        n_known, end = largest.shape[1], first + kept.size
        if end > n_known:
            if end > self._room[layer].shape[1]:
                # Not one micro-batch at a time: freed arrays of every size would stay with the allocator.
                spare = min(max(end // 4, 64), _MOST_SPARE) if n_known else 0
                self._room[layer] = np.zeros((len(largest), end + spare), self._dtype)
                self._room[layer][:, :n_known] = largest
            self._room[layer][:, n_known:end] = 0
            self._n[layer] = end
        start = head // group
        largest = self._room[layer][start : start + len(seen), first:end]
        if self._dtype == np.float16:
            largest[...] = np.maximum(largest, seen)  # in float32, which NumPy compares many times faster
        else:
            np.maximum(largest, self._stored(seen), out=largest)

    def trim(self, n_columns: Sequence[int]) -> None:
        """Forget the columns of each layer from this number on."""
        self._n = [min(old, n) for old, n in zip(self._n, n_columns, strict=True)]

    def pick(self, layer: int, columns: NDArray[np.integer[Any]], reserve: int = 0) -> None:
        """Go on with these columns of a layer, in their order; 0 for those it has not seen.

        ``columns`` is int (H, T): each row is that of as many heads which follow each other. There is room for
        ``reserve`` more.
        """
        largest = self._columns(layer)
        picked = np.zeros((len(largest), columns.shape[1] + reserve), self._dtype)
        for head, row in enumerate(np.repeat(np.arange(len(columns)), len(largest) // len(columns))):
            known = np.flatnonzero(columns[row] < largest.shape[1])  # head by head: the indices are the larger part
            picked[head, known] = largest[head, columns[row, known]]
        self._room[layer], self._n[layer] = picked, columns.shape[1]

    def take_back(self, largest: Sequence[FloatArray]) -> None:
        """Go on from an earlier result, L float32 arrays (heads, T_l).

        Raises InvalidInput, with nothing changed, where it cannot be one.
        """
        heads = [old.shape[0] for old in self._room]
        fits = len(largest) == len(heads) and all(
            new.ndim == 2
            and new.shape[0] == n
            and new.dtype == np.float32
            and np.isfinite(new).all()
            and (new >= 0).all()
            for new, n in zip(largest, heads, strict=True)
        )
        if not fits:
            raise InvalidInput(f"this is not the attention of {len(heads)} layers of {heads[0]} heads")
        self._room = [self._stored(new) for new in largest]
        self._n = [new.shape[1] for new in largest]

    @property
    def n_columns(self) -> tuple[int, ...]:
        """The T_l."""
        return tuple(self._n)

    def of_layer(self, layer: int) -> FloatArray:
        """Float (heads, T_l), (heads, 0) where never updated; later updates may change it."""
        columns = self._columns(layer)
        if self._dtype == np.uint8:
            halves = columns.astype(np.uint16)
            halves <<= _LOST_BITS
            return halves.view(np.float16)
        return columns

    def result(self) -> list[FloatArray]:
        """:meth:`of_layer` of all layers."""
        return [self.of_layer(layer) for layer in range(len(self._room))]

    def stacked(self) -> FloatArray:
        """The result as one array (L, heads, T). Raises InvalidInput when the layers differ in shape."""
        layers = self.result()
        shapes = {largest.shape for largest in layers}
        if len(shapes) > 1:
            raise InvalidInput("layers saw different numbers of tokens or heads; take result() layer by layer")
        return np.stack(layers)

    def _stored(self, weights: FloatArray) -> NDArray[Any]:
        """Non-negative weights as they are kept: of these, rising codes rise as the floats do."""
        if self._dtype != np.uint8:
            return weights.astype(self._dtype)
        return (np.minimum(weights, 1).astype(np.float16).view(np.uint16) >> _LOST_BITS).astype(np.uint8)

    def _columns(self, layer: int) -> NDArray[Any]:
        return self._room[layer][:, : self._n[layer]]

    def _redo_nearest(
        self,
        seen: FloatArray,
        weights: FloatArray,
        kept: IntArray,
        query_positions: NDArray[Any],
        column_positions: NDArray[Any] | None,
    ) -> None:
        """Take the maximum again, in place, for the columns that lie too near to some query."""
        if column_positions is None:
            raise InvalidInput("exclude_nearest needs the positions of the columns, too")
        queries, tokens = np.asarray(query_positions, np.int64), np.asarray(column_positions, np.int64)
        if queries.shape != weights.shape[1:2] or tokens.shape != kept.shape:
            raise InvalidInput(
                f"{weights.shape[1]} queries and {kept.size} columns cannot have positions of shapes "
                f"{queries.shape} and {tokens.shape}"
            )
        if not queries.size:
            return
        near = np.flatnonzero(tokens > queries.min() - self._exclude_nearest)
        counts = queries[:, None] - tokens[near] >= self._exclude_nearest  # (n_queries, n_near)
        source = _as_slice(kept[near])
        for head, weights_of_head in enumerate(weights):  # head by head bounds the copy
            seen[head, near] = np.where(counts, weights_of_head[:, source], 0).max(axis=0)


def _kept_columns(columns: slice | NDArray[Any], n_kv: int) -> IntArray:
    """Indices of the columns to keep, int64 (T,), each in [0, n_kv)."""
    if isinstance(columns, slice):
        return np.arange(n_kv, dtype=np.int64)[columns]
    kept = np.asarray(columns)
    if kept.ndim != 1 or (kept.size and (kept.dtype.kind not in "iu" or kept.min() < 0 or kept.max() >= n_kv)):
        raise InvalidInput(f"columns must be a slice, or integers from 0 to {n_kv - 1}")
    return kept.astype(np.int64)


def _as_slice(indices: IntArray) -> slice | IntArray:
    """The same columns as a slice where they follow each other, since a slice is read without gathering."""
    if indices.size and np.array_equal(indices, np.arange(indices[0], indices[0] + indices.size)):
        return slice(int(indices[0]), int(indices[0]) + indices.size)
    return indices
