"""Paths as people give them: typed, or as terminals and file managers paste what is dropped on them."""

from __future__ import annotations

import glob
import os
import re
import shlex
from pathlib import Path

_FILE_URL = re.compile("file:(?://([^/]*))?(/.*)", re.IGNORECASE)
#: Backslashes are no quotes there.
_WINDOWS = re.compile(r"[a-z]:\\|\\\\", re.IGNORECASE)


def path_in(argument: str) -> Path:
    """The one file that an argument names, quoted or not, as a ``file://`` URL or with a tilde."""
    paths = paths_in(argument)
    return paths[0] if len(paths) == 1 else plain_path(argument)


def paths_in(argument: str) -> list[Path]:
    """The files that a line names as typed, or as terminals paste what is dropped on them.

    One name as it is, or words as a shell reads them (quotes, backslashes), ``file://`` URLs and wildcards.
    """
    whole = plain_path(argument)
    if exists(whole) or _WINDOWS.match(argument):
        return [whole]
    try:
        words = shlex.split(argument)
    except ValueError:  # an apostrophe in a name
        return [whole]
    paths = [plain_path(word) for word in words]
    return paths if len(paths) == 1 or any(exists(path) or glob.has_magic(str(path)) for path in paths) else [whole]


def plain_path(word: str) -> Path:
    """The path of a name without quotes."""
    if url := _FILE_URL.fullmatch(word):
        host, path = url.groups()
        if (host or "").lower() in ("", "localhost", os.uname().nodename.lower()):
            from urllib.parse import unquote

            return Path(unquote(path))
    return Path(os.path.expanduser(word))  # which leaves the name of no user as it is


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; not for what can be no path."""
    try:
        return os.path.exists(path)
    except ValueError:
        return False
