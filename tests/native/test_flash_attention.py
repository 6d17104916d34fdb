"""Flash attention over quantized keys and values, against the formula in float64: patches 0004 and 0005 alone."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import gguf
import numpy as np
import pytest
from ggml_ops import POINTER, operations, packed, rounded

from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.llama_ffi.library import bind

# Where vectors have no size of their own, small numbers of queries are left to llama.cpp.
_sized = not any(bind(f"ggml_cpu_has_{name}", ctypes.c_int)() for name in ("sve", "riscv_v"))
pytestmark = pytest.mark.skipif(
    not library_is_patched() or not _sized, reason="the library of this run does not take quantized cells in tiles"
)

F32, F16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16
Q8_0, Q4_0, Q5_1 = (gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "Q5_1"))


ggml_permute = bind("ggml_permute", POINTER, POINTER, POINTER, *[ctypes.c_int] * 4)
ggml_flash_attn_ext = bind("ggml_flash_attn_ext", POINTER, *[POINTER] * 5, *[ctypes.c_float] * 3)
ggml_add_sinks = bind("ggml_flash_attn_ext_add_sinks", None, POINTER, POINTER)


@dataclass
class Case:
    """Arrays of float32, as ggml lays them out: q (queries, heads, DK), k and v (cells, KV heads, D), mask (heads or 1,
    queries, cells); k and v are rounded to their types."""

    k_type: gguf.GGMLQuantizationType
    v_type: gguf.GGMLQuantizationType
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: np.ndarray
    sinks: np.ndarray | None = None
    softcap: float = 0.0
    max_bias: float = 0.0

    @classmethod
    def random(cls, rng: np.random.Generator) -> Case:
        def pick(*values: int) -> int:
            return int(rng.choice(values))

        def values(*shape: int) -> np.ndarray:
            return rng.uniform(-1, 1, shape).astype(np.float32)

        n_kv_heads, group, n_queries = pick(1, 2, 3, 8), pick(1, 2, 3, 4, 7, 17, 65), pick(1, 1, 1, 2, 3, 5, 64, 70)
        if group > 8:
            n_kv_heads, n_queries = min(n_kv_heads, 2), min(n_queries, 3)
        n_cells, n_heads = pick(1, 15, 16, 17, 63, 65, 129, 300), n_kv_heads * group
        mask = values(pick(1, n_heads), n_queries, n_cells)
        mask[..., rng.random(n_cells) < rng.choice([0, 0.3, 0.9])] = -np.inf
        mask[..., : pick(0, n_cells // 2)] = -np.inf  # whole tiles
        mask[..., -1] = 0  # every query sees something
        case = cls(
            Q8_0 if rng.random() < 0.6 else gguf.GGMLQuantizationType(pick(Q4_0, Q5_1)),
            gguf.GGMLQuantizationType(pick(Q4_0, Q8_0, Q5_1)),
            2 * values(n_queries, n_heads, 32 * pick(1, 2, 3, 4, 8)),
            values(0),
            values(0),
            mask.astype(np.float16).astype(np.float32),
            4 * values(n_heads) if rng.random() < 0.3 else None,
            10.0 if rng.random() < 0.3 else 0.0,
            8.0 if rng.random() < 0.3 else 0.0,
        )
        case.k = rounded(values(n_cells, n_kv_heads, case.q.shape[2]), case.k_type)
        case.v = rounded(values(n_cells, n_kv_heads, 32 * pick(1, 2, 3, 4, 8)), case.v_type)
        return case

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def scale(self) -> float:
        return float(np.float32(2 / np.sqrt(self.q.shape[2])))

    def expected(self) -> np.ndarray:
        """float64 (queries, heads, DV)."""
        n_heads = self.q.shape[1]
        k, v = (np.repeat(x.astype(np.float64), self.group, axis=1) for x in (self.k, self.v))
        scores = np.einsum("qhd,chd->hqc", self.q.astype(np.float64), k) * self.scale
        if self.softcap:
            scores = self.softcap * np.tanh(scores / self.softcap)
        slopes = np.ones(n_heads)
        if self.max_bias:  # as ALiBi's paper gives them to numbers of heads that are no powers of two
            n = 1 << int(np.log2(n_heads))
            for h in range(n_heads):
                slopes[h] = (
                    2 ** (-self.max_bias / n * (h + 1)) if h < n else 2 ** (-self.max_bias / 2 / n * (2 * (h - n) + 1))
                )
        scores += slopes[:, None, None] * self.mask
        sinks = np.full(n_heads, -np.inf) if self.sinks is None else self.sinks.astype(np.float64)
        largest = np.maximum(scores.max(axis=2), sinks[:, None])
        weights = np.exp(scores - largest[..., None])
        total = weights.sum(axis=2) + np.exp(sinks[:, None] - largest)
        return np.einsum("hqc,chd->qhd", weights / total[..., None], v)

    def computed(self, n_threads: int, k: np.ndarray | None = None, v: np.ndarray | None = None) -> np.ndarray:
        """llama.cpp's float32 (queries, heads, DV); k and v are packed bytes to take instead."""
        with operations() as ggml:

            def by_head(made: int) -> int:  # the cells of one head, whose rows stand apart, as in a cache
                return int(ggml_permute(ggml.context, made, 0, 2, 1, 3))

            k, v = packed(self.k, self.k_type) if k is None else k, packed(self.v, self.v_type) if v is None else v
            out = ggml_flash_attn_ext(
                ggml.context,
                by_head(ggml.tensor(self.q, F32, self.q.shape)),
                by_head(ggml.tensor(k, self.k_type, self.k.shape)),
                by_head(ggml.tensor(v, self.v_type, self.v.shape)),
                ggml.tensor(self.mask.astype(np.float16), F16, self.mask.shape),
                self.scale,
                self.max_bias,
                self.softcap,
            )
            if self.sinks is not None:
                ggml_add_sinks(out, ggml.tensor(self.sinks, F32, self.sinks.shape))
            return ggml.computed(out, (self.q.shape[0], self.q.shape[1], self.v.shape[2]), n_threads)


@pytest.mark.parametrize("seed", range(60))
def test_as_the_formula_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = Case.random(rng)
    expected, found = case.expected(), case.computed(int(rng.choice([1, 2, 5])))
    error = float(((found - expected) ** 2).sum() / (expected**2).sum())
    # Keys and values that one to three rows of queries share are left to llama.cpp, which rounds queries to eight bits.
    own = case.group * case.q.shape[0] >= 4 or (case.q.shape[0] == 1 and case.group > 1)
    assert error < (1e-8 if own else 2e-4), (case.k_type, case.v_type, case.q.shape, case.k.shape, case.v.shape)


def single_query(rng: np.random.Generator, k_type: gguf.GGMLQuantizationType) -> Case:
    q, k, v = (rng.uniform(-1, 1, shape).astype(np.float32) for shape in ((1, 14, 64), (200, 2, 64), (200, 2, 64)))
    mask = np.where(np.arange(200) % 3 == 1, -np.inf, 0).astype(np.float32).reshape(1, 1, 200)
    return Case(k_type, Q4_0, q, rounded(k, k_type), rounded(v, Q4_0), mask)


@pytest.mark.parametrize("k_type", [Q8_0, Q4_0])
def test_masked_cells_may_hold_anything(k_type: gguf.GGMLQuantizationType) -> None:
    """llama.cpp does not clear the cells that it frees."""
    case = single_query(np.random.default_rng(0), k_type)
    k, v = packed(case.k, case.k_type).copy(), packed(case.v, case.v_type).copy()
    clean = case.computed(2)
    for cells in (k, v):
        cells[1::3] = 0xFF  # scales of NaN
    np.testing.assert_array_equal(case.computed(2, k, v), clean)


@pytest.mark.parametrize("k_type", [Q8_0, Q4_0])
@pytest.mark.parametrize("what", ["query", "every key", "one value"])
def test_nan_stays_nan(k_type: gguf.GGMLQuantizationType, what: str) -> None:
    """A broken number must be seen, not become a plausible answer."""
    case = single_query(np.random.default_rng(1), k_type)
    k, v = packed(case.k, case.k_type).copy(), packed(case.v, case.v_type).copy()
    if what == "query":
        case.q[0, 0, 5] = np.nan
    elif what == "every key":
        k[:, 0] = 0xFF
    else:
        v[0, 0] = 0xFF
    found = case.computed(2, k, v)
    assert np.isnan(found[0, 0]).all()
    assert np.isfinite(found[0, 7:]).all()
