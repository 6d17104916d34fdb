"""Finds the libraries of llama.cpp, or why they cannot be loaded: ``run`` fails with the problem that ``doctor`` finds.

This looks at files only; :func:`why_not_loaded` explains what goes wrong in loading.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from kvcompose_local.errors import KVComposeError
from kvcompose_local.install.elf import fault_of
from kvcompose_local.install.pin import build_facts, cpu_features, preferred_library_dir, read_pin
from kvcompose_local.install.resources import CACHE_VARIABLE, cache_folder, data_file

#: Read by llama-cpp-python when it is imported; a library that the user names there wins.
VARIABLE = "LLAMA_CPP_LIB_PATH"
BUILD = "run `kvcompose-local build`"
_ANOTHER = f"unset {VARIABLE}, or name another folder"
_NAMES = ("libllama.so", "libllama.dylib", "llama.dll")
_ELSEWHERE = f"set {CACHE_VARIABLE} to a folder on another file system"


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what to do about it; together they are one line."""

    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.text}: {self.remedy}"


@dataclass(frozen=True)
class Library:
    """The folder with libllama, None where there is none.

    problem: why it cannot be loaded; is_named: the user named it, in :data:`VARIABLE`; why_not_built: why it is not our
    own build.
    """

    folder: Path | None
    problem: Problem | None = None
    is_named: bool = False
    why_not_built: Problem | None = None

    @property
    def why_stock(self) -> Problem:
        """Why this is not the patched llama.cpp, where it is not."""
        if self.is_named:
            return Problem(f"{VARIABLE} names a llama.cpp without the patches", "unset it")
        return self.why_not_built or Problem("llama.cpp is not built", BUILD)


def find_library() -> Library:
    """The user's choice, our build, or the library inside the bindings."""
    if named := os.environ.get(VARIABLE):
        return Library(Path(named), _problem_of_named(Path(named)), is_named=True)
    why_not_built = None
    try:
        if built := preferred_library_dir():
            return Library(built, _problem_of_file(built))
        why_not_built = _why_not_built()
    except KVComposeError as error:  # no home folder, a damaged pin
        text, _, remedy = str(error).partition(": ")
        why_not_built = Problem(text, remedy)
    except OSError as error:  # the cache of another user
        why_not_built = Problem(f"cannot read {error.filename} ({error.strerror})", f"set {CACHE_VARIABLE} to another")
    bindings = importlib.util.find_spec("llama_cpp")
    for location in (bindings.submodule_search_locations or []) if bindings else []:
        inside = Path(location) / "lib"
        if libllama(inside) is not None:
            return Library(inside, _problem_of_file(inside), why_not_built=why_not_built)
    return Library(None, why_not_built, why_not_built=why_not_built)


def libllama(folder: Path) -> Path | None:
    """The library itself, None where the folder has none."""
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)


def ggml_libraries(folder: Path) -> list[Path]:
    """The libraries that libllama needs, on Linux, in the order in which they need each other."""
    found = folder.glob("libggml*.so") if sys.platform == "linux" else ()
    return sorted(found, key=lambda path: (path.name == "libggml.so", path.name != "libggml-base.so", path.name))


def _problem_of_named(folder: Path) -> Problem | None:
    remedy = f"unset it, or name the folder that holds {_NAMES[sys.platform == 'darwin']}"
    if not os.path.lexists(folder):
        return Problem(f"{VARIABLE} names {folder}, which is not there", remedy)
    if not folder.is_dir():
        return Problem(f"{VARIABLE} names {folder}, which is no folder", remedy)
    if libllama(folder) is None:
        return Problem(f"{VARIABLE} names {folder}, where there is no libllama", remedy)
    return _problem_of_file(folder, is_named=True)


def _problem_of_file(folder: Path, *, is_named: bool = False) -> Problem | None:
    library = libllama(folder)
    if library is None:
        return Problem(f"{folder} was built, and holds no libllama", _again(folder))
    try:
        library.open("rb").close()
    except OSError as error:
        remedy = _ANOTHER if is_named else f"set {CACHE_VARIABLE} to a folder of yours"
        return Problem(f"cannot read {library} ({error.strerror})", remedy)
    # Linux alone lets nothing be loaded from such a file system; root is no exception.
    if sys.platform == "linux" and os.statvfs(library).f_flag & os.ST_NOEXEC:
        return Problem(
            f"{folder} is on a file system mounted noexec, from which no library is loaded",
            _ANOTHER if is_named else _ELSEWHERE,
        )
    for file in (library, *ggml_libraries(folder)):
        if fault := fault_of(file):
            return Problem(f"{file} {fault}", _ANOTHER if is_named else _again(folder))
    return None


def _again(folder: Path) -> str:
    return f"delete {folder.parent}, then {BUILD}"


def why_not_loaded(error: BaseException, library: Library) -> Problem:
    """The meaning of a failure to load or bind a library."""
    told = " ".join(str(error).split())
    if library.folder is None:
        return Problem(f"no usable llama.cpp library ({told})", BUILD)
    remedy = _ANOTHER if library.is_named else _again(library.folder)
    if "failed to map segment" in told:
        remedy = remedy if library.is_named else _ELSEWHERE
        return Problem(f"the system lets no library be loaded from {library.folder} (mounted noexec?)", remedy)
    if os.environ.get("LD_LIBRARY_PATH") and re.search(r"undefined symbol|version .* not found", told):
        found = f"{library.folder} and what LD_LIBRARY_PATH brings may not fit each other ({told})"
        return Problem(found, f"unset LD_LIBRARY_PATH, or {remedy}")
    if missing := re.search(r"([\w.+-]+\.so[\w.]*): cannot open shared object", told):
        return Problem(f"{library.folder} needs {missing[1]}, which is missing here", f"install it, or {remedy}")
    if isinstance(error, AttributeError):
        symbol = told.rpartition(" ")[2]
        return Problem(f"{library.folder} holds another version of llama.cpp, without {symbol}", remedy)
    return Problem(f"no usable llama.cpp library in {library.folder} ({told})", remedy)


def _why_not_built() -> Problem:
    """Why our build is not in the cache; where there are others, what the newest of them was made for."""
    builds = sorted((cache_folder() / "llama").glob("*/build.json"), key=lambda path: path.stat().st_mtime)
    facts = next((facts for path in reversed(builds) if (facts := build_facts(path.parent))), {})
    text = "llama.cpp is not built"
    if facts and not set(facts.get("cpu", "").split()) <= set(cpu_features().split()):
        text = "llama.cpp was built for another machine, whose processor has other instructions"
    elif facts:
        text = f"llama.cpp was built for another pin, patch series or machine ({facts['key']})"
    return Problem(text, BUILD)


def bindings_problem() -> Problem | None:
    """The fault of the installed llama-cpp-python, which must be the pinned one to fit llama.cpp's functions."""
    try:
        pin = read_pin(data_file("patches"))
    except KVComposeError as error:
        return Problem(str(error), "install kvcompose-local again")
    found = importlib.util.find_spec("llama_cpp")
    for location in (found.submodule_search_locations or []) if found else []:
        # The folder tells as much as importlib.metadata, which takes longer to import than the bindings.
        if (Path(location).parent / f"{pin.name.replace('-', '_')}-{pin.version}.dist-info").is_dir():
            return None
    from importlib import metadata

    remedy = f"pip install {pin.name}=={pin.version}"
    try:
        version = metadata.version(pin.name)
    except metadata.PackageNotFoundError:
        return Problem(f"{pin.name} is not installed", remedy)
    return None if version == pin.version else Problem(f"{pin.name} {version}, but {pin.version} is needed", remedy)
