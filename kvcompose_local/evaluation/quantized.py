"""A cache's cells in another type, as llama.cpp would have stored them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from kvcompose_local.composing.rotation import unjoined
from kvcompose_local.interfaces import ByteArray, CacheSnapshot, ModelShape

#: The smallest rotation of llama.cpp, and the only one of V.
_ROTATED = 64


def quantized(snapshot: CacheSnapshot, shape: ModelShape, kind: str) -> CacheSnapshot:
    """The cells of an F16 cache as ``kind``, "q8_0" or "q8_0/q4_0": rotated as llama.cpp does, then rounded.

    While a text is read into a quantized cache, each layer sees the errors of the layers below it. Here all methods
    start from the same keys and values, which favours quantized caches; `streaming` reads as a chat does.
    """
    k_kind, _, v_kind = kind.partition("/")
    heads = [layer.n_kv_heads for layer in shape.layers]
    k_size, v_size = (_rotated_size(planes, heads) for planes in (snapshot.keys, snapshot.values))
    k_joined, v_joined = k_size & -k_size, _ROTATED if v_size else 0  # the largest power of two that divides it
    return replace(
        snapshot,
        keys=tuple(_stored(rows, k_joined, k_kind) for rows in snapshot.keys),
        values=tuple(_stored(rows, v_joined, v_kind or k_kind) for rows in snapshot.values),
    )


def _rotated_size(planes: Sequence[ByteArray], n_kv_heads: Sequence[int]) -> int:
    """Numbers of a head in F16 rows, 0 where llama.cpp rotates none: they differ, or are no multiple of 64."""
    sizes = {rows.shape[1] // 2 // n for rows, n in zip(planes, n_kv_heads, strict=True)}
    size = sizes.pop()
    return 0 if sizes or size % _ROTATED else size


def _stored(rows: ByteArray, joined: int, kind: str) -> ByteArray:
    numbers = np.ascontiguousarray(rows).view(np.float16).astype(np.float32)
    return np.asarray(quantize(unjoined(numbers, joined), GGMLQuantizationType[kind.upper()]), np.uint8)
