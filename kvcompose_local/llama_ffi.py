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
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kvcompose_local import build
from kvcompose_local.errors import EngineError, InvalidInput, ModelError
from kvcompose_local.interfaces import FloatArray, Sampling

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
            if not name.startswith(_SOFTMAX_PREFIX):
                return not ask
            if ask:
                return True
            layer = int(name[len(_SOFTMAX_PREFIX) :])
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
