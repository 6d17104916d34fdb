"""The GPUs that the loaded llama.cpp can use, and how many of a model's layers they hold."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcompose_local.arena import DEFAULT_CTX
from kvcompose_local.install.gguf_header import BadHeader, Header, read_header
from kvcompose_local.install.model_files import size_of
from kvcompose_local.llama_ffi.library import bind

_GPU_TYPES = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU and _IGPU
_count = bind("ggml_backend_dev_count", ctypes.c_size_t)
_get = bind("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
_type = bind("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
_name = bind("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
_description = bind("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)
_memory = bind(
    "ggml_backend_dev_memory",
    None,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.POINTER(ctypes.c_size_t),
)
#: More than any model has.
_ALL_LAYERS = 999
#: What graphs are computed in, and the driver's own, in bytes of a GPU: left free.
_SPARED = 768 << 20


@dataclass(frozen=True)
class Gpu:
    """name: ggml's, as ``CUDA0``; free, total: bytes of its memory."""

    name: str
    description: str
    free: int
    total: int


def gpus() -> list[Gpu]:
    """Those of this machine; RPC workers are none."""
    found = []
    for i in range(_count()):
        device = _get(i)
        if _type(device) not in _GPU_TYPES or _name(device).startswith(b"RPC"):
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        _memory(device, ctypes.byref(free), ctypes.byref(total))
        name, description = (text.decode("utf-8", "replace") for text in (_name(device), _description(device)))
        found.append(Gpu(name, description, free.value, total.value))
    return found


def layers_to_offload(
    path: Path, wanted: int | None, *, n_ctx: int | None, budget: float, workers: Sequence[str] = ()
) -> int:
    """``wanted``; where that is None all layers if there are workers, else as many as the GPUs' free memory holds.

    A layer is its weights and its share of the cache that ``budget`` promises.
    """
    if wanted is not None:
        return wanted
    if workers:
        return _ALL_LAYERS
    free = sum(max(gpu.free - _SPARED, 0) for gpu in gpus())
    return _fitting(path, free, n_ctx, budget) if free else 0


def _fitting(path: Path, free: int, n_ctx: int | None, budget: float) -> int:
    """Layers whose weights and cells ``free`` bytes hold; all where the file does not tell."""
    try:
        with path.open("rb") as file:
            header = read_header(file)
    except (BadHeader, OSError):  # told when it is loaded
        return _ALL_LAYERS
    n_layers = header.number("{arch}.block_count") or 0
    if n_layers < 1:
        return _ALL_LAYERS
    known = header.number("{arch}.context_length") or DEFAULT_CTX
    n_positions = min(DEFAULT_CTX, known) if n_ctx is None else n_ctx
    # The embedding stays on the host; it stands here for the output, which may be a copy of it.
    layer_bytes = size_of(path) / n_layers + _token_bytes(header) * n_positions * budget
    n_fitting = int(free // layer_bytes)
    return _ALL_LAYERS if n_fitting >= n_layers else n_fitting


def _token_bytes(header: Header) -> int:
    """Of the layer that has the most: what a token takes in F16."""
    embedding, n_heads = (header.number("{arch}." + key) for key in ("embedding_length", "attention.head_count"))
    usual = embedding // n_heads if embedding and n_heads else 128
    sizes = (header.number(f"{{arch}}.attention.{kind}_length") or usual for kind in ("key", "value"))
    kv_heads = header.values.get(f"{header.architecture}.attention.head_count_kv") or n_heads or 8
    widest = max(kv_heads) if isinstance(kv_heads, list) else kv_heads
    return 2 * int(widest) * sum(sizes)
