"""The files that a model is made of, their sizes, and their digest."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from kvcompose_local.errors import KVComposeError, ModelError, SessionError
from kvcompose_local.install.file_kinds import complaint
from kvcompose_local.install.files import ByteProgress, own_folder, replacing, sha256_of
from kvcompose_local.install.gguf_header import MAGIC, BadHeader, Header, read_header
from kvcompose_local.install.resources import cache_folder

#: How llama.cpp names the files of a model that is split.
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
#: Samples of a file that show a change of its content: bytes at its begin, and bytes at places spread over it.
_SAMPLED_BEGIN, _SAMPLED_PLACE, _N_PLACES = 64 << 10, 4 << 10, 16
_UINT16 = 2
#: The most links to links that are followed, as in Linux.
_MOST_LINKS = 40


def check_gguf(path: Path) -> None:
    """Look at a model's files before native code does. Raises ModelError that says what the file is and what to do."""
    _check(path)
    for shard in files_of(path)[1:]:
        _check(shard)


def _check(path: Path) -> None:
    try:
        told = complaint(path)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if told:
        raise ModelError(f"{path} {told}")


def first_of(path: Path) -> Path:
    """The file by which llama.cpp loads a model. If the model is split, this is its first file, whichever was named.

    Raises ModelError where the first file is missing.
    """
    path = _shard_behind(path)
    name = _SHARD.fullmatch(path.name)
    if name is None or int(name[2]) == 1 or not _is_shard(path):
        return path
    first = path.with_name(f"{name[1]}-{1:05d}-of-{name[3]}.gguf")
    if not first.exists():
        raise ModelError(f"{path} is one of {int(name[3])} files of a model, and {first.name} is missing beside it")
    return first


def _shard_behind(path: Path) -> Path:
    """The target of a link to a shard, where the link itself has no shard's name; otherwise the same path."""
    target = path
    for _ in range(_MOST_LINKS):
        if _SHARD.fullmatch(target.name):
            return target
        if not target.is_symlink():
            break
        target = target.parent / os.readlink(target)
    return path


def files_of(path: Path) -> tuple[Path, ...]:
    """All files of a model, of which ``path`` is one.

    They are found by their names beside it. In a hub's cache these are links, whose targets have other names: links are
    not followed. Raises ModelError that names a file which is missing or belongs to another model.
    """
    first = first_of(path)
    name = _SHARD.fullmatch(first.name)
    header = whole_header(first) if name else None
    n_files = header.number("split.count") if header else None
    if not name or not header or not n_files or n_files == 1:
        return (first,)
    if n_files != int(name[3]):
        raise ModelError(f"{first} is one of {n_files} files by its header, and of {int(name[3])} by its name")
    shards = tuple(first.with_name(f"{name[1]}-{i:05d}-of-{name[3]}.gguf") for i in range(1, n_files + 1))
    for i, shard in enumerate(shards):
        if not shard.exists():
            raise ModelError(f"{shard} is missing: the model is made of {n_files} files, which belong in one folder")
        found = whole_header(shard)
        # llama.cpp asserts that the number is of this type
        if found is None or found.number("split.no") != i or found.kinds["split.no"] != _UINT16:
            raise ModelError(f"{shard} is not file {i + 1} of the model, as its name says: fetch it again")
        if found.n_bytes >= (size := shard.stat().st_size):
            raise ModelError(f"{shard} is cut off after {size} bytes: fetch it again")
    return shards


def size_of(path: Path) -> int:
    """Bytes of all files of a model. Raises ModelError."""
    try:
        return sum(file.stat().st_size for file in files_of(path))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error


def _is_shard(path: Path) -> bool:
    header = whole_header(path)
    return header is not None and (header.number("split.count") or 1) > 1


def whole_header(path: Path) -> Header | None:
    """The whole header of a file, None where it is no GGUF file."""
    try:
        return _kept_header(path, _version_of(path.stat()))
    except (OSError, BadHeader):
        return None


@lru_cache(maxsize=256)
def _kept_header(path: Path, _version: tuple[int, ...]) -> Header:
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise BadHeader("is none")
        return read_header(file, whole=True)


def _version_of(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to; its time of change (ctime) cannot be set back."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


# -- identity ---------------------------------------------------------------------------------------------------------


class OpenFiles:
    """A model's open files, as they were when it was loaded: llama.cpp goes on reading, and anybody may write to them.

    handles: by now another model may stand at their paths, or none; digest: as :func:`model_digest`, None until
    somebody asks for it, since to make one takes as long as reading the files. Raises OSError.
    """

    def __init__(self, handles: Sequence[BinaryIO]) -> None:
        self.handles = tuple(handles)
        self._written, self._samples = self._when_written(), [_sample_of(file) for file in handles]
        self.digest = _kept_digest(handles, self._samples)[1]

    def _when_written(self) -> list[tuple[int, int]]:
        """Another name or other rights do not matter."""
        return [(status.st_size, status.st_mtime_ns) for status in (os.fstat(file.fileno()) for file in self.handles)]

    def are_changed(self) -> bool:
        """Whether any of them holds something else by now, as far as sizes, times and samples tell."""
        if (written := self._when_written()) == self._written:
            return False
        is_cut = [size for size, _ in written] != [size for size, _ in self._written]
        if is_cut or [_sample_of(file) for file in self.handles] != self._samples:
            return True
        self._written = written
        return False


def model_digest(path: Path, progress: ByteProgress | None = None, files: OpenFiles | None = None) -> str:
    """The sha256 of a model's files, one after another, in hexadecimal.

    The cache folder keeps it under the files' identities and samples of their content. So another model is noticed even
    if it has the same place, size and time, and a cached digest costs milliseconds.

    progress gets (MiB read, MiB in all); files: where the model is loaded. Raises ModelError when they cannot be
    read, or were written to since, and nobody had asked before.
    """

    def in_mib(done: int, total: int) -> None:
        if progress is not None:
            progress(done >> 20, total >> 20)

    if files is not None and any(file.closed for file in files.handles):
        raise ModelError("the model is closed")
    if files is not None and files.are_changed():
        if files.digest is None:
            raise ModelError(f"{path.name} was written to while it is in use: nobody knows whose chat this is")
        return files.digest
    try:
        with ExitStack() as stack:
            opened = files.handles if files else [stack.enter_context(open(file, "rb")) for file in files_of(path)]
            before = [_version_of(os.fstat(file.fileno())) for file in opened]
            kept, digest = _kept_digest(opened, [_sample_of(file) for file in opened])
            is_kept = digest is not None
            digest = digest or sha256_of(*opened, progress=in_mib)
            if files is not None and not files.are_changed():
                files.digest = digest
            if is_kept or kept is None or before != [_version_of(os.fstat(file.fileno())) for file in opened]:
                return digest  # as it is kept, or somebody wrote meanwhile
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    with suppress(SessionError):  # a cache that cannot be written costs time, nothing else
        own_folder(kept.parent)
        with replacing(kept) as file:
            file.write(digest.encode())
    return digest


def _kept_digest(files: Sequence[BinaryIO], samples: Sequence[str]) -> tuple[Path | None, str | None]:
    """Where the digest of open files is kept, and what stands there; None where the user has no cache, or nothing."""
    versions = [_version_of(os.fstat(file.fileno())) for file in files]
    key = json.dumps([versions, samples])
    kept = _kept_at(hashlib.sha256(key.encode()).hexdigest())
    with suppress(OSError, UnicodeDecodeError):
        if kept and re.fullmatch("[0-9a-f]{64}", digest := kept.read_text(encoding="ascii")):
            return kept, digest
    return kept, None


def _kept_at(name: str) -> Path | None:
    """Where a digest is kept, None where the user has no cache folder."""
    try:
        return cache_folder() / "digests" / name
    except KVComposeError:
        return None


def _sample_of(file: BinaryIO) -> str:
    handle = file.fileno()
    size = os.fstat(handle).st_size
    digest = hashlib.sha256(os.pread(handle, _SAMPLED_BEGIN, 0))
    last = max(size - _SAMPLED_PLACE, 0)
    for i in range(_N_PLACES):
        digest.update(os.pread(handle, _SAMPLED_PLACE, last * (i + 1) // _N_PLACES))
    return digest.hexdigest()
