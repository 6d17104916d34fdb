"""llama.cpp through llama-cpp-python's low-level API: the only place that imports ``llama_cpp`` or uses ctypes.

Every native return code is checked here and becomes an :class:`EngineError` that names the call; owners of native
memory are context managers. Facts about the library are those of the pinned version (``patches/PIN``).
"""

from kvcompose_local.llama_ffi.cells import PerLayerCells, library_is_patched
from kvcompose_local.llama_ffi.context import CACHE_TYPES, F16, Context, SoftmaxTap, WatchTap
from kvcompose_local.llama_ffi.library import give_small_blocks_back, layers_to_offload, library_path, on_abort
from kvcompose_local.llama_ffi.model import Loading, Model
from kvcompose_local.llama_ffi.rpc import add_workers, is_loopback, serve

__all__ = [
    "CACHE_TYPES",
    "F16",
    "Context",
    "Loading",
    "Model",
    "PerLayerCells",
    "SoftmaxTap",
    "WatchTap",
    "add_workers",
    "give_small_blocks_back",
    "is_loopback",
    "layers_to_offload",
    "library_is_patched",
    "library_path",
    "on_abort",
    "serve",
]
