"""From a budget to bytes to cells, and the types that cells are stored as. It knows no model, and needs no NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

from kvcompose_local.errors import InvalidInput

#: Numbers of a block of llama.cpp's quantized types.
BLOCK = 32


class ValueType(NamedTuple):
    """A type that numbers of K or V are stored in: ggml's number of it, and bytes of a number, scales included."""

    ggml_type: int
    n_bytes: Fraction

    @property
    def is_quantized(self) -> bool:
        """Whether numbers are stored in blocks of :data:`BLOCK`."""
        return self.n_bytes < 2


VALUE_TYPES = {
    "f32": ValueType(0, Fraction(4)),
    "f16": ValueType(1, Fraction(2)),
    "bf16": ValueType(30, Fraction(2)),
    "q8_0": ValueType(8, Fraction(34, BLOCK)),
    "q5_1": ValueType(7, Fraction(24, BLOCK)),
    "q5_0": ValueType(6, Fraction(22, BLOCK)),
    "q4_1": ValueType(3, Fraction(20, BLOCK)),
    "q4_0": ValueType(2, Fraction(18, BLOCK)),
}
#: The default type of cells under a budget: two and a half times as many fit, which is worth far more than the rounding
#: costs (docs/results.md). Keys need 8 bits, values 4.
QUANTIZED = "q8_0/q4_0"
#: The same where K and V must be of one type: MLA, and the flash attention of most GPUs.
QUANTIZED_ALIKE = "q8_0"
#: How cells may be stored; ``K/V`` where the two differ.
CACHE_TYPES = (*VALUE_TYPES, QUANTIZED)
#: A quantized type that costs a model more, in nats a token from F16, is not its default: a quarter of its F16 cells
#: cost less (docs/results.md).
MOST_KL = 0.05

#: llama.cpp pads the cell table, and what attention looks at of it, to this many cells.
CELL_PADDING = 256
#: Positions a chat may span when the user does not say.
DEFAULT_CTX = 8192
#: Bytes beside a cell for each of its KV heads: its score, the position of its token, and, while a compaction runs, its
#: place in the selection (the last two take 4 each beyond 65,536 positions or cells).
UPKEEP_BYTES = 2 + 2 + 2
#: The share of the bytes of all cells that one explicit softmax may take. It needs half as much again to work in.
SOFTMAX_SHARE = Fraction(1, 16)
#: Bounds of that in bytes.
SOFTMAX_BYTES = 4 << 20, 32 << 20


class TokenShape(NamedTuple):
    """What a token leaves in a cache: numbers of a head's key and of its value, and KV heads of all layers."""

    k_size: int
    v_size: int
    n_heads: int


#: Where nothing is known of a model yet.
USUAL_TOKEN = TokenShape(64, 64, 0)


def value_types(cache_type: str) -> tuple[ValueType, ValueType]:
    """What K and V are stored as in a cache of this type, such as ``q8_0`` or ``q8_0/q4_0``."""
    k, _, v = cache_type.partition("/")
    return VALUE_TYPES[k], VALUE_TYPES[v or k]


def share_of_f16(cache_type: str, k_size: int = 1, v_size: int = 1) -> Fraction:
    """A cell's share of the bytes of an F16 cell; k_size, v_size: numbers of a key and of a value."""
    k, v = value_types(cache_type)
    return (k.n_bytes * k_size + v.n_bytes * v_size) / (VALUE_TYPES["f16"].n_bytes * (k_size + v_size))


def default_cache_type(
    budget: float, *, whole_blocks: bool, one_type: bool, patched: bool, kl: Mapping[str, float] | None = None
) -> str:
    """The type of a budget's cells where nobody chose one.

    whole_blocks: every key and value fills blocks; one_type: K and V are to be of one, for a GPU or since V is in K;
    kl: what types cost on this model, where its profile tells.
    """
    if budget == 1 or not whole_blocks or not patched:
        return "f16"
    types = (QUANTIZED_ALIKE,) if one_type else (QUANTIZED, QUANTIZED_ALIKE)
    return next((kind for kind in types if (kl or {}).get(kind, 0.0) <= MOST_KL), "f16")


def cells_bought(n_ctx: int, budget: float, cache_type: str, token: TokenShape) -> int:
    """Cells that ``budget`` of the bytes of ``n_ctx`` F16 cells buys.

    Cells beyond the first 2,048 also pay for half of the most that a compaction takes beside them, which it takes for
    milliseconds. Where cells are few, rounding to llama.cpp's padding leaves as much unused already.
    """
    share = share_of_f16(cache_type, token.k_size, token.v_size)
    token_bytes = VALUE_TYPES["f16"].n_bytes * (token.k_size + token.v_size)  # of one head
    upkeep = UPKEEP_BYTES / token_bytes
    whole = Fraction(str(budget)) * n_ctx
    charged = whole / (share * (1 + SOFTMAX_SHARE * 3 / 2) + upkeep)
    if token.n_heads:
        largest = Fraction(SOFTMAX_BYTES[1]) / (token_bytes * token.n_heads)  # in cells
        charged = max(charged, (whole - largest * 3 / 2) / (share + upkeep))
    return int(max(charged, min(whole / share, Fraction(8 * CELL_PADDING))))


def cells_for(n_ctx: int, budget: float, cache_type: str = "f16", token: TokenShape = USUAL_TOKEN) -> int:
    """The same, at most ``n_ctx``, rounded down to llama.cpp's padding, and up where all fit."""
    if not 0 < budget <= 1 or not math.isfinite(budget):
        raise InvalidInput(f"--budget is a share in (0, 1], not {budget}")
    if n_ctx <= 0:
        raise InvalidInput(f"--ctx is a number of positions above 0, not {n_ctx}")
    whole = padded(n_ctx)
    if budget == 1:
        return whole
    cells = min(cells_bought(n_ctx, budget, cache_type, token) // CELL_PADDING * CELL_PADDING, whole)
    if cells == 0:
        raise InvalidInput(
            f"--budget {budget} of --ctx {n_ctx} is under {CELL_PADDING} cells, the least there is: raise one of them"
        )
    return cells


def padded(n_cells: int) -> int:
    """``n_cells``, rounded up to what llama.cpp allocates."""
    return -(-n_cells // CELL_PADDING) * CELL_PADDING
