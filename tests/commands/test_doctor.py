"""The doctor's findings on environments made for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcompose_local.commands import doctor
from kvcompose_local.install import build
from kvcompose_local.install.pin import build_dir
from kvcompose_local.llama_ffi.library import library_path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCOMPOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    return tmp_path / "cache"


def findings() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.report()}


def make_library(folder: Path) -> None:
    (folder / "lib").mkdir(parents=True)
    for file in library_path().parent.iterdir():
        (folder / "lib" / file.name).symlink_to(file)
    facts = {"key": folder.name, "pin": "llama-cpp-python 0.3.36", "date": "2026-01-01T00:00:00+00:00"}
    (folder / "build.json").write_text(json.dumps(facts))


def test_every_finding_has_a_state_and_a_remedy_when_it_needs_one(cache: Path) -> None:
    checks = doctor.report()
    assert [check.name for check in checks] == [
        *("python", "compiler", "cmake and ninja", "bindings", "library", "device", "engine"),
        *("cache folder", "sessions", "default model", "memory"),
    ]
    for check in checks:
        assert check.state in ("ok", "warn", "fail")
        assert "\n" not in check.text + check.remedy
        assert bool(check.remedy) == (check.state != "ok")


def test_a_patched_build_runs_the_patched_engine(cache: Path) -> None:
    make_library(build_dir())
    found = findings()
    assert found["library"].text.startswith("patched, llama-cpp-python 0.3.36, key ")
    assert found["engine"] == doctor.Check("engine", "ok", found["engine"].text)
    assert found["engine"].text.startswith("patched")


def test_a_library_that_the_user_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_library(tmp_path / "own")
    (tmp_path / "own/build.json").unlink()
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path / "own/lib"))
    assert findings()["library"].text == f"patched, not built by us: {tmp_path / 'own/lib'}"


def test_a_wrong_library_folder_is_told(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    found = findings()
    assert found["library"].state == found["engine"].state == "fail"
    assert found["library"].text == f"LLAMA_CPP_LIB_PATH names {tmp_path}, where there is no libllama"


def test_missing_tools_warn_with_their_remedy(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(build.sys, "executable", str(tmp_path / "python"))
    found = findings()
    assert found["compiler"].state == "warn"
    assert found["compiler"].text == "no C++ compiler found"
    assert "pip install cmake ninja" in found["cmake and ninja"].remedy


def test_a_cache_folder_that_cannot_be_made_fails_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVCOMPOSE_CACHE", str(tmp_path / "file/cache"))
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    found = findings()["cache folder"]
    assert found.state == "fail"
    assert "KVCOMPOSE_CACHE" in found.remedy
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(library_path().parent))
    found = findings()["cache folder"]  # a model by its path runs
    assert found.state == "warn"
    assert "nothing built" in found.text


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting takes root")
def test_a_read_only_cache_that_works_is_a_remark(cache: Path) -> None:
    make_library(build_dir())
    script = f'mount --bind {cache} {cache} && mount -o remount,bind,ro {cache} && exec "$@"'
    mounted = ["unshare", "-m", "sh", "-c", script, "sh"]
    if subprocess.run([*mounted, "true"], check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    command = [*mounted, sys.executable, "-m", "kvcompose_local", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f" warn  cache folder: {cache}: Read-only file system" in done.stdout
    assert "   ok  engine: patched" in done.stdout
