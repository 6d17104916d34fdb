"""llama.cpp's serialized sequence state as arrays, and the gather that makes composite tokens of it.

``llama_state_seq_get_data`` of the pinned version writes this (llama-context.cpp, llama-kv-cache.cpp):

======================  ==================================================================================
u32, i32                magic 0xaf143cd8, sequence id
u32, u32                streams (1), cells ``n``
n × (i32, u32, i32…)    position, number of sequence ids (1), the ids
u32, u32                V transposed?, layers
per layer               i32 ggml type, u64 bytes of a K row, n rows
per layer, V plain      i32 ggml type, u64 bytes of a V row, n rows
per layer, V transp.    i32 type, u32 bytes of an element, u32 elements of a V row, then n of each element
======================  ==================================================================================

There is no version number inside, so every size is checked and nothing may be left over.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from kvcompose_local.errors import StateFormatError
from kvcompose_local.interfaces import ByteArray, Selection

STATE_MAGIC = 0xAF143CD8


def type_sizes(ggml_type: int) -> tuple[int, int]:
    """(elements of a block, bytes of a block) of a ggml type. Raises StateFormatError for a type gguf does not know."""
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
    except (KeyError, ValueError) as error:
        raise StateFormatError(f"the cache has ggml type {ggml_type}, which this version does not know") from error
    return int(block), int(size)


def row_bytes(ggml_type: int, n_elements: int) -> int:
    """Bytes of ``n_elements`` values of a ggml type. Raises StateFormatError where a block would be cut."""
    block, size = type_sizes(ggml_type)
    if n_elements % block:
        raise StateFormatError(f"{n_elements} values are not whole blocks of {block}")
    return n_elements // block * size


@dataclass(frozen=True)
class Plane:
    """The K or the V rows of one layer.

    data: uint8 (n, row bytes), or, transposed, (elements of a row, n, bytes of an element).
    """

    ggml_type: int
    data: ByteArray
    transposed: bool = False

    def rows(self) -> ByteArray:
        """uint8 (n, row bytes), not transposed."""
        return self.data.transpose(1, 0, 2).reshape(self.data.shape[1], -1) if self.transposed else self.data

    @classmethod
    def of_rows(cls, ggml_type: int, rows: ByteArray, *, transposed: bool = False) -> Plane:
        """The inverse of :meth:`rows`."""
        if not transposed:
            return cls(ggml_type, rows)
        size = type_sizes(ggml_type)[1]
        return cls(ggml_type, rows.reshape(len(rows), -1, size).transpose(1, 0, 2), True)

    def gather(self, selection: Selection, n_tail: int) -> Plane:
        """Composed rows by head, then the last ``n_tail`` rows as they are.

        selection: int (H, K), source row of each head of each composed row. Raises StateFormatError when a head is
        not a whole number of quantization blocks.
        """
        n_kv_heads, n_composed = selection.shape
        n = self.data.shape[1 if self.transposed else 0]
        if selection.size and not 0 <= selection.min() <= selection.max() < n:
            raise StateFormatError(f"the selection names rows outside the {n} cells")
        tail = slice(n - n_tail, n)
        if self.transposed:
            elements = self.data.shape[0]
            if elements % n_kv_heads:
                raise StateFormatError(f"{elements} values of a row do not divide into {n_kv_heads} heads")
            rows = np.repeat(selection, elements // n_kv_heads, axis=0)  # (elements, K)
            composed = self.data[np.arange(elements)[:, None], rows]
            return Plane(self.ggml_type, np.concatenate([composed, self.data[:, tail]], axis=1), True)
        width = self.data.shape[1]
        block_bytes = type_sizes(self.ggml_type)[1]
        if width % n_kv_heads or (width // n_kv_heads) % block_bytes:
            raise StateFormatError(f"a row of {width} bytes does not divide into {n_kv_heads} heads of whole blocks")
        by_head = self.data.reshape(n, n_kv_heads, width // n_kv_heads)
        composed = by_head[selection.T, np.arange(n_kv_heads)].reshape(n_composed, width)
        return Plane(self.ggml_type, np.concatenate([composed, self.data[tail]], axis=0))


@dataclass(frozen=True)
class CellBlock:
    """All cells of a sequence: positions int32 (n,), and K and V of each layer, in the order of the cells."""

    positions: npt.NDArray[np.int32]
    keys: tuple[Plane, ...]
    values: tuple[Plane, ...]
    sequence: int = 0

    def gather(self, selection: Sequence[Selection], n_tail: int, n_forgotten: int = 0) -> CellBlock:
        """Composite tokens, then the last ``n_tail`` cells.

        selection: one int (H, K) array a layer, K equal in all; n_forgotten: without a tail, positions to go back by.
        Composed cells take the positions just before the first kept one, so that the next token goes on at the true
        position: a position only feeds the causal mask, and keys keep the rotation of their own token. Raises
        StateFormatError for unequal or out-of-range selections.
        """
        widths = {s.shape[1] for s in selection}
        if len(selection) != len(self.keys) or len(widths) != 1:
            raise StateFormatError("one table of cells wants one selection a layer, equally long in all")
        n, n_composed = len(self.positions), widths.pop()
        if not 0 <= n_tail <= n:
            raise StateFormatError(f"cannot keep {n_tail} of {n} cells")
        tail = self.positions[n - n_tail :]
        first_live = int(tail[0]) if n_tail else (int(self.positions.max()) + 1 if n else 0) - n_forgotten
        if n_composed > first_live:
            raise StateFormatError(f"{n_composed} composed cells have no positions before {first_live}")
        composed = np.arange(first_live - n_composed, first_live, dtype=np.int32)
        return CellBlock(
            np.concatenate([composed, tail]),
            tuple(plane.gather(s, n_tail) for plane, s in zip(self.keys, selection, strict=True)),
            tuple(plane.gather(s, n_tail) for plane, s in zip(self.values, selection, strict=True)),
            self.sequence,
        )


class _Reader:
    """Reads structs and bytes from a buffer; running out of it is a StateFormatError."""

    def __init__(self, blob: ByteArray) -> None:
        self.blob = blob
        self.offset = 0

    def take(self, n: int) -> ByteArray:
        if n < 0 or self.offset + n > self.blob.size:
            raise StateFormatError(f"the cache state ends at byte {self.blob.size}, inside a field")
        part = self.blob[self.offset : self.offset + n]
        self.offset += n
        return part

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)).tobytes())


def parse_state(blob: ByteArray) -> CellBlock:
    """Read a serialized state; the arrays are views of ``blob``, uint8 (size,).

    Raises StateFormatError for another magic, several streams, cells of several sequences, sizes that contradict each
    other, and bytes left over (a second, sliding-window cache among them).
    """
    reader = _Reader(blob)
    magic, sequence = reader.unpack("<Ii")
    if magic != STATE_MAGIC:
        raise StateFormatError(f"the cache state has magic {magic:#x}, not {STATE_MAGIC:#x}: another llama.cpp version")
    streams, n = reader.unpack("<II")
    if streams != 1:
        raise StateFormatError(f"the cache has {streams} streams; one is supported")
    if n == 0:
        if reader.offset != blob.size:
            raise StateFormatError("an empty cache state has bytes left over")
        return CellBlock(np.empty(0, np.int32), (), (), sequence)
    meta = reader.take(n * 12).view("<i4").reshape(n, 3)
    if not (meta[:, 1] == 1).all():
        raise StateFormatError("a cell belongs to several sequences, or carries 2D positions")
    transposed, n_layers = reader.unpack("<II")
    if transposed > 1 or not 0 < n_layers < 4096:
        raise StateFormatError(f"the cache state names {n_layers} layers and V layout {transposed}")

    def plain() -> Plane:
        ggml_type, width = reader.unpack("<iQ")
        if not 0 < width < 1 << 24 or width % type_sizes(ggml_type)[1]:
            raise StateFormatError(f"a row of {width} bytes is impossible for ggml type {ggml_type}")
        return Plane(ggml_type, reader.take(n * width).reshape(n, width))

    def by_element() -> Plane:
        ggml_type, size, elements = reader.unpack("<iII")
        if type_sizes(ggml_type) != (1, size) or not 0 < elements < 1 << 22:
            raise StateFormatError(f"{elements} elements of {size} bytes are impossible for ggml type {ggml_type}")
        return Plane(ggml_type, reader.take(elements * n * size).reshape(elements, n, size), True)

    keys = tuple(plain() for _ in range(n_layers))
    values = tuple(by_element() if transposed else plain() for _ in range(n_layers))
    if reader.offset != blob.size:
        raise StateFormatError(f"the cache state has {blob.size - reader.offset} bytes left over")
    return CellBlock(meta[:, 0], keys, values, sequence)


def write_state(cells: CellBlock) -> ByteArray:
    """The inverse of :func:`parse_state`, uint8 (size,)."""
    n = len(cells.positions)
    parts: list[bytes | ByteArray] = [struct.pack("<IiII", STATE_MAGIC, cells.sequence, 1, n)]
    if n:
        meta = np.empty((n, 3), "<i4")
        meta[:, 0], meta[:, 1], meta[:, 2] = cells.positions, 1, cells.sequence
        transposed = cells.values[0].transposed
        parts += [meta.view(np.uint8).ravel(), struct.pack("<II", transposed, len(cells.keys))]
        for plane in cells.keys + cells.values:
            if plane.transposed:
                parts.append(struct.pack("<iII", plane.ggml_type, plane.data.shape[2], plane.data.shape[0]))
            else:
                parts.append(struct.pack("<iQ", plane.ggml_type, plane.data.shape[1]))
            parts.append(plane.data.ravel())
    return np.concatenate([np.frombuffer(p, np.uint8) if isinstance(p, bytes) else p for p in parts])
