"""Finding, loading and binding llama.cpp; its log and its aborts."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvcompose_local.errors import EngineError
from kvcompose_local.install.library_choice import (
    VARIABLE,
    Library,
    bindings_problem,
    find_library,
    ggml_libraries,
    why_not_loaded,
)

_LOG_LEVEL_ERROR = 4
#: How often a thread of libgomp checks whether the others are done before it sleeps: some tens of microseconds, as long
#: as a sleep costs. With libgomp's default of 300,000, two chats on two cores keep each other's threads from running
#: (scripts/side-by-side measures it).
_SPINS = "1000"

#: glibc's numbers of parameters, and the bytes from which a block gets memory of its own: by default, and beside a GPU.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_BIG_BLOCK, _HUGE_BLOCK = 64 << 10, 32 << 20


def _libc(name: str) -> Any:
    """A function of glibc, None elsewhere."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _give_big_blocks_back() -> None:
    """Let glibc return big blocks when they are freed.

    Otherwise it keeps blocks below 32 MiB, and work buffers and attention of ever larger sizes pile up.
    """
    if mallopt := _libc("mallopt"):
        mallopt(_M_MMAP_THRESHOLD, _BIG_BLOCK)


def keep_big_blocks() -> None:
    """Let glibc keep the memory of big blocks that are freed: a new one takes NumPy longer than to compute in it.

    For where a compaction's milliseconds count, and the cells are not in the host's memory.
    """
    if mallopt := _libc("mallopt"):
        mallopt(_M_MMAP_THRESHOLD, _HUGE_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, 4 * _HUGE_BLOCK)


def give_small_blocks_back() -> None:
    """Return the memory of freed small blocks, which glibc keeps; takes milliseconds."""
    if malloc_trim := _libc("malloc_trim"):
        malloc_trim(0)


@contextmanager
def without_high_level() -> Iterator[None]:
    """Import modules of llama_cpp without its ``__init__``, which imports several times as much.

    A later import of the package gets all of it, on the same library.
    """
    found = None if "llama_cpp" in sys.modules else importlib.util.find_spec("llama_cpp")
    if found is None:
        yield
        return
    bare = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("llama_cpp", None, is_package=True))
    bare.__path__ = list(found.submodule_search_locations or [])
    sys.modules["llama_cpp"] = bare
    try:
        yield
    finally:
        del sys.modules["llama_cpp"]


def _import_library(found: Library) -> Any:
    if problem := bindings_problem() or found.problem:
        raise EngineError(str(problem))
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # a backtrace starts gdb, which may hang
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    if found.folder is not None:
        os.environ[VARIABLE] = str(found.folder)
    try:
        if found.folder is not None:
            for needed in ggml_libraries(found.folder):
                ctypes.CDLL(str(needed))  # by name they would be looked for in LD_LIBRARY_PATH first
        with without_high_level():
            import llama_cpp.llama_cpp as lib
    except (ImportError, FileNotFoundError, RuntimeError, OSError, AttributeError) as error:
        raise EngineError(str(why_not_loaded(error, found))) from error
    return lib


_give_big_blocks_back()
#: What ``lib`` was loaded from.
found = find_library()
lib = _import_library(found)
_native = lib._lib


def bind(name: str, restype: Any, *argtypes: Any) -> Any:
    """A function of libllama or of the ggml libraries it is linked to; None where this build has no such symbol."""
    try:
        function = getattr(_native, name)
    except AttributeError:
        return None
    function.restype = restype
    function.argtypes = list(argtypes)
    return function


_log_lines: deque[str] = deque(maxlen=20)
_shows_log = bool(os.environ.get("KVCOMPOSE_LOG"))


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _user_data: object) -> None:
    if level != _LOG_LEVEL_ERROR and not _shows_log:  # a thousand of them while a model is loaded
        return
    line = text.decode("utf-8", "replace").rstrip()
    if level == _LOG_LEVEL_ERROR and line:
        _log_lines.append(line)
    if _shows_log:
        print(line, file=sys.stderr)


def clear_log() -> None:
    """Forget what was logged, before a call whose complaints are wanted."""
    _log_lines.clear()


#: Called with llama.cpp's message before an abort ends the process, to save what must not be lost.
on_abort: list[Callable[[str], None]] = []


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)  # type: ignore[untyped-decorator]
def _abort(message: bytes) -> None:
    # There is no way back into llama.cpp from here: one line, not a core dump, and an exit code.
    try:
        text = " ".join(message.decode("utf-8", "replace").split())
        reason = "an RPC worker was lost" if "RPC server" in text else f"llama.cpp stopped: {text}"
        print(f"\nerror: {reason}", file=sys.stderr, flush=True)
        for hook in on_abort:
            hook(reason)
    finally:
        os._exit(1)


bind("ggml_set_abort_callback", ctypes.c_void_p, ctypes.c_void_p)(ctypes.cast(_abort, ctypes.c_void_p))
lib.llama_log_set(_on_log, ctypes.c_void_p(0))
lib.llama_backend_init()


def last_log() -> str:
    """llama.cpp's first complaint since the last call, in brackets, or nothing; later lines only repeat it."""
    return f" ({_log_lines[0].partition(': ')[2] or _log_lines[0]})" if _log_lines else ""


def library_path() -> Path:
    """Where the loaded libllama is."""
    return Path(_native._name)
