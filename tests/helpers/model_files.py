"""Random models as files, with the tensors of a real one alone and no more metadata than it has."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import random_models
from random_models import BYTES, N_VOCAB, Shape

from kvcompose_local.architectures.fixtures import metadata, weights
from kvcompose_local.llama_ffi.library import lib
from kvcompose_local.llama_ffi.random_models import RandomModel, Value

#: What llama.cpp does not save the tensors of.
_LEFT_OUT: dict[str, dict[str, Value]] = {"gemma4": {"gemma4.embedding_length_per_layer_input": 0}}


def write_model(shape: Shape, path: Path) -> Path:
    """A model of a shape."""
    return _write(random_models.RandomModel(shape), path)


def write_architecture(arch: str, path: Path) -> Path:
    """A tiny model of an architecture, whose tokens are bytes; a few cannot be saved (``llama-model-saver.cpp``)."""
    keys = metadata(arch) | {f"{arch}.vocab_size": N_VOCAB} | BYTES | _LEFT_OUT.get(arch, {})
    return _write(RandomModel(keys, weights=weights(arch)), path)


def _write(model: RandomModel, path: Path) -> Path:
    """llama.cpp's own saving adds a hundred values that no converter writes; closes the model."""
    saved = path.with_suffix(".saved")
    try:
        lib.llama_model_save_to_file(model._model, os.fsencode(saved))
    finally:
        model.close()
    writer = gguf.GGUFWriter(str(path), model.keys["general.architecture"])
    for key, value in model.keys.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for tensor in gguf.GGUFReader(saved).tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    saved.unlink()
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
        writer.add_key_value(key, value.tolist(), kind.ARRAY, sub_type=kind[value.dtype.name.upper()])
    else:
        writer.add_array(key, list(value))
