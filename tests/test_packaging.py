"""The wheel in an environment of its own, the source archive, and what they say that they need."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from programs import FAST

ROOT = Path(__file__).parent.parent
#: Programs that a dependency brings; nothing imports them.
PROGRAMS = {"cmake", "ninja"}


def built(kind: str, source: Path, folder: Path) -> Path:
    """The wheel or the source archive of a source tree."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=60)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive, not from the checkout."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Pythons before 3.10.12 and 3.11.4 have none
        tar.extractall(unpacked)
    (source,) = unpacked.iterdir()
    return built("wheel", source, tmp_path_factory.mktemp("wheel"))


def test_the_source_archive_holds_every_file(archive: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    there = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    assert there - held == set()


def test_the_wheel_holds_the_package_and_its_data(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    package = [path for path in (ROOT / "kvcompose_local").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    wanted = {str(path.relative_to(ROOT)) for path in package}
    wanted |= {f"kvcompose_local/data/patches/{path.name}" for path in (ROOT / "patches").iterdir()}
    assert wanted | {"kvcompose_local/data/models.txt"} <= held
    assert not [name for name in held if name.startswith(("tests/", "docs/", "scripts/"))]


def test_the_wheel_runs_in_an_environment_of_its_own(
    wheel: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
    python = venv / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, timeout=60)
    site = next((venv / "lib").glob("python*/site-packages"))
    # Dependencies are those of this environment: fetching and compiling them again takes minutes.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command: object) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert Path(run(python, "-c", "import kvcompose_local; print(kvcompose_local.__file__)")).is_relative_to(venv)
    program = venv / "bin" / "kvcompose-local"
    folder = run(
        program, "build"
    ).strip()  # the library is in the cache already: the wheel's patches are the checkout's
    assert Path(folder).is_dir()
    assert f"engine: patched, {folder}" in run(program, "--version")
    assert "smollm2-135m" in run(program, "models", "list")
    assert run(program, "run", tiny_model(), *FAST, "-p", "Hello").strip()


def requirement_names() -> set[str]:
    """The distributions that pyproject.toml names, with or without an extra."""
    text = (ROOT / "pyproject.toml").read_text()
    plain = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    extras = re.findall(r"^(?:hf|plot|server) = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert plain
    return {re.split(r"[<>=~\[]", name)[0] for name in re.findall(r'"([^"]+)"', plain[1] + "".join(extras))}


def test_what_is_imported_is_required_and_what_is_required_is_imported() -> None:
    imported = set()
    for path in (ROOT / "kvcompose_local").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    imported -= {*sys.stdlib_module_names, "kvcompose_local"}
    distributions = metadata.packages_distributions()
    names = {distributions[module][0].lower().replace("_", "-") for module in imported}
    assert names == requirement_names() - PROGRAMS
