"""Files that are written whole or not at all, their digests, and a disk's errors in one line."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from kvcompose_local.errors import DownloadError, InvalidInput, KVComposeError, SessionError
from kvcompose_local.install.resources import CACHE_VARIABLE, cache_folder

#: Called with (bytes done, bytes in all, 0 where unknown). May raise to stop; what was fetched stays.
ByteProgress = Callable[[int, int], None]
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_folders(*files: Path | None, folder: Path | None = None) -> None:
    """Raises InvalidInput where a file, or a folder, cannot be written to its path: before minutes of work."""
    for path in (path for path in (*files, folder) if path is not None):
        if path is not folder and path.is_dir():
            raise InvalidInput(f"{path} is a folder: name a file in it")
        parent = path.resolve().parent
        if not os.access(parent, os.W_OK):
            raise InvalidInput(f"cannot write to {parent}: make the folder, or give another path")


def check_cache(name: str) -> None:
    """Raises SessionError where nothing can be written into that folder of the cache: before minutes of work."""
    folder = cache_folder() / name
    with cache_errors(folder, SessionError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path``, at once and on the disk, when the block ends well.

    Raises SessionError, with ``path`` as it was, where the disk refuses.
    """
    with disk_errors(path, SessionError, then="save again"):
        path = path.resolve()  # a link stays a link
        _remove_leftovers(path)
        part = part_of(path)
        try:
            with open(part, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


@contextmanager
def disk_errors(path: Path, kind: type[KVComposeError], *, then: str, remedy: str = "") -> Iterator[None]:
    """Turn errors of the file system about ``path`` into an error of ``kind``, in one line that says what to do.

    then: what to do once a full disk has room; remedy: the end of the line for all other reasons.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise kind(f"the disk is full: make room in {path.parent}, then {then}") from error
        raise kind(f"cannot write {path} ({error.strerror or error}){remedy}") from error


def cache_errors(path: Path, kind: type[KVComposeError] = DownloadError) -> AbstractContextManager[None]:
    """The same for a file in the cache folder."""
    remedy = f": make the folder writable, or set {CACHE_VARIABLE} to another"
    return disk_errors(path, kind, then="try again", remedy=remedy)


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written because the disk is full."""
    return isinstance(error, OSError) and error.errno in _DISK_FULL


def sha256_of(*files: BinaryIO, progress: ByteProgress = lambda _done, _total: None) -> str:
    """The sha256 of whole files, one after another, in hexadecimal. Raises OSError."""
    total, done, digest = sum(os.fstat(file.fileno()).st_size for file in files), 0, hashlib.sha256()
    for file in files:
        file.seek(0)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            done += len(chunk)
            progress(done, total)
    return digest.hexdigest()


def sha256_at(path: Path) -> str:
    """The sha256 of the file at a path. Raises OSError."""
    with path.open("rb") as file:
        return sha256_of(file)


def part_of(path: Path) -> Path:
    """The file that is written to until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def own_folder(path: Path) -> Path:
    """Make a folder that only its user may read, unless it is there. Raises SessionError."""
    with disk_errors(path, SessionError, then="try again"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _remove_leftovers(path: Path) -> None:
    """Delete part files of processes that were killed while they wrote."""
    import psutil  # late: most who look at model files write none

    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        pid = part.name.split(".")[-2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut, where the file system allows that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
