"""What ``inspect`` says against what an engine allocates."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from click.testing import CliRunner
from programs import program

from kvcompose_local.commands.cli import cli
from kvcompose_local.commands.inspect import inspect
from kvcompose_local.engines import open_engine
from kvcompose_local.errors import InvalidInput
from kvcompose_local.llama_ffi.cells import library_is_patched


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q8_0/q4_0"])
def test_the_header_tells_what_is_allocated(tiny_model: Callable[..., Path], arch: str, cache_type: str) -> None:
    path = tiny_model(arch)
    found = inspect(path, n_ctx=1024, cache_type=cache_type)
    engine, _ = open_engine(path, n_ctx=1024, budget=1.0, n_threads=1, cache_type=cache_type)
    with engine:
        assert found.row_bytes(1) == engine.shape.row_bytes
        assert found.kv_bytes(1.0) == engine.cache_bytes
        assert (found.n_layers, found.n_kv_heads) == (3, "2")
    engine, _ = open_engine(path, n_ctx=1024, budget=0.25, n_threads=1, cache_type=cache_type)
    with engine:
        assert found.n_cells(0.25) == {"f16": 256, "q8_0": 256, "q8_0/q4_0": 512}[cache_type]
        assert found.kv_bytes(0.25) == engine.cache_bytes
    assert found.n_cells(0.1) == 0  # 252 at most
    assert re.search(r"^ *0\.1 +too few cells", found.text(), re.MULTILINE)


def test_the_command(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["inspect", str(tiny_model("gemma3", n_layers=7)), "--ctx", "1024"])
    assert done.exit_code == 0, done.output
    assert "for --ctx 1024" in done.stdout
    assert "Sliding-window layers hold at most 64 tokens" in done.stdout
    assert "does not fit now" not in done.stdout
    assert re.search(r"^ *1 .* 1024 +f16$", done.stdout, re.MULTILINE)
    assert re.search(r"^ *0\.25 .* 512 +q8_0/q4_0$", done.stdout, re.MULTILINE)
    told = {
        inspect(tiny_model(), n_ctx=n).text().partition("cache ")[2].split(" a token")[0] for n in (300, 1024, 2000)
    }
    assert len(told) == 1  # whatever --ctx is rounded to
    wrong = CliRunner().invoke(cli, ["inspect", str(tiny_model()), "--ctx", "99999"])
    assert isinstance(wrong.exception, InvalidInput)


@pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")
def test_heads_without_numbers_are_one_line(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    shutil.copy(tiny_model("llama"), path)
    reader = gguf.GGUFReader(path, "r+")
    for name in ("key_length", "value_length"):
        reader.fields[f"llama.attention.{name}"].parts[-1][0] = 0
    reader.data.flush()
    done = program("inspect", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: none.gguf says that its heads have 0 and 0 numbers\n"


def test_the_type_is_the_one_that_a_run_takes(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = inspect(tiny_model())
    assert [found.type_at(budget) for budget in (1, 0.25)] == ["f16", "q8_0/q4_0"]
    assert inspect(tiny_model("llama", head=40)).type_at(0.25) == "f16"
    assert inspect(tiny_model(), cache_type="q5_1").type_at(1) == "q5_1"
    monkeypatch.setattr("kvcompose_local.llama_ffi.devices.gpus", lambda: ["one"])
    assert found.type_at(0.25) == "q8_0"
    monkeypatch.setattr("kvcompose_local.llama_ffi.cells.library_is_patched", lambda: False)
    assert found.type_at(0.25) == "f16"
