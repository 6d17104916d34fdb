"""Measuring a profile: it goes on where it was stopped, tells its time, leaves kinds out, and measures cell types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open

from kvcompose_local import profiles
from kvcompose_local.arena import default_cache_type
from kvcompose_local.chat.scoring import Scored
from kvcompose_local.commands.cli import cli
from kvcompose_local.engines import open_engine
from kvcompose_local.evaluation.harness import MOST_OUTPUTS, engine_beside, read_records, room_for
from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.profiling.measure import fitted, forget, lost, plan, seconds_left, watch, weighed
from kvcompose_local.profiling.observing import N_ASKED, observed
from kvcompose_local.profiling.weighing import Losses, layer_weights

needs_patch = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")


@needs_patch
def test_a_measurement_goes_on_where_it_was_stopped(
    tiny_model: Callable[..., Path], tmp_path: Path, private_cache: Path
) -> None:
    model, file = tiny_model("llama", n_ctx=8192), tmp_path / "p.safetensors"
    told: list[tuple[int, int, str]] = []

    def progress(*what: Any) -> None:
        told.append(what)
        if len(told) == 3:
            raise KeyboardInterrupt

    with open_engine(model, n_ctx=room_for(512), budget=1.0, n_threads=1, n_outputs=MOST_OUTPUTS)[0] as engine:
        other = engine_beside(engine, room_for(512), "q8_0", n_threads=1)

        def planned() -> Any:
            return plan(engine, "ab", n_texts=3, n_tokens=512, tasks=("logs",), own_texts=["A text of my own. " * 20])

        of_all = seconds_left(engine, planned())
        with pytest.raises(KeyboardInterrupt):
            watch(engine, planned(), beside={"q8_0": other}, progress=progress)
        assert planned().n_done == 2
        kept = {path: path.stat().st_mtime_ns for path in private_cache.rglob("*-*.safetensors")}
        measurement = planned()
        watch(engine, measurement, beside={"q8_0": other})
        assert 0 < seconds_left(engine, measurement) < of_all, "layers are still to be weighed"
        other.close_context()
        assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
        plain = fitted(measurement)
        losses = lost(engine, measurement, plain)
        times = {path: path.stat().st_mtime_ns for path in measurement.files[0].parent.iterdir()}
        again = lost(engine, measurement, plain)  # an earlier call's
        assert {path: path.stat().st_mtime_ns for path in measurement.files[0].parent.iterdir()} == times
        assert [of.kl.tolist() for _, of in again] == [of.kl.tolist() for _, of in losses]
    profile = weighed(plain, losses)
    assert (profile.n_texts, profile.kinds) == (3, "own,logs")
    assert [kind for kind, _ in losses] == ["own", "logs", "logs"]
    assert all((losses_.attention > 0).all() and np.isfinite(losses_.kl).all() for _, losses_ in losses)
    shifts = [after - before for after, before in zip(profile.scorer.places, plain.scorer.places, strict=True)]
    wanted = layer_weights([losses_ for _, losses_ in losses])
    np.testing.assert_allclose([shift[0] for shift in shifts], [[0, 0, weight] for weight in wanted], atol=1e-5)
    assert weighed(plain, losses, without="logs").scorer.digest not in (plain.scorer.digest, profile.scorer.digest)
    assert fitted(measurement, without="logs").kinds == "own"
    costs = [observed(path).kl["q8_0"] for path in measurement.files]
    assert profile.kl == {"q8_0": pytest.approx(np.mean(costs), abs=1e-5)}
    forget(measurement)
    assert not [*private_cache.rglob("*-*.safetensors")], "nothing of the texts is left"
    file.write_bytes(profile.dump())
    assert profiles.read(file).scorer.digest == profile.scorer.digest
    with open_engine(model, n_ctx=256, budget=1.0, n_threads=1)[0] as engine:
        engine.decode([5, 6, 7, 8])
        assert Scored(engine, profile.scorer).scores([5, 6, 7, 8], 4, 0).shape == (
            sum(layer.n_kv_heads for layer in engine.shape.layers),
            4,
        )


@needs_patch
def test_another_text_of_ones_own_is_measured_anew(tiny_model: Callable[..., Path], private_cache: Path) -> None:
    model = tiny_model("llama", n_ctx=8192)
    with open_engine(model, n_ctx=room_for(512), budget=1.0, n_threads=1, n_outputs=MOST_OUTPUTS)[0] as engine:
        for text in ("This is one. ", "This is another. "):
            measurement = plan(engine, "ab", n_texts=1, n_tokens=512, own_texts=[text * 100])
            assert measurement.n_done == 0
            watch(engine, measurement)


@needs_patch
def test_lines_are_completed_where_a_text_has_no_sentences(
    tiny_model: Callable[..., Path], private_cache: Path
) -> None:
    model = tiny_model("llama", n_ctx=8192)
    n_cells = room_for(2048)  # a token of this model is a byte, and one function may be longer than 512
    with open_engine(model, n_ctx=n_cells, budget=1.0, n_threads=1, n_outputs=MOST_OUTPUTS)[0] as engine:
        measurement = plan(engine, "ab", n_texts=3, n_tokens=512, tasks=("keys", "logs", "source"))
        watch(engine, measurement)
        for item, file in zip(measurement.items, measurement.files, strict=True):
            with safe_open(file, "numpy") as tensors:
                n_asked, _, n = tensors.get_slice("seen.0").get_shape()
                assert 2 + min(len(item.questions), 4) < n_asked <= N_ASKED, item.task
                assert n == tensors.get_slice("keys.0").get_shape()[1]


@needs_patch
def test_the_commands_leave_kinds_out_and_try_them(
    tiny_model: Callable[..., Path], tmp_path: Path, private_cache: Path
) -> None:
    model, folder, file = str(tiny_model("llama", n_ctx=8192)), tmp_path / "without", tmp_path / "p.safetensors"
    command = ["profile", model, "--texts", "2", "--length", "512", "--tasks", "qa,keys", "--threads", "1"]
    done = CliRunner().invoke(cli, [*command, "--left-out", str(folder), "-o", str(file)])
    assert done.exit_code == 0, done.output
    first = done.output.splitlines()[0]
    assert first.startswith("2 texts: about ")
    assert "seconds" in first
    assert {path.stem: profiles.read(path).kinds for path in folder.iterdir()} == {"qa": "keys", "keys": "qa"}
    out = tmp_path / "o.jsonl"
    command = ["eval", model, "--tasks", "qa,vt", "--length", "256", "--items", "1", "--keep", "0.5", "--threads", "1"]
    command += ["--profile", str(file), "-o", str(out)]
    done = CliRunner().invoke(cli, [*command, "--methods", "kvcompose-local"])
    assert done.exit_code == 0, done.output
    assert {r["task"]: r["fitted"] for r in read_records(out)} == {"qa": True, "vt": False}
    tried = [*command, "--methods", "left-out", "--left-out", str(folder)]
    refused = CliRunner().invoke(cli, tried)
    assert "vt.safetensors is no profile" in str(refused.exception)
    tried[tried.index("qa,vt")] = "qa"
    done = CliRunner().invoke(cli, tried)
    assert done.exit_code == 0, done.output
    assert "left-out" in {r["method"] for r in read_records(out)}


def test_the_default_type_follows_from_what_types_cost() -> None:
    def kind(one_type: bool = False, **kl: float) -> str:
        costs = {name.replace("__", "/"): cost for name, cost in kl.items()}
        return default_cache_type(0.5, whole_blocks=True, one_type=one_type, patched=True, kl=costs)

    assert kind() == kind(q8_0__q4_0=0.01, q8_0=0.001) == "q8_0/q4_0"
    assert kind(q8_0__q4_0=0.2, q8_0=0.001) == "q8_0"
    assert kind(q8_0__q4_0=4.0, q8_0=0.2) == "f16"
    assert kind(one_type=True, q8_0__q4_0=4.0, q8_0=0.001) == "q8_0"


def test_a_layer_that_costs_more_than_it_loses_weighs_more() -> None:
    """All texts count alike, noise below zero costs nothing, and weights are half of what was measured."""
    even = np.ones(3)
    texts = [Losses(np.array([1.0, 4.0, -0.1]), even), Losses(np.array([100.0, 400.0, -3.0]), 100 * even)]
    first, second, third = layer_weights(texts)
    assert second - first == pytest.approx(np.log(4) / 2, abs=1e-4)
    assert third < first
    assert first + second + third == pytest.approx(0)
    np.testing.assert_allclose(
        layer_weights([Losses(even, np.array([1.0, 2.0, 4.0]))])[[0, 2]], np.log([2, 0.5]) / 2, atol=1e-4
    )
    assert np.isfinite(layer_weights([Losses(0 * even, 0 * even)])).all()
