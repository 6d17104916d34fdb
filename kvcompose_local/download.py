"""Fetching one URL to one file: resumable, with progress, never half-written under the final name."""

from __future__ import annotations

import errno
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import platformdirs

from kvcompose_local.errors import DownloadError

#: Called with (bytes done, bytes in all, 0 where unknown).
ByteProgress = Callable[[int, int], None]
CACHE_VARIABLE = "KVCOMPOSE_CACHE"
_CHUNK = 1 << 20
_RETRIES = 3
_TIMEOUT_SECONDS = 30


def cache_folder() -> Path:
    """The user's cache folder of this package, or what ``KVCOMPOSE_CACHE`` names; not created here."""
    override = os.environ.get(CACHE_VARIABLE)
    return Path(override) if override else platformdirs.user_cache_path("kvcompose-local")


@contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses about ``path`` into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DownloadError(
                f"the disk is full: make room for {path.name} in {path.parent}, then try again"
            ) from error
        if isinstance(error, urllib.error.URLError | http.client.HTTPException | TimeoutError | ConnectionError):
            raise
        raise DownloadError(
            f"cannot write {path} ({error.strerror or error}): "
            f"make the folder writable, or set {CACHE_VARIABLE} to another"
        ) from error


def fetch(url: str, target: Path, *, progress: ByteProgress | None = None) -> None:
    """Download ``url`` to ``target``, going on from ``target`` + ``.part`` where an earlier try stopped.

    Interrupts and lost connections keep the part file; the name ``target`` appears only when the server says that the
    file is whole. Raises DownloadError, after three tries where trying again can help.
    """
    part = target.with_name(target.name + ".part")
    with clear_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(_RETRIES):
        try:
            _fetch_rest(url, part, progress)
            with clear_disk_errors(target):
                os.replace(part, target)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part file is longer than the source: it is of something else
                part.unlink(missing_ok=True)
            elif error.code < 500:
                raise DownloadError(f"the server answers {error.code} {error.reason} for {target.name}") from error
            reason = f"{error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(getattr(error, "reason", error))
        if attempt + 1 < _RETRIES:
            time.sleep(attempt + 1)
    raise DownloadError(f"cannot download {target.name} ({reason}): check the network and try again; it will resume")


def _fetch_rest(url: str, part: Path, progress: ByteProgress | None) -> None:
    with clear_disk_errors(part):
        have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
        if have and response.status != 206:  # the server sends everything again
            have = 0
        length = int(response.headers.get("Content-Length") or 0)
        with clear_disk_errors(part), open(part, "ab" if have else "wb") as file:
            done = have + _copy(response, file, have, have + length, progress)
            file.flush()
            os.fsync(file.fileno())
    if length and done != have + length:
        raise ConnectionError(f"the connection ended after {done} of {have + length} bytes")


def _copy(response: IO[bytes], file: IO[bytes], have: int, total: int, progress: ByteProgress | None) -> int:
    copied = 0
    while chunk := response.read(_CHUNK):
        file.write(chunk)
        copied += len(chunk)
        if progress is not None:
            progress(have + copied, total)
    return copied
