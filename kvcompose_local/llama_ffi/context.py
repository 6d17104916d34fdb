"""A llama.cpp context with one sequence: decoding, sampling, attention, serialized state."""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from kvcompose_local.arena import value_types
from kvcompose_local.errors import EngineError, InvalidInput
from kvcompose_local.interfaces import ByteArray, FloatArray, Sampling
from kvcompose_local.interrupts import uninterrupted
from kvcompose_local.llama_ffi.grammar import Grammar
from kvcompose_local.llama_ffi.library import bind, clear_log, last_log, lib
from kvcompose_local.llama_ffi.model import Model

_SOFTMAX_PREFIX = b"kq_soft_max-"
#: Tokens drawn before that penalties look at.
_PENALIZED = 4096
_PARTIAL_ONLY = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY

#: Receives (model layer, float32 (Q, n_queries, n_kv) softmax weights of one micro-batch); the array is native memory
#: and dies with the call.
SoftmaxTap = Callable[[int, FloatArray], None]


# Accessors only: the layout of ggml_tensor is not part of ggml's interface and has changed before.
_ggml_get_name = bind("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p)
_ggml_nelements = bind("ggml_nelements", ctypes.c_int64, ctypes.c_void_p)
_ggml_nrows = bind("ggml_nrows", ctypes.c_int64, ctypes.c_void_p)
_ggml_tensor_get = bind(
    "ggml_backend_tensor_get", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
)
# Of the patch series, for any context; None without it.
_kvc_host_data = bind("llama_kvc_host_data", ctypes.c_void_p, ctypes.c_void_p)
_kvc_set_span = bind("llama_kvc_set_span", ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32)
_kvc_set_next_span = bind("llama_kvc_set_next_span", ctypes.c_int32, ctypes.c_int32)
_kvc_get_rope_factors = bind(
    "llama_kvc_get_rope_factors", ctypes.c_int32, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32)
)
_ROPE_FACTORS = ("", "short", "long")


class _Floats:
    """float32 numbers in llama.cpp's memory, which NumPy reads in place.

    ``np.ctypeslib.as_array`` makes a ctypes type of each new shape and never frees it: 3 KB for each token of a chat,
    since every micro-batch is wider than the last.
    """

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": shape, "typestr": "<f4", "version": 3}

    @classmethod
    def at(cls, pointer: Any, shape: tuple[int, ...]) -> _Floats:
        return cls(ctypes.cast(pointer, ctypes.c_void_p).value or 0, shape)


class Context:
    """A llama.cpp context with one sequence.

    n_ctx: cells, a multiple of 256; n_ubatch: most tokens of a micro-batch; flash_attention: False makes the softmax
    visible in every pass and V transposed; cache_type: of :data:`arena.CACHE_TYPES`; n_outputs: most logits of a
    micro-batch, for which buffers are taken; callback_at_creation: let the tap work from the start (an unpatched
    llama.cpp cannot install it later); n_positions: what the sequence may span, if that is not ``n_ctx`` (an unpatched
    llama.cpp cannot be told).
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_ubatch: int,
        n_threads: int,
        flash_attention: bool,
        cache_type: str = "f16",
        n_outputs: int = 1,
        callback_at_creation: bool = False,
        n_positions: int | None = None,
    ) -> None:
        self.model = model
        self.n_ctx = n_ctx
        self.n_ubatch = n_ubatch
        self.n_outputs = n_outputs
        self.tap: SoftmaxTap | None = None
        self.tap_prefix = _SOFTMAX_PREFIX
        self.has_logits = False
        self._is_checked = False  # whether the logits are of numbers
        self._n_queries = 0
        self._callback_error: BaseException | None = None
        self._callback = lib.ggml_backend_sched_eval_callback(self._on_tensor)
        self.is_recurrent = model.is_recurrent
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = n_ubatch
        params.n_ubatch = n_ubatch
        params.n_seq_max = 1
        params.n_outputs_max = n_outputs
        params.n_threads = n_threads
        params.n_threads_batch = n_threads
        params.flash_attn_type = 1 if flash_attention else 0
        params.type_k, params.type_v = (kind.ggml_type for kind in value_types(cache_type))
        params.swa_full = False
        params.no_perf = True
        if callback_at_creation:
            params.cb_eval = self._callback
        clear_log()
        self._pointer = self._made(model, params, n_positions or n_ctx)
        if not self._pointer:
            raise EngineError(f"llama_init_from_model failed: too little memory for {n_ctx} cells?{last_log()}")
        self._sampler: Any = None
        self._grammar: Grammar | None = None
        try:
            self.rope_factors, self.wanted_rope_factors = self._choose_rope_factors(n_positions or n_ctx)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _made(model: Model, params: Any, n_positions: int) -> Any:
        """llama.cpp's pointer, with cells for sliding windows that are longer than the cells of the other layers."""
        if _kvc_set_next_span is None:
            return lib.llama_init_from_model(model._model, params)
        _kvc_set_next_span(n_positions)
        try:
            return lib.llama_init_from_model(model._model, params)
        finally:
            _kvc_set_next_span(0)

    def _choose_rope_factors(self, n_positions: int) -> tuple[str, str]:
        """``short`` or ``long``, for models with two sets of RoPE factors (LongRoPE): the set that llama.cpp takes, and
        the set that ``n_positions`` need. Without the patches llama.cpp goes by the number of cells.
        """
        if _kvc_set_span is None:
            return self.model.rope_factors(self.n_ctx), self.model.rope_factors(n_positions)
        chosen = ctypes.c_int32()
        for name, code in (
            ("set_span", _kvc_set_span(self._pointer, n_positions)),
            ("get_rope_factors", _kvc_get_rope_factors(self._pointer, ctypes.byref(chosen))),
        ):
            if code != 0:
                raise EngineError(f"llama_kvc_{name} failed with {code} for {n_positions} positions")
        return (_ROPE_FACTORS[chosen.value],) * 2

    def close(self) -> None:
        """Free the context; further use is an error."""
        if getattr(self, "_grammar", None):
            self.set_grammar("")
        if getattr(self, "_sampler", None):
            lib.llama_sampler_free(self._sampler)
            self._sampler = None
        if getattr(self, "_pointer", None):
            lib.llama_free(self._pointer)
            self._pointer = None

    @property
    def _ctx(self) -> Any:
        if self._pointer is None:
            raise EngineError("the model is closed")
        return self._pointer

    @property
    def _memory(self) -> Any:
        return lib.llama_get_memory(self._ctx)

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _on_tensor(self, tensor: int, ask: bool, _user_data: object) -> bool:
        """llama.cpp asks for each node whether we want it (True), then shows it (False stops the graph)."""
        if self.tap is None:
            return not ask
        try:
            name = _ggml_get_name(tensor)
            if not name.startswith(self.tap_prefix):
                return not ask
            if ask:
                return True
            self.tap(int(name[len(self.tap_prefix) :]), self._softmax(tensor, self._n_queries))
        except BaseException as error:
            # An exception cannot cross the native frames: stop the graph and let decode() raise it.
            self._callback_error = error
            return False
        return True

    def _softmax(self, tensor: int, n_queries: int) -> FloatArray:
        """float32 (heads, n_queries, n_kv): ggml lays it out as ne = (n_kv, n_queries, heads, 1), contiguous."""
        n, rows = _ggml_nelements(tensor), _ggml_nrows(tensor)
        if rows % n_queries or n % rows:
            raise EngineError(f"a softmax of {rows} rows does not divide into {n_queries} queries")
        shape = (rows // n_queries, n_queries, n // rows)
        # A tensor may be on a device though no layer is: large products are computed there.
        if data := _kvc_host_data(tensor) if _kvc_host_data else None:
            return np.asarray(_Floats(data, shape))
        weights = np.empty(shape, np.float32)
        _ggml_tensor_get(tensor, weights.ctypes.data, 0, weights.nbytes)
        return weights

    def decode(self, tokens: Sequence[int], *, logits: bool = True, all_logits: bool = False) -> None:
        """Run one micro-batch at the next positions; logits are kept of its last token, of all, or of none."""
        if not 0 < len(tokens) <= self.n_ubatch:
            raise InvalidInput(f"a micro-batch holds 1 to {self.n_ubatch} tokens, not {len(tokens)}")
        if all_logits and len(tokens) > self.n_outputs:
            raise InvalidInput(f"there is room for the logits of {self.n_outputs} tokens, not {len(tokens)}")
        # The batch holds only a pointer: the array must outlive the call.
        array = (lib.llama_token * len(tokens))(*tokens)
        batch = lib.llama_batch_get_one(array, len(tokens))
        if all_logits or not logits:  # the last layer's second half and the output are left out for the others
            wanted = (ctypes.c_int8 * len(tokens))(*[int(all_logits)] * len(tokens))
            batch.logits = wanted
        self._callback_error = None
        self._n_queries = len(tokens)
        clear_log()
        self.has_logits = False
        before = self.next_position
        with uninterrupted():
            state = self.partial_state() if self.tap is not None and self.is_recurrent else None
            code = lib.llama_decode(self._ctx, batch)
            if self._callback_error is not None:  # the later layers of this micro-batch are without their cells
                lib.llama_synchronize(self._ctx)
                if state is not None:
                    self.set_partial_state(state)
                self.remove(before)
        if self._callback_error is not None:
            error, self._callback_error = self._callback_error, None
            raise error
        if code != 0:
            reason = {1: "no free cells", 2: "stopped"}.get(code, f"code {code}")
            raise EngineError(f"llama_decode failed: {reason}{last_log()}")
        self.has_logits = logits or all_logits
        self._is_checked &= len(tokens) == 1  # at the beginning of an answer is often enough

    def logits(self) -> FloatArray:
        """float32 (n_vocab,): a copy of the last token's logits."""
        if not self.has_logits:
            raise EngineError("there are no logits: decode a token first")
        pointer = lib.llama_get_logits_ith(self._ctx, -1)
        return np.array(_Floats.at(pointer, (self.model.n_vocab,)))

    def all_logits(self, n: int) -> FloatArray:
        """float32 (n, n_vocab): a copy of the logits of the last batch, which was decoded with ``all_logits``."""
        pointer = lib.llama_get_logits(self._ctx)
        return np.array(_Floats.at(pointer, (n, self.model.n_vocab)))

    def set_sampling(self, sampling: Sampling) -> None:
        """Replace the sampler chain."""
        if self._sampler:
            lib.llama_sampler_free(self._sampler)
            self._sampler = None
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        penalties = sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty
        if penalties != (1, 0, 0):
            penalizing = lib.llama_sampler_init_penalties(self.model.n_vocab, _PENALIZED, *penalties)
            lib.llama_sampler_chain_add(chain, penalizing)
        if sampling.temperature <= 0:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
        else:
            seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
            for sampler in (
                lib.llama_sampler_init_top_k(sampling.top_k),
                lib.llama_sampler_init_top_p(sampling.top_p, 1),
                lib.llama_sampler_init_min_p(sampling.min_p, 1),
                lib.llama_sampler_init_temp(sampling.temperature),
                lib.llama_sampler_init_dist(seed),
            ):
                lib.llama_sampler_chain_add(chain, sampler)
        self._sampler = chain

    def set_grammar(self, gbnf: str, markers: frozenset[str] = frozenset()) -> None:
        """Draw what this grammar allows from now on, anything where it is empty. Raises InvalidInput for no grammar.

        markers: of :class:`Grammar`.
        """
        grammar = Grammar(self.model, gbnf, markers) if gbnf else None
        if self._grammar is not None:
            self._grammar.close()
        self._grammar = grammar

    def sample(self) -> int:
        """Draw a token from the last logits. Raises EngineError where they are none."""
        if not self.has_logits:
            raise EngineError("there are no logits: decode a token first")
        if not self._is_checked:
            if np.isnan(self.logits()).any():
                raise EngineError("the model computes NaN, no numbers: its file is damaged, fetch it again")
            self._is_checked = True
        if self._sampler is None:
            self.set_sampling(Sampling())
        if self._grammar is not None:
            return self._grammar.sample(self._sampler, self.logits())
        return int(lib.llama_sampler_sample(self._sampler, self._ctx, -1))

    @property
    def next_position(self) -> int:
        return int(lib.llama_memory_seq_pos_max(self._memory, 0)) + 1

    def remove(self, start: int, stop: int = -1) -> None:
        """Drop the cells of positions ``start`` up to, not including, ``stop``; -1 is the end."""
        if not lib.llama_memory_seq_rm(self._memory, 0, start, stop):
            raise EngineError("llama_memory_seq_rm refused: this cache cannot drop part of a sequence")

    def clear(self) -> None:
        self.has_logits = False
        lib.llama_memory_clear(self._memory, True)

    def state(self) -> ByteArray:
        """The sequence's cells as llama.cpp serializes them (see :mod:`kvcompose_local.engines.state_format`)."""
        return self._state(0)

    def set_state(self, blob: ByteArray) -> None:
        """Put serialized cells back; the caller removes the old ones first."""
        self._set_state(blob, 0)

    def partial_state(self) -> ByteArray:
        """The parts that only move on, with each token: cells of sliding-window layers, states of recurrent layers."""
        return self._state(_PARTIAL_ONLY)

    def set_partial_state(self, blob: ByteArray) -> None:
        """Put back what :meth:`partial_state` gave, perhaps at an earlier position.

        Cells of other layers behind that position stay until :meth:`remove`. A recurrent state refuses to drop a token
        that it has seen; after this call it has seen none of those.
        """
        self._set_state(blob, _PARTIAL_ONLY)

    def partial_bytes(self) -> int:
        """Bytes of :meth:`partial_state` now."""
        return self._state_bytes(_PARTIAL_ONLY)

    def _state_bytes(self, flags: int) -> int:
        return int(lib.llama_state_seq_get_size_ext(self._ctx, 0, flags))

    def _state(self, flags: int) -> ByteArray:
        size = self._state_bytes(flags)
        blob = np.empty(size, np.uint8)
        pointer = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = int(lib.llama_state_seq_get_data_ext(self._ctx, pointer, size, 0, flags))
        if written != size or size == 0:
            raise EngineError(f"llama_state_seq_get_data wrote {written} of {size} bytes{last_log()}")
        return blob

    def _set_state(self, blob: ByteArray, flags: int) -> None:
        blob = np.ascontiguousarray(blob)
        pointer = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        self.has_logits = False
        read = int(lib.llama_state_seq_set_data_ext(self._ctx, pointer, blob.size, 0, flags))
        if read != blob.size:
            raise EngineError(f"llama_state_seq_set_data read {read} of {blob.size} bytes{last_log()}")
