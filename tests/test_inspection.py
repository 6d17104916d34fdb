"""What ``inspect`` says against what an engine allocates."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvcompose_local.cli import cli
from kvcompose_local.engines import open_engine
from kvcompose_local.errors import InvalidInput
from kvcompose_local.inspection import inspect


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q8_0/q4_0"])
def test_the_header_tells_what_is_allocated(tiny_model: Callable[..., Path], arch: str, cache_type: str) -> None:
    path = tiny_model(arch)
    found = inspect(path, n_ctx=512, cache_type=cache_type)
    engine, _ = open_engine(path, n_ctx=512, budget=1.0, n_threads=1, cache_type=cache_type)
    with engine:
        assert found.row_bytes(1) == engine.shape.row_bytes
        assert found.kv_bytes(1.0) == engine.cache_bytes
        assert (found.n_layers, found.n_kv_heads) == (3, "2")
    cells = {"f16": 128, "q8_0": 240, "q8_0/q4_0": 315}[cache_type]
    assert found.n_cells(0.25) == cells
    assert found.kv_bytes(0.25) == cells * engine.shape.row_bytes


def test_the_command(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["inspect", str(tiny_model("gemma3", n_layers=7)), "--ctx", "1024"])
    assert done.exit_code == 0, done.output
    assert "for --ctx 1024" in done.stdout
    assert "Sliding-window layers hold at most 64 tokens" in done.stdout
    assert "does not fit now" not in done.stdout
    assert re.search(r"^ *1 .* 1024 +f16$", done.stdout, re.MULTILINE)
    assert re.search(r"^ *0\.25 .* 630 +q8_0/q4_0$", done.stdout, re.MULTILINE)
    wrong = CliRunner().invoke(cli, ["inspect", str(tiny_model()), "--ctx", "99999"])
    assert isinstance(wrong.exception, InvalidInput)
