"""Where things are: data files of the package, the user's folders; what a disk may refuse; what a file is."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kvcompose_local.errors import DownloadError, KVComposeError, NoHome

CACHE_VARIABLE = "KVCOMPOSE_CACHE"
#: Called with (bytes done, bytes in all, 0 where unknown). May raise to stop; what was fetched stays.
ByteProgress = Callable[[int, int], None]
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def data_file(name: str) -> Path:
    """The path of ``models.txt`` or ``patches``, in a source checkout or in an installed wheel."""
    package = Path(__file__).parent.parent
    for path in (package / "data" / name, package.parent / name):
        if path.exists():
            return path
    raise KVComposeError(f"{name} is missing from this installation: install kvcompose-local again")


def cache_folder() -> Path:
    """Where models, archives and libraries are kept: ``KVCOMPOSE_CACHE``, or the platform's folder; not made here.

    Raises NoHome.
    """
    if override := os.environ.get(CACHE_VARIABLE):
        return Path(os.path.expanduser(override)).absolute()
    return _user_folder("user_cache_path", f"set HOME or {CACHE_VARIABLE}")


def state_folder() -> Path:
    """Where sessions and the history of what was typed are kept; not made here. Raises NoHome."""
    return _user_folder("user_state_path", "set HOME")


def _user_folder(kind: str, remedy: str) -> Path:
    import platformdirs  # late: the build needs this module before anything is installed

    try:
        path: Path = getattr(platformdirs, kind)("kvcompose-local")
    except RuntimeError:  # as a container's user without an entry among the users
        path = Path()
    if not path.is_absolute():  # older platformdirs gives ~/… back
        raise NoHome(f"this user has no home folder: {remedy} to a folder that can be written")
    return path


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


@contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses about ``path`` into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DownloadError(f"the disk is full: make room in {path.parent}, then try again") from error
        raise DownloadError(
            f"cannot write {path} ({error.strerror or error}): "
            f"make the folder writable, or set {CACHE_VARIABLE} to another"
        ) from error
