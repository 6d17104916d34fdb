"""What is installed, which engine will run, and what to do about the rest: data for ``kvcompose-local doctor``.

Looks at files and versions only. The library is never loaded, so that a broken one can still be reported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import mmap
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from kvcompose_local import build, models
from kvcompose_local.errors import KVComposeError
from kvcompose_local.pin import library_dir, read_pin
from kvcompose_local.resources import cache_folder, data_file

State = Literal["ok", "warn", "fail"]

#: A function of the patch series' C interface: a library that holds its name can run the patched engine.
_PATCHED_SYMBOL = b"llama_kvc_rewrite"
_BUILD_REMEDY = "kvcompose-local build"
_GB = 10**9


@dataclass(frozen=True)
class Check:
    """One finding. ``remedy`` is a command or an instruction, empty when there is nothing to do."""

    name: str
    state: State
    text: str
    remedy: str = ""


def report() -> list[Check]:
    """All findings, in the order in which a user would mend them. Never raises for what it finds."""
    checks = [_python(), _compiler(), _build_tools(), _bindings()]
    library = _library_folder()
    checks += [_library(library), _device(library), _engine(library)]
    checks += [_cache_folder(), _default_model(), _memory()]
    return checks


def _python() -> Check:
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
    return _found("compiler", build.find_compiler)


def _build_tools() -> Check:
    return _found("cmake and ninja", lambda: ", ".join(build.find_tool(name) for name in ("cmake", "ninja")))


def _bindings() -> Check:
    try:
        pin = read_pin(data_file("patches"))
    except KVComposeError as error:
        return Check("bindings", "fail", str(error), "reinstall kvcompose-local")
    remedy = f"pip install {pin.name}=={pin.version}"
    try:
        version = importlib.metadata.version(pin.name)
    except importlib.metadata.PackageNotFoundError:
        return Check("bindings", "fail", f"{pin.name} is not installed", remedy)
    if version != pin.version:
        return Check("bindings", "fail", f"{pin.name} {version}, but {pin.version} is needed", remedy)
    return Check("bindings", "ok", str(pin))


def _library_folder() -> Path | None:
    """The folder llama.cpp would be loaded from: the user's choice, our build, or the one inside the bindings."""
    chosen = os.environ.get("LLAMA_CPP_LIB_PATH")
    if chosen:
        return Path(chosen)
    try:
        built = library_dir()
    except KVComposeError:
        built = None
    if built is not None:
        return built
    bindings = importlib.util.find_spec("llama_cpp")
    for location in (bindings.submodule_search_locations or []) if bindings else []:
        if _libllama(inside := Path(location) / "lib") is not None:
            return inside
    return None


def _libllama(folder: Path | None) -> Path | None:
    names = ("libllama.so", "libllama.dylib", "llama.dll")
    return next((folder / name for name in names if (folder / name).is_file()), None) if folder else None


def _has_patched_interface(folder: Path | None) -> bool:
    library = _libllama(folder)
    if library is None or library.stat().st_size == 0:
        return False
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(_PATCHED_SYMBOL) >= 0


def _library(folder: Path | None) -> Check:
    if folder is None:
        if stale := _stale_builds():
            text = f"built for another pin, patch series or machine: {', '.join(stale)}"
            return Check("library", "fail", text, _BUILD_REMEDY)
        return Check("library", "fail", "llama.cpp is not built", _BUILD_REMEDY)
    if _libllama(folder) is None:
        return Check("library", "fail", f"no libllama in {folder}", "unset LLAMA_CPP_LIB_PATH")
    kind = "patched" if _has_patched_interface(folder) else "stock"
    facts = _build_facts(folder.parent)
    if not facts:
        return Check("library", "ok", f"{kind}, not built by us: {folder}")
    return Check("library", "ok", f"{kind}, {facts['pin']}, key {facts['key']}, {facts['date']}: {folder}")


def _build_facts(folder: Path) -> dict[str, str]:
    try:
        facts = json.loads((folder / "build.json").read_text(encoding="utf-8"))
        return {name: str(facts[name]) for name in ("pin", "key", "date")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _stale_builds() -> list[str]:
    builds = cache_folder() / "llama"
    return sorted(path.parent.name for path in builds.glob("*/build.json") if _build_facts(path.parent))


def _device(folder: Path | None) -> Check:
    if folder is not None and any(folder.glob("libggml-metal*")):
        return Check("device", "ok", "Metal")
    apple_silicon = sys.platform == "darwin" and platform.machine() == "arm64"
    if folder is not None and apple_silicon:
        return Check("device", "warn", "CPU only, this library has no Metal", _BUILD_REMEDY)
    return Check("device", "ok", f"CPU, {psutil.cpu_count(logical=False) or os.cpu_count()} cores")


def _engine(folder: Path | None) -> Check:
    if _libllama(folder) is None:
        return Check("engine", "fail", "none can run without llama.cpp", _BUILD_REMEDY)
    if _has_patched_interface(folder):
        return Check("engine", "ok", "patched: every layer keeps its own number of cells")
    return Check("engine", "warn", "stock: all layers keep the same number of cells", _BUILD_REMEDY)


def _cache_folder() -> Check:
    folder = cache_folder()
    remedy = "set KVCOMPOSE_CACHE to a folder you can write"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free_gb = shutil.disk_usage(folder).free / _GB
    except OSError as error:
        return Check("cache folder", "fail", f"{folder}: {error.strerror}", remedy)
    if free_gb < 1:
        return Check("cache folder", "warn", f"{folder}: only {free_gb:.1f} GB free", f"free some or {remedy}")
    return Check("cache folder", "ok", f"{folder}: {free_gb:.0f} GB free")


def _default_model() -> Check:
    try:
        return Check("default model", "ok", str(models.resolve(None, pull=False)))
    except KVComposeError:
        return Check("default model", "warn", "not fetched yet", f"kvcompose-local models pull {models.DEFAULT_MODEL}")


def _memory() -> Check:
    memory = psutil.virtual_memory()
    text = f"{memory.available / _GB:.1f} of {memory.total / _GB:.1f} GB free"
    if memory.available < _GB:
        return Check("memory", "warn", text, "close other programs, or take a smaller --ctx or --budget")
    return Check("memory", "ok", text)
