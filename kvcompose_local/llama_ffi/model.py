"""A loaded GGUF model and its vocabulary."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import re
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompose_local.errors import EngineError, ModelError
from kvcompose_local.install.gguf_header import Header
from kvcompose_local.install.model_files import OpenFiles, files_of, whole_header
from kvcompose_local.llama_ffi.builtin_templates import builtin_renderer, builtin_templates
from kvcompose_local.llama_ffi.endings import Endings
from kvcompose_local.llama_ffi.library import clear_log, last_log, lib
from kvcompose_local.llama_ffi.text_parts import parts_of, sentencepiece_parts_of

if TYPE_CHECKING:
    from datetime import datetime

    from kvcompose_local.chat.reasoning import Format
    from kvcompose_local.chat.template import ChatTemplate
    from kvcompose_local.chat.text_model import Message

#: The template of models that bring none. Base models have mostly seen roles on lines of their own.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

#: Advice about llama.cpp's complaints.
_ADVICE = (
    ("file bounds|failed to read|incomplete", ": the file is cut off or damaged, fetch it again"),
    ("unknown (model architecture|pre-tokenizer|tokenizer)", ": a newer kvcompose-local may know it"),
    ("(invalid|illegal) split", ": it is one of several files, name it as it was: NAME-00001-of-00003.gguf or such"),
)
#: Architectures whose header gives all layers the same heads, though only every so manyth has attention; the header may
#: tell another interval.
_ATTENTION_INTERVALS = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "minimax-01": 8}


class Model:
    """A loaded GGUF model and its vocabulary.

    Raises ModelError when llama.cpp cannot load the file. ``progress`` gets (percent, 100) and may raise.
    ``header_only`` reads the metadata and the vocabulary: no context can be made of it. ``dry`` reads no weights: a
    context can be made, which takes no memory and computes nothing.
    """

    def __init__(
        self,
        path: Path,
        *,
        gpu_layers: int = 0,
        progress: Callable[[int, int], None] | None = None,
        header_only: bool = False,
        dry: bool = False,
    ) -> None:
        self.path = path
        self.gpu_layers = gpu_layers
        self._templates: dict[str | None, ChatTemplate] = {}  # by how it thinks
        self._endings: Endings | None = None
        self._template_name = ""
        self._thinking: str | None = None
        params = lib.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.vocab_only = header_only
        if dry:
            params.no_alloc, params.load_mode = True, lib.LLAMA_LOAD_MODE_NONE
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
        with ExitStack() as stack:
            try:  # they stay open as long as the model: what its path names may change
                self.files = OpenFiles([stack.enter_context(open(file, "rb")) for file in files_of(path)])
            except OSError as error:
                raise ModelError(f"cannot load {path.name}: {error.strerror or error}") from error
            weakref.finalize(self, stack.pop_all().close)  # Python warns of open files that are dropped, not of a model
        clear_log()
        self._pointer = self._load(params)
        if stopped:
            self.close()
            raise stopped[0]
        if not self._pointer:
            self.close()
            told = last_log()
            advice = next((advice for words, advice in _ADVICE if re.search(words, told)), "")
            raise ModelError(f"llama.cpp cannot load {path.name}{told}{advice}")
        try:
            self._check_sections()
        except ModelError:
            self.close()
            raise

    def _check_sections(self) -> None:
        """Raises ModelError for sections of M-RoPE at which ggml would abort."""
        sections = self.numbers(f"{self.architecture}.rope.dimension_sections")
        if lib.llama_model_rope_type(self._model) in (-1, 0, 2):  # none, normal, NeoX
            return
        if not (sections and min(sections) >= 0 < sum(sections) <= self.head_sizes("key_length")[0]):
            raise ModelError(f"{self.path.name} says that M-RoPE turns {sections} pairs of a head: it is damaged")

    def _load(self, params: Any) -> Any:
        """llama.cpp's pointer to the model, None where it refuses; tests make models that are no files."""
        return lib.llama_model_load_from_file(os.fsencode(self.path), params)

    @property
    def _model(self) -> Any:
        if self._pointer is None:
            raise EngineError("the model is closed")
        return self._pointer

    @property
    def _vocab(self) -> Any:
        return lib.llama_model_get_vocab(self._model)

    def close(self) -> None:
        """Free the model; further use is an error."""
        if getattr(self, "_pointer", None):
            lib.llama_model_free(self._pointer)
            self._pointer = None
        for file in self.files.handles:
            file.close()

    def metadata(self, key: str) -> str | None:
        """The GGUF value of ``key`` as llama.cpp prints it; None where there is none, and for arrays."""
        size = 1024
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = lib.llama_model_meta_val_str(self._model, key.encode(), buffer, size)
            if n < size:
                return buffer.value.decode("utf-8", "replace") if n >= 0 else None
            size = n + 1

    def numbers(self, key: str) -> list[int]:
        """The GGUF's array of integers of ``key``; a single number is an array of one. Empty where there is none."""
        value = self.metadata(key)
        if value is not None:
            return [int(value)] if value.lstrip("-").isdigit() else []
        return self._header.array(key, int)

    @property
    def _header(self) -> Header:
        """The file's header, for facts that llama.cpp does not tell: arrays, and tensors' names."""
        return whole_header(self.path) or Header(0)

    def _by_layer(self, name: str) -> list[int]:
        """A number of each layer, for which the header may have one for all; empty where it has none."""
        values = self.numbers(f"{self.architecture}.attention.{name}")
        values = values * self.n_layers if len(values) == 1 else values[: self.n_layers]
        return values + [0] * (self.n_layers - len(values)) if values else []

    @property
    def architecture(self) -> str:
        return self.metadata("general.architecture") or "unknown"

    @property
    def name(self) -> str:
        """In one short line, whatever the header says."""
        return " ".join((self.metadata("general.name") or "").split())[:100] or self.path.stem

    @property
    def n_ctx_train(self) -> int:
        return int(lib.llama_model_n_ctx_train(self._model))

    @property
    def n_layers(self) -> int:
        # Of a header alone llama.cpp tells no sizes.
        return int(lib.llama_model_n_layer(self._model)) or sum(self.numbers(f"{self.architecture}.block_count"))

    @functools.cached_property
    def heads(self) -> tuple[int, ...]:
        """Query heads of each layer; 0 where a layer has no attention."""
        return tuple(self._by_layer("head_count") or [0] * max(self.n_layers, 1))

    @functools.cached_property
    def kv_heads(self) -> tuple[int, ...]:
        """KV heads of each layer; 0 where a layer has no attention."""
        heads = self._by_layer("head_count_kv") or self.heads
        recurrent = self._by_layer("recurrent_layers")
        if not recurrent and (interval := _ATTENTION_INTERVALS.get(self.architecture)):
            interval = sum(self.numbers(f"{self.architecture}.full_attention_interval")) or interval
            recurrent = [int((i + 1) % interval != 0) for i in range(self.n_layers)]
        pairs = itertools.zip_longest(heads, recurrent[: len(heads)], fillvalue=0)
        return tuple(0 if is_recurrent else n for n, is_recurrent in pairs)

    def head_sizes(self, *names: str) -> list[int]:
        """Numbers of a head, by the keys of the GGUF header that tell them, ``key_length`` and such.

        Sliding-window layers (``key_length_swa``) have the same sizes as others where the header does not tell.
        """
        head = self.n_embd // max(self.heads[0], 1)  # llama.cpp, too, goes by the first layer

        def told(name: str) -> str | None:
            return self.metadata(f"{self.architecture}.attention.{name}")

        return [int(told(name) or told(name.removesuffix("_swa")) or head) for name in names]

    @property
    def n_embd(self) -> int:
        return int(lib.llama_model_n_embd(self._model)) or sum(self.numbers(f"{self.architecture}.embedding_length"))

    @property
    def n_vocab(self) -> int:
        return int(lib.llama_vocab_n_tokens(self._vocab))

    @property
    def can_generate(self) -> bool:
        """Whether this is a causal language model with a vocabulary."""
        return bool(
            self.metadata(f"{self.architecture}.attention.causal") != "false"
            and self.metadata(f"{self.architecture}.pooling_type") in (None, "0")
            and lib.llama_model_has_decoder(self._model)
            and not lib.llama_model_has_encoder(self._model)
            and not lib.llama_model_is_diffusion(self._model)
            and self.n_vocab > 0
            and lib.llama_vocab_type(self._vocab) != lib.LLAMA_VOCAB_TYPE_NONE  # it asserts where text is tokenized
        )

    @functools.cached_property
    def is_recurrent(self) -> bool:
        """Whether some layers, or all, keep a state that each token changes, and none of its earlier ones."""
        return bool(lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model))

    def cache_kind(self) -> str:
        """``attention``, ``sliding-window``, ``recurrent``, ``hybrid``, ``mla``, ``m-rope`` or ``rotation-free``.

        By the header alone, for an unpatched llama.cpp: :mod:`kvcompose_local.llama_ffi.memory` asks a patched one.
        """
        if lib.llama_model_is_recurrent(self._model):
            return "recurrent"
        if self.is_mla:
            return "mla"
        if lib.llama_model_is_hybrid(self._model):
            return "hybrid"
        if not self.is_rotated:
            return "rotation-free"
        if lib.llama_model_rope_type(self._model) not in (0, 2):  # normal, NeoX; the rest has 2D positions
            return "m-rope"
        if lib.llama_model_n_swa(self._model) > 0:
            return "sliding-window"
        return "attention"

    @property
    def is_mla(self) -> bool:
        """Whether a cell is one latent row, of which the value is a part."""
        return self.metadata(f"{self.architecture}.attention.key_length_mla") is not None

    @property
    def one_type(self) -> bool:
        """Whether K and V must be stored alike."""
        return self.is_mla or self.architecture == "deepseek4"  # as llama_init_from_model has it

    @property
    def is_rotated(self) -> bool:
        """Whether RoPE tells positions. Where they are learned they end with the trained length: ggml aborts beyond."""
        # llama.cpp says of StarCoder that it is.
        return lib.llama_model_rope_type(self._model) != -1 and self.architecture != "starcoder"

    def rope_factors(self, n_positions: int) -> str:
        """``short`` or ``long``: the RoPE factors of a text of so many positions; empty where there is no choice."""
        # As llama.cpp has it (llama-model.cpp, load_hparams and get_rope_factors).
        original = self.metadata(f"{self.architecture}.rope.scaling.original_context_length") or self.n_ctx_train
        if self._has_tensor("rope_freqs.weight"):
            return ""
        for name in ("short", "long"):
            if not self._has_tensor(f"rope_factors_{name}.weight"):
                return ""
        return "long" if n_positions > int(original) else "short"

    def _has_tensor(self, name: str) -> bool:
        """Whether one of the model's files holds a tensor of this name."""
        headers = map(whole_header, files_of(self.path))
        return any(name in header.tensors for header in headers if header)

    def chat_template(self, name: str | None = None) -> str | None:
        """The GGUF's own Jinja chat template, or the one it has under a name; None where there is none."""
        raw = lib.llama_model_chat_template(self._model, name.encode() if name else None)
        text = raw.decode("utf-8", "replace") if raw else ""
        return text if text.strip() else None

    @property
    def template_name(self) -> str:
        """The argument of :meth:`use_template`, empty for the GGUF's own template."""
        return self._template_name

    def use_template(self, template: str) -> None:
        """Render by another template: one of :meth:`template_names`, Jinja source, or, empty, the GGUF's own again."""
        if template != self._template_name:
            self._template_name, self._templates, self._endings = template, {}, None

    def use_thinking(self, thinking: str | None) -> bool:
        """Let the template turn thinking on or off, None for as it is unasked; False where it has no such switch."""
        self._thinking = None
        if thinking is not None and self.template.has_switch:
            self._thinking = thinking
        return self._thinking == thinking

    def template_names(self) -> list[str]:
        """The names of templates: ``plain``, the GGUF's own, and llama.cpp's."""
        return ["plain", *self._own_templates(), *builtin_templates()]

    def _own_templates(self) -> list[str]:
        return self._header.array("tokenizer.chat_templates", str)

    @property
    def has_template(self) -> bool:
        """False for a base model, which gets :data:`PLAIN_TEMPLATE`."""
        return self._template_name != "plain" and bool(self._template_name or self.chat_template())

    @property
    def template(self) -> ChatTemplate:
        """The template of this model's chats. Raises ModelError where it is not valid."""
        if self._thinking not in self._templates:
            # Late: loading a model need not wait for Jinja.
            from kvcompose_local.chat.template import ChatTemplate

            source = self._template_name or self.chat_template() or "plain"
            if source == "plain":
                source = PLAIN_TEMPLATE
            elif source in self._own_templates():
                source = self.chat_template(source) or source
            if source.strip() in builtin_templates():  # some headers have a name in place of a template
                found = ChatTemplate(source, renderer=builtin_renderer(source.strip()))
            else:
                bos, eos = self.special_text("bos"), self.special_text("eos")
                found = ChatTemplate(source, bos=bos, eos=eos, thinking=self._thinking)
            self._templates[self._thinking] = found
        return self._templates[self._thinking]

    @property
    def folds_system(self) -> bool:
        """Whether a system prompt goes before the first message, since the template has no place for it."""
        return self.template.folds_system

    @property
    def reasoning_format(self) -> Format:
        """How this model marks its thinking."""
        return self.template.format

    def use_format(self, form: Format) -> None:
        """Take over a format of thinking that was found out from an answer."""
        self.template.format = form

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        now: datetime | None = None,
        tools: Sequence[Any] = (),
    ) -> str:
        """``messages`` through the chat template, in a sandbox; now: for templates that tell the date.

        tools: functions that the model may call, as OpenAI's protocol has them.

        A model without a template (a base model) gets :data:`PLAIN_TEMPLATE`. Raises ModelError when the template
        fails, refuses the messages or leaves some out.
        """
        return self.template.render(messages, add_generation_prompt=add_generation_prompt, now=now, tools=tools)

    def control_text(self, token: int) -> str:
        """The text of a control token, such as ``<|channel|>``; empty for all others."""
        return self.token_text(token) if lib.llama_vocab_is_control(self._vocab, token) else ""

    @cached_property
    def control_tokens(self) -> list[int]:
        """All control tokens that end no answer."""
        controls = (t for t in range(self.n_vocab) if lib.llama_vocab_is_control(self._vocab, t))
        return [t for t in controls if not lib.llama_vocab_is_eog(self._vocab, t)]

    def is_marker(self, text: str) -> bool:
        """Whether ``text`` is one token of the vocabulary that no other text becomes."""
        return len(self.tokenize(text)) == 1 and len(self.tokenize(text, special=False)) > 1

    def special_token(self, which: str) -> int | None:
        """The ``bos`` or ``eos`` token, None where the header names none.

        llama.cpp would take a default of the vocabulary's type, which for byte-level BPE is token 11, a comma.
        """
        told = self.metadata(f"tokenizer.ggml.{which}_token_id") or ""
        return int(told) if told.isdecimal() and int(told) < self.n_vocab else None

    def special_text(self, which: str) -> str:
        """Text of the ``bos`` or ``eos`` token, empty where the header names none."""
        token = self.special_token(which)
        return "" if token is None else self.token_text(token)

    def token_text(self, token: int) -> str:
        """The text of a token, with its marks: ``<|…|>``, ``▁``."""
        return lib.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace")  # type: ignore[no-any-return]

    @property
    def adds_bos(self) -> bool:
        """Whether prompts begin with BOS: as the header says, or the vocabulary's type, where the header names one."""
        return self.special_token("bos") is not None and bool(lib.llama_vocab_get_add_bos(self._vocab))

    def is_end(self, token: int) -> bool:
        """Whether ``token`` ends an answer: the header says so, its text does, or the chat template."""
        if self._endings is None:
            self._endings = Endings(self)
        return self._endings.holds(token)

    def is_listed_end(self, token: int) -> bool:
        """Whether llama.cpp has ``token`` among the ends of an answer."""
        return bool(lib.llama_vocab_is_eog(self._vocab, token))

    @property
    def eos_by_type(self) -> int:
        """EOS as llama.cpp has it, which may be no more than usual for the vocabulary's type; negative without one."""
        return int(lib.llama_vocab_eos(self._vocab))

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = True) -> list[int]:
        """Token ids of ``text``; ``special`` reads ``<|…|>`` markers as the tokens they name.

        ``add_bos`` puts the header's BOS before them. llama.cpp's own option may append EOS as well, and models answer
        a prompt that ends with EOS with nonsense.
        """
        bos = self.special_token("bos") if add_bos else None
        kind = lib.llama_vocab_type(self._vocab)
        if kind == lib.LLAMA_VOCAB_TYPE_BPE:
            tokens = [token for part in parts_of(text) for token in self._tokens_of(part, special)]
        elif kind == lib.LLAMA_VOCAB_TYPE_SPM:
            self._check_characters(text)
            first, *others = sentencepiece_parts_of(text)
            tokens = self._tokens_of(first, special)
            for part in others:
                tokens += self._tokens_behind(part, special)
        else:
            tokens = self._tokens_of(text, special)
        return tokens if bos is None else [bos, *tokens]

    def _check_characters(self, text: str) -> None:
        """llama.cpp would end the program at a byte that a vocabulary has no token for. Raises ModelError."""
        unknown = {*text.replace(" ", "\u2581")} - self._characters if self._missing_bytes else set()
        if lost := {char for char in unknown if self._missing_bytes & {*char.encode("utf-8", "replace")}}:
            what = f"no token for {min(lost)!r}, nor for all of its bytes"
            raise ModelError(f"the model's vocabulary has {what}: fetch another file of the model")

    @cached_property
    def _missing_bytes(self) -> set[int]:
        """Bytes that there are no tokens for, as there should be."""
        missing = {f"<0x{byte:02X}>": byte for byte in range(256)}
        for token in itertools.takewhile(lambda _: missing, range(self.n_vocab)):  # they come first
            if lib.llama_vocab_get_attr(self._vocab, token) & lib.LLAMA_TOKEN_ATTR_BYTE:
                missing.pop(self.token_text(token), None)
        return {*missing.values()}

    @cached_property
    def _characters(self) -> set[str]:
        """All characters that there are tokens for."""
        return {text for token in range(self.n_vocab) if len(text := self.token_text(token)) == 1}

    def _tokens_behind(self, part: str, special: bool) -> list[int]:
        """Tokens of a part that continues a text, without the space that SentencePiece puts at a text's beginning."""
        if self.metadata("tokenizer.ggml.add_space_prefix") == "false":
            return self._tokens_of(part, special)
        if part.startswith(" ") and part != " ":
            return self._tokens_of(part[1:], special)
        tokens = self._tokens_of(part, special)
        return tokens[1:] if self.token_bytes(tokens[0]) == b" " else tokens

    def _tokens_of(self, text: str, special: bool) -> list[int]:
        raw = text.encode("utf-8", "replace")
        size = len(raw) + 8
        for _ in range(2):
            buffer = (lib.llama_token * size)()
            n = lib.llama_tokenize(self._vocab, raw, len(raw), buffer, size, False, special)
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
