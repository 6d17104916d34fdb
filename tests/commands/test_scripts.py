"""The scripts: syntax, the repository's own checks, and what they say when something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file()), ROOT / ".ci/run"]
SHELL_SCRIPTS = [path for path in SCRIPTS if path.read_bytes().startswith((b"#!/bin/sh", b"#!/usr/bin/env bash"))]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_run(script: Path) -> None:
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path, shell: str) -> None:
    if shell == "sh" and b"bash" in script.read_bytes().splitlines()[0]:
        pytest.skip("a bash script")
    result = subprocess.run([shell, "-n", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_lint_format_and_types() -> None:
    result = subprocess.run(
        [ROOT / "scripts/check"],
        env=os.environ | {"CHECK_PYTHON": sys.executable},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what scripts/setup reads, in a folder with a space in its name, and an empty ``bin`` beside it."""
    copy = tmp_path / "a check out"
    for name in ("scripts", "patches", "kvcompose_local"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "models.txt"):
        shutil.copy(ROOT / name, copy / name)
    (tmp_path / "bin").mkdir()
    return copy


def run_setup(checkout: Path, *tools: str) -> subprocess.CompletedProcess[str]:
    """scripts/setup with a PATH that has nothing but the named tools."""
    folder = checkout.parent / "bin"
    for tool in (*tools, "dirname", "cat", "cksum", "id", "rm", "tail"):
        (folder / tool).symlink_to(shutil.which(tool) or tool)
    return subprocess.run(
        ["/bin/sh", checkout / "scripts/setup"],
        env={"PATH": str(folder), "HOME": str(checkout.parent)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_setup_without_python_is_one_line(checkout: Path) -> None:
    result = run_setup(checkout)
    assert result.returncode == 1
    assert result.stderr == "setup: Python 3.10 or newer is needed: apt install python3, or brew install python\n"


def test_setup_without_a_compiler_is_one_line_and_comes_first(checkout: Path) -> None:
    (checkout.parent / "bin/python3").symlink_to(getattr(sys, "_base_executable", sys.executable))
    result = run_setup(checkout)
    assert result.returncode == 1
    assert result.stderr.startswith("error: no C++ compiler found: ")
    assert result.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()
