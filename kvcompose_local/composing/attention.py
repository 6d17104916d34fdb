"""The largest attention weight that each token ever got, updated as softmax tensors stream by.

Source: arXiv 2509.05165, steps 2 to 4 of the method. A maximum is associative, so micro-batches are taken one by one,
and no tensor of queries × tokens is ever held. Axes: layer L, query head Q, KV head H, token (column) T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompose_local.errors import InvalidInput
from kvcompose_local.interfaces import FloatArray, IntArray, LayerShape


class AttentionMax:
    """Running maximum over queries of the softmax weight on each token, by layer and head.

    ``n_heads`` is the number of heads that have a row of their own: one number for all layers, or one each. Where it is
    the number of KV heads, query heads that share a KV head add the mean of their maxima in a micro-batch. This is
    their score, except for tokens that they need at different times, and takes a fraction of the memory. The object
    holds the result in ``dtype``, float32 or float16, and during an update one layer's weights.

    >>> seen = AttentionMax(n_layers=24, n_heads=14)
    >>> seen.update(0, weights, slice(0, n_context))  # for every layer and micro-batch
    >>> scores = token_scores(seen.stacked(), n_kv_heads=2)
    """

    def __init__(
        self,
        n_layers: int,
        n_heads: int | Sequence[int],
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
        self._group = groups
        self._largest = [np.zeros((n, 0), dtype) for n in heads]

    @classmethod
    def over(cls, layers: Sequence[LayerShape], dtype: type[Any] = np.float16) -> AttentionMax:
        """For the KV heads of an engine's layers."""
        heads = [layer.n_kv_heads for layer in layers]
        group = [layer.n_heads // layer.n_kv_heads for layer in layers]
        return cls(len(layers), heads, dtype, group=group)

    def update(self, layer: int, weights: FloatArray, columns: slice | IntArray) -> None:
        """Take in the softmax weights of one micro-batch: float32 (Q, n_queries, n_kv).

        They may be a strided view of foreign memory; they are never copied whole, and not kept. ``columns``
        (a slice, or int (T,)) says which of the n_kv columns to keep and in which order: column j of the result is the
        j-th kept one. An update with more columns than any before appends the new ones.

        Raises InvalidInput for shapes, dtype or columns that do not fit, and for NaN or infinite weights (looked for in
        the maximum, which carries them). After an error the layer is as it was before.
        """
        if not 0 <= layer < len(self._largest):
            raise InvalidInput(f"layer {layer} is not one of {len(self._largest)}")
        largest, group = self._largest[layer], self._group[layer]
        n_heads = len(largest) * group
        if weights.ndim != 3 or weights.dtype != np.float32 or len(weights) != n_heads:
            raise InvalidInput(
                f"weights must be float32 ({n_heads}, queries, cells), not {weights.dtype} {weights.shape}"
            )
        kept = _kept_columns(columns, weights.shape[2])
        seen = weights.max(axis=1, initial=0)  # (Q, n_kv), reduced before it is picked from: no copy
        seen = seen[:, columns if isinstance(columns, slice) else kept]
        if group > 1:
            seen = seen.reshape(-1, group, seen.shape[1]).mean(axis=1)
        if not np.isfinite(seen).all():
            raise InvalidInput(f"attention weights of layer {layer} hold NaN or infinite values")
        if kept.size > largest.shape[1]:
            self._largest[layer] = np.zeros((len(largest), kept.size), largest.dtype)
            self._largest[layer][:, : largest.shape[1]] = largest
        largest = self._largest[layer][:, : kept.size]
        largest[...] = np.maximum(largest, seen)  # in float32, which NumPy compares many times faster

    def of_layer(self, layer: int) -> FloatArray:
        """Float (heads, T_l), (heads, 0) where never updated; later updates may change it."""
        return self._largest[layer]

    def result(self) -> list[FloatArray]:
        """:meth:`of_layer` of all layers."""
        return [*self._largest]

    def stacked(self) -> FloatArray:
        """The result as one array (L, heads, T). Raises InvalidInput when the layers differ in shape."""
        layers = self.result()
        shapes = {largest.shape for largest in layers}
        if len(shapes) > 1:
            raise InvalidInput("layers saw different numbers of tokens or heads; take result() layer by layer")
        return np.stack(layers)


def _kept_columns(columns: slice | NDArray[Any], n_kv: int) -> IntArray:
    """Indices of the columns to keep, int64 (T,), each in [0, n_kv)."""
    if isinstance(columns, slice):
        return np.arange(n_kv, dtype=np.int64)[columns]
    kept = np.asarray(columns)
    if kept.ndim != 1 or (kept.size and (kept.dtype.kind not in "iu" or kept.min() < 0 or kept.max() >= n_kv)):
        raise InvalidInput(f"columns must be a slice, or integers from 0 to {n_kv - 1}")
    return kept.astype(np.int64)
