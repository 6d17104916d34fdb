"""The program as a library: a model under a memory budget, that reads, answers, saves and loads.

>>> from kvcompose_local import LocalChat
>>> with LocalChat("smollm2-135m", budget=0.5, n_ctx=4096) as chat:
...     chat.read(open("notes.txt").read())
...     print(chat.ask("Who wrote this?"))
...     chat.save("notes.kvc")
"""

from __future__ import annotations

import difflib
import json
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from kvcompose_local import profiles
from kvcompose_local.chat import Chat, TurnStats, inputs, sessions
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.chat.report import CompactionReport
from kvcompose_local.chat_options import SCORINGS, ChatOptions, Sampling, check_number
from kvcompose_local.engines import open_engine
from kvcompose_local.engines.base import LlamaEngine
from kvcompose_local.errors import InvalidInput
from kvcompose_local.install import models
from kvcompose_local.install.model_files import check_gguf
from kvcompose_local.install.paths import path_in
from kvcompose_local.interfaces import CacheLayout, Progress
from kvcompose_local.llama_ffi.devices import layers_to_offload
from kvcompose_local.llama_ffi.model import Model
from kvcompose_local.llama_ffi.rpc import add_workers


def template_of(wanted: str, names: Sequence[str]) -> str:
    """The template that ``--template`` asks for: one of ``names``, or the text of a file. Raises InvalidInput."""
    if wanted in names:
        return wanted
    try:
        path = path_in(wanted)
        is_there = path.exists()
    except (OSError, RuntimeError, ValueError):  # a name that is too long, a user that is unknown
        is_there = False
    if not is_there or not wanted:
        close = difflib.get_close_matches(wanted, names, n=3) or ["plain", "chatml", "llama3", "gemma", "mistral-v7"]
        raise InvalidInput(f"there is no template {wanted!r}: give a Jinja file, or a name such as {', '.join(close)}")
    text = inputs.read(path)
    source = _template_in(text, wanted)
    if source is None:
        source = "" if path.suffix == ".json" else text
    if not source.strip():
        raise InvalidInput(f"there is no template in {wanted}")
    return source


def _template_in(text: str, name: str) -> str | None:
    """The chat template of a tokenizer_config.json, as a model's page has it; None for other text, such as a template.

    Raises InvalidInput, which begins with ``name``, for several of which none is the default.
    """
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(told, dict):
        return None
    found = told.get("chat_template")
    if isinstance(found, list):
        named = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
        if "default" not in named:
            told_names = f"several templates ({', '.join(named)})"
            raise InvalidInput(f"{name} holds {told_names}: copy the one you want into a file of its own")
        found = named["default"]
    return found if isinstance(found, str) else ""


def memory_of(engine: LlamaEngine, n_ctx: int, *, scoring: str = SCORINGS[0], **options: Any) -> CacheMemory:
    """The memory of an engine's model, scored by its profile where it has one; options: of :class:`CacheMemory`."""
    if scoring != SCORINGS[0] or not options.get("compose", True):
        return CacheMemory(engine, n_ctx, replay=True, **options)
    profile = profiles.of_file(engine.model.path)
    return CacheMemory(engine, n_ctx, scorer=profile.scorer if profile else None, **options)


def _lacks(model: Model) -> list[str]:
    """What a chat would need and the model's file does not say, a line each."""
    is_bpe = model.metadata("tokenizer.ggml.model") == "gpt2"
    missing = {
        "no chat template: questions are put as plain text (--template NAME takes another)": not model.chat_template(),
        "no word on how to cut words: a newer file may answer better": is_bpe
        and model.metadata("tokenizer.ggml.pre") is None,
    }
    return [f"the model's file has {what}" for what, is_missing in missing.items() if is_missing]


def _with_chosen(options: ChatOptions, chosen: Mapping[str, Any]) -> ChatOptions:
    """Options with some fields replaced by name. Raises InvalidInput for what none can be, or no field is called."""
    names = [field.name for field in fields(ChatOptions)]
    for name in chosen:
        if name in names:
            continue
        if name in {field.name for field in fields(Sampling)}:
            raise InvalidInput(f"there is no option {name}: give sampling=Sampling({name}=…)")
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5) or [n for n in names if n.endswith(name)]
        raise InvalidInput(f"there is no option {name}: " + (f"{close[0]}?" if close else ", ".join(names)))
    options = replace(options, **chosen)
    options.check()
    return options


def _check_text(what: str, text: object) -> None:
    if not isinstance(text, str):
        raise InvalidInput(f"{what} is a str, not {type(text).__name__}")


class LocalChat:
    """One chat with one model. Close it, or use it in a ``with`` block: it holds native memory.

    Threads may share it, and wait for each other. A stream is one thread's until it is done: meanwhile others are
    refused.

    model: a GGUF file or a name of ``models.txt``, which is fetched, None for the small default; options: see
    :class:`ChatOptions`, whose fields may be given by name instead, as in ``LocalChat(model, budget=0.25)``.
    on_compaction gets a report of each compaction; on_rebuild gets the number of tokens that are read again because a
    turn was taken back; on_note gets lines that a user should know about the chat template; on_loading, on_reading and
    on_compacting get (done, in all), and may raise KeyboardInterrupt; should_stop is asked between tokens, and
    ``turns[-1].stopped`` of the attribute ``chat`` says where it stopped something; load: a :class:`Loading` of the
    same model, begun earlier.

    A KeyboardInterrupt in the middle of reading or answering loses nothing: text that was read or said stays, and
    unread text is read before the next message.

    Raises ModelError and InvalidInput, each with one line that says what to do.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        options: ChatOptions | None = None,
        *,
        on_compaction: Callable[[CompactionReport], None] | None = None,
        on_loading: Progress | None = None,
        on_reading: Progress | None = None,
        on_compacting: Progress | None = None,
        on_rebuild: Callable[[int], None] = lambda _n_tokens: None,
        on_note: Callable[[str], None] = lambda _line: None,
        should_stop: Callable[[], bool] = lambda: False,
        load: Callable[..., Model] = Model,
        **chosen: Any,
    ) -> None:
        self.options = options = _with_chosen(options or ChatOptions(), chosen)
        self._lock = threading.RLock()
        path = models.resolve(None if model is None else str(model), pull=True)
        check_gguf(path)
        add_workers(list(options.workers))
        self._engine, positions = open_engine(
            path,
            n_ctx=options.n_ctx,
            budget=options.budget,
            n_threads=options.n_threads,
            gpu_layers=layers_to_offload(
                path, options.gpu_layers, n_ctx=options.n_ctx, budget=options.budget, workers=options.workers
            ),
            cache_type=options.cache_type,
            sampling=options.sampling,
            progress=on_loading,
            load=load,
        )
        with ExitStack() as stack:
            stack.callback(self._engine.close)
            self.setup = sessions.Setup(path, self._engine.shape.cache_type, options.budget, self._engine.model.files)
            self.memory = memory_of(
                self._engine,
                positions,
                scoring=options.scoring,
                compose=options.budget < 1,
                on_compaction=on_compaction,
                on_progress=on_compacting,
            )
            self.use_template(options.template)
            if not self._engine.model.use_thinking(options.thinking):
                raise InvalidInput("the model's chat template has no switch for its thinking: leave --thinking out")
            self.chat = Chat(
                self._engine.model,
                self.memory,
                system=models.system_prompt(path) if options.system is None else options.system,
                should_stop=should_stop,
                on_read=on_reading,
                on_rebuild=on_rebuild,
                on_note=on_note,
            )
            for line in _lacks(self._engine.model) if options.template is None else ():
                on_note(line)
            stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and its cache, once no thread is using them."""
        with self._lock:
            self._engine.close()

    @property
    def layout(self) -> CacheLayout:
        """Composed cells of each layer, live cells, and tokens seen."""
        return self._engine.layout()

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for the cells, which never grow."""
        return self._engine.cache_bytes

    def use_template(self, template: str | None) -> None:
        """Render by another template from now on; None changes nothing. Raises InvalidInput and ModelError."""
        model = self._engine.model
        with self._lock:
            if template is not None:
                model.use_template(template_of(template, model.template_names()))
            elif not model.template_name:
                inner = _template_in(model.chat_template() or "", "the model's header")
                if inner == "":
                    raise InvalidInput("the model has JSON in its template's place: name another by --template")
                model.use_template(inner or "")
            _ = model.template  # raises where it is not valid: this is better known before anything is read

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Draw at another temperature in this block. Whatever the seed is, no random number is drawn twice."""
        sampling = replace(self.options.sampling, seed=None)
        self._engine.set_sampling(replace(sampling, temperature=temperature))
        try:
            yield
        finally:
            self._engine.set_sampling(sampling)

    def read(self, text: str) -> TurnStats:
        """Read a document now: the next question is about it. Raises ContextFull where the positions run out."""
        _check_text("a document", text)
        with self._lock:
            stats = self.chat.read(text)
            self._raise_interrupt()
        return stats

    def ask(self, message: str, *, max_tokens: int = 1024) -> str:
        """The whole answer to a message. Another thread's question waits for it."""
        with self._lock:
            return "".join(self.stream(message, max_tokens=max_tokens))

    def stream(self, message: str, *, max_tokens: int = 1024) -> Generator[str]:
        """The answer in pieces of whole characters, as they come.

        Take all of it, or close it, before anything else.
        """
        _check_text("a message", message)
        check_number("max_tokens", max_tokens, 1, whole=True)
        pieces = self.chat.ask(message, max_tokens=max_tokens)
        try:
            while True:
                with self._lock:  # for a piece at a time: whoever takes them may never go on
                    piece = next(pieces, None)
                if piece is None:
                    break
                yield piece
        finally:
            with self._lock:
                pieces.close()
        self._raise_interrupt()

    def _raise_interrupt(self) -> None:
        """Raise the Ctrl-C that the chat has caught to put itself in order: a script must not go on after it."""
        if self.chat.turns[-1].stopped == "interrupt" and not self.chat.should_stop():
            raise KeyboardInterrupt

    def compress(self, keep: float) -> CompactionReport | None:
        """Compress now, to at most the share ``keep`` in (0, 1] of the bytes in use; None where nothing is new."""
        with self._lock:
            return self.memory.compact(keep)

    def save(self, path: str | Path) -> None:
        """Keep the chat and its cells in a file. Raises SessionError where it cannot be written."""
        with self._lock:
            sessions.save(Path(path), self.chat, self.setup)

    def load(self, path: str | Path) -> None:
        """Go on from a file. Raises SessionError, with this chat untouched, where it does not belong or fit."""
        with self._lock:
            sessions.load(Path(path), self.chat, self.setup)
