"""Profiles: the file, and whose it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvcompose_local import profiles
from kvcompose_local.composing.scorer import Scorer
from kvcompose_local.errors import InvalidInput
from kvcompose_local.profiles import Profile

SCORER = Scorer(
    (np.arange(8, dtype=np.float16).reshape(2, 4), np.ones((1, 4), np.float16)),
    (np.zeros((2, 3), np.float32), np.full((1, 3), -0.5, np.float32)),
    2048,
)
TWO = Profile("Two layers", "ab", 10, 3, 6000, "logs,qa", SCORER, {"q8_0": 0.001})


def test_a_file_gives_the_same_profile(tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    file.write_bytes(TWO.dump())
    found = profiles.read(file)
    assert replace(found, scorer=SCORER) == TWO
    assert found.scorer.digest == SCORER.digest
    assert found.scorer.weights[0].dtype == np.float16


def untouched() -> str:
    raise AssertionError("no profile is of a file of this size: it need not be read")


def test_a_users_own_profile_comes_first(private_cache: Path) -> None:
    shipped = [profiles.read(path) for path in Path(profiles.__file__).parent.glob("*.safetensors")]
    assert shipped
    assert profiles.find(10, untouched) is None
    found = profiles.find(shipped[0].model_bytes, lambda: shipped[0].model_sha256)
    assert found is not None
    assert found.scorer.digest == shipped[0].scorer.digest
    assert profiles.find(shipped[0].model_bytes, lambda: "another file of that size") is None
    own = profiles.user_path(shipped[0].model_sha256)
    own.parent.mkdir(parents=True)
    own.write_bytes(replace(shipped[0], scorer=SCORER).dump())
    (own.parent / "damaged.safetensors").write_bytes(b"{")
    (own.parent / "ab.json").write_text("{}")  # of an earlier version
    mine = profiles.find(shipped[0].model_bytes, lambda: shipped[0].model_sha256)
    assert mine is not None
    assert mine.scorer.digest == SCORER.digest


def test_shipped_profiles_are_small() -> None:
    assert all(path.stat().st_size < 2 << 20 for path in Path(profiles.__file__).parent.glob("*.safetensors"))


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "format", "numbers"])
def test_what_is_no_profile_is_told_in_one_line(tmp_path: Path, damage: str) -> None:
    raw = TWO.dump()
    file = tmp_path / "p.safetensors"
    file.write_bytes(
        {
            "empty": b"",
            "text": b"this is no profile",
            "cut": raw[:-3],
            "format": raw.replace(b'"format":"2"', b'"format":"9"'),
            "numbers": raw.replace(b'"furthest":"2048"', b'"furthest":"many"'),
        }[damage]
    )
    with pytest.raises(InvalidInput, match="no profile of this version") as told:
        profiles.read(file)
    assert "\n" not in str(told.value)
