"""``kvcompose-local doctor``: what is installed, which engine will run, and what to do about the rest.

The library is loaded by a process of its own, so that a broken one can still be reported.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from kvcompose_local.errors import KVComposeError, NoHome
from kvcompose_local.install.library_choice import BUILD, Library, Problem, bindings_problem, find_library
from kvcompose_local.install.pin import build_facts, cpu_features, read_pin
from kvcompose_local.install.resources import CACHE_VARIABLE, cache_folder, data_file

State = Literal["ok", "warn", "fail"]

_GB = 10**9
#: Prints why the library cannot be loaded, or which engine can run on it, and to stderr a line a GPU.
_LOAD = """
import sys
from kvcompose_local.errors import KVComposeError
try:
    from kvcompose_local.llama_ffi.cells import library_is_patched
    from kvcompose_local.llama_ffi.devices import gpus
    for gpu in gpus():
        print(f"{gpu.name}, {gpu.description}, {gpu.free / 1e9:.1f} of {gpu.total / 1e9:.1f} GB free", file=sys.stderr)
    print("patched" if library_is_patched() else "stock")
except KVComposeError as error:
    print(error)
"""
_LOAD_SECONDS = 60


@dataclass(frozen=True)
class Check:
    """One finding. ``remedy`` is a command or an instruction, empty when there is nothing to do."""

    name: str
    state: State
    text: str
    remedy: str = ""


def report() -> list[Check]:
    """All findings, in the order in which a user would mend them. Never raises for what it finds."""
    library = find_library()
    kind, devices = (library.problem, []) if library.problem else _loaded()
    checks = [_python(), _compiler(), _build_tools(), _bindings(), _library(library, kind)]
    checks += [_device(library.folder, devices), _engine(library, kind)]
    checks += [_cache_folder(is_needed=isinstance(kind, Problem)), _sessions(), _default_model(), _memory()]
    return checks


def _python() -> Check:
    from kvcompose_local.install import build

    text = f"{platform.python_version()}, {platform.machine()}, {sys.executable}"
    if build.runs_under_rosetta():
        remedy = "make the environment with an arm64 Python"
        return Check("python", "fail", f"{text} (Intel, translated by Rosetta)", remedy)
    return Check("python", "ok", text)


def _found(name: str, find: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", find())
    except KVComposeError as error:
        text, _, remedy = str(error).partition(": ")
        # Needed to build, not to run what is built.
        return Check(name, "warn", text, remedy)


def _compiler() -> Check:
    from kvcompose_local.install import build

    return _found("compiler", build.find_compiler)


def _build_tools() -> Check:
    from kvcompose_local.install import build

    return _found("cmake and ninja", lambda: ", ".join(build.find_tool(name) for name in ("cmake", "ninja")))


def _bindings() -> Check:
    if problem := bindings_problem():
        return Check("bindings", "fail", problem.text, problem.remedy)
    return Check("bindings", "ok", str(read_pin(data_file("patches"))))


def _loaded() -> tuple[Problem | str, list[str]]:
    """The engine that runs on the library, "patched" or "stock", or what ``run`` would fail with; and its GPUs."""
    command = [sys.executable, "-c", _LOAD]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LOAD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Problem(f"the library could not be tried ({error})", "try again"), []
    if done.returncode:
        return Problem(f"loading the library ends a process with code {done.returncode}", BUILD), []
    told = done.stdout.strip()
    text, _, remedy = told.rpartition(": ")
    return told if told in ("patched", "stock") else Problem(text, remedy), done.stderr.splitlines()


def _library(library: Library, kind: Problem | str) -> Check:
    if isinstance(kind, Problem) or library.folder is None:
        problem = kind if isinstance(kind, Problem) else Problem("llama.cpp is not built", BUILD)
        return Check("library", "fail", problem.text, problem.remedy)
    facts = build_facts(library.folder.parent)
    if not facts:
        return Check("library", "ok", f"{kind}, not built by us: {library.folder}")
    text = f"{kind}, {facts['pin']}, key {facts['key']}, {facts['date']}: {library.folder}"
    built_for = set(facts.get("cpu", "").split())
    if built_for and (more := set(cpu_features().split()) - built_for):
        text += f" (built for a processor without {', '.join(sorted(more))})"
        return Check("library", "warn", text, f"{BUILD}, which may make it faster")
    return Check("library", "ok", text)


def _device(folder: Path | None, devices: list[str]) -> Check:
    """devices: a line for each GPU that the library finds."""
    from kvcompose_local.install.threads import default_threads

    backends = [name for name in ("Metal", "CUDA", "Vulkan") if folder and any(folder.glob(f"libggml-{name.lower()}*"))]
    if devices:
        return Check("device", "ok", f"{', '.join(backends)}: {'; '.join(devices)}".removeprefix(": "))
    if backends == ["Metal"]:
        return Check("device", "ok", "Metal")
    if backends:
        remedy = "look at its driver (nvidia-smi, vulkaninfo)"
        return Check("device", "warn", f"CPU only: {backends[0]} finds no GPU", remedy)
    apple_silicon = sys.platform == "darwin" and platform.machine() == "arm64"
    if folder is not None and apple_silicon:
        return Check("device", "warn", "CPU only, this library has no Metal", BUILD)
    return Check("device", "ok", f"CPU, {default_threads()} threads")


def _engine(library: Library, kind: Problem | str) -> Check:
    if isinstance(kind, Problem):
        return Check("engine", "fail", "none can run without llama.cpp", kind.remedy)
    if kind == "patched":
        return Check("engine", "ok", "patched: every layer keeps its own number of cells")
    return Check("engine", "warn", "stock: all layers keep the same number of cells", str(library.why_stock))


def _cache_folder(*, is_needed: bool) -> Check:
    """is_needed: something must still be written there, before a chat can run."""
    remedy = f"set {CACHE_VARIABLE} to a folder you can write"
    try:
        folder = cache_folder()
        text = f"{folder}: "
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free_gb = shutil.disk_usage(folder).free / _GB
    except NoHome as error:
        text, _, remedy = str(error).partition(": ")
        return Check("cache folder", "fail" if is_needed else "warn", text, remedy)
    except OSError as error:
        text += f"{error.strerror}{'' if is_needed else ', so that no model is fetched and nothing built'}"
        return Check("cache folder", "fail" if is_needed else "warn", text, remedy)
    if free_gb < 1:
        return Check("cache folder", "warn", f"{folder}: only {free_gb:.1f} GB free", f"free some or {remedy}")
    return Check("cache folder", "ok", f"{folder}: {free_gb:.0f} GB free")


def _sessions() -> Check:
    from kvcompose_local.chat import sessions

    try:
        sessions.check_writable(sessions.path_of(sessions.LAST))
    except KVComposeError as error:
        text, _, remedy = str(error).partition(": ")
        remedy = remedy if isinstance(error, NoHome) else "set XDG_STATE_HOME to a folder you can write"
        return Check("sessions", "warn", f"no chat is saved: {text}", remedy)
    return Check("sessions", "ok", str(sessions.sessions_folder()))


def _default_model() -> Check:
    from kvcompose_local.install import models

    try:
        return Check("default model", "ok", str(models.resolve(None, pull=False)))
    except KVComposeError:
        return Check("default model", "warn", "not fetched yet", f"kvcompose-local models pull {models.DEFAULT_MODEL}")


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / _GB:.1f} of {memory.total / _GB:.1f} GB free"
    if memory.available < _GB:
        return Check("memory", "warn", text, "close other programs, or take a smaller --ctx or --budget")
    return Check("memory", "ok", text)


@click.command("doctor", short_help="Say what is installed and what to mend.")
@click.option("--models", is_flag=True, help="Try a tiny model of every architecture instead; takes a minute or two.")
def doctor_command(models: bool) -> None:
    """Say what is installed, which engine will run, and what to do about the rest."""
    if models:
        _try_architectures()
        return
    checks = report()
    for check in checks:
        remedy = f"\n        → {check.remedy}" if check.remedy else ""
        click.echo(f"{check.state:>5}  {check.name}: {check.text}{remedy}")
    if any(check.state == "fail" for check in checks):
        raise KVComposeError("something above needs mending before a chat can run")


def _try_architectures() -> None:
    """Try a tiny model of every architecture, and print the table. Raises KVComposeError where a trial failed."""
    from kvcompose_local.architectures import table
    from kvcompose_local.install.threads import default_threads
    from kvcompose_local.terminal.status import Status

    status = Status(sys.stderr)
    found = table.rows(default_threads(), lambda done, n: status.progress("trying:", done, n, "architectures"))
    click.echo(table.text(found))
    if any(row.failed for row in found):
        raise KVComposeError("trials failed: see above")
