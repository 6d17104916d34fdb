"""Reads headers of GGUF files with the standard library alone, so that no file reaches native code unseen.

The format is GGUF 2 and 3 (ggml's docs/gguf.md). A number in a file is compared with the file's size before anything is
allocated by it.
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

MAGIC = b"GGUF"
VERSIONS = (2, 3)
#: GGUF's numbers of types, by their struct formats; 8 is a string and 9 an array.
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_UINT32, _LENGTH = struct.Struct("<I"), struct.Struct("<Q")
#: No real header comes near these: bounds of key-value pairs, of tensors, of a key in bytes, and of a tensor's axes.
_MOST, _LONGEST_KEY, _MOST_AXES = 1 << 20, 1 << 16, 8
#: Larger texts, in bytes, and larger arrays, in elements, are passed over; most of them are parts of a vocabulary.
_LARGEST_TEXT, _LARGEST_ARRAY = 16 << 20, 4096
#: The fewest bytes of a pair (a key of one letter, type, value) and of a tensor's entry (name, axes, type, offset).
_PAIR_BYTES, _TENSOR_BYTES = 8 + 1 + 4 + 1, 8 + 4 + 4 + 8
_CHUNK = 1 << 20
#: Possible names of architectures.
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
#: Keys that almost every file has before its vocabulary.
_FIRST = ("{arch}.context_length", "{arch}.block_count")


class BadHeader(ValueError):
    """The file's header contradicts itself or ends too soon; the text completes "its header ..."."""


class Tensor(NamedTuple):
    """Name, begin in the file, and number of rows; those of a vector are its numbers."""

    name: str
    begin: int
    n_rows: int


@dataclass
class Header:
    """The header of a GGUF file.

    values: by key, arrays as lists; arrays of more than 4,096 elements, and texts above 16 MiB, are None. kinds: their
    GGUF types. tensors: their names; places: where they lie, in the order of the file; n_bytes: more than so many the
    file has, if it is whole. Where the reading stopped early, some values and all tensors are missing.
    """

    n_tensors: int
    values: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()
    places: tuple[Tensor, ...] = ()
    n_bytes: int = 0

    @property
    def architecture(self) -> str:
        """The architecture's name; empty where the file has none, or an impossible one."""
        found = self.values.get("general.architecture")
        return found if isinstance(found, str) and _NAME.fullmatch(found) else ""

    def number(self, key: str) -> int | None:
        """The whole number of ``key``, where {arch} stands for the architecture; None where there is none."""
        value = self.values.get(key.replace("{arch}", self.architecture))
        return value if type(value) is int else None

    def array(self, key: str, kind: type) -> list[Any]:
        """The array of ``key``, empty where it is none of this Python type; booleans are integers."""
        value = self.values.get(key)
        return value if isinstance(value, list) and all(isinstance(element, kind) for element in value) else []


def read_header(file: BinaryIO, *, whole: bool = False) -> Header:
    """The header of an open file of GGUF 2 or 3.

    Unless ``whole``, reading stops at the vocabulary, which takes longer than all the rest, once the numbers of
    :data:`_FIRST` are known. Raises BadHeader and OSError.
    """
    size = os.fstat(file.fileno()).st_size
    reader = _Reader(file, size)
    reader.at = len(MAGIC) + _UINT32.size
    n_tensors, n_pairs = reader.length(), reader.length()
    if n_tensors > min(_MOST, size // _TENSOR_BYTES):
        raise BadHeader(f"promises {n_tensors} tensors in {size} bytes")
    if n_pairs > min(_MOST, size // _PAIR_BYTES):
        raise BadHeader(f"promises {n_pairs} values in {size} bytes")
    header = Header(n_tensors)
    for _ in range(n_pairs):
        key = reader.text(_LONGEST_KEY)
        if key is None:
            raise BadHeader("has a key that is too long")
        if key in header.values:
            raise BadHeader(f"tells {key[:60]!r} twice")
        kind = header.kinds[key] = reader.kind()
        if kind != _ARRAY:
            header.values[key] = reader.value(kind)
            continue
        kind, n = reader.kind(), reader.length()
        header.values[key] = None
        if not whole and n > _LARGEST_ARRAY and all(header.number(needed) is not None for needed in _FIRST):
            return header
        header.values[key] = reader.array(kind, n)
    if whole:
        tensors = sorted((reader.tensor() for _ in range(n_tensors)), key=lambda tensor: tensor.begin)
        alignment = max(header.number("general.alignment") or 32, 1)
        data = -(-reader.at // alignment) * alignment
        header.tensors = frozenset(tensor.name for tensor in tensors)
        header.places = tuple(tensor._replace(begin=data + tensor.begin) for tensor in tensors)
        header.n_bytes = reader.at + (tensors[-1].begin if tensors else -1)
    return header


class _Reader:
    """Takes values out of a file, which is read a MiB at a time."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._data, self._begin = b"", 0  # what was read, and where it begins in the file
        self.at = 0  # in the file

    def _span(self, n: int) -> tuple[bytes, int]:
        """Bytes that hold the next n, and where these begin in them; moves behind them."""
        if n > self._size - self.at:
            raise BadHeader("ends too soon")
        if not self._begin <= self.at <= self.at + n <= self._begin + len(self._data):
            self._file.seek(self.at)
            self._data, self._begin = self._file.read(max(n, _CHUNK)), self.at
            if len(self._data) < n:
                raise BadHeader("ends too soon")
        begin = self.at - self._begin
        self.at += n
        return self._data, begin

    def kind(self) -> int:
        kind = int(_UINT32.unpack_from(*self._span(4))[0])
        if kind not in _FORMATS and kind not in (_STRING, _ARRAY):
            raise BadHeader(f"has a value of the unknown type {kind}")
        return kind

    def length(self) -> int:
        return int(_LENGTH.unpack_from(*self._span(8))[0])

    def text(self, longest: int) -> str | None:
        n = self.length()
        if n > longest:
            self._skip(n)
            return None
        data, begin = self._span(n)
        return data[begin : begin + n].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text(_LARGEST_TEXT)
        form = struct.Struct("<" + _FORMATS[kind])
        return form.unpack_from(*self._span(form.size))[0]

    def array(self, kind: int, n: int) -> list[Any] | None:
        if kind == _ARRAY:
            raise BadHeader("has an array of arrays")
        size = 8 if kind == _STRING else struct.calcsize("<" + _FORMATS[kind])
        if n > (self._size - self.at) // size:
            raise BadHeader(f"promises an array of {n} values in a file of {self._size} bytes")
        if n <= _LARGEST_ARRAY:
            return [self.value(kind) for _ in range(n)]
        if kind == _STRING:
            self._skip_texts(n)
        else:
            self._skip(n * size)
        return None

    def tensor(self) -> Tensor:
        """An entry of the tensors' table; there the tensor's begin is counted from behind the table."""
        name = self.text(_LONGEST_KEY)
        n_axes = int(_UINT32.unpack_from(*self._span(4))[0])
        if name is None or n_axes > _MOST_AXES:
            raise BadHeader("has a tensor of no possible name or shape")
        sizes = [self.length() for _ in range(n_axes)]
        self._skip(4)  # type
        return Tensor(name, self.length(), math.prod(sizes[1:] if n_axes > 1 else sizes))

    def _skip(self, n: int) -> None:
        if n > self._size - self.at:
            raise BadHeader("ends too soon")
        self.at += n

    def _skip_texts(self, n: int) -> None:
        """Pass over so many strings: what :meth:`text` does, ten times as fast."""
        while n:
            data, begin = self._span(8)
            at, last, length = begin, len(data) - 8, _LENGTH.unpack_from
            while n and at <= last:
                at += 8 + length(data, at)[0]
                n -= 1
            self.at = self._begin
            self._skip(at)
