"""Tiny models of architectures as GGUF files, whose tokens are bytes, for the command line."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from random_models import BYTES, N_VOCAB

from kvcompose_local.architectures.fixtures import metadata, weights
from kvcompose_local.llama_ffi.library import lib
from kvcompose_local.llama_ffi.random_models import RandomModel, Value

#: llama.cpp does not write the tensors of these.
_LEFT_OUT: dict[str, dict[str, Value]] = {"gemma4": {"gemma4.embedding_length_per_layer_input": 0}}


def write_architecture(arch: str, path: Path) -> Path:
    """A file with the tensors that llama.cpp made; it writes not all architectures' (``llama-model-saver.cpp``)."""
    keys = metadata(arch) | {f"{arch}.vocab_size": N_VOCAB} | BYTES | _LEFT_OUT.get(arch, {})
    model = RandomModel(keys, weights=weights(arch))
    own = path.with_suffix(".own")  # llama.cpp's has not all keys
    try:
        lib.llama_model_save_to_file(model._model, str(own).encode())
    finally:
        model.close()
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for tensor in gguf.GGUFReader(own).tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    own.unlink()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, np.ndarray):
        kind = gguf.GGUFValueType
        writer.add_key_value(key, value.tolist(), kind.ARRAY, sub_type=kind.UINT64)
    else:
        writer.add_array(key, value)
