"""Products with Q4_1 and Q5_0 weights: patch 0006 alone."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest
from ggml_ops import POINTER, operations, packed, rounded

from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.llama_ffi.library import bind

pytestmark = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")

F32 = gguf.GGMLQuantizationType.F32
ggml_mul_mat = bind("ggml_mul_mat", POINTER, POINTER, POINTER, POINTER)
has_avx2 = bool(bind("ggml_cpu_has_avx2", ctypes.c_int)())


def product(
    weights: np.ndarray, kind: gguf.GGMLQuantizationType, columns: np.ndarray, n_threads: int = 1
) -> np.ndarray:
    """llama.cpp's float32 (n, m) of weights, bytes (m, …) of that kind, and columns, float32 (n, k)."""
    with operations() as ggml:
        a = ggml.tensor(weights, kind, (len(weights), columns.shape[1]))
        b = ggml.tensor(columns, F32, columns.shape)
        return ggml.computed(ggml_mul_mat(ggml.context, a, b), (len(columns), len(weights)), n_threads)


# Rows by fours or not, columns by twos or not, rows of one block, of the most that are unpacked, and of one more.
SHAPES = [(4, 32, 2), (64, 576, 37), (12, 8192, 5), (12, 8224, 4), (10, 96, 7), (1, 64, 3), (896, 64, 192)]


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_0"])
@pytest.mark.parametrize(("n_rows", "n_values", "n_columns"), SHAPES)
def test_columns_together_are_those_alone(n_rows: int, n_values: int, n_columns: int, kind: str) -> None:
    """A column alone goes through vec_dot, which the patch leaves as it is; on AVX2 the two agree to the last bit."""
    rng = np.random.default_rng(n_rows + n_values)
    kind = gguf.GGMLQuantizationType[kind]
    weights = rng.normal(0.01, 0.02, (n_rows, n_values)).astype(np.float32)
    columns = rng.normal(0, 1, (n_columns, n_values)).astype(np.float32)
    expected = columns.astype(np.float64) @ rounded(weights, kind).T.astype(np.float64)
    # llama.cpp rounds the columns to eight bits.
    tolerance = 0.01 * np.linalg.norm(columns, axis=1, keepdims=True) * np.linalg.norm(weights, axis=1)
    weights = packed(weights, kind)
    alone = np.concatenate([product(weights, kind, column[None]) for column in columns])
    assert (abs(alone - expected) <= tolerance).all()
    for n_threads in (1, 2, 5):
        together = product(weights, kind, columns, n_threads)
        assert (abs(together - expected) <= tolerance).all()
        if has_avx2:
            assert together.tobytes() == alone.tobytes()


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_0"])
def test_nan_stays_nan(kind: str) -> None:
    """A broken number must be seen, in its own row alone."""
    rng = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType[kind]
    weights = packed(rng.normal(0, 1, (8, 64)).astype(np.float32), kind).copy()
    weights[3, :2] = 0xFF  # the first block's scale
    found = product(weights, kind, rng.normal(0, 1, (6, 64)).astype(np.float32))
    assert np.isnan(found[:, 3]).all()
    assert np.isfinite(np.delete(found, 3, axis=1)).all()
