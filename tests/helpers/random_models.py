"""Random models in memory, of the layers, heads and head sizes of real ones: llama.cpp makes them from metadata alone.

What is not attention is tiny: a vocabulary of 260, embeddings of 32 numbers where the architecture lets heads be wider.
They have every tensor that the architecture may have, so that llama.cpp bounds their graphs less tightly than those of
a file, which has fewer: test_shapes.py has files, too.
"""

from __future__ import annotations

import ctypes
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import TEMPLATE

from kvcompose_local.interfaces import Progress
from kvcompose_local.llama_ffi.library import bind, lib
from kvcompose_local.llama_ffi.model import Model

Value = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]
N_VOCAB, N_EMBD, N_FF = 260, 32, 32

_init_empty = bind("gguf_init_empty", ctypes.c_void_p)
_free = bind("gguf_free", None, ctypes.c_void_p)
_set_u32 = bind("gguf_set_val_u32", None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32)
_set_f32 = bind("gguf_set_val_f32", None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float)
_set_bool = bind("gguf_set_val_bool", None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_bool)
_set_str = bind("gguf_set_val_str", None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
_set_strings = bind(
    "gguf_set_arr_str",
    None,
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_char_p),
    ctypes.c_size_t,
)
_set_numbers = bind(
    "gguf_set_arr_data", None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
)
_INT32, _FLOAT32 = 5, 6  # GGUF_TYPE_…
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
_NOISE = np.random.default_rng(0).standard_normal(1 << 20, np.float32)


_NUMBERS: dict[str, Value] = {
    "tokenizer.ggml.model": "test",
    "tokenizer.ggml.tokens": [f"tok_{i}" for i in range(N_VOCAB)],
}
_SPECIALS = ["<unk>", "<s>", "<pad>", "<end>"]
_BYTES: dict[str, Value] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [*_SPECIALS, *(f"<0x{i:02X}>" for i in range(256))],
    "tokenizer.ggml.scores": [0.0] * N_VOCAB,
    "tokenizer.ggml.token_type": [2, 3, 3, 3] + [6] * 256,  # unknown, control, byte
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.chat_template": TEMPLATE,
}


@dataclass(frozen=True)
class Shape:
    """A model's attention: layers, query heads, KV heads, numbers of a head; ``more`` are the architecture's own keys.

    n_rot: numbers of a head that RoPE turns; n_embd: what the architecture wants, if not any size will do; q_scale: of
    the queries, where random ones would make the model chaotic; note: what is not as in the model; speaks: bytes as
    tokens and a chat template.
    """

    name: str
    arch: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head: int
    more: Mapping[str, Value] = field(default_factory=dict)
    n_rot: int | None = None
    n_embd: int = N_EMBD
    q_scale: float = 1.0
    note: str = ""
    speaks: bool = False

    def metadata(self) -> dict[str, Value]:
        """GGUF keys and values."""
        own: dict[str, Value] = {
            "vocab_size": N_VOCAB,
            "context_length": 4096,
            "embedding_length": self.n_embd,
            "block_count": self.n_layers,
            "feed_forward_length": N_FF,
            "attention.head_count": self.n_heads,
            "attention.head_count_kv": self.n_kv_heads,
            "attention.key_length": self.head,
            "attention.value_length": self.head,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": self.n_rot or self.head,
            "rope.freq_base": 10000.0,
            **self.more,
        }
        return {
            "general.architecture": self.arch,
            "general.name": self.name,
            **{f"{self.arch}.{key}": value for key, value in own.items()},
            **(_BYTES if self.speaks else _NUMBERS),
        }


def _gguf(metadata: Mapping[str, Value]) -> int:
    """A ``gguf_context`` without tensors."""
    gguf = _init_empty()
    for key, value in metadata.items():
        name = key.encode()
        if isinstance(value, bool):
            _set_bool(gguf, name, value)
        elif isinstance(value, int):
            _set_u32(gguf, name, value)
        elif isinstance(value, float):
            _set_f32(gguf, name, value)
        elif isinstance(value, str):
            _set_str(gguf, name, value.encode())
        elif isinstance(value[0], int | float):
            kind, number = (_INT32, ctypes.c_int32) if isinstance(value[0], int) else (_FLOAT32, ctypes.c_float)
            _set_numbers(gguf, name, kind, (number * len(value))(*value), len(value))
        else:
            texts = [str(text).encode() for text in value]
            _set_strings(gguf, name, (ctypes.c_char_p * len(texts))(*texts), len(texts))
    return int(gguf)


def _fill(tensor: int, q_scale: float) -> None:
    """Weights whose attention is peaked enough to tell cells apart, the same for the same name."""
    name, n = _name(tensor).decode(), _nelements(tensor)
    start = zlib.crc32(name.encode()) % (len(_NOISE) - min(n, len(_NOISE) - 1))
    noise = np.resize(_NOISE[start:], n) if n > len(_NOISE) - start else _NOISE[start : start + n]
    if "norm" in name:
        data = 1 + 0.1 * noise
    elif name.startswith("rope_"):
        data = 1 + np.abs(noise)
    elif name.endswith(".bias"):
        data = 0.1 * noise
    elif "ssm_a" in name:
        data = -0.1 - np.abs(noise)  # a state decays
    elif "sinks" in name or name.startswith("token_embd"):
        data = noise
    else:
        data = noise * np.float32((2 if "attn_q" in name or "attn_k" in name else 1) / np.sqrt(n // _nrows(tensor)))
    data = np.ascontiguousarray(data * (q_scale if "attn_q" in name else 1), np.float32)
    _tensor_set(tensor, data.ctypes.data, 0, data.nbytes)


class RandomModel(Model):
    """A :class:`Model` of which only the header is a file. Raises ModelError where llama.cpp refuses the metadata."""

    def __init__(self, shape: Shape, *, gpu_layers: int = 0, progress: Progress | None = None) -> None:
        self._shape = shape
        self._header_file = tempfile.NamedTemporaryFile(suffix=".gguf")  # noqa: SIM115 -- as long as the model
        gguf = _gguf(shape.metadata())
        written = _write(gguf, self._header_file.name.encode(), True)
        _free(gguf)
        assert written, f"cannot write {self._header_file.name}"
        super().__init__(Path(self._header_file.name), gpu_layers=gpu_layers, progress=progress)

    def _load(self, params: Any) -> Any:
        gguf = _gguf(self._shape.metadata())
        fill = _SET_TENSOR(lambda tensor, _user_data: _fill(tensor, self._shape.q_scale))
        try:
            return _init_from_user(gguf, fill, None, params)
        finally:
            _free(gguf)

    def close(self) -> None:
        super().close()
        self._header_file.close()
