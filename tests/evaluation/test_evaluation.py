"""Tasks, harness and report: hand-worked tables, and a run on a tiny and on a real model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from kvcompose_local.arena import TokenShape, cells_for, share_of_f16
from kvcompose_local.commands.cli import cli
from kvcompose_local.composing.policy import LEAST_TAIL
from kvcompose_local.engines import open_engine
from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.errors import InvalidInput
from kvcompose_local.evaluation import report
from kvcompose_local.evaluation.harness import FULL, Evaluation, read_records, room_for
from kvcompose_local.evaluation.kinds import KINDS
from kvcompose_local.evaluation.methods import find_method, method_names
from kvcompose_local.evaluation.quantized import quantized
from kvcompose_local.evaluation.statistics import Statistics
from kvcompose_local.evaluation.tasks import TASKS, Question, make_item
from kvcompose_local.llama_ffi.cells import library_is_patched

needs_patch = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("task", TASKS)
def test_items_are_repeatable_and_answerable(task: str) -> None:
    count = len if task == "chinese" else words
    item = make_item(task, 3, 1000, count)
    assert item == make_item(task, 3, 1000, count)
    assert item.context != make_item(task, 4, 1000, count).context
    assert 900 <= count(item.context) <= 1250
    for question in item.questions:
        for reference in question.references:
            assert reference in item.context
            assert reference not in question.text + question.prefix
        assert question.score(" ".join(question.references).upper()) == 1
        assert question.score("") == 0


def test_needles_are_spread_and_say_what_is_asked() -> None:
    item = make_item("needles_8", 0, 2000, words)
    places = [item.context.index(q.references[0]) / len(item.context) for q in item.questions]
    assert all(i / 8 - 0.05 < place < (i + 1) / 8 + 0.05 for i, place in enumerate(places))


def test_frequent_words_are_the_frequent_ones() -> None:
    item = make_item("fwe", 1, 1500, words)
    coded = item.context.partition("\n")[2].split()
    counts = sorted({word: coded.count(word) for word in coded}.items(), key=lambda pair: -pair[1])
    assert {word for word, _ in counts[1:4]} == set(item.questions[0].references)


def test_a_partial_answer_scores_its_share() -> None:
    assert Question("", "", ("Alpha", "beta"), 5).score("it is alpha.") == 0.5


def test_unknown_tasks_and_methods_are_named() -> None:
    with pytest.raises(InvalidInput, match="needles_8"):
        make_item("nope", 0, 1000, words)
    with pytest.raises(InvalidInput, match="256"):
        make_item("qa", 0, 10, words)
    with pytest.raises(InvalidInput, match="key-norm"):
        find_method("nope")
    assert set(method_names()) > {"kvcompose-local", "published", "replay", "uniform"}


def record(task: str, seed: int, method: str, keep: float, score: float, kl: float = 0.0) -> dict[str, Any]:
    names = {"task": task, "seed": seed, "n_tokens": 100, "question": 0, "method": method, "keep": keep}
    return names | {"score": score, "kl": kl, "kept": keep, "layer_cells": [4, 2]}


@pytest.fixture
def table() -> list[dict[str, Any]]:
    """Two tasks that count and one that does not: at keep 0.5 a task is halved, at 0.25 both are."""
    rows = [record(task, seed, FULL, 1.0, 1.0) for task in ("a", "b") for seed in (0, 1)]
    rows += [record("hard", 0, FULL, 1.0, 0.5), record("hard", 0, "m", 0.5, 0.0)]
    rows += [record("a", 0, "m", 0.5, 1.0, 0.1), record("a", 1, "m", 0.5, 1.0, 0.3)]
    rows += [record("b", seed, "m", 0.5, 0.5, 0.2) for seed in (0, 1)]
    rows += [record(task, seed, "m", 0.25, 0.5, 0.4) for task in ("a", "b") for seed in (0, 1)]
    return rows


def test_results_by_hand(table: list[dict[str, Any]]) -> None:
    assert report.tasks_that_count(table) == {"a": 1.0, "b": 1.0}
    found = {(r.method, r.keep): r for r in report.results(table)}
    assert found["m", 0.5].share == 0.75
    assert found["m", 0.5].kl == pytest.approx(0.2)
    assert found["m", 0.5].low == found["m", 0.5].high == 0.75  # items of a task agree
    assert (found["m", 0.25].share, found["m", 0.25].n) == (0.5, 4)
    # trapezoids: (0.5 + 0.75) / 2 over a quarter, (0.75 + 1) / 2 over a half, of three quarters
    assert report.least_kept(list(found.values())) == {"m": 0.25}
    assert report.area(list(found.values()), "m", 0.25) == pytest.approx((0.625 * 0.25 + 0.875 * 0.5) / 0.75)
    # from keep 0.4 on, where the share is 0.65
    assert report.area(list(found.values()), "m", 0.4) == pytest.approx((0.7 * 0.1 + 0.875 * 0.5) / 0.6)
    # 0.8 is crossed four fifths of the way from keep 1 (share 1) to keep 0.5 (share 0.75)
    assert report.most_removed(list(found.values()), "m", 0.2) == pytest.approx(0.4)
    assert "| m | 4 | 0.75 (0.75–0.75) / 0.200 | 0.50 (0.50–0.50) / 0.400 | 0.79 | 40% | 2% |" in report.tables(table)
    assert "left out: hard" in report.tables(table)
    caches = {("m", 0.5): "--budget 0.5", ("m", 0.25): "--budget 0.3"}
    assert report.recommendation(table, caches, within=0.3) == (
        "--budget 0.5 keeps 75% of the full cache's score on these 4 questions"
    )
    assert "--budget 0.3 keeps 50%" in report.recommendation(table, caches, within=0.5)
    assert "no budget" in report.recommendation(table, caches)


def test_areas_of_a_table_are_of_the_same_bytes(table: list[dict[str, Any]]) -> None:
    rows = [record(t, s, "m+q8_0", keep, 0.5) | {"kept": keep / 2} for t in "ab" for s in (0, 1) for keep in (0.5, 0.1)]
    rows += [record(t, s, "full+q8_0", 1.0, 1.0) | {"kept": 0.53} for t in "ab" for s in (0, 1)]
    text = report.tables(table + rows)
    assert "| area from 25% of the bytes |" in text
    # a half at a quarter of the bytes, all with all: the share is the middle of both
    assert "| 0.75 |" in next(line for line in text.splitlines() if line.startswith("| m+q8_0 |"))
    assert next(line for line in text.splitlines() if line.startswith("| full+q8_0 |")).endswith("|  |  |  |")


@needs_patch
def test_the_recommendation_is_about_this_program(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    options = ["--tasks", "needles_8", "--length", "500", "--items", "1", "--keep", "0.3", "--threads", "1"]
    for methods, ours in (
        ("kvcompose-local,random,full+q8_0", "kvcompose-local"),
        ("random,random,full+q8_0", "random"),
    ):
        out = tmp_path / f"{ours}.jsonl"
        done = CliRunner().invoke(
            cli, ["eval", str(tiny_model("llama", n_ctx=16384)), *options, "--methods", methods, "-o", str(out)]
        )
        assert done.exit_code == 0, done.output
        rows = [(r["method"], r["question"]) for r in map(json.loads, out.read_text().splitlines())]
        assert len(rows) == len(set(rows)), "a method that is named twice runs once"
        assert done.stdout.splitlines()[-1].startswith(f"{ours}: ")


def test_a_text_that_is_too_long_is_told_as_such(tiny_model: Callable[..., Path]) -> None:
    done = CliRunner().invoke(cli, ["eval", str(tiny_model()), "--length", "9000"])
    assert "--length 9000 takes a cache of 11264 cells: --ctx 11264 is beyond the 4096 positions" in str(done.exception)


def test_a_method_that_met_only_what_the_full_cache_fails_has_no_share(table: list[dict[str, Any]]) -> None:
    rows = [r for r in table if r["method"] == FULL] + [record("a", 9, FULL, 1.0, 0.0), record("a", 9, "m", 0.5, 1.0)]
    assert [r.method for r in report.results(rows)] == [FULL]


def test_intervals_widen_where_items_differ(table: list[dict[str, Any]]) -> None:
    table[-1]["score"], table[-2]["score"] = 1.0, 0.0
    result = next(r for r in report.results(table) if r.keep == 0.25)
    assert result.low < result.share < result.high


def test_plots_are_drawn(table: list[dict[str, Any]], tmp_path: Path) -> None:
    table += [record("a", 2, "m", keep, 1.0) | {"layer_cells": [40, 10]} for keep in (0.5, 0.25)]
    files = report.plot(table, tmp_path / "new", "m")
    assert [file.name for file in files] == ["quality.png", "layers.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


@needs_patch
def test_a_run_on_a_tiny_model_goes_on_where_it_stopped(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    item = make_item("needles_8", 0, 256, words)
    trials = [(FULL, 1.0), ("kvcompose-local", 1.0), ("kvcompose-local", 0.3), ("published", 0.3), ("random", 0.3)]

    def run(wanted: list[tuple[str, float]]) -> list[dict[str, Any]]:
        engine, _ = open_engine(
            tiny_model("llama", n_ctx=16384),
            n_ctx=room_for(3000, whole_replay=True),
            budget=1.0,
            n_threads=1,
            n_outputs=64,
        )
        with engine:
            evaluation = Evaluation(engine, output)
            evaluation.run(item, 256, wanted)
            return evaluation.records

    first = run(trials[:2])
    with output.open("a") as file:
        file.write('{"model": "Tiny random", "se')  # the run was killed in a write
    records = run(trials)
    assert records[: len(first)] == first
    assert len(records) == len(trials) * 8 == len(read_records(output))
    by_trial = {trial: [r for r in records if (r["method"], r["keep"]) == trial] for trial in trials}
    for r in by_trial["kvcompose-local", 1.0]:
        assert max(r["kl"], r["first_kl"]) < 1e-3  # everything is kept, in another order
    for trial in trials[2:]:
        assert all(0.29 < r["kept"] <= 0.3 for r in by_trial[trial])
        assert np.mean([r["kl"] for r in by_trial[trial]]) > 1e-5
    assert sum(by_trial["kvcompose-local", 0.3][0]["layer_cells"]) <= 0.3 * 3 * 3500
    output.write_text("not json\n" + output.read_text())
    with pytest.raises(InvalidInput, match="line 1"):
        read_records(output)


@needs_patch
def test_quantized_and_streaming_trials(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    item = make_item("recall", 0, 256, words)
    trials = [
        ("full+q8_0", 1.0),
        ("full+q4_0", 1.0),
        ("full+q8_0/q4_0", 1.0),
        ("streaming+q8_0/q4_0", 1.0),
        ("kvcompose-local+q8_0", 0.5),
        ("kvcompose-local", 0.5),
        ("streaming", 0.5),
    ]
    engine, _ = open_engine(
        tiny_model("llama", n_ctx=16384), n_ctx=room_for(3000), budget=1.0, n_threads=1, n_outputs=64
    )
    with engine:
        evaluation = Evaluation(engine, tmp_path / "out.jsonl")
        evaluation.run(item, 256, trials)
        evaluation.close()
    first = {r["method"]: r for r in evaluation.records if r["question"] == 0}
    kl = {name: np.mean([r["kl"] for r in evaluation.records if r["method"] == name]) for name, _ in trials}
    assert first["full+q8_0"]["kept"] == pytest.approx(34 / 64, abs=1e-3)
    assert first["kvcompose-local+q8_0"]["kept"] == pytest.approx(17 / 64, abs=1e-3)
    assert first["streaming"]["kept"] == pytest.approx(0.5, abs=0.07)  # whole blocks of 256 cells
    assert max(first["streaming"]["layer_cells"]) > min(first["streaming"]["layer_cells"]) > 0
    assert 0 < kl["full+q8_0"] < kl["full+q8_0/q4_0"] < kl["full+q4_0"]
    assert first["full+q8_0/q4_0"]["kept"] == pytest.approx(13 / 32, abs=1e-3)
    assert first["streaming+q8_0/q4_0"]["kept"] == pytest.approx(13 / 32, abs=0.05)
    assert kl["full+q8_0"] < kl["kvcompose-local"]


@needs_patch
def test_quantized_windows_are_of_a_cache_that_has_read_the_text(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    item = make_item("recall", 0, 256, words)
    trials = [("full+q8_0", 1.0), ("kvcompose-local+q8_0/q4_0", 1.0), ("kvcompose-local+q8_0", 0.5)]
    model = tiny_model("gemma3", n_ctx=16384, n_layers=7)
    engine, _ = open_engine(model, n_ctx=room_for(3000), budget=1.0, n_threads=1, n_outputs=64)
    with engine:
        evaluation = Evaluation(engine, tmp_path / "out.jsonl")
        evaluation.run(item, 256, trials)
        evaluation.close()
    assert {(r["method"], r["question"]) for r in evaluation.records} == {
        (name, i) for name, _ in trials for i in range(len(item.questions))
    }
    assert max(r["kl"] for r in evaluation.records) < 0.01  # this model's answers hardly depend on what it has read


@needs_patch
@pytest.mark.parametrize(
    "option", [["--tasks", "qa"], ["--methods", "full"], ["--keep", "0.5"], ["--length", "512"], ["--items", "3"]]
)
def test_quick_is_not_given_beside_what_it_chooses(tiny_model: Callable[..., Path], option: list[str]) -> None:
    done = CliRunner().invoke(cli, ["eval", str(tiny_model("llama")), "--quick", *option])
    assert done.exit_code == 2
    assert f"--quick chooses {option[0]} itself" in done.output


@needs_patch
@pytest.mark.parametrize("head", [64, 40])
def test_quick_asks_what_the_chat_would_do(tiny_model: Callable[..., Path], tmp_path: Path, head: int) -> None:
    model, out = tiny_model("llama", n_ctx=16384, n_layers=2, head=head), tmp_path / "out.jsonl"
    options = ["eval", str(model), "--threads", "1", "-o", str(out)]
    done = CliRunner().invoke(cli, [*options, "--quick"])
    assert done.exit_code == 0, done.output
    kept = {(r["method"], round(r["kept"], 2)) for r in map(json.loads, out.read_text().splitlines())}
    expected = {("full", 1.0)}
    kind = "q8_0/q4_0" if head == 64 else "f16"
    for budget in (0.5, 0.25, 0.1):
        share = min(cells_for(8192, budget, kind, TokenShape(head, head, 4)) / 8192, 1) * share_of_f16(kind)
        expected.add(("kvcompose-local" + ("" if kind == "f16" else f"+{kind}"), round(float(share), 2)))
    assert kept == expected
    if head == 40:
        refused = CliRunner().invoke(cli, [*options, "--methods", "full+q8_0"])
        assert "no whole blocks" in str(refused.exception)


@needs_patch
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q8_0/q5_0", "q8_0/q4_0"])
def test_quantized_cells_are_llama_cpps_own(real_model: Callable[[str], Path], kind: str) -> None:
    """What llama.cpp stores itself is the oracle, in the first layer: those above see the errors of reading."""
    path, stored = real_model("smollm2-135m"), {}
    for name in ("f16", kind):
        engine, _ = open_engine(path, n_ctx=256, budget=1.0, n_threads=1, cache_type=name)
        with engine:
            assert isinstance(engine, PatchedEngine)
            engine.decode(engine.model.tokenize("The quick brown fox jumps over the lazy dog. " * 8))
            stored[name] = engine.snapshot()
            shape = engine.shape
    made, own = quantized(stored["f16"], shape, kind), stored[kind]
    k_kind, _, v_kind = kind.upper().partition("/")
    for ours, theirs, name in (
        (made.keys[0], own.keys[0], k_kind),
        (made.values[0], own.values[0], v_kind or k_kind),
    ):
        a, b = (dequantize(rows, GGMLQuantizationType[name]) for rows in (ours, theirs))
        assert ours.shape == theirs.shape
        assert np.abs(a).max() > 0.1
        # a number that F16 rounded across an edge is one step off
        assert np.linalg.norm(a - b) < 0.005 * np.linalg.norm(b) * (1 if kind == "q8_0" else 8)


@needs_patch
def test_methods_keep_what_they_say(tiny_model: Callable[..., Path]) -> None:
    engine, _ = open_engine(tiny_model("llama"), n_ctx=1024, budget=1.0, n_threads=1)
    with engine:
        tokens = np.random.default_rng(0).integers(3, 259, 120).tolist()
        scorer = Statistics(engine, tokens).cells[0]
        engine.clear()
        stats = Statistics(engine, tokens, left_out=scorer)
        layers = engine.shape.layers
        n_cells = 120 * len(layers) // 4
        for name in method_names():
            selection = find_method(name)(stats, n_cells)
            assert len(selection) == len(layers)
            assert n_cells - len(layers) < sum(rows.shape[1] for rows in selection) <= n_cells, name
            for rows, layer in zip(selection, layers, strict=True):
                assert len(rows) == layer.n_kv_heads
                assert all(len(set(row)) == len(row) for row in rows.tolist())
        for name in ("kvcompose-local", "replay"):
            for rows in find_method(name)(stats, n_cells):
                assert set(range(120 - LEAST_TAIL, 120)) <= set(rows[0].tolist())
        sinks = find_method("sinks+recent")(stats, n_cells)[0][0].tolist()
        assert sinks == [0, 1, 2, 3, *range(120 - 26, 120)]
        assert len(layers) == 3
        assert engine.layout().position == 120  # the context stands as it was


@needs_patch
def test_the_command_on_a_tiny_model(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    command = ["eval", str(tiny_model("llama", n_ctx=8192)), "--tasks", "qa", "--length", "256", "--items", "1"]
    command += ["-o", str(tmp_path / "o.jsonl"), "--keep", "0.5", "--threads", "1"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert "answers no task well enough" in done.output
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 2
    for wrong, said in (("--keep", "keep ratios"), ("--tasks", "the tasks are"), ("--methods", "there is no method")):
        refused = CliRunner().invoke(cli, [*command, wrong, "2"])
        assert refused.exit_code != 0
        assert said in refused.output + str(refused.exception)


@needs_patch
def test_ours_beats_the_window_on_a_real_model(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    """One text whose needles lie everywhere: at a quarter of the bytes ours answers, sinks and newest tokens do not."""
    command = [
        "eval",
        str(real_model("qwen2.5-coder-0.5b")),
        "--tasks",
        "needles_8",
        "--length",
        "500",
        "--items",
        "1",
        "--keep",
        "0.3",
    ]
    command += ["--methods", "kvcompose-local,sinks+recent", "-o", str(tmp_path / "o.jsonl"), "--json"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    shares = {r["method"]: r["share"] for r in json.loads(done.stdout)["results"]}
    assert shares[FULL] == 1
    assert shares["kvcompose-local"] > 0.6 > shares["sinks+recent"]


def test_a_measured_score_at_keep_1_is_not_replaced(table: list[dict[str, Any]]) -> None:
    rows = [record("a", seed, "m", 1.0, 0.5, 0.1) for seed in (0, 1)]
    found = report.results([r for r in table if r["method"] == FULL or r["keep"] == 0.5] + rows)
    _, shares = report.curve(found, "m")
    assert shares[-1] == 0.5


def test_only_caches_above_all_of_which_pass_are_recommended(table: list[dict[str, Any]]) -> None:
    rows = [r for r in table if r["method"] == FULL]
    rows += [record(t, s, "m", keep, score) for t in "ab" for s in (0, 1) for keep, score in ((0.5, 0.0), (0.25, 1.0))]
    assert "no budget" in report.recommendation(rows, {("m", 0.5): "a half", ("m", 0.25): "a quarter"})


@pytest.mark.parametrize(
    "text",
    ['{"precious": 1}', "my notes", '{"model": "M"}\nmy notes', '{"mx', "[1, 2]", "\udcff"],
)
def test_a_file_that_is_no_evaluation_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.jsonl"
    raw = text.encode("utf-8", "surrogateescape")
    path.write_bytes(raw)
    with pytest.raises(InvalidInput, match="no record of an evaluation"):
        read_records(path)
    assert path.read_bytes() == raw


def test_a_last_line_cut_inside_a_character_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    facts = {"model": "M"} | record("a", 0, "m", 0.5, 1.0) | {"answer": "é"}
    whole = json.dumps(facts, ensure_ascii=False).encode()
    assert whole.startswith(b'{"model": ')
    path.write_bytes(whole + b"\n" + whole[: whole.index("é".encode()) + 1])
    assert len(read_records(path)) == 1
    assert path.read_bytes() == whole + b"\n"


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_single_2", "recall", "needles_8", "qa"])
def test_texts_may_be_longer_than_the_book(task: str) -> None:
    item = make_item(task, 0, 60_000, lambda text: len(text.split()))
    assert len(item.context.split()) > 55_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_text_holds_what_is_asked(kind: str) -> None:
    item = make_item(kind, 3, 1500, words)
    assert item.questions
    assert item == make_item(kind, 3, 1500, words)
    assert item.context != make_item(kind, 4, 1500, words).context
    for question in item.questions:
        (reference,) = question.references
        assert reference in item.context
        assert reference not in question.text + question.prefix
