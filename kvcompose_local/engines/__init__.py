"""The Engine protocol on llama.cpp, and the choice between the two engines."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

from kvcompose_local.engines.base import LlamaEngine
from kvcompose_local.engines.patched import CELL_PADDING, PREFILL_MICRO_BATCH, SMALL_MICRO_BATCH, PatchedEngine
from kvcompose_local.errors import InvalidInput, ModelError
from kvcompose_local.install.threads import default_threads
from kvcompose_local.interfaces import (
    BLOCK,
    SOFTMAX_BYTES,
    SOFTMAX_SHARE,
    UPKEEP_BYTES,
    VALUE_BYTES,
    Sampling,
    TokenShape,
    share_of_f16,
)
from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.llama_ffi.model import Model

#: How cells are stored under a budget: two and a half times as many fit, which is worth far more than what rounding
#: costs (docs/results.md). Keys need 8 bits, values 4.
QUANTIZED = "q8_0/q4_0"
#: The same where K and V must be of one type: MLA, and most flash attention of GPUs.
QUANTIZED_ALIKE = "q8_0"
#: Positions a chat may span when the user does not say.
DEFAULT_CTX = 8192
#: Where nothing is known of a model yet.
USUAL_TOKEN = TokenShape(64, 64, 0)


def cells_bought(n_ctx: int, budget: float, cache_type: str, token: TokenShape) -> int:
    """Cells that ``budget`` of the bytes of ``n_ctx`` F16 cells buys.

    They are charged with what compacting takes beside them, but for the first 2,048: where there are few, rounding to
    llama.cpp's padding leaves as much unused, and would make more of it.
    """
    share = share_of_f16(cache_type, token.k_size, token.v_size)
    token_bytes = VALUE_BYTES["f16"] * (token.k_size + token.v_size)  # of one head
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
    whole = -(-n_ctx // CELL_PADDING) * CELL_PADDING
    if budget == 1:
        return whole
    cells = min(cells_bought(n_ctx, budget, cache_type, token) // CELL_PADDING * CELL_PADDING, whole)
    if cells == 0:
        raise InvalidInput(
            f"--budget {budget} of --ctx {n_ctx} is under {CELL_PADDING} cells, the least there is: raise one of them"
        )
    return cells


def open_engine(
    path: Path,
    *,
    n_ctx: int | None,
    budget: float,
    n_threads: int | None = None,
    gpu_layers: int = 0,
    cache_type: str | None = None,
    sampling: Sampling | None = None,
    engine_name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    load: Callable[..., Model] = Model,
    n_outputs: int = 1,
) -> tuple[LlamaEngine, int]:
    """Load a model under a budget; returns the engine and the number of positions.

    engine_name: "patched" or "stock"; None takes the patched one when the library has it. n_ctx None takes 8192 or the
    model's trained length, whichever is less. cache_type, of CACHE_TYPES: None takes a quantized one where cells are
    composed and F16 elsewhere. n_outputs: most logits of a micro-batch, of the patched engine; load: as :class:`Model`,
    where that has been begun already. Raises InvalidInput for impossible numbers, before the weights are read where
    that can be known, and ModelError for models that cannot run.
    """
    cells_for(DEFAULT_CTX if n_ctx is None else n_ctx, budget, cache_type or QUANTIZED)
    model = load(path, gpu_layers=gpu_layers, progress=progress)
    try:
        if not model.can_generate:
            raise ModelError(f"{path.name} is not a language model that can chat")
        positions = min(DEFAULT_CTX, model.n_ctx_train) if n_ctx is None else n_ctx
        if positions > model.n_ctx_train:
            raise InvalidInput(f"--ctx {positions} is beyond the {model.n_ctx_train} positions {model.name} knows")
        threads = n_threads or default_threads()
        patched = engine_name == "patched" or (engine_name is None and library_is_patched())
        if cache_type is None:
            whole_blocks, on_gpu = has_whole_blocks(model), gpu_layers > 0
            one_type = on_gpu or model.is_mla
            cache_type = default_cache_type(budget, whole_blocks=whole_blocks, one_type=one_type, patched=patched)
        elif "/" in cache_type and model.is_mla:
            raise InvalidInput(f"{model.name} keeps keys and values in one row: --cache-type must be of one type")
        elif any(VALUE_BYTES[t] < 2 for t in cache_type.split("/")) and not has_whole_blocks(model):  # quantized
            raise InvalidInput(
                f"--cache-type {cache_type} takes blocks of {BLOCK} values, and the heads of {model.name} are of "
                f"{max(model.head_sizes('key_length', 'value_length'))}: leave it out"
            )
        if n_ctx is None and positions <= 2 * CELL_PADDING and budget < 1:
            try:
                cells_for(positions, budget, cache_type, token_of(model))
            except InvalidInput as error:
                raise InvalidInput(
                    f"{model.name} knows {positions} positions, too few to compress: run it with --budget 1"
                ) from error
        n_cells = cells_for(positions, budget, cache_type, token_of(model))
        open_ = partial(_patched, n_outputs=n_outputs) if patched else _stock
        engine = open_(model, n_cells, positions, threads, cache_type, sampling, budget)
    except BaseException:
        model.close()
        raise
    return engine, positions


def default_cache_type(budget: float, *, whole_blocks: bool, one_type: bool, patched: bool) -> str:
    """How a budget's cells are stored where nobody says.

    whole_blocks: of :func:`has_whole_blocks`; one_type: K and V are to be of one, for a GPU or since V is in K (MLA).
    """
    if budget == 1 or not whole_blocks or not patched:
        return "f16"
    return QUANTIZED_ALIKE if one_type else QUANTIZED


def has_whole_blocks(model: Model) -> bool:
    """Whether every head's key and value are whole blocks of a quantized type."""
    sizes = model.head_sizes("key_length", "value_length", "key_length_swa", "value_length_swa")
    return all(size % BLOCK == 0 for size in sizes)


def token_of(model: Model) -> TokenShape:
    """What a token of a model takes; a usual head's where it has none."""
    k_size, v_size = model.head_sizes("key_length", "value_length")
    v_size = 0 if model.is_mla else v_size
    return TokenShape(k_size, v_size, sum(model.kv_heads)) if k_size + v_size else USUAL_TOKEN


def _patched(
    model: Model,
    n_cells: int,
    n_positions: int,
    n_threads: int,
    cache_type: str,
    sampling: Sampling | None,
    budget: float,
    *,
    n_outputs: int,
) -> LlamaEngine:
    """The patched engine; at budget 1 the stock one runs what cannot be composed."""
    try:
        return PatchedEngine(
            model,
            n_cells=n_cells,
            n_positions=n_positions,
            n_threads=n_threads,
            cache_type=cache_type,
            n_ubatch=PREFILL_MICRO_BATCH if budget == 1 else SMALL_MICRO_BATCH,
            n_outputs=n_outputs,
            sampling=sampling,
        )
    except ModelError as error:
        if budget < 1:
            raise ModelError(f"{model.architecture} runs with --budget 1 only: {error}") from error
        return _stock(model, n_cells, n_positions, n_threads, cache_type, sampling, budget)


def _stock(
    model: Model,
    n_cells: int,
    n_positions: int,
    n_threads: int,
    cache_type: str,
    sampling: Sampling | None,
    budget: float,
) -> LlamaEngine:
    from kvcompose_local.engines.stock import StockEngine  # late: it reads GGML's tables, which take time to import

    return StockEngine(
        model,
        n_cells=n_cells,
        n_positions=n_positions,
        n_threads=n_threads,
        scoring=budget < 1,
        cache_type=cache_type,
        sampling=sampling,
    )
