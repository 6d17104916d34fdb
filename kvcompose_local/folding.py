"""What is dropped leaves its value behind, in the kept token whose key is nearest.

A query that would have looked at a dropped token looks at the kept ones whose keys are most like its key, and finds
their values there. So before a selection drops a token for a head, its value is mixed into that of the kept token
nearest by cosine, each counting by its score. Keys stay as they are. On top of a replay's scores it takes a seventh off
the KL divergence (docs/trials.md). Axes: KV head H, row n.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvcompose_local.interfaces import ByteArray, FloatArray, IntArray, Selection

#: A token with a lower score is dropped as it is: the others take the same share of the loss back (docs/trials.md).
LEAST_SCORE = 0.02
#: Rows that are looked at together, which bounds the memory.
_CHUNK = 512
_F16 = 1


class Plane(Protocol):
    """All K, or all V rows of a layer, of a ggml type."""

    @property
    def ggml_type(self) -> int: ...

    @property
    def n_rows(self) -> int: ...

    def read(self, start: int, stop: int) -> ByteArray:
        """uint8 (stop - start, bytes of a row)."""
        ...

    def write(self, start: int, rows: ByteArray) -> None:
        """The inverse."""
        ...


@dataclass(frozen=True)
class ArrayPlane:
    """Rows in memory, uint8 (n, bytes of a row)."""

    rows: ByteArray
    ggml_type: int = _F16

    @property
    def n_rows(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> ByteArray:
        return self.rows[start:stop]

    def write(self, start: int, rows: ByteArray) -> None:
        self.rows[start : start + len(rows)] = rows


def fold_dropped(keys: Plane, values: Plane, kept: Selection, scores: FloatArray) -> int:
    """Mix the values of what ``kept`` drops into those of what it keeps, in place; returns how many were.

    kept: int (H, K), the rows that each head keeps; scores: float (H, at most n) of the rows, 0 for those that are not
    in use, or that are neither dropped nor looked at, as the newest are.
    """
    n_heads = len(kept)
    stays = np.zeros((n_heads, keys.n_rows), bool)
    np.put_along_axis(stays, kept, True, axis=1)
    dropped = [np.flatnonzero((row >= LEAST_SCORE) & ~stays[h, : row.size]) for h, row in enumerate(scores)]
    if not kept.shape[1] or not any(rows.size for rows in dropped):
        return 0
    nearest = _nearest(keys, stays, dropped)
    sums = _gathered(values, dropped)  # float32 (g, D) of each head, in order of the dropped
    totals, targets = [], []
    for h in range(n_heads):
        weights = scores[h, dropped[h]].astype(np.float32)
        into, order = np.unique(nearest[h], return_inverse=True)
        mixed, total = np.zeros((into.size, sums[h].shape[1]), np.float32), np.zeros(into.size, np.float32)
        np.add.at(mixed, order, sums[h] * weights[:, None])
        np.add.at(total, order, weights)
        sums[h] = mixed
        totals.append(total)
        targets.append(into)
    for start, raw, parts in _chunks(values, targets):
        raw = raw.copy()
        for h, part in enumerate(parts):
            rows = targets[h][part]
            if not rows.size:
                continue
            own = np.maximum(scores[h, rows], LEAST_SCORE).astype(np.float32)
            head = _head(raw, h, n_heads)
            value = _floats(head[rows - start], values.ggml_type) * own[:, None] + sums[h][part]
            head[rows - start] = _stored(value / (own + totals[h][part])[:, None], values.ggml_type)
        values.write(start, raw)
    return sum(rows.size for rows in dropped)


def _nearest(keys: Plane, stays: NDArray[np.bool_], dropped: list[IntArray]) -> list[IntArray]:
    """For each head's dropped rows, the row of the kept one whose key is nearest by cosine."""
    n_heads = len(stays)
    wanted = [_unit(rows) for rows in _gathered(keys, dropped)]
    best = [np.full(rows.size, -np.inf, np.float32) for rows in dropped]
    found = [np.zeros(rows.size, np.int64) for rows in dropped]
    kept = [np.flatnonzero(row) if rows.size else rows for row, rows in zip(stays, dropped, strict=True)]
    for start, raw, parts in _chunks(keys, kept):
        for h, here in enumerate(parts):
            rows = kept[h][here]
            if not rows.size:
                continue
            unit = _unit(_floats(_head(raw, h, n_heads)[rows - start], keys.ggml_type))
            for at in range(0, dropped[h].size, _CHUNK):
                part = slice(at, at + _CHUNK)
                alike = wanted[h][part] @ unit.T
                place = alike.argmax(axis=1)
                alike = alike[np.arange(len(place)), place]
                better = alike > best[h][part]
                best[h][part][better] = alike[better]
                found[h][part][better] = rows[place[better]]
    return found


def _gathered(plane: Plane, wanted: list[IntArray]) -> list[FloatArray]:
    """Of each head the rows that it wants, which rise: float32 (g, D)."""
    found: list[list[FloatArray]] = [[] for _ in wanted]
    for start, raw, parts in _chunks(plane, wanted):
        for h, part in enumerate(parts):
            rows = wanted[h][part]
            if rows.size:  # of no rows, not every type can be read
                found[h].append(_floats(_head(raw, h, len(wanted))[rows - start], plane.ggml_type))
    return [np.concatenate(rows) if rows else np.zeros((0, 0), np.float32) for rows in found]


def _chunks(plane: Plane, wanted: list[IntArray]) -> Iterator[tuple[int, ByteArray, list[slice]]]:
    """The parts of a plane with rows that some head wants: (start, rows, of each head's wanted ones the slice)."""
    for start in range(0, plane.n_rows, _CHUNK):
        stop = min(start + _CHUNK, plane.n_rows)
        parts = [slice(*np.searchsorted(rows, (start, stop)).tolist()) for rows in wanted]
        if any(part.start < part.stop for part in parts):
            yield start, plane.read(start, stop), parts


def _head(raw: ByteArray, head: int, n_heads: int) -> ByteArray:
    width = raw.shape[1] // n_heads
    return raw[:, head * width : (head + 1) * width]


def _unit(rows: FloatArray) -> FloatArray:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6), np.float32)


def _floats(rows: ByteArray, ggml_type: int) -> FloatArray:
    rows = np.ascontiguousarray(rows)
    if ggml_type == _F16:
        return rows.view(np.float16).astype(np.float32)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return np.asarray(dequantize(rows, GGMLQuantizationType(ggml_type)), np.float32)


def _stored(rows: FloatArray, ggml_type: int) -> ByteArray:
    if ggml_type == _F16:
        return rows.astype(np.float16).view(np.uint8)
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    return np.ascontiguousarray(quantize(rows, GGMLQuantizationType(ggml_type))).view(np.uint8)
