"""Where the library has a GPU backend: shapes with no, some and all layers on it.

With none large products are moved to the GPU all the same, so that attention may stand in its memory. The library of a
machine with CUDA is built from ``kvcompose_local.install.build --source DIR`` with ``-DGGML_CUDA=ON`` and named by
``LLAMA_CPP_LIB_PATH``.
"""

from __future__ import annotations

import pytest
from real_shapes import SHAPES, try_shape

from kvcompose_local.llama_ffi.library import layers_to_offload

pytestmark = pytest.mark.skipif(layers_to_offload(None) == 0, reason="the library of this run has no GPU backend")


@pytest.mark.parametrize("gpu_layers", [0, 8, 999])
@pytest.mark.parametrize("name", ["Llama 3.2 1B", "Qwen3 0.6B, 1.7B", "Gemma 3 1B"])
def test_shape(name: str, gpu_layers: int) -> None:
    assert try_shape(next(shape for shape in SHAPES if shape.name == name), gpu_layers)
