"""Shared fixtures: tiny random models, written once, and the real models the set-up fetched."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import write_tiny_model

# A shell's background jobs ignore Ctrl-C, and what they start inherits that; the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model(arch, **options)`` gives the path of a model, written once for the same arguments."""
    folder = tmp_path_factory.mktemp("models")
    written: dict[str, Path] = {}

    def get(arch: str = "llama", **options: object) -> Path:
        key = f"{arch}-{abs(hash(tuple(sorted(options.items()))))}"
        if key not in written:
            written[key] = write_tiny_model(folder / f"{key}.gguf", arch, **options)  # type: ignore[arg-type]
        return written[key]

    return get


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """``real_model(name)`` gives the path of a model of models.txt, fetching it when the set-up has not."""
    from kvcompose_local.install import models

    return lambda name: models.resolve(name, pull=True)


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test alone."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("KVCOMPOSE_CACHE", str(folder))
    return folder
