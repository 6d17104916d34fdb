"""A cache's cells in another type, as llama.cpp would have stored them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from kvcompose_local.interfaces import ByteArray, CacheSnapshot, FloatArray, ModelShape

#: What llama.cpp rotates by at least, and what V is always rotated by.
_ROTATED = 64


def quantized(snapshot: CacheSnapshot, shape: ModelShape, kind: str) -> CacheSnapshot:
    """The cells of an F16 cache as ``kind``, such as "q8_0": rotated as llama.cpp does before it rounds, then rounded.

    Reading the text into a quantized cache takes several times as long on a CPU, and each of its layers would see the
    errors of those below. Here all methods start from the same keys and values, which favours the quantized ones.
    """
    heads = [layer.n_kv_heads for layer in shape.layers]
    k_rotation = _rotation([rows.shape[1] // 2 // h for rows, h in zip(snapshot.keys, heads, strict=True)])
    v_rotation = _rotation([rows.shape[1] // 2 // h for rows, h in zip(snapshot.values, heads, strict=True)])
    if v_rotation is not None:
        v_rotation = _hadamard(_ROTATED)
    return replace(
        snapshot,
        keys=tuple(_stored(rows, k_rotation, kind) for rows in snapshot.keys),
        values=tuple(_stored(rows, v_rotation, kind) for rows in snapshot.values),
    )


def _rotation(head_sizes: list[int]) -> FloatArray | None:
    """What llama.cpp rotates keys of these sizes by: the largest power of two that divides them; None for others."""
    size = head_sizes[0]
    if len(set(head_sizes)) > 1 or size % _ROTATED:
        return None
    return _hadamard(size & -size)


def _hadamard(n: int) -> FloatArray:
    """The Walsh-Hadamard matrix (n, n), orthonormal and its own inverse."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(np.float32(n)), np.float32)


def _stored(rows: ByteArray, rotation: FloatArray | None, kind: str) -> ByteArray:
    numbers = np.ascontiguousarray(rows).view(np.float16).astype(np.float32)
    if rotation is not None:
        numbers = (numbers.reshape(-1, len(rotation)) @ rotation).reshape(numbers.shape)
    return np.asarray(quantize(numbers, GGMLQuantizationType[kind.upper()]), np.uint8)
