"""What turned a cached key, and how to turn it back.

RoPE (arXiv 2104.09864) turns pairs of a key's numbers by angles that grow with the token's position; YaRN
(arXiv 2309.00071), factors of Llama 3 and LongRoPE change the angles, YaRN the length as well. Where llama.cpp
quantizes K or V, a Hadamard matrix joins blocks of each head's numbers last of all. Parameters and formulas are
ggml's (``GGML_OP_ROPE``). Axes: KV head H, token T, numbers of a head D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from kvcompose_local.interfaces import FloatArray

#: ggml's number of the RoPE that pairs neighbours; all others pair numbers that stand half of ``n_rotated`` apart.
_NEIGHBOURS = 0


@dataclass(frozen=True)
class Rope:
    """How a layer turns its keys; with ``n_rotated`` 0 it turns none.

    n_rotated: numbers of a head that are turned, from ``offset`` on; mode: ggml's; n_ctx_original, extrapolation,
    beta_fast, beta_slow: of YaRN; magnitude: factor of the numbers that are turned, before YaRN's own; factors: what
    each frequency is divided by, none or n_rotated / 2.
    """

    n_rotated: int = 0
    mode: int = 2
    base: float = 10000.0
    scale: float = 1.0
    factors: tuple[float, ...] = ()
    magnitude: float = 1.0
    extrapolation: float = 0.0
    n_ctx_original: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    offset: int = 0

    @cached_property
    def frequencies(self) -> npt.NDArray[np.float64]:
        """Radians of a position: float64 (n_rotated / 2,)."""
        pairs = np.arange(self.n_rotated // 2)
        extrapolated = self.base ** (-2.0 * pairs / self.n_rotated) / (np.array(self.factors) if self.factors else 1.0)
        interpolated = self.scale * extrapolated
        if self.extrapolation == 0:
            return np.asarray(interpolated)

        def pair_of(n_turns: float) -> float:
            """The pair that turns as often in ``n_ctx_original`` positions."""
            wavelengths = self.n_ctx_original / (n_turns * 2 * math.pi)
            return self.n_rotated * math.log(wavelengths) / (2 * math.log(self.base))

        low = max(0.0, math.floor(pair_of(self.beta_fast)))
        high = min(self.n_rotated - 1.0, math.ceil(pair_of(self.beta_slow)))
        mix = (1 - np.clip((pairs - low) / max(0.001, high - low), 0, 1)) * self.extrapolation
        return np.asarray(interpolated * (1 - mix) + extrapolated * mix)

    @property
    def length(self) -> float:
        """Factor of the numbers that are turned, YaRN's included."""
        grown = 1 + 0.1 * math.log(1 / self.scale) if self.extrapolation != 0 else 1.0
        return self.magnitude * grown

    def undone(self, keys: FloatArray, first: int) -> FloatArray:
        """Keys as they were before they were turned: float32 (H, T, D); tokens stand at positions from ``first`` on."""
        if not self.n_rotated or not keys.size:
            return keys
        cosine, sine = _turns(self, first, keys.shape[1])
        turned = keys[..., self.offset : self.offset + self.n_rotated]
        half = self.n_rotated // 2
        a, b = (
            (slice(0, None, 2), slice(1, None, 2)) if self.mode == _NEIGHBOURS else (slice(0, half), slice(half, None))
        )
        result: FloatArray = keys.copy()
        back = result[..., self.offset : self.offset + self.n_rotated]
        back[..., a] = turned[..., a] * cosine + turned[..., b] * sine
        back[..., b] = turned[..., b] * cosine - turned[..., a] * sine
        return result


@lru_cache(maxsize=4)  # the layers of a model turn alike, or in two ways
def _turns(rope: Rope, first: int, n: int) -> tuple[FloatArray, FloatArray]:
    """Cosine and sine of each position's angles, divided by the length: float32 (n, n_rotated / 2) each."""
    angles = np.arange(first, first + n)[:, None] * rope.frequencies
    return (np.cos(angles) / rope.length).astype(np.float32), (np.sin(angles) / rope.length).astype(np.float32)


@lru_cache(maxsize=4)
def _hadamard(size: int) -> FloatArray:
    """The orthonormal Walsh-Hadamard matrix, its own inverse: float32 (size, size), size a power of 2."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.float32(math.sqrt(size)))


def unjoined(rows: FloatArray, size: int) -> FloatArray:
    """Rows (…, D) before a Hadamard matrix joined their numbers in blocks of ``size``; 0: none did."""
    if not size or not rows.size:
        return rows
    blocks = rows.reshape(*rows.shape[:-1], -1, size)
    return np.asarray((blocks @ _hadamard(size)).reshape(rows.shape))
