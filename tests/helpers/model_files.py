"""Random models as files, with the tensors of a real one alone and no more metadata than it has."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
from random_models import RandomModel, Shape

from kvcompose_local.llama_ffi.library import lib


def write_model(shape: Shape, path: Path) -> Path:
    """Write a model of a shape; llama.cpp's own saving adds a hundred values that no converter writes."""
    saved = path.with_suffix(".saved")
    model = RandomModel(shape)
    lib.llama_model_save_to_file(model._model, os.fsencode(saved))
    model.close()
    writer = gguf.GGUFWriter(str(path), shape.arch)
    for key, value in shape.metadata().items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, np.asarray(value).tolist())
    for tensor in gguf.GGUFReader(saved).tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    saved.unlink()
    return path
