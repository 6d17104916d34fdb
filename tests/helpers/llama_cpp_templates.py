"""The chat templates that llama.cpp is tested with, from the source archive that the library is built of."""

from __future__ import annotations

import tarfile
from functools import cache
from pathlib import PurePosixPath

import pytest

from kvcompose_local.install.pin import read_pin
from kvcompose_local.install.resources import cache_folder, data_file


@cache
def templates() -> dict[str, str]:
    archive = cache_folder() / "archives" / read_pin(data_file("patches")).archive_name
    if not archive.is_file():
        pytest.skip(f"no {archive.name}: the library of this run was not built here", allow_module_level=True)
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if path.parts[-3:-1] == ("models", "templates") and path.suffix == ".jinja":
                file = tar.extractfile(member)
                assert file is not None
                found[path.stem] = file.read().decode()
    return found
