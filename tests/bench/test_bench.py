"""The benchmark on a tiny model: what it reports, not how fast."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvcompose_local.bench import decoding, measure
from kvcompose_local.commands.cli import cli
from kvcompose_local.install.pin import library_dir
from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.llama_ffi.library import library_path

pytestmark = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")


@pytest.mark.parametrize(
    ("file", "told"),
    [("none/b.png", "make the folder"), ("b.txt", "is no .png, .svg or .pdf file"), (".", "is a folder")],
)
def test_where_to_draw_is_asked_before_anything_is_measured(
    tiny_model: Callable[..., Path], tmp_path: Path, file: str, told: str
) -> None:
    done = CliRunner().invoke(cli, ["bench", str(tiny_model("llama")), "--plot", str(tmp_path / file)])
    assert type(done.exception).__name__ == "InvalidInput"
    assert told in str(done.exception)
    assert not done.stdout


def test_a_run_and_its_json(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("llama", n_ctx=8192)
    options = ["--lengths", "600,1100", "--budgets", "0.4,0.25", "--rounds", "2", "--tokens", "4", "--threads", "1"]
    done = CliRunner().invoke(cli, ["bench", str(model), *options, "--plot", str(tmp_path / "b.png")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert [r["n_tokens"] for r in found["lengths"]] == [600, 1100]
    unpatched = library_dir(patched=False)
    names = [measure.UNCOMPRESSED, f"{measure.UNCOMPRESSED}, q8_0/q4_0", "budget 0.4", "budget 0.25"]
    names += [measure.UNPATCHED, measure.TWIN] if unpatched and unpatched != library_path().parent else []
    for result in found["lengths"]:
        assert [mode["name"] for mode in result["modes"]] == names
        for figures in ("rates", "question_seconds"):
            assert all(len(mode[figures]) == 2 and min(mode[figures]) > 0 for mode in result["modes"])
        assert result["rewrite_seconds"] > 0
        for mode in result["modes"][2:4]:
            assert mode["n_compactions"] > 0
            assert mode["read_seconds"] > mode["score_seconds"] > 0 < mode["rewrite_seconds"]
    full, rounded, *small = (mode["kv_bytes"] for mode in found["lengths"][1]["modes"][:4])
    assert rounded == full * 13 / 32
    assert small == [pytest.approx(rounded * n / 1100) for n in (1024, 512)]
    assert small[0] <= full * 0.4
    assert small[1] <= full * 0.25
    assert "| 1100 | budget 0.25 |" in done.stdout
    rates, reading, rewriting = (
        [line.split(" | ") for line in table.splitlines()] for table in done.stdout.split("\n\n")[:3]
    )
    speed, bandwidth = found["multiply_adds_per_second"], found["memory_bandwidth_bytes_per_second"]
    longer = found["lengths"][1]
    uncompressed = longer["modes"][0]
    shown = next(row for row in rates if row[:2] == ["| 1100", measure.UNCOMPRESSED])
    floor = max((found["model_bytes"] + full) / bandwidth, longer["question_multiply_adds"] / speed)
    assert shown[12] == f"{floor / statistics.median(uncompressed['question_seconds']):.0%} |"
    shown = next(row for row in reading if row[:2] == ["| 1100", measure.UNCOMPRESSED])
    assert shown[5] == f"{longer['multiply_adds'] / speed / uncompressed['read_seconds']:.0%}"
    assert rewriting[3][3] == f"{full / 2 / bandwidth / longer['rewrite_seconds']:.0%}"
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_heads_that_are_no_whole_blocks_are_measured_in_f16(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("llama", n_ctx=8192, head=40)
    done = CliRunner().invoke(
        cli, ["bench", str(model), "--lengths", "600", "--budgets", "0.5", "--rounds", "1", "--tokens", "4"]
    )
    assert done.exit_code == 0, done.output
    modes = json.loads(done.stdout.splitlines()[-1])["lengths"][0]["modes"]
    assert [mode["name"] for mode in modes][:2] == [measure.UNCOMPRESSED, "budget 0.5"]
    assert modes[1]["kv_bytes"] == modes[0]["kv_bytes"] * 256 / 600


def test_a_quarter_of_the_tokens_is_a_quarter_of_f16(tiny_model: Callable[..., Path]) -> None:
    options = ["--lengths", "1100", "--budgets", "0.25", "--cache-type", "f16", "--rounds", "1", "--tokens", "4"]
    done = CliRunner().invoke(cli, ["bench", str(tiny_model("llama", n_ctx=8192)), *options])
    assert done.exit_code == 0, done.output
    full, quarter = json.loads(done.stdout.splitlines()[-1])["lengths"][0]["modes"][:2]
    assert quarter["kv_bytes"] == pytest.approx(full["kv_bytes"] * 256 / 1100)
    refused = CliRunner().invoke(cli, ["bench", str(tiny_model("llama", n_ctx=8192)), *options, "--lengths", "600"])
    assert "under 256 cells" in str(refused.exception)


def test_what_was_measured_is_shown_when_the_rest_is_stopped(tiny_model: Callable[..., Path]) -> None:
    options = ["--lengths", "1100,600", "--budgets", "0.25", "--cache-type", "f16", "--rounds", "1", "--tokens", "4"]
    stopped = CliRunner().invoke(cli, ["bench", str(tiny_model("llama", n_ctx=8192)), *options])
    assert "under 256 cells" in str(stopped.exception)
    assert [r["n_tokens"] for r in json.loads(stopped.stdout.splitlines()[-1])["lengths"]] == [1100]


def test_a_worker_decodes_the_same_cells(tiny_model: Callable[..., Path]) -> None:
    """The worker runs here with this library: what it measures needs no second build."""
    path = tiny_model("llama")
    with closing(measure.Model(path)) as model, measure._patched(model, 512, 1) as engine:
        engine.decode(measure.text_tokens(model, ["A sentence of some words."], 300))
        worker = decoding.Worker(library_path().parent, path, engine.snapshot(), 512, 1)
        try:
            assert min(worker.time_round(4)) > 0
            worker._process.kill()
            worker._process.wait()
            with pytest.raises(decoding.EngineError, match="process ended"):
                worker.time_round(4)
        finally:
            worker.close()


@pytest.mark.parametrize("wrong", [("--lengths", "5"), ("--lengths", "x"), ("--budgets", "1"), ("--budgets", "x,0.5")])
def test_wrong_numbers(wrong: tuple[str, str]) -> None:
    done = CliRunner().invoke(cli, ["bench", *wrong])
    assert done.exit_code == 2
