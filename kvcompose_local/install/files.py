"""Files that appear whole or not at all."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from kvcompose_local.errors import SessionError
from kvcompose_local.install.resources import DISK_FULL


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path``, at once and on the disk, when the block ends well.

    Raises SessionError, with ``path`` as it was, where the disk refuses.
    """
    try:
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
    except OSError as error:
        if error.errno in DISK_FULL:
            raise SessionError(f"the disk is full: make room in {path.parent}, then save again") from error
        raise SessionError(f"cannot write {path}: {error.strerror or error}") from error


def part_of(path: Path) -> Path:
    """What a file is written to before it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def own_folder(path: Path) -> Path:
    """Make a folder that only its user may read, unless it is there. Raises SessionError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SessionError(f"cannot make {path}: {error.strerror or error}") from error
    return path


def _remove_leftovers(path: Path) -> None:
    """Delete what processes left that were killed while they wrote."""
    import psutil  # late: most who look at model files write none

    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        pid = part.name.split(".")[-2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a power cut, where the file system lets us: the file is there all the same."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
