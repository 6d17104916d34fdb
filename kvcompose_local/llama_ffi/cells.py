"""The patch series' interface to per-layer cells (``llama-kvcompose.h``)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcompose_local.composing.rotation import Rope, unjoined
from kvcompose_local.errors import ContextFull, EngineError, InvalidInput, ModelError
from kvcompose_local.interfaces import FloatArray, HalfArray, IntArray
from kvcompose_local.llama_ffi.context import Context
from kvcompose_local.llama_ffi.library import bind
from kvcompose_local.llama_ffi.memory import memory_of


class _Info(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("n_layers", "n_arenas", "n_live_cap", "n_cells", "n_live", "pos_next", "composed", "has_window")
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("il", "n_head_kv", "head_dim_k", "head_dim_v", "type_k", "type_v")),
        *((name, ctypes.c_uint64) for name in ("k_row_bytes", "v_row_bytes", "k_head_bytes", "v_head_bytes")),
        *((name, ctypes.c_int32) for name in ("n_composed", "n_rows", "arena")),
    ]


class _Arena(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("size", "used", "peak_used", "staging_peak")),
        ("name", ctypes.c_char * 64),
    ]


class _Turn(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in ("hadamard_k", "hadamard_v", "n_rope", "rope_offset", "rope_mode", "n_ctx_orig")
        ),
        *(
            (name, ctypes.c_float)
            for name in ("freq_base", "freq_scale", "ext_factor", "attn_factor", "beta_fast", "beta_slow")
        ),
        ("has_factors", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Turn:
    """How a layer turns the rows that it stores: keys by RoPE, then both by Hadamard matrices of so many numbers.

    gain: weights of a norm between the two, by which the numbers of a head were multiplied; empty where there is none.
    """

    rope: Rope
    hadamard_k: int
    hadamard_v: int
    gain: tuple[float, ...] = ()

    def keys(self, stored: FloatArray, first: int) -> FloatArray:
        """Keys as they were before; where a norm follows RoPE, their length differs.

        stored: float32 (H, T, D) of tokens at positions from ``first`` on.
        """
        keys = unjoined(stored, self.hadamard_k)
        if self.gain:
            gain = np.array(self.gain, np.float32)
            keys = np.divide(keys, np.where(gain == 0, 1, gain), dtype=np.float32)
        return self.rope.undone(keys, first)

    def values(self, stored: FloatArray) -> FloatArray:
        """Values as they were before; no RoPE turns them."""
        return unjoined(stored, self.hadamard_v)


_INT32_P = ctypes.POINTER(ctypes.c_int32)
_KVC_VERSION = 9
_kvc_version = bind("llama_kvc_version", ctypes.c_int32)
_KVC_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "get_info": (ctypes.POINTER(_Info),),
    "get_layer": (ctypes.c_int32, ctypes.POINTER(_Layer)),
    "get_arena": (ctypes.c_int32, ctypes.POINTER(_Arena)),
    "get_positions": (_INT32_P, ctypes.c_int32),
    "get_turn": (ctypes.c_int32, ctypes.POINTER(_Turn), ctypes.POINTER(ctypes.c_float), ctypes.c_int32),
    "get_gain": (ctypes.c_int32, ctypes.POINTER(ctypes.c_float), ctypes.c_int32, _INT32_P),
    "get_owner": (ctypes.c_int32, _INT32_P),
    "rewrite": (*(ctypes.c_int32,) * 3, _INT32_P, ctypes.POINTER(ctypes.c_void_p), ctypes.c_int32),
    "set_layout": (ctypes.c_int32, _INT32_P, ctypes.c_int32, ctypes.c_int32, _INT32_P),
    "get_products": (ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_void_p)),
    "get_rows": (*(ctypes.c_int32,) * 4, ctypes.c_void_p, ctypes.c_size_t),
    "set_rows": (*(ctypes.c_int32,) * 4, ctypes.c_void_p, ctypes.c_size_t),
    "set_eval_callback": (ctypes.c_void_p, ctypes.c_void_p),
    "set_explicit_softmax": (ctypes.c_int32,),
    "get_compute_bytes": (ctypes.POINTER(ctypes.c_uint64),),
}
_kvc = {
    name: bind(f"llama_kvc_{name}", ctypes.c_int32, ctypes.c_void_p, *argtypes)
    for name, argtypes in _KVC_FUNCTIONS.items()
}
#: Types that gguf takes apart block by block.
_BLOCKS = frozenset({"Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"})
_kvc_last_error = bind("llama_kvc_last_error", ctypes.c_char_p)
_KVC_INVALID, _KVC_UNSUPPORTED, _KVC_NO_SPACE = -1, -2, -3


def library_is_patched() -> bool:
    """Whether the loaded llama.cpp has the interface of ``patches/`` in the version that this module speaks."""
    return _kvc_version is not None and _kvc_version() == _KVC_VERSION and None not in _kvc.values()


def _int32(values: Any) -> Any:
    """A pointer to values as contiguous int32; NumPy's pointer keeps its array alive."""
    return np.ascontiguousarray(values, np.int32).ctypes.data_as(_INT32_P)


def _as_unsigned(cells: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.integer[Any]]:
    """Numbers of cells in at most 32 bits; the native side knows which cells there are."""
    if cells.dtype.kind == "u" and cells.itemsize <= 4:
        return cells
    if cells.size and not 0 <= cells.min() <= cells.max() < 2**32:
        raise InvalidInput("sources are numbers of cells: none is negative, and none beyond 32 bits")
    return cells.astype(np.uint32)


def _addresses(arrays: Sequence[npt.NDArray[Any]]) -> Any:
    """Where arrays are, which must outlive the call."""
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))


class PerLayerCells:
    """The patch series' interface to the cells of a :class:`Context` (``llama-kvcompose.h``).

    Raises ModelError where this cache cannot be composed.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        if obstacle := memory_of(context).obstacle:
            raise ModelError(obstacle)
        self.n_layers = int(self.info().n_layers)
        self._shapes = [self.layer(i) for i in range(self.n_layers)]  # to ask them takes longer than to compute with

    def _call(self, name: str, *arguments: Any) -> None:
        status = _kvc[name](self._context._ctx, *arguments)
        if status != 0:
            reason = _kvc_last_error().decode("utf-8", "replace")
            kinds = {_KVC_INVALID: InvalidInput, _KVC_NO_SPACE: ContextFull, _KVC_UNSUPPORTED: ModelError}
            kind = kinds.get(status, EngineError)
            raise kind(f"llama_kvc_{name} failed: {reason}")

    def info(self) -> Any:
        """n_layers, n_arenas, n_live_cap, n_cells, n_live, pos_next, composed, has_window."""
        info = _Info()
        self._call("get_info", ctypes.byref(info))
        return info

    def layer(self, i: int) -> Any:
        """il, n_head_kv, head_dim_k, head_dim_v, type_k, type_v, k_row_bytes, …, n_composed, n_rows, arena."""
        layer = _Layer()
        self._call("get_layer", i, ctypes.byref(layer))
        return layer

    def arena(self, i: int) -> Any:
        """size, used, peak_used and staging_peak in bytes, name."""
        arena = _Arena()
        self._call("get_arena", i, ctypes.byref(arena))
        return arena

    def compute_bytes(self) -> int:
        """Bytes of the buffers that graphs are computed in, on all devices."""
        n_bytes = ctypes.c_uint64()
        self._call("get_compute_bytes", ctypes.byref(n_bytes))
        return n_bytes.value

    def positions(self) -> npt.NDArray[np.int32]:
        """int32 (n_cells,): position of each cell, -1 where it is empty."""
        positions = np.empty(self.info().n_cells, np.int32)
        self._call("get_positions", positions.ctypes.data_as(_INT32_P), positions.size)
        return positions

    def rewrite(
        self, n_live_cap: int, n_tail: int, sources: Sequence[npt.NDArray[np.integer[Any]]], n_forgotten: int = 0
    ) -> None:
        """n_tail: newest live cells that stay; sources: a layer's int (H, K_l), as a selection counts its cells;
        n_forgotten: without a tail, positions to go back by.
        """
        self._check_layers(sources)
        for i, cells in enumerate(sources):
            if cells.ndim != 2 or len(cells) != self._shapes[i].n_head_kv:
                raise InvalidInput(f"layer {i} has {self._shapes[i].n_head_kv} KV heads: {cells.shape} are no sources")
        arrays = [_as_unsigned(cells) for cells in sources]
        width = np.result_type(np.uint16, *{cells.dtype for cells in arrays})
        arrays = [np.require(cells, width, ["C", "ALIGNED"]) for cells in arrays]
        self._context.has_logits = False
        counts = _int32([cells.shape[1] for cells in arrays])
        self._call("rewrite", n_live_cap, n_tail, n_forgotten, counts, _addresses(arrays), width.itemsize)

    def set_layout(self, n_live_cap: int, live_positions: IntArray, end: int, n_composed: IntArray) -> None:
        """Empty the cache and lay it out for an import; composed cells take the positions before ``end``."""
        self._check_layers(n_composed)
        self._context.has_logits = False
        self._call("set_layout", n_live_cap, _int32(live_positions), len(live_positions), end, _int32(n_composed))

    def _check_layers(self, values: Any) -> None:
        if len(values) != self.n_layers:
            raise InvalidInput(f"{len(values)} layers are given, the cache has {self.n_layers}")

    def rows(self, i: int, *, values: bool, first: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """uint8 (n, row bytes): K or V rows of a layer, all of them or ``first`` to ``stop``."""
        layer = self.layer(i)
        width = layer.v_row_bytes if values else layer.k_row_bytes
        data = np.empty(((layer.n_rows if stop is None else stop) - first, width), np.uint8)
        self._call("get_rows", i, int(values), first, len(data), data.ctypes.data, data.nbytes)
        return data

    def numbers(self, i: int, *, values: bool, first: int, stop: int) -> FloatArray:
        """The same as float32 (H, n, numbers of a head), turned as they are stored."""
        from gguf import GGMLQuantizationType, quants  # late: their tables take time to import

        layer = self.layer(i)
        size = layer.head_dim_v if values else layer.head_dim_k
        kind = GGMLQuantizationType(layer.type_v if values else layer.type_k)
        rows = self.rows(i, values=values, first=first, stop=stop)
        if not rows.size:  # no rows, or a value that is a part of its key (MLA)
            numbers = np.zeros(0, np.float32)
        elif kind.name == "F16":
            numbers = rows.view(np.float16).astype(np.float32)
        elif kind.name in _BLOCKS:  # at once: gguf's own loop over groups of rows takes longer than the numbers do
            type_ = getattr(quants, kind.name)
            numbers = type_.dequantize_blocks(rows.reshape(-1, type_.type_size))
        else:
            numbers = np.asarray(quants.dequantize(rows, kind), np.float32)
        return np.asarray(numbers.reshape(len(rows), layer.n_head_kv, size).transpose(1, 0, 2))

    def products(self, weights: Sequence[FloatArray | HalfArray], n: int) -> FloatArray:
        """What the oldest ``n`` live cells' keys, as they were before they were turned, and values give by ``weights``.

        float32 (all heads, n), the heads of all layers below each other, of each layer's weights (H, numbers of a key
        and of a value).
        """
        self._check_layers(weights)
        for i, rows in enumerate(weights):
            layer = self._shapes[i]
            if rows.shape != (layer.n_head_kv, layer.head_dim_k + layer.head_dim_v):
                raise InvalidInput("the model's profile is of other heads: measure it again")
        tables = [np.ascontiguousarray(rows, np.float32) for rows in weights]
        heads = [len(rows) for rows in weights]
        results = np.empty((sum(heads), n), np.float32)
        self._context.has_logits = False
        self._call("get_products", n, _addresses(tables), _addresses(np.split(results, np.cumsum(heads)[:-1])))
        return results

    def turn(self, i: int) -> Turn:
        """How a layer turns its rows, as the graph that was built last tells. Raises EngineError where none tells."""
        turn = _Turn()
        self._call("get_turn", i, ctypes.byref(turn), None, 0)
        factors = (ctypes.c_float * (turn.n_rope // 2))()
        if turn.has_factors:
            self._call("get_turn", i, ctypes.byref(turn), factors, len(factors))
        rope = Rope(
            n_rotated=turn.n_rope,
            mode=turn.rope_mode,
            base=turn.freq_base,
            scale=turn.freq_scale,
            factors=tuple(factors) if turn.has_factors else (),
            magnitude=turn.attn_factor,
            extrapolation=turn.ext_factor,
            n_ctx_original=turn.n_ctx_orig,
            beta_fast=turn.beta_fast,
            beta_slow=turn.beta_slow,
            offset=turn.rope_offset,
        )
        n_gain = ctypes.c_int32()
        self._call("get_gain", i, None, 0, ctypes.byref(n_gain))
        gain = (ctypes.c_float * n_gain.value)()
        if n_gain.value:
            self._call("get_gain", i, gain, len(gain), ctypes.byref(n_gain))
        return Turn(rope, turn.hadamard_k, turn.hadamard_v, tuple(gain))

    def owner(self, layer: int) -> int | None:
        """Which of the composed layers has the cells that a layer of the model reads; None where none has."""
        found = ctypes.c_int32()
        self._call("get_owner", layer, ctypes.byref(found))
        return found.value if found.value >= 0 else None

    def set_rows(self, i: int, data: npt.NDArray[np.uint8], *, values: bool, first: int = 0) -> None:
        """Write K or V rows of a layer from row ``first`` on."""
        data = np.ascontiguousarray(data, np.uint8)
        self._call("set_rows", i, int(values), first, data.shape[0], data.ctypes.data, data.nbytes)

    @contextmanager
    def visible_softmax(self) -> Iterator[None]:
        """While open, attention takes the explicit softmax and the context's tap sees it."""
        self._call("set_explicit_softmax", 1)
        self._call("set_eval_callback", ctypes.cast(self._context._callback, ctypes.c_void_p), None)
        try:
            yield
        finally:
            self._call("set_eval_callback", None, None)
            self._call("set_explicit_softmax", 0)
