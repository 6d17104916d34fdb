"""llama.cpp through llama-cpp-python's low-level API: the only module that imports ``llama_cpp`` or uses ctypes.

Every native return code is checked here and becomes an :class:`EngineError` that names the call; owners of native
memory are context managers. Facts about the library are those of the pinned version (``patches/PIN``).
"""

from __future__ import annotations

import ctypes
import os
import secrets
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcompose_local import build
from kvcompose_local.errors import ContextFull, EngineError, InvalidInput, ModelError
from kvcompose_local.interfaces import FloatArray, IntArray, Sampling

#: ``LLAMA_CPP_LIB_PATH`` is read by llama-cpp-python when it is imported; a library the user names there wins.
_LIBRARY_VARIABLE = "LLAMA_CPP_LIB_PATH"
_LOG_LEVEL_ERROR = 4
#: ggml's type number of the cache's default type.
F16 = 1
_SOFTMAX_PREFIX = b"kq_soft_max-"

#: For models that bring none. Roles on lines of their own are what base models have seen most.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

#: Receives (model layer, float32 (Q, n_queries, n_kv) softmax weights of one micro-batch); the array is native memory
#: and dies with the call.
SoftmaxTap = Callable[[int, FloatArray], None]


def _import_library() -> Any:
    if _LIBRARY_VARIABLE not in os.environ:
        built = build.library_dir()
        if built is not None:
            os.environ[_LIBRARY_VARIABLE] = str(built)
    try:
        import llama_cpp.llama_cpp as lib
    except ImportError as error:
        raise EngineError(
            "llama-cpp-python is not installed: run scripts/setup, or pip install llama-cpp-python"
        ) from error
    except (FileNotFoundError, RuntimeError, OSError, AttributeError) as error:
        raise EngineError(f"no usable llama.cpp library ({error}): run `kvcompose-local build`") from error
    return lib


lib = _import_library()
_native = lib._lib


def _bind(name: str, restype: Any, *argtypes: Any) -> Any:
    """A function of libllama or of the ggml libraries it is linked to; None where this build has no such symbol."""
    try:
        function = getattr(_native, name)
    except AttributeError:
        return None
    function.restype = restype
    function.argtypes = list(argtypes)
    return function


# Accessors only: the layout of ggml_tensor is not part of ggml's interface and has changed before.
_ggml_get_name = _bind("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p)
_ggml_get_data = _bind("ggml_get_data", ctypes.c_void_p, ctypes.c_void_p)
_ggml_nelements = _bind("ggml_nelements", ctypes.c_int64, ctypes.c_void_p)
_ggml_nrows = _bind("ggml_nrows", ctypes.c_int64, ctypes.c_void_p)
_ggml_tensor_get = _bind(
    "ggml_backend_tensor_get", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
)

_log_lines: deque[str] = deque(maxlen=20)


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _user_data: object) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if level == _LOG_LEVEL_ERROR and line:
        _log_lines.append(line)
    if os.environ.get("KVCOMPOSE_LOG"):
        print(line, file=sys.stderr)


lib.llama_log_set(_on_log, ctypes.c_void_p(0))
lib.llama_backend_init()


def _last_log() -> str:
    """What llama.cpp complained of first since the last call, in brackets, or nothing: later lines only repeat it."""
    return f" ({_log_lines[0].partition(': ')[2] or _log_lines[0]})" if _log_lines else ""


def library_path() -> Path:
    """Where the loaded libllama is."""
    return Path(_native._name)


def supports_gpu() -> bool:
    """Whether this build can offload layers."""
    return bool(lib.llama_supports_gpu_offload())


class Model:
    """A loaded GGUF model and its vocabulary.

    Raises ModelError when llama.cpp cannot load the file. ``progress`` gets (percent, 100) and may raise.
    """

    def __init__(self, path: Path, *, gpu_layers: int = 0, progress: Callable[[int, int], None] | None = None) -> None:
        self.path = path
        self.gpu_layers = gpu_layers
        self._formatter: Any = None
        params = lib.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        stopped: list[BaseException] = []

        @lib.llama_progress_callback  # type: ignore[untyped-decorator]
        def on_progress(fraction: float, _user_data: object) -> bool:
            try:
                if progress is not None:
                    progress(int(fraction * 100), 100)
            except BaseException as error:
                stopped.append(error)
                return False
            return True

        params.progress_callback = on_progress
        _log_lines.clear()
        self._model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if stopped:
            self.close()
            raise stopped[0]
        if not self._model:
            raise ModelError(f"llama.cpp cannot load {path.name}{_last_log()}")
        self._vocab = lib.llama_model_get_vocab(self._model)

    def close(self) -> None:
        """Free the model; further use is an error."""
        if getattr(self, "_model", None):
            lib.llama_model_free(self._model)
            self._model = None

    def metadata(self, key: str) -> str | None:
        """The GGUF value of ``key`` as llama.cpp prints it (arrays as ``[a, b]``), or None."""
        buffer = ctypes.create_string_buffer(1024)
        n = lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if n >= 0 else None

    @property
    def architecture(self) -> str:
        return self.metadata("general.architecture") or "unknown"

    @property
    def name(self) -> str:
        return self.metadata("general.name") or self.path.stem

    @property
    def n_ctx_train(self) -> int:
        return int(lib.llama_model_n_ctx_train(self._model))

    @property
    def n_layers(self) -> int:
        return int(lib.llama_model_n_layer(self._model))

    @property
    def n_heads(self) -> int:
        return int(lib.llama_model_n_head(self._model))

    def n_heads_of(self, layer: int) -> int:
        """Query heads of one layer; some models give each layer its own number."""
        value = self.metadata(f"{self.architecture}.attention.head_count") or ""
        if value.startswith("["):
            return int(value.strip("[]").split(",")[layer])
        return self.n_heads

    @property
    def n_kv_heads(self) -> int:
        return int(lib.llama_model_n_head_kv(self._model))

    @property
    def n_embd(self) -> int:
        return int(lib.llama_model_n_embd(self._model))

    @property
    def n_vocab(self) -> int:
        return int(lib.llama_vocab_n_tokens(self._vocab))

    @property
    def can_generate(self) -> bool:
        """Whether this is a causal language model with a vocabulary."""
        return bool(
            lib.llama_model_has_decoder(self._model)
            and not lib.llama_model_has_encoder(self._model)
            and not lib.llama_model_is_diffusion(self._model)
            and self.n_vocab > 0
        )

    def cache_kind(self) -> str:
        """``attention``, ``sliding-window``, ``recurrent``, ``hybrid``, ``mla`` or ``m-rope``."""
        arch = self.architecture
        if lib.llama_model_is_recurrent(self._model):
            return "recurrent"
        if lib.llama_model_is_hybrid(self._model):
            return "hybrid"
        if self.metadata(f"{arch}.attention.kv_lora_rank") is not None:
            return "mla"
        if lib.llama_model_rope_type(self._model) not in (
            -1,
            0,
            2,
        ):  # none, normal, NeoX; the rest has 2D positions
            return "m-rope"
        if lib.llama_model_n_swa(self._model) > 0:
            return "sliding-window"
        return "attention"

    def chat_template(self) -> str | None:
        """The GGUF's own Jinja chat template, or None."""
        raw = lib.llama_model_chat_template(self._model, None)
        return raw.decode("utf-8", "replace") if raw else None

    def render_chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """``messages`` through the GGUF's chat template, in llama-cpp-python's Jinja sandbox.

        A model without a template (a base model) gets :data:`PLAIN_TEMPLATE`. Raises ModelError when the template
        fails or refuses the messages.
        """
        # Importing the formatter costs 0.2 s, which a one-shot completion without a template need not pay.
        import jinja2
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        template = self.chat_template() or PLAIN_TEMPLATE
        try:
            if self._formatter is None or self._formatter.add_generation_prompt != add_generation_prompt:
                bos, eos = self.special_text("bos"), self.special_text("eos")
                self._formatter = Jinja2ChatFormatter(template, eos, bos, add_generation_prompt)
            return str(self._formatter(messages=list(messages)).prompt)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise ModelError(f"the model's chat template failed: {error}") from error

    def special_text(self, which: str) -> str:
        """Text of the ``bos`` or ``eos`` token, empty when the vocabulary has none."""
        token = getattr(lib, f"llama_vocab_{which}")(self._vocab)
        return lib.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace") if token >= 0 else ""

    @property
    def adds_bos(self) -> bool:
        return bool(lib.llama_vocab_get_add_bos(self._vocab))

    @property
    def bos(self) -> int:
        return int(lib.llama_vocab_bos(self._vocab))

    def is_end(self, token: int) -> bool:
        """Whether ``token`` ends an answer."""
        return bool(lib.llama_vocab_is_eog(self._vocab, token))

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = True) -> list[int]:
        """Token ids of ``text``; ``special`` reads ``<|…|>`` markers as the tokens they name."""
        raw = text.encode("utf-8", "replace")
        size = len(raw) + 8
        for _ in range(2):
            buffer = (lib.llama_token * size)()
            n = lib.llama_tokenize(self._vocab, raw, len(raw), buffer, size, add_bos, special)
            if n >= 0:
                return list(buffer[:n])
            size = -n
        raise EngineError(f"llama_tokenize failed with {n} on a text of {len(raw)} bytes")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; may be part of a UTF-8 sequence; empty for control tokens."""
        buffer = ctypes.create_string_buffer(256)
        n = lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(n, 0)]


class Context:
    """A llama.cpp context with one sequence.

    n_ctx: cells, a multiple of 256; n_ubatch: most tokens of a micro-batch; flash_attention: False makes the softmax
    visible in every pass and V transposed; cache_type: ggml type number of K and V; callback_at_creation: let the tap
    work from the start (an unpatched llama.cpp cannot install it later).
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_ubatch: int,
        n_threads: int,
        flash_attention: bool,
        cache_type: int = F16,
        callback_at_creation: bool = False,
    ) -> None:
        self.model = model
        self.n_ctx = n_ctx
        self.n_ubatch = n_ubatch
        self.tap: SoftmaxTap | None = None
        self.tap_prefix = _SOFTMAX_PREFIX
        self.has_logits = False
        self._n_queries = 0
        # Tensors of offloaded layers stand in device memory and must be fetched.
        self._host_tensors = model.gpu_layers == 0
        self._callback_error: BaseException | None = None
        self._callback = lib.ggml_backend_sched_eval_callback(self._on_tensor)
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = n_ubatch
        params.n_ubatch = n_ubatch
        params.n_seq_max = 1
        params.n_threads = n_threads
        params.n_threads_batch = n_threads
        params.flash_attn_type = 1 if flash_attention else 0
        params.type_k = cache_type
        params.type_v = cache_type
        params.swa_full = False
        params.no_perf = True
        if callback_at_creation:
            params.cb_eval = self._callback
        _log_lines.clear()
        self._ctx = lib.llama_init_from_model(model._model, params)
        if not self._ctx:
            raise EngineError(f"llama_init_from_model failed: too little memory for {n_ctx} cells?{_last_log()}")
        self._memory = lib.llama_get_memory(self._ctx)
        self._sampler: Any = None

    def close(self) -> None:
        """Free the context; further use is an error."""
        if getattr(self, "_sampler", None):
            lib.llama_sampler_free(self._sampler)
            self._sampler = None
        if getattr(self, "_ctx", None):
            lib.llama_free(self._ctx)
            self._ctx = None

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
            layer = int(name[len(self.tap_prefix) :])
            self.tap(layer, self._softmax(tensor))
        except BaseException as error:
            # An exception cannot cross the native frames: stop the graph and let decode() raise it.
            self._callback_error = error
            return False
        return True

    def _softmax(self, tensor: int) -> FloatArray:
        """float32 (Q, n_queries, n_kv): ggml lays the softmax out as ne = (n_kv, n_queries, Q, 1), contiguous."""
        n, rows = _ggml_nelements(tensor), _ggml_nrows(tensor)
        if rows % self._n_queries or n % rows:
            raise EngineError(f"a softmax of {rows} rows does not divide into {self._n_queries} queries")
        shape = (rows // self._n_queries, self._n_queries, n // rows)
        if self._host_tensors:
            pointer = ctypes.cast(_ggml_get_data(tensor), ctypes.POINTER(ctypes.c_float))
            return np.ctypeslib.as_array(pointer, shape=shape)
        weights = np.empty(shape, np.float32)
        _ggml_tensor_get(tensor, weights.ctypes.data, 0, weights.nbytes)
        return weights

    def decode(self, tokens: Sequence[int]) -> None:
        """Run one micro-batch at the next positions; logits are those of its last token."""
        if not 0 < len(tokens) <= self.n_ubatch:
            raise InvalidInput(f"a micro-batch holds 1 to {self.n_ubatch} tokens, not {len(tokens)}")
        # The batch holds only a pointer: the array must outlive the call.
        array = (lib.llama_token * len(tokens))(*tokens)
        batch = lib.llama_batch_get_one(array, len(tokens))
        self._callback_error = None
        self._n_queries = len(tokens)
        _log_lines.clear()
        self.has_logits = False
        code = lib.llama_decode(self._ctx, batch)
        if self._callback_error is not None:
            error, self._callback_error = self._callback_error, None
            lib.llama_synchronize(self._ctx)
            raise error
        if code != 0:
            reason = {1: "no free cells", 2: "stopped"}.get(code, f"code {code}")
            raise EngineError(f"llama_decode failed: {reason}{_last_log()}")
        self.has_logits = True

    def logits(self) -> FloatArray:
        """float32 (n_vocab,): a copy of the last token's logits."""
        if not self.has_logits:
            raise EngineError("there are no logits: decode a token first")
        pointer = lib.llama_get_logits_ith(self._ctx, -1)
        return np.array(np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab,)), np.float32)

    def set_sampling(self, sampling: Sampling) -> None:
        """Replace the sampler chain."""
        if self._sampler:
            lib.llama_sampler_free(self._sampler)
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
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

    def sample(self) -> int:
        """Draw a token from the last logits."""
        if not self.has_logits:
            raise EngineError("there are no logits: decode a token first")
        if self._sampler is None:
            self.set_sampling(Sampling())
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

    def state(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The sequence's cells as llama.cpp serializes them (see :mod:`kvcompose_local.cells`)."""
        size = int(lib.llama_state_seq_get_size(self._ctx, 0))
        blob = np.empty(size, np.uint8)
        pointer = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = int(lib.llama_state_seq_get_data(self._ctx, pointer, size, 0))
        if written != size or size == 0:
            raise EngineError(f"llama_state_seq_get_data wrote {written} of {size} bytes{_last_log()}")
        return blob

    def set_state(self, blob: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Put serialized cells back; the caller removes the old ones first."""
        blob = np.ascontiguousarray(blob)
        pointer = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        self.has_logits = False
        read = int(lib.llama_state_seq_set_data(self._ctx, pointer, blob.size, 0))
        if read != blob.size:
            raise EngineError(f"llama_state_seq_set_data read {read} of {blob.size} bytes{_last_log()}")


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


_INT32_P = ctypes.POINTER(ctypes.c_int32)
_KVC_VERSION = 1
_kvc_version = _bind("llama_kvc_version", ctypes.c_int32)
_KVC_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "supported": (),
    "get_info": (ctypes.POINTER(_Info),),
    "get_layer": (ctypes.c_int32, ctypes.POINTER(_Layer)),
    "get_arena": (ctypes.c_int32, ctypes.POINTER(_Arena)),
    "get_positions": (_INT32_P, ctypes.c_int32),
    "rewrite": (ctypes.c_int32, _INT32_P, ctypes.c_int32, _INT32_P, ctypes.POINTER(_INT32_P)),
    "set_layout": (ctypes.c_int32, _INT32_P, ctypes.c_int32, ctypes.c_int32, _INT32_P),
    "get_rows": (*(ctypes.c_int32,) * 4, ctypes.c_void_p, ctypes.c_size_t),
    "set_rows": (*(ctypes.c_int32,) * 4, ctypes.c_void_p, ctypes.c_size_t),
    "set_eval_callback": (ctypes.c_void_p, ctypes.c_void_p),
    "set_explicit_softmax": (ctypes.c_int32,),
}
_kvc = {
    name: _bind(f"llama_kvc_{name}", ctypes.c_int32, ctypes.c_void_p, *argtypes)
    for name, argtypes in _KVC_FUNCTIONS.items()
}
_kvc_last_error = _bind("llama_kvc_last_error", ctypes.c_char_p)
_KVC_UNSUPPORTED, _KVC_NO_SPACE = -2, -3


def library_is_patched() -> bool:
    """Whether the loaded llama.cpp has the interface of ``patches/`` in the version that this module speaks."""
    return _kvc_version is not None and _kvc_version() == _KVC_VERSION


def _int32(values: Any) -> Any:
    """A pointer to values as contiguous int32; NumPy's pointer keeps its array alive."""
    return np.ascontiguousarray(values, np.int32).ctypes.data_as(_INT32_P)


class PerLayerCells:
    """The patch series' interface to the cells of a :class:`Context` (``llama-kvcompose.h``).

    Raises ModelError where this cache cannot be composed.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        if _kvc["supported"](context._ctx) != 0:
            raise ModelError(_kvc_last_error().decode("utf-8", "replace"))
        self.n_layers = int(self.info().n_layers)

    def _call(self, name: str, *arguments: Any) -> None:
        status = _kvc[name](self._context._ctx, *arguments)
        if status != 0:
            reason = _kvc_last_error().decode("utf-8", "replace")
            kind = {_KVC_NO_SPACE: ContextFull, _KVC_UNSUPPORTED: ModelError}.get(status, EngineError)
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

    def positions(self) -> npt.NDArray[np.int32]:
        """int32 (n_cells,): position of each cell, -1 where it is empty."""
        positions = np.empty(self.info().n_cells, np.int32)
        self._call("get_positions", positions.ctypes.data_as(_INT32_P), positions.size)
        return positions

    def rewrite(self, n_live_cap: int, tail: IntArray, sources: Sequence[IntArray]) -> None:
        """tail: int (n_tail,) live cells that stay; sources: a layer's int (H, K_l) physical rows."""
        self._check_layers(sources)
        counts = [s.shape[1] for s in sources]
        pointers = [_int32(s) for s in sources]  # a ctypes array of them would not keep NumPy's arrays alive
        table = (_INT32_P * len(sources))(*pointers)
        self._context.has_logits = False
        self._call("rewrite", n_live_cap, _int32(tail), len(tail), _int32(counts), table)

    def set_layout(self, n_live_cap: int, live_positions: IntArray, end: int, n_composed: IntArray) -> None:
        """Empty the cache and lay it out for an import; composed cells take the positions before ``end``."""
        self._check_layers(n_composed)
        self._context.has_logits = False
        self._call("set_layout", n_live_cap, _int32(live_positions), len(live_positions), end, _int32(n_composed))

    def _check_layers(self, values: Any) -> None:
        if len(values) != self.n_layers:
            raise InvalidInput(f"{len(values)} layers are given, the cache has {self.n_layers}")

    def rows(self, i: int, *, values: bool) -> npt.NDArray[np.uint8]:
        """uint8 (n_rows, row bytes): all K, or all V rows of a layer."""
        layer = self.layer(i)
        width = layer.v_row_bytes if values else layer.k_row_bytes
        data = np.empty((layer.n_rows, width), np.uint8)
        self._call("get_rows", i, int(values), 0, layer.n_rows, data.ctypes.data, data.nbytes)
        return data

    def set_rows(self, i: int, data: npt.NDArray[np.uint8], *, values: bool) -> None:
        """The inverse of :meth:`rows`."""
        data = np.ascontiguousarray(data, np.uint8)
        self._call("set_rows", i, int(values), 0, data.shape[0], data.ctypes.data, data.nbytes)

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
