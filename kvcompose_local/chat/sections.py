"""One file of named sections, each with a version and a checksum of its own: the container of sessions.

The container is safetensors. A tensor ``cells/keys.0`` belongs to the section ``cells``. The file's metadata are::

    manifest   JSON, the caller's
    sections   JSON: {name: {"version": int, "required": bool, "checksum": hexadecimal}}
    checksum   blake2b over the header, with zeros in this checksum's place

A section's checksum is blake2b over the bytes of its tensors, in the order in which they lie in the file. A reader
skips a section that it does not know, or knows in older versions only, unless the section is required: then it refuses
the file. So later programs add optional sections, and raise the version of what an older one would misread.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import psutil
from safetensors import safe_open

from kvcompose_local.errors import SessionError
from kvcompose_local.install.files import replacing

Array = npt.NDArray[Any]
#: A manifest and the names of some hundred tensors take 100 kB.
_MAX_HEADER_BYTES = 4 << 20
_CHUNK = 1 << 20
_CHECKSUM = b'"checksum": "'
_DIGITS = 64
_DTYPES = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4"), "U8": np.dtype("u1")}
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,30}")


@dataclass(frozen=True)
class Section:
    """What is written as one section: its version, whether readers must know it, and what makes each tensor.

    Tensors are float32, int32 or uint8. Each is made twice: once for its size, once to be written.
    """

    version: int
    arrays: Mapping[str, Callable[[], Array]]
    required: bool = True


class Sections:
    """The sections of an open file that this program knows; their checksums were right when it was opened."""

    def __init__(self, tensors: Any, versions: Mapping[str, int]) -> None:
        self._tensors = tensors
        self.versions = versions

    def names(self, section: str) -> set[str]:
        """The tensors of a section."""
        return {name.split("/", 1)[1] for name in self._tensors.keys() if name.startswith(f"{section}/")}  # noqa: SIM118

    def shape(self, name: str, dtype: str, *sizes: range) -> list[int]:
        """The shape of a tensor, which is not read yet. Raises ValueError unless each size is in its range."""
        view = self._tensors.get_slice(name)
        found = view.get_shape()
        if view.get_dtype() != dtype or len(found) != len(sizes):
            raise ValueError(f"tensor {name} is {view.get_dtype()} {found}")
        if not all(n in allowed for n, allowed in zip(found, sizes, strict=True)):
            raise ValueError(f"tensor {name} has shape {found}")
        return [*found]

    def array(self, name: str) -> Array:
        """A tensor, read now. Look at its shape before."""
        return self._tensors.get_tensor(name)  # type: ignore[no-any-return]


# -- writing ----------------------------------------------------------------------------------------------------------


def write(path: Path, manifest: str, sections: Mapping[str, Section]) -> int:
    """Write a file, which is there either whole or as it was before; returns its bytes. Raises SessionError."""
    dtypes = {dtype: name for name, dtype in _DTYPES.items()}
    makers: dict[str, Callable[[], Array]] = {}
    kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]] = {}
    for name, section in sections.items():
        for key, make in section.arrays.items():
            array = make()  # one at a time: all cells must not be in memory a second time
            makers[f"{name}/{key}"], kinds[f"{name}/{key}"] = make, (array.dtype, array.shape, array.nbytes)
    entries, end = {}, 0
    # Tensors of four bytes come first, so that all of them are aligned.
    for name, (dtype, shape, n_bytes) in sorted(kinds.items(), key=lambda item: -item[1][0].itemsize):
        begin, end = end, end + n_bytes
        entries[name] = {"dtype": dtypes[dtype], "shape": shape, "data_offsets": [begin, end]}
    digests = {name: hashlib.blake2b(digest_size=_DIGITS // 2) for name in sections}

    def header() -> bytes:
        """The header after safetensors' README, "Format". Its length does not depend on the checksums."""
        # The package's own writer holds all cells in memory, and tells a full disk as text only.
        table = {
            name: {"version": section.version, "required": section.required, "checksum": digests[name].hexdigest()}
            for name, section in sections.items()
        }
        # No text inside can look like the checksum: quotes within JSON strings are escaped.
        metadata = {"checksum": "0" * _DIGITS, "manifest": manifest, "sections": json.dumps(table)}
        raw = json.dumps({"__metadata__": metadata, **entries}).encode()
        raw += b" " * (-len(raw) % 8)
        return struct.pack("<Q", len(raw)) + raw

    with replacing(path) as file:
        file.write(header())
        for name in entries:
            part = np.ascontiguousarray(makers[name]()).reshape(-1).view(np.uint8).data
            digests[name.split("/", 1)[0]].update(part)
            file.write(part)
        n_written = file.tell()
        file.seek(0)
        file.write(_with_checksum(header()))
    return n_written


def _with_checksum(head: bytes) -> bytes:
    at = head.index(_CHECKSUM) + len(_CHECKSUM)
    return head[:at] + _checksum_of(head).encode() + head[at + _DIGITS :]


def _checksum_of(head: bytes) -> str:
    """The checksum that a header should have: over all its bytes, with zeros in the checksum's place."""
    at = head.find(_CHECKSUM) + len(_CHECKSUM)
    return hashlib.blake2b(head[:at] + b"0" * _DIGITS + head[at + _DIGITS :], digest_size=_DIGITS // 2).hexdigest()


# -- reading ----------------------------------------------------------------------------------------------------------


@contextmanager
def opened(
    path: Path, known: Mapping[str, int], check: Callable[[str], object] = lambda _manifest: None
) -> Iterator[tuple[str, Sections]]:
    """The manifest and the sections of a file. Its checksums are checked before anything of it is believed.

    known: the newest version that the caller reads of each section; check: gets the manifest first of all, so that a
    file of another format is reported as such. Raises OSError, SessionError for a file that needs a newer program, and
    ValueError, KeyError, TypeError, RecursionError or SafetensorError for a file that is damaged or no container.
    """
    # A pipe would keep a plain open waiting.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a plain file")
        length = file.read(8)
        if (n := int.from_bytes(length, "little")) > _MAX_HEADER_BYTES:
            raise ValueError("its header is too large")
        if status.st_size > psutil.virtual_memory().total:
            raise ValueError("it is larger than this machine's memory")
        with safe_open(path, "numpy") as tensors:
            if not os.path.samestat(status, os.stat(path)):
                raise ValueError("it was replaced meanwhile")
            metadata = tensors.metadata() or {}
            manifest = metadata.get("manifest", "{}")
            check(manifest)
            head = length + file.read(n)
            if metadata.get("checksum") != _checksum_of(head):
                raise ValueError("its checksum is wrong")
            entries = json.loads(head[8:])
            entries.pop("__metadata__")
            table = _table(metadata.get("sections", ""), entries)
            versions = {name: row["version"] for name, row in table.items() if _is_read(name, row, known)}
            for name in versions:
                if _digest_of(file, len(head), name, entries) != table[name]["checksum"]:
                    raise ValueError(f"the checksum of its {name} is wrong")
            yield manifest, Sections(tensors, versions)


def _table(text: str, entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The table of sections. Raises ValueError where it is none, or a tensor has no section."""
    table = json.loads(text)
    fields = {"version": int, "required": bool, "checksum": str}
    if not isinstance(table, dict) or not all(
        _NAME.fullmatch(name)
        and isinstance(row, dict)
        and row.keys() == fields.keys()
        and all(type(row[field]) is kind for field, kind in fields.items())
        for name, row in table.items()
    ):
        raise ValueError("its table of sections is none")
    if strays := {name.split("/", 1)[0] for name in entries} - table.keys():
        raise ValueError(f"its tensors {sorted(strays)[0]} are in no section")
    return table


def _is_read(name: str, row: Mapping[str, Any], known: Mapping[str, int]) -> bool:
    """Whether a section is read; raises SessionError where it must be and cannot."""
    if 1 <= row["version"] <= known.get(name, 0):
        return True
    if row["required"]:
        raise SessionError(
            f"needs a newer version of this program: this one does not read {name!r} in version {row['version']}"
        )
    return False


def _digest_of(file: BinaryIO, begin: int, section: str, entries: Mapping[str, Any]) -> str:
    """The checksum that a section should have; its tensors' data begins at ``begin`` of the file."""
    digest = hashlib.blake2b(digest_size=_DIGITS // 2)
    spans: Sequence[Sequence[int]] = sorted(
        entry["data_offsets"] for name, entry in entries.items() if name.startswith(f"{section}/")
    )
    for start, stop in spans:
        file.seek(begin + start)
        left = stop - start
        while left and (chunk := file.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
