"""Models in memory with random weights: llama.cpp makes them from metadata alone, without a file of weights."""

from __future__ import annotations

import ctypes
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcompose_local.errors import EngineError
from kvcompose_local.interfaces import FloatArray, Progress
from kvcompose_local.llama_ffi.library import bind, lib
from kvcompose_local.llama_ffi.model import Model

#: A GGUF value; integers have 32 bits, in a list with a sign and alone without; in a NumPy array they have 64.
Value = bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str] | npt.NDArray[np.uint64]

_init_empty = bind("gguf_init_empty", ctypes.c_void_p)
_free = bind("gguf_free", None, ctypes.c_void_p)
_SCALARS: dict[type, Callable[..., None]] = {
    bool: bind("gguf_set_val_bool", None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_bool),
    int: bind("gguf_set_val_u32", None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32),
    float: bind("gguf_set_val_f32", None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float),
}
_set_str = bind("gguf_set_val_str", None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
_set_strings = bind(
    "gguf_set_arr_str", None, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p), ctypes.c_size_t
)
_set_numbers = bind(
    "gguf_set_arr_data", None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
)
_ARRAY_TYPES = {"int32": 5, "float32": 6, "uint64": 10}  # of enum gguf_type
_write = bind("gguf_write_to_file", ctypes.c_bool, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_bool)
_name = bind("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p)
_nelements = bind("ggml_nelements", ctypes.c_int64, ctypes.c_void_p)
_nrows = bind("ggml_nrows", ctypes.c_int64, ctypes.c_void_p)
_tensor_set = bind("ggml_backend_tensor_set", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
_SET_TENSOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
_init_from_user = bind(
    "llama_model_init_from_user",
    ctypes.c_void_p,
    ctypes.c_void_p,
    _SET_TENSOR,
    ctypes.c_void_p,
    lib.llama_model_params,
)
_noise: FloatArray = np.zeros(0, np.float32)


def _gguf(metadata: Mapping[str, Value]) -> int:
    """A ``gguf_context`` without tensors."""
    gguf = _init_empty()
    for key, value in metadata.items():
        name = key.encode()
        if isinstance(value, str):
            _set_str(gguf, name, value.encode())
        elif isinstance(value, bool | int | float):
            _SCALARS[type(value)](gguf, name, value)
        elif isinstance(value[0], str):
            texts = [str(text).encode() for text in value]
            _set_strings(gguf, name, (ctypes.c_char_p * len(texts))(*texts), len(texts))
        else:
            narrow = np.float32 if isinstance(value[0], float) else np.int32
            numbers = value if isinstance(value, np.ndarray) else np.array(value, narrow)
            _set_numbers(gguf, name, _ARRAY_TYPES[numbers.dtype.name], numbers.ctypes.data, numbers.size)
    return int(gguf)


def random_numbers(name: str, n: int) -> FloatArray:
    """float32 (n,) of a normal distribution, the same for the same name."""
    global _noise
    if not _noise.size:
        _noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    start = zlib.crc32(name.encode()) % (len(_noise) - min(n, len(_noise) - 1))
    return np.asarray(np.resize(_noise[start:], n) if n > len(_noise) - start else _noise[start : start + n])


def random_weights(name: str, n: int, n_columns: int) -> FloatArray:
    """float32 (n,): weights whose attention is peaked enough to tell cells apart, the same for the same name."""
    noise = random_numbers(name, n)
    if "norm" in name:
        return np.asarray(1 + 0.1 * noise, np.float32)
    if name.startswith("rope_"):
        return np.asarray(1 + np.abs(noise), np.float32)
    if name.endswith(".bias"):
        return np.asarray(0.1 * noise, np.float32)
    if "ssm_a" in name:
        return np.asarray(-0.1 - np.abs(noise), np.float32)  # a state decays
    if "sinks" in name or name.startswith("token_embd"):
        return noise
    return np.asarray(noise * np.float32((2 if "attn_q" in name or "attn_k" in name else 1) / np.sqrt(n_columns)))


class RandomModel(Model):
    """A :class:`Model` of which only the header is a file.

    weights: makes a tensor, by its name, the number of its values, and of the values in a row. Raises ModelError where
    llama.cpp refuses the metadata.
    """

    def __init__(
        self,
        metadata: Mapping[str, Value],
        *,
        weights: Callable[[str, int, int], FloatArray] = random_weights,
        gpu_layers: int = 0,
        progress: Progress | None = None,
        header_only: bool = False,
    ) -> None:
        self.keys, self._weights = metadata, weights
        self._header_file = tempfile.NamedTemporaryFile(suffix=".gguf")  # noqa: SIM115 -- as long as the model
        gguf = _gguf(metadata)
        written = _write(gguf, self._header_file.name.encode(), True)
        _free(gguf)
        if not written:
            raise EngineError(f"cannot write {self._header_file.name}")
        path = Path(self._header_file.name)
        super().__init__(path, gpu_layers=gpu_layers, progress=progress, header_only=header_only)

    def _load(self, params: Any) -> Any:
        if params.vocab_only:
            return super()._load(params)
        gguf = _gguf(self.keys)

        @_SET_TENSOR  # type: ignore[untyped-decorator]
        def fill(tensor: int, _user_data: object) -> None:
            n, rows = _nelements(tensor), _nrows(tensor)
            data = np.ascontiguousarray(self._weights(_name(tensor).decode(), n, n // rows), np.float32)
            _tensor_set(tensor, data.ctypes.data, 0, data.nbytes)

        try:
            return _init_from_user(gguf, fill, None, params)
        finally:
            _free(gguf)

    def close(self) -> None:
        """Free the model and its header."""
        super().close()
        self._header_file.close()
