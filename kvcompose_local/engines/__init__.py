"""The Engine protocol on llama.cpp, and the choice between the two engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvcompose_local import profiles
from kvcompose_local.arena import (
    BLOCK,
    CELL_PADDING,
    DEFAULT_CTX,
    QUANTIZED,
    USUAL_TOKEN,
    TokenShape,
    cells_for,
    default_cache_type,
    value_types,
)
from kvcompose_local.composing.policy import DEVICE_MICRO_BATCH
from kvcompose_local.engines.base import LlamaEngine
from kvcompose_local.engines.patched import PREFILL_MICRO_BATCH, SMALL_MICRO_BATCH, PatchedEngine
from kvcompose_local.errors import InvalidInput, ModelError
from kvcompose_local.install.threads import default_threads
from kvcompose_local.interfaces import Sampling
from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.llama_ffi.model import Model


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
            profile = profiles.of_file(model.path) if budget < 1 else None
            kl, one_type = profile.kl if profile else None, on_gpu or model.one_type
            cache_type = default_cache_type(
                budget, whole_blocks=whole_blocks, one_type=one_type, patched=patched, kl=kl
            )
        elif "/" in cache_type and model.one_type:
            raise InvalidInput(f"{model.name} keeps keys and values in one row: --cache-type must be of one type")
        elif any(kind.is_quantized for kind in value_types(cache_type)) and not has_whole_blocks(model):  # quantized
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
        cache = _Cache(n_cells, positions, threads, cache_type, sampling, budget)
        engine = _patched(model, cache, n_outputs) if patched else _stock(model, cache)
    except BaseException:
        model.close()
        raise
    return engine, positions


def has_whole_blocks(model: Model) -> bool:
    """Whether every head's key and value are whole blocks of a quantized type."""
    sizes = model.head_sizes("key_length", "value_length", "key_length_swa", "value_length_swa")
    return all(size % BLOCK == 0 for size in sizes)


def token_of(model: Model) -> TokenShape:
    """The shape of a model's token; a usual one where the model has no attention."""
    k_size, v_size = model.head_sizes("key_length", "value_length")
    v_size = 0 if model.is_mla else v_size
    return TokenShape(k_size, v_size, sum(model.kv_heads)) if k_size + v_size else USUAL_TOKEN


@dataclass(frozen=True)
class _Cache:
    """The arguments that both engines are opened with."""

    n_cells: int
    n_positions: int
    n_threads: int
    cache_type: str
    sampling: Sampling | None
    budget: float


def _patched(model: Model, cache: _Cache, n_outputs: int) -> LlamaEngine:
    """The patched engine; at budget 1 the stock one runs what cannot be composed."""
    try:
        return PatchedEngine(
            model,
            n_cells=cache.n_cells,
            n_positions=cache.n_positions,
            n_threads=cache.n_threads,
            cache_type=cache.cache_type,
            n_ubatch=micro_batch(model, cache.budget),
            n_outputs=n_outputs,
            sampling=cache.sampling,
        )
    except ModelError as error:
        if cache.budget < 1:
            raise ModelError(f"{model.architecture} runs with --budget 1 only: {error}") from error
        return _stock(model, cache)


def micro_batch(model: Model, budget: float) -> int:
    """Tokens of a micro-batch: fewer below budget 1, where the room beside the cells is a part of the promise."""
    if model.gpu_layers > 0:
        return DEVICE_MICRO_BATCH
    return PREFILL_MICRO_BATCH if budget == 1 else SMALL_MICRO_BATCH


def _stock(model: Model, cache: _Cache) -> LlamaEngine:
    from kvcompose_local.engines.stock import StockEngine  # late: it reads GGML's tables, which take time to import

    return StockEngine(
        model,
        n_cells=cache.n_cells,
        n_positions=cache.n_positions,
        n_threads=cache.n_threads,
        scoring=cache.budget < 1,
        cache_type=cache.cache_type,
        sampling=cache.sampling,
    )
