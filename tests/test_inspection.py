"""What ``inspect`` says against what an engine allocates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvcompose_local.cli import cli
from kvcompose_local.engines import open_engine
from kvcompose_local.errors import InvalidInput
from kvcompose_local.inspection import inspect


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_the_header_tells_what_is_allocated(tiny_model: Callable[..., Path], arch: str, cache_type: str) -> None:
    path = tiny_model(arch)
    found = inspect(path, n_ctx=512, cache_type=cache_type)
    engine, _ = open_engine(path, n_ctx=512, budget=1.0, n_threads=1, cache_type={"f16": 1, "q8_0": 8}[cache_type])
    with engine:
        assert found.row_bytes == engine.shape.row_bytes
        assert found.kv_bytes(1.0) == engine.cache_bytes
        assert (found.n_layers, found.n_kv_heads) == (3, "2")
    assert found.kv_bytes(0.25) == found.kv_bytes(1.0) // 4


def test_the_command(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["inspect", str(tiny_model("gemma3", n_layers=7)), "--ctx", "1024"])
    assert done.exit_code == 0, done.output
    assert "for --ctx 1024" in done.stdout
    assert "Sliding-window layers hold at most 64 tokens" in done.stdout
    assert "does not fit now" not in done.stdout
    wrong = CliRunner().invoke(cli, ["inspect", str(tiny_model()), "--ctx", "99999"])
    assert isinstance(wrong.exception, InvalidInput)
