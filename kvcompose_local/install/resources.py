"""Finds data files of the package, and the user's folders."""

from __future__ import annotations

import os
from pathlib import Path

from kvcompose_local.errors import KVComposeError, NoHome

CACHE_VARIABLE = "KVCOMPOSE_CACHE"


def data_file(name: str) -> Path:
    """The path of ``models.txt`` or ``patches``, in a source checkout or in an installed wheel."""
    package = Path(__file__).parent.parent
    for path in (package / "data" / name, package.parent / name):
        if path.exists():
            return path
    raise KVComposeError(f"{name} is missing from this installation: install kvcompose-local again")


def cache_folder() -> Path:
    """The folder of models, archives and libraries: ``KVCOMPOSE_CACHE``, or the platform's; not made here.

    Raises NoHome.
    """
    if override := os.environ.get(CACHE_VARIABLE):
        return Path(os.path.expanduser(override)).absolute()
    return _user_folder("user_cache_path", f"set HOME or {CACHE_VARIABLE}")


def state_folder() -> Path:
    """The folder of sessions and of the history of typed lines; not made here. Raises NoHome."""
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
