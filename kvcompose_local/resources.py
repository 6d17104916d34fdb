"""Data files that stand at the top of the repository and inside the installed package."""

from __future__ import annotations

from pathlib import Path

from kvcompose_local.errors import KVComposeError


def data_file(name: str) -> Path:
    """The path of ``models.txt`` or ``patches``, in a source checkout or in an installed wheel."""
    package = Path(__file__).parent
    for path in (package / "data" / name, package.parent / name):
        if path.exists():
            return path
    raise KVComposeError(f"{name} is missing from this installation: install kvcompose-local again")
