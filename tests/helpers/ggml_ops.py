"""Single operations of the ggml that is loaded, on NumPy arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import gguf
import numpy as np

from kvcompose_local.llama_ffi.library import bind

POINTER, SIZE = ctypes.c_void_p, ctypes.c_size_t


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", SIZE), ("mem_buffer", POINTER), ("no_alloc", ctypes.c_bool))


_init = bind("ggml_init", POINTER, InitParams)
_free = bind("ggml_free", None, POINTER)
_new_tensor = bind("ggml_new_tensor_4d", POINTER, POINTER, ctypes.c_int, *[ctypes.c_int64] * 4)
_get_data = bind("ggml_get_data", POINTER, POINTER)
_new_graph = bind("ggml_new_graph", POINTER, POINTER)
_build_forward_expand = bind("ggml_build_forward_expand", None, POINTER, POINTER)
_compute = bind("ggml_graph_compute_with_ctx", ctypes.c_int, POINTER, POINTER, ctypes.c_int)


class Operations:
    """Tensors of one ggml context; ``context`` is what ggml's functions take."""

    def __init__(self, context: int) -> None:
        self.context = context

    def tensor(self, data: np.ndarray, kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> int:
        """A tensor of these bytes, whose shape is NumPy's: the last axis is contiguous."""
        made: int = _new_tensor(self.context, int(kind), *shape[::-1], *[1] * (4 - len(shape)))
        data = np.ascontiguousarray(data)
        ctypes.memmove(_get_data(made), data.ctypes.data, data.nbytes)
        return made

    def computed(self, out: int, shape: tuple[int, ...], n_threads: int) -> np.ndarray:
        """float32 of this shape: what the tensor ``out`` comes to."""
        graph = _new_graph(self.context)
        _build_forward_expand(graph, out)
        assert _compute(self.context, graph, n_threads) == 0
        return np.frombuffer(ctypes.string_at(_get_data(out), 4 * int(np.prod(shape))), np.float32).reshape(shape)


@contextmanager
def operations() -> Iterator[Operations]:
    """Up to 256 MiB of tensors and what computing takes."""
    context = _init(InitParams(256 << 20, None, False))
    try:
        yield Operations(context)
    finally:
        _free(context)


def packed(x: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """uint8 of blocks, last axis of bytes."""
    return np.asarray(gguf.quants.quantize(x, kind))


def rounded(x: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The numbers that packing leaves of ``x``."""
    return np.asarray(gguf.quants.dequantize(packed(x, kind), kind)).reshape(x.shape)
