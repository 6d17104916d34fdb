"""The doctor's findings on environments made for them."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from kvcompose_local import build, doctor
from kvcompose_local.pin import build_dir


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCOMPOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    return tmp_path / "cache"


def findings() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.report()}


def make_library(folder: Path, content: bytes = b"", key: str = "") -> None:
    (folder / "lib").mkdir(parents=True)
    (folder / "lib/libllama.so").write_bytes(b"ELF" + content)
    facts = {"key": key or folder.name, "pin": "llama-cpp-python 0.3.36", "date": "2026-01-01T00:00:00+00:00"}
    (folder / "build.json").write_text(json.dumps(facts))


def test_every_finding_has_a_state_and_a_remedy_when_it_needs_one(cache: Path) -> None:
    checks = doctor.report()
    assert [check.name for check in checks] == [
        *("python", "compiler", "cmake and ninja", "bindings", "library", "device", "engine"),
        *("cache folder", "default model", "memory"),
    ]
    for check in checks:
        assert check.state in ("ok", "warn", "fail")
        assert "\n" not in check.text + check.remedy
        assert bool(check.remedy) == (check.state != "ok")


def test_a_patched_build_runs_the_patched_engine(cache: Path) -> None:
    make_library(build_dir(), b"..llama_kvc_rewrite..")
    found = findings()
    assert found["library"].text.startswith("patched, llama-cpp-python 0.3.36, key ")
    assert found["engine"] == doctor.Check("engine", "ok", found["engine"].text)
    assert found["engine"].text.startswith("patched")


def test_a_library_without_the_interface_runs_the_stock_engine(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_library(tmp_path / "own")
    (tmp_path / "own/build.json").unlink()
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path / "own/lib"))
    found = findings()
    assert found["library"].text.startswith("stock, not built by us")
    assert (found["engine"].state, found["engine"].remedy) == ("warn", "kvcompose-local build")


def test_a_build_of_another_series_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _name: None)
    assert findings()["library"].text == "llama.cpp is not built"
    make_library(cache / "llama/0123456789abcdef")
    found = findings()
    assert "another pin, patch series or machine: 0123456789abcdef" in found["library"].text
    assert (found["engine"].state, found["engine"].remedy) == ("fail", "kvcompose-local build")


def test_a_wrong_library_folder_is_told(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    found = findings()
    assert (found["library"].state, found["library"].remedy) == ("fail", "unset LLAMA_CPP_LIB_PATH")
    assert found["engine"].state == "fail"


def test_bindings_of_another_version_are_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "0.2.0")
    found = findings()["bindings"]
    assert found.text == "llama-cpp-python 0.2.0, but 0.3.36 is needed"
    assert found.remedy == "pip install llama-cpp-python==0.3.36"


def test_missing_tools_warn_with_their_remedy(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(build.sys, "executable", str(tmp_path / "python"))
    found = findings()
    assert found["compiler"].state == "warn"
    assert found["compiler"].text == "no C++ compiler found"
    assert "pip install cmake ninja" in found["cmake and ninja"].remedy


def test_a_cache_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVCOMPOSE_CACHE", str(tmp_path / "file/cache"))
    found = findings()["cache folder"]
    assert found.state == "fail"
    assert "KVCOMPOSE_CACHE" in found.remedy
