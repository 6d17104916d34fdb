"""The largest attention weight that each token ever got, kept up while the softmax tensors stream by.

Source: arXiv 2509.05165, steps 2 and 3 of the method. A maximum is associative, so it is taken one
micro-batch at a time, and no tensor of queries × tokens is ever held. Axes: layer L, query head Q, token
(column) T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompose_local.errors import InvalidInput
from kvcompose_local.interfaces import FloatArray, IntArray, LayerShape


class AttentionMax:
    """Running maximum over queries of the softmax weight on each token, by layer and query head.

    ``n_heads`` is the number of query heads, one for all layers or one each. With ``exclude_nearest`` = n > 0
    a query at position p counts for a token at position c only when ``p - c >= n``: every token looks at its
    neighbours, which says nothing about who else needs them. Memory is that of the result, at most a quarter more
    for columns to come, and one layer's while it is updated.

    >>> seen = AttentionMax(n_layers=24, n_heads=14)
    >>> seen.update(0, weights, slice(0, n_context))  # for every layer and micro-batch
    >>> scores = token_scores(seen.stacked(), n_kv_heads=2)
    """

    def __init__(self, n_layers: int, n_heads: int | Sequence[int], exclude_nearest: int = 0) -> None:
        """Raises InvalidInput when a count is out of range or ``n_heads`` names another number of layers."""
        heads = list(n_heads) if isinstance(n_heads, Sequence) else [n_heads] * n_layers
        if n_layers < 1 or len(heads) != n_layers or min(heads) < 1:
            raise InvalidInput(f"attention needs layers and heads, not {n_layers} layers of {n_heads} heads")
        if exclude_nearest < 0:
            raise InvalidInput(f"exclude_nearest must be 0 or more tokens, not {exclude_nearest}")
        self._exclude_nearest = exclude_nearest
        self._room = [np.zeros((n, 0), np.float32) for n in heads]  # the first _n columns are in use
        self._n = [0] * n_layers

    @classmethod
    def over(cls, layers: Sequence[LayerShape], exclude_nearest: int = 0) -> AttentionMax:
        """For the layers of an engine."""
        return cls(len(layers), [layer.n_heads for layer in layers], exclude_nearest)

    def update(
        self,
        layer: int,
        weights: FloatArray,
        columns: slice | IntArray,
        query_positions: IntArray | None = None,
        column_positions: IntArray | None = None,
    ) -> None:
        """Take in the softmax weights of one micro-batch: float32 (Q, n_queries, n_kv).

        They may be a strided view of foreign memory; they are never copied whole, and not kept. ``columns``
        (a slice, or int (T,)) says which of the n_kv columns to keep and in which order; column j of the
        result is the j-th of them. An update with more columns than any before appends the new ones; one with
        fewer touches only the first. ``query_positions`` int (n_queries,) and ``column_positions`` int (T,)
        are needed, and looked at, only with ``exclude_nearest``; a pair that does not count leaves the 0 that
        columns start with.

        Raises InvalidInput for shapes, dtype or columns that do not fit, missing positions, and for NaN or
        infinite weights (looked for in the maximum, which carries them). After an error the layer is as it
        was before.
        """
        if not 0 <= layer < len(self._room):
            raise InvalidInput(f"layer {layer} is not one of {len(self._room)}")
        largest = self._columns(layer)
        if weights.ndim != 3 or weights.shape[0] != largest.shape[0] or weights.dtype != np.float32:
            raise InvalidInput(
                f"weights must be float32 ({largest.shape[0]}, queries, cells), not {weights.dtype} {weights.shape}"
            )
        kept = _kept_columns(columns, weights.shape[2])
        if isinstance(columns, slice):
            seen = weights[:, :, columns].max(axis=1, initial=0)  # (Q, T)
        else:
            seen = weights.max(axis=1, initial=0)[:, kept]  # reduced before it is picked from: no copy
        if self._exclude_nearest:
            self._redo_nearest(seen, weights, kept, query_positions, column_positions)
        if not np.isfinite(seen).all():
            raise InvalidInput(f"attention weights of layer {layer} hold NaN or infinite values")

        n_known = largest.shape[1]
        np.maximum(largest[:, : kept.size], seen[:, :n_known], out=largest[:, : kept.size])
        if kept.size > n_known:
            if kept.size > self._room[layer].shape[1]:
                # Not one micro-batch at a time: freed arrays of every size would stay with the allocator.
                self._room[layer] = np.zeros((largest.shape[0], kept.size + max(kept.size // 4, 64)), np.float32)
                self._room[layer][:, :n_known] = largest
            self._room[layer][:, n_known : kept.size] = seen[:, n_known:]
            self._n[layer] = kept.size

    def keep(self, columns: slice) -> None:
        """Forget all but these columns, which are numbered from 0 afterwards."""
        self._set([largest[:, columns] for largest in self.result()])

    def take_back(self, largest: Sequence[FloatArray]) -> None:
        """Go on from an earlier :meth:`result`. Raises InvalidInput, with nothing changed, where it cannot be one."""
        heads = [old.shape[0] for old in self._room]
        fits = len(largest) == len(heads) and all(
            new.ndim == 2 and new.shape[0] == n and new.dtype == np.float32 and np.isfinite(new).all()
            for new, n in zip(largest, heads, strict=True)
        )
        if not fits:
            raise InvalidInput(f"this is not the attention of {len(heads)} layers of {heads[0]} heads")
        self._set(largest)

    def result(self) -> list[FloatArray]:
        """L float32 arrays (Q, T_l), (Q, 0) where never updated; later updates may change them."""
        return [self._columns(layer) for layer in range(len(self._room))]

    def stacked(self) -> FloatArray:
        """The result as one float32 array (L, Q, T). Raises InvalidInput when the layers differ in shape."""
        shapes = {largest.shape for largest in self.result()}
        if len(shapes) > 1:
            raise InvalidInput("layers saw different numbers of tokens or heads; take result() layer by layer")
        return np.stack(self.result())

    def _columns(self, layer: int) -> FloatArray:
        return self._room[layer][:, : self._n[layer]]

    def _set(self, largest: Sequence[FloatArray]) -> None:
        self._room = [new.copy() for new in largest]
        self._n = [new.shape[1] for new in largest]

    def _redo_nearest(
        self,
        seen: FloatArray,
        weights: FloatArray,
        kept: IntArray,
        query_positions: NDArray[Any] | None,
        column_positions: NDArray[Any] | None,
    ) -> None:
        """Take the maximum again, in place, for the columns that lie too near to some query."""
        if query_positions is None or column_positions is None:
            raise InvalidInput("exclude_nearest needs the positions of queries and columns")
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
