"""Where things are: data files of the package, and the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from kvcompose_local.errors import KVComposeError

CACHE_VARIABLE = "KVCOMPOSE_CACHE"


def data_file(name: str) -> Path:
    """The path of ``models.txt`` or ``patches``, in a source checkout or in an installed wheel."""
    package = Path(__file__).parent
    for path in (package / "data" / name, package.parent / name):
        if path.exists():
            return path
    raise KVComposeError(f"{name} is missing from this installation: install kvcompose-local again")


def cache_folder() -> Path:
    """Where models, archives and libraries are kept: ``KVCOMPOSE_CACHE``, or the platform's folder; not made here."""
    if override := os.environ.get(CACHE_VARIABLE):
        return Path(os.path.expanduser(override)).absolute()
    from platformdirs import user_cache_path  # late: the build needs this module before anything is installed

    return user_cache_path("kvcompose-local")
