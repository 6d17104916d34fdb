"""Layer profiles: the file, budgets from it, and chats that need no replay."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from test_cli import program, refused

from kvcompose_local import profiles
from kvcompose_local.cell_scores import N_UNSEEN
from kvcompose_local.compaction import CacheMemory, Policy
from kvcompose_local.errors import InvalidInput, KVComposeError
from kvcompose_local.llama_ffi.library import library_path
from kvcompose_local.predictor import Predictor
from kvcompose_local.profiles import NOT_TUNED, Profile, Tuning, average

TWO = Profile("Two layers", "ab", (0.25, 0.5, 1.0), ((0.1, 0.4), (0.2, 0.8), (1.0, 1.0)), 1, 100)


def test_a_file_gives_the_same_profile() -> None:
    assert Profile.parse(TWO.dump()) == TWO
    tuned = replace(TWO, weights=(0.5, 4.0), model_bytes=10, predictor=((0.5, -1.25, 3.0, 0.0),))
    assert Profile.parse(tuned.dump()) == tuned


def test_a_file_of_before_weights_is_one() -> None:
    values = json.loads(TWO.dump())
    del values["weights"], values["model_bytes"]
    assert Profile.parse(json.dumps(values)) == TWO


def test_weights_are_those_of_the_file(private_cache: Path, tmp_path: Path) -> None:
    def untouched(_: Path) -> str:
        raise AssertionError("no profile is of a file of this size: it need not be read")

    ten, eleven = tmp_path / "10", tmp_path / "11"
    ten.write_bytes(bytes(10))
    eleven.write_bytes(bytes(11))
    own = profiles.user_path("ab")
    own.parent.mkdir(parents=True)
    assert profiles.tuning_of(ten, untouched) == NOT_TUNED
    own.write_text(replace(TWO, model_bytes=10).dump())
    assert profiles.tuning_of(ten, untouched) == NOT_TUNED, "its layers were not tuned"
    own.write_text(replace(TWO, weights=(0.5, 4.0), model_bytes=10).dump())
    (own.parent / "damaged.json").write_text("{")
    assert profiles.tuning_of(ten, lambda _: "ab") == ((0.5, 4.0), None)
    assert profiles.tuning_of(ten, lambda _: "cd") == NOT_TUNED, "another file of the same size"
    assert profiles.tuning_of(eleven, untouched) == NOT_TUNED
    own.write_text(replace(TWO, predictor=((0.5,) * 4,), model_bytes=10).dump())
    weights, predictor = profiles.tuning_of(ten, lambda _: "ab")
    assert (weights, predictor and predictor.n_heads) == ((), 1)


def test_a_profile_measured_again_does_not_hide_the_weights_that_ship(private_cache: Path, tmp_path: Path) -> None:
    shipped = next(profile for profile in profiles._shipped() if profile.weights)
    model = tmp_path / "model"
    with model.open("wb") as file:
        file.truncate(shipped.model_bytes)  # takes no room
    own = profiles.user_path(shipped.model_sha256)
    own.parent.mkdir(parents=True)
    own.write_text(replace(shipped, weights=(), predictor=(), model_bytes=0).dump())
    found = profiles.tuning_of(model, lambda _: shipped.model_sha256)
    assert found.weights == shipped.weights
    assert (found.predictor is not None) == bool(shipped.predictor)
    mine = tuple(2 * weight for weight in shipped.weights)
    own.write_text(replace(shipped, weights=mine).dump())
    assert profiles.tuning_of(model, lambda _: shipped.model_sha256).weights == mine


def test_weights_fade_where_cells_are_many() -> None:
    assert profiles.faded((0.5, 4.0), 0.0) == [0.5, 4.0]
    assert profiles.faded((0.25, 4.0), 0.25) == pytest.approx([0.5, 2.0])
    assert profiles.faded((0.5, 4.0), 0.5) == profiles.faded((0.5, 4.0), 0.9) == [1.0, 1.0]
    assert profiles.faded((), 0.1) == []


def test_weights_move_cells_between_layers() -> None:
    """Two layers of equal scores share evenly; one whose cells are worth four times as much gets the most it can."""
    kept: dict[tuple[float, ...], list[int]] = {}
    for weights in ((), (1.0, 1.0), (1.0, 4.0), (4.0, 1.0)):
        engine = FakeEngine(200, per_layer=True)
        memory = CacheMemory(engine, 1000, policy=Policy(4, 16, 64), tuning=Tuning(weights))
        memory.feed([*range(50, 200)])
        memory.compact(0.3)
        kept[weights] = [cells.shape[1] for cells in engine.composed]
    assert kept[()] == kept[1.0, 1.0]
    assert kept[1.0, 4.0][1] > kept[()][1] > kept[4.0, 1.0][1]
    assert kept[1.0, 4.0][0] < kept[()][0] < kept[4.0, 1.0][0]


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 2},
        {"keeps": [0.5, 0.25, 1]},
        {"keeps": [0.25, 1]},
        {"shares": [[0.1], [0.2, 0.3], [1, 1]]},
        {"shares": [[0.5, 0.5], [0.4, 0.6], [1, 1]]},
        {"shares": [[0.1, float("nan")], [0.2, 0.3], [1, 1]]},
        {"shares": [[-0.1, 0.2], [0.2, 0.3], [1, 1]]},
        {"shares": [[0.1, 0.1], [0.2, 0.3], [1, 0.9]]},
        {"shares": 3},
        {"model": 3},
        {"more": 1},
        {"weights": [1]},
        {"weights": [1, 0]},
        {"weights": [1, float("inf")]},
        {"weights": [[1, 1]]},
        {"predictor": [[1, 2, 3]]},
        {"predictor": [[1, 2, 3, 4], [1]]},
        {"predictor": [[1, 2, 3, float("nan")]]},
        {"predictor": 5},
    ],
    ids=str,
)
def test_a_damaged_file_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="no layer profile"):
        Profile.parse(json.dumps(json.loads(TWO.dump()) | damage))


@pytest.mark.parametrize("text", ["", "[]", "{}", "\x00", "[" * 100_000])
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="no layer profile"):
        Profile.parse(text)


def test_shares_are_read_between_what_was_measured() -> None:
    """By hand: keep 0.5 of 100 tokens is 20 + 80 cells of one byte; half way to keep 0.25 it is 15 + 60."""
    ones, available = [1, 1], [100, 100]
    assert TWO.budgets(100, available, ones, [100], [0, 0]).tolist() == [20, 80]
    assert TWO.budgets(100, available, ones, [75], [0, 0]).tolist() == [15, 60]
    assert TWO.budgets(100, available, ones, [200], [0, 0]).tolist() == [100, 100]
    # What a layer has not got any more goes to the other.
    assert TWO.budgets(100, [100, 30], ones, [100], [0, 0]).tolist() == [70, 30]
    # Each device has a limit of its own, and a layer of no bytes gets nothing.
    assert TWO.budgets(100, available, ones, [10, 40], [0, 1]).tolist() == [10, 40]
    assert TWO.budgets(100, available, [1, 0], [20], [0, 0]).tolist() == [20, 0]
    with pytest.raises(InvalidInput, match="2 layers, and the model composes 3"):
        TWO.budgets(100, [1, 1, 1], [1, 1, 1], [1], [0, 0, 0])


@given(
    available=st.lists(st.integers(0, 300), min_size=2, max_size=2),
    cost=st.lists(st.integers(0, 9), min_size=2, max_size=2),
    limit=st.integers(0, 3000),
    least=st.integers(0, 5),
)
def test_budgets_fit_and_leave_little_unused(available: list[int], cost: list[int], limit: int, least: int) -> None:
    budgets = TWO.budgets(300, available, cost, [limit], [0, 0], min_per_layer=least)
    floor = [min(a, least) if c else 0 for a, c in zip(available, cost, strict=True)]
    assert all(f <= b <= a for f, b, a in zip(floor, budgets, available, strict=True))
    used = int((budgets * cost).sum())
    assert used <= max(limit, int((np.array(floor) * cost).sum()))
    if used < sum(a * c for a, c in zip(available, cost, strict=True)):
        assert used > limit - sum(cost) - 1 or used == int((np.array(floor) * cost).sum())


@pytest.mark.parametrize("tuning", [Tuning((1.0, 2.0, 3.0)), Tuning((), Predictor([[0.0] * 4]))], ids=str)
def test_what_was_tuned_for_another_model_is_refused(tuning: Tuning) -> None:
    with pytest.raises(InvalidInput, match="profile is of other layers"):
        CacheMemory(FakeEngine(200, per_layer=True), 1000, tuning=tuning)


def test_the_average_of_texts_is_a_profile() -> None:
    rows = np.linspace(0, 100, len(profiles.KEEPS)).astype(np.int64)
    profile = average("m", "ab", [np.stack([rows, rows], 1), np.stack([2 * rows, 0 * rows], 1)], [100, 200])
    assert Profile.parse(profile.dump()) == profile
    assert profile.shares[5] == pytest.approx((rows[5] / 100, rows[5] / 200), abs=1e-4)


def test_a_profile_takes_the_place_of_the_replay() -> None:
    engine = FakeEngine(200, per_layer=True)
    memory = CacheMemory(engine, 1000, policy=Policy(4, 16, 64), profile=TWO)
    memory.feed([50, 240, *[100] * 150])
    assert engine.replayed == [bytes([100] * (4 + N_UNSEEN - 4))], "what too few looked at, with its lead-in"
    few, many = (c.shape[1] for c in engine.composed)
    assert few < many <= 132
    assert few + many <= 2 * (200 - 4 - 16 - 64)
    assert 240 in engine.composed[0][0], "what was seen while reading tells"


def test_with_a_profile_only_what_nobody_saw_is_replayed() -> None:
    engine = FakeEngine(200, per_layer=True)
    memory = CacheMemory(engine, 1000, policy=Policy(N_UNSEEN, 16, 64), profile=TWO)
    memory.feed([50, 240, *[100] * 98])
    memory.compact()
    assert engine.replayed == []
    assert 240 in engine.composed[0][0]
    for token in range(1, 11):  # an answer, which comes token by token
        memory.feed([token])
    memory.compact()
    assert engine.replayed == [bytes([100] * 14)], "the ten that the answer moved out of the tail, led in by four"


@pytest.mark.parametrize("n", range(200, 1000, 333))
def test_pins_stay_with_a_profile(n: int) -> None:
    engine = FakeEngine(200, per_layer=True)
    memory = CacheMemory(engine, 10_000, policy=Policy(4, 16, 64), profile=TWO)
    memory.pin(2, 8)
    memory.feed([9, 9, *range(1, 7), *[100] * n])
    for cells in engine.composed:
        assert set(range(1, 7)) <= set(cells[0])


def test_every_shipped_profile_is_one() -> None:
    files = sorted(Path(profiles.__file__).parent.glob("*.json"))
    assert [profiles.find(Profile.parse(f.read_text()).model_sha256).model for f in files]
    with pytest.raises(KVComposeError, match="kvcompose-local profile MODEL"):
        profiles.find("0" * 64)


def test_profile_and_run(
    tiny_model: Callable[..., Path], private_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(library_path().parent))
    model = tiny_model(n_ctx=4096)
    text = tmp_path / "text.txt"
    text.write_text("Allworkandnoplay." * 40)
    chat = ["run", model, "--budget", "0.21", "--ctx", "1024", "-f", text, "-p", "Hi", "--temp", "0", "--max-tokens", 4]
    refused(program(*chat, "--scoring", "profile"), 1, "kvcompose-local profile")
    done = program("profile", model, "--texts", "2", "--length", "300")
    assert (done.returncode, done.stdout) == (0, "")
    written = Path(re.search(r"wrote (.*\.json)$", done.stderr, re.M)[1])  # type: ignore[index]
    assert written.is_relative_to(private_cache)
    assert Profile.parse(written.read_text()).n_texts == 2
    assert Profile.parse(written.read_text()).weights == ()
    assert Profile.parse(written.read_text()).predictor, "what its questions looked at"
    written.write_text(replace(Profile.parse(written.read_text()), weights=(1.0, 2.0, 0.5)).dump())
    assert program("profile", model, "--texts", "1", "--length", "300").returncode == 0
    assert Profile.parse(written.read_text()).weights == (1.0, 2.0, 0.5), "measured again, they stay"
    done = program(*chat, "--scoring", "profile", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["compactions"]
    written.write_text("{}")
    refused(program(*chat, "--scoring", "profile"), 2, "no layer profile", str(written))
    refused(program("profile", model, "--texts", "1", "--length", "300", "-o", tmp_path / "no" / "x.json"), 1, "x.json")
