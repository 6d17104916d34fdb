"""Finds the zeros of a download that is not finished: its file has the full size, and nothing in the parts that miss.

Zeros alone prove nothing: a tensor, an expert or the rows of tokens that nobody uses may be zero. But then they begin
and end with a row, and a part that misses begins and ends anywhere.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from typing import BinaryIO

from kvcompose_local.install.gguf_header import Header, Tensor, read_header

#: Places that are looked at, evenly spread and at the end; bytes of each; shorter zeros are no missing part.
_N_PROBES, _PROBE_BYTES, _LEAST_BYTES = 64, 4 << 10, 64 << 10
_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)
#: Bytes that may be zero by chance beside a row, and beside a tensor, to whose begin zeros are padded.
_BESIDE_ROW, _BESIDE_TENSOR = 8, 64


def hole_in(file: BinaryIO) -> str | None:
    """Where a part of a GGUF file is missing, as the end of a sentence that begins with its name.

    Takes about a millisecond unless there are zeros. Raises BadHeader and OSError.
    """
    handle = file.fileno()
    size = os.fstat(handle).st_size
    header: Header | None = None
    end = 0
    for i in range(1, _N_PROBES + 1) if size >= _LEAST_BYTES else ():
        at = (size - _PROBE_BYTES) * i // _N_PROBES
        if at < end or os.pread(handle, _PROBE_BYTES, at).strip(b"\0"):
            continue
        begin, end = _first_zero(handle, at), _last_zero(handle, at, size)
        header = header or read_header(file, whole=True)
        tensors = header.places
        if end - begin < _LEAST_BYTES or not tensors or begin < tensors[0].begin - _BESIDE_TENSOR:
            continue
        if _is_of_rows(begin, end, tensors, size):
            continue
        where = f"ends in zeros, from byte {begin} of {size}" if end == size else f"holds zeros from {begin} to {end}"
        return f"{where}, as a download does that is not finished"
    return None


def _first_zero(handle: int, at: int) -> int:
    """Where the zeros begin in whose midst a place is."""
    while at:
        n = min(at, _CHUNK)
        chunk = os.pread(handle, n, at - n)
        if chunk != _ZEROS[:n]:
            return at - n + len(chunk.rstrip(b"\0"))
        at -= n
    return 0


def _last_zero(handle: int, at: int, size: int) -> int:
    """Where the first byte behind the zeros is."""
    while at < size:
        chunk = os.pread(handle, _CHUNK, at)
        if chunk != _ZEROS[: len(chunk)]:
            return at + len(chunk) - len(chunk.lstrip(b"\0"))
        at += len(chunk)
    return size


def _is_of_rows(begin: int, end: int, tensors: Sequence[Tensor], size: int) -> bool:
    """Whether zeros are whole tensors, or whole rows of one tensor or of two that follow each other."""
    bounds = [*(tensor.begin for tensor in tensors), size]
    first, last = (min(max(bisect_right(bounds, at) - 1, 0), len(tensors) - 1) for at in (begin, end - 1))

    def row_bytes(i: int) -> int:
        return max((bounds[i + 1] - bounds[i]) // max(tensors[i].n_rows, 1), 1)

    begins = begin <= bounds[first] or bounds[first + 1] - begin <= _BESIDE_TENSOR
    ends = end == bounds[last + 1] or end - bounds[last] <= _BESIDE_TENSOR
    if last - first <= 1:
        begins = begins or (bounds[first] - begin) % row_bytes(first) <= _BESIDE_ROW
        ends = ends or (end - bounds[last]) % row_bytes(last) <= _BESIDE_ROW
    return begins and ends
