"""Chats as files: all that a chat knows and all its cells. They hold numbers and text, and no code.

The container is described in :mod:`kvcompose_local.chat.sections`. For layer ``l`` it holds::

    text      json U8 (bytes,): JSON of system prompt, messages, draft, the text that was fed, steps and pins
    tokens    read I32 (position,), pending I32 (n,)
    cells     keys.l, values.l U8 (K_l + n_live, row bytes)
    scores    scores.l F32 (H, K_l), origins.l I32 (H, K_l): the positions of their tokens
    scorer    weights.l F32 (H, F), places.l F32 (H, 3), furthest I32 (1,): what the scores are of, where something is
    window    bytes U8 (bytes,): llama.cpp's own cells of sliding-window layers and state of recurrent ones, if any
    checkpoints  positions I32 (n,), state.i U8 (bytes,): what the window was there, for the last turn to be taken back

A file gets its name when it is whole. Nothing of it is believed, allocated or handed on before its sizes and its
checksums were checked.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from kvcompose_local import __version__
from kvcompose_local.chat import Chat, ChatState, Place, Step, sections
from kvcompose_local.chat.checkpoints import LEAST, Checkpoint
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.chat.sections import Section, Sections
from kvcompose_local.chat.state import MemoryState
from kvcompose_local.composing.scorer import DTYPE as SCORER_DTYPE
from kvcompose_local.composing.scorer import Scorer
from kvcompose_local.errors import InvalidInput, KVComposeError, NoHome, SessionError
from kvcompose_local.install.files import own_folder, part_of
from kvcompose_local.install.model_files import OpenFiles, model_digest
from kvcompose_local.install.paths import path_in
from kvcompose_local.install.pin import read_pin
from kvcompose_local.install.resources import data_file, state_folder
from kvcompose_local.interfaces import CacheSnapshot, Lazy, ModelShape, Progress

FORMAT = 5
#: The newest version of each section that this program reads, and the one that it writes.
VERSIONS = {"text": 1, "tokens": 1, "cells": 1, "scores": 1, "scorer": 1, "window": 1, "checkpoints": 1}
SUFFIX = ".kvc"
#: The session that the REPL saves a chat as when it was given none.
LAST = "last"
#: The most bytes of a file name, almost everywhere.
_LONGEST_NAME = 255
_NAME = re.compile(r"[\w-][\w -]*")
#: Texts of a ChatState, and fields that are left out where they are empty, as in older files.
_STRINGS = ("draft", "fed")
_OPTIONAL: dict[str, type] = {"template": str, "began": float, "tools": str}

#: What messages hold where the model calls tools (:mod:`kvcompose_local.chat.tools`).
_TOOL_KEYS = ("tool_calls", "tool_call_id", "name")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Setup:
    """What a chat runs with and its engine does not know: the model's file, ``--cache-type`` and ``--budget``.

    files: of the model, where it is loaded.
    """

    model: Path
    cache_type: str
    budget: float
    files: OpenFiles | None = None


@dataclass(frozen=True)
class Manifest:
    """What a session was made with, and how many cells it holds.

    llama_cpp: the pin; rope_factors: of :class:`ModelShape`; composed: K_l.
    """

    format: int
    program: str
    llama_cpp: str
    engine: str
    cache_type: str
    rope_factors: str
    model_path: str
    model_sha256: str
    n_ctx: int
    budget: float
    composed: list[int]
    n_live: int
    position: int

    @classmethod
    def parse(cls, text: str) -> Manifest:
        """Raises SessionError for a manifest of another format, ValueError for any other text."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
        version = values.get("format")
        if version != FORMAT and type(version) is int:
            raise SessionError(
                f"has format {version} and was made by version {str(values.get('program'))[:20]} of this program; "
                f"this is version {__version__}, which reads format {FORMAT}"
            )
        kinds = {"str": str, "int": int, "float": float, "list[int]": list}
        if values.keys() != {field.name for field in fields(cls)} or any(
            type(values[field.name]) is not kinds[str(field.type)] for field in fields(cls)
        ):
            raise ValueError("its values are no manifest's")
        manifest = cls(**values)
        _counts([manifest.n_ctx, manifest.n_live, manifest.position, *manifest.composed])
        if not (manifest.n_ctx and 0 < manifest.budget <= 1):
            raise ValueError("its numbers are out of range")
        return manifest


# -- names ------------------------------------------------------------------------------------------------------------


def sessions_folder() -> Path:
    """Where sessions with a plain name live; not made here. Raises NoHome."""
    return state_folder() / "sessions"


def path_of(name: str) -> Path:
    """The file of a session: a plain name belongs to the sessions folder, a name with a slash or a suffix is a path.

    Raises InvalidInput for an impossible name, NoHome for a plain name where there is no such folder.
    """
    path = path_in(name)
    try:
        os.lstat(path)
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            raise InvalidInput(f"no file can have that name of {len(os.fsencode(name))} bytes: give another") from error
    if os.sep in name or (os.altsep and os.altsep in name) or path.suffix:
        return path
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"{name!r} cannot name a session: use letters, digits, - and _, or give a path")
    return sessions_folder() / (name + SUFFIX)


def version_of(path: Path) -> tuple[int, ...]:
    """What another chat changes by saving to the file; () where there is none."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


def beside(path: Path) -> Path:
    """A file next to this one that is not there yet: notes-2.kvc for notes.kvc."""
    numbered = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in itertools.count(2))
    return next(other for other in numbered if not other.exists())


def names() -> list[str]:
    """The sessions of the sessions folder, newest first."""
    found = []
    with suppress(OSError):
        found = [(path.stat().st_mtime_ns, path.stem) for path in sessions_folder().glob(f"*{SUFFIX}")]
    return [name for _, name in sorted(found, reverse=True) if _NAME.fullmatch(name)]


def check_writable(path: Path) -> None:
    """Raises SessionError where a session certainly cannot be written: it is better to know before the chat than after.

    A file that is no session is not replaced either: ``-o notes.txt`` is soon typed for ``-o notes.kvc``.
    """
    folder = path.resolve().parent
    if path.is_dir():
        raise SessionError(f"{path} is a folder, and a session is a file")
    if path.exists() and not path.is_file():
        raise SessionError(f"{path} is a device or a pipe, and a session is a file: give another name")
    if len(os.fsencode(part_of(path).name)) > _LONGEST_NAME:
        raise SessionError(f"a file name of {len(os.fsencode(path.name))} bytes is too long: give a shorter one")
    with suppress(NoHome):
        if folder == sessions_folder().resolve():
            own_folder(folder)
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise SessionError(f"cannot write to {folder}: make the folder, or give another path")
    if path.suffix != SUFFIX and path.is_file() and path.stat().st_size:
        try:
            read_manifest(path)
        except SessionError as error:
            raise SessionError(f"{path} is no session, and is not overwritten: give another name") from error


# -- saving -----------------------------------------------------------------------------------------------------------


def save(path: Path, chat: Chat, setup: Setup, progress: Progress | None = None) -> int:
    """Write a chat to a file, which is there either whole or as it was before; returns its bytes.

    Raises SessionError, with nothing left behind, where it cannot be written.
    """
    check_writable(path)
    return save_state(path, chat.view(), chat.memory, setup, progress)  # all cells must not be in memory a second time


def save_state(
    path: Path, state: ChatState, memory: CacheMemory, setup: Setup, progress: Progress | None = None
) -> int:
    """Write the state of a chat with a model; memory: any of the same engine. Otherwise as :func:`save`."""
    digest = model_digest(setup.model, progress, setup.files)
    cells = state.memory.cells
    manifest = Manifest(
        format=FORMAT,
        program=__version__,
        llama_cpp=_pin(),
        engine=memory.engine.name,
        cache_type=setup.cache_type,
        rope_factors=memory.engine.shape.rope_factors,
        model_path=os.path.abspath(setup.model),  # not where links lead: shards are found by the names of links
        model_sha256=digest,
        n_ctx=memory.n_ctx,
        budget=float(setup.budget),
        composed=list(cells.composed),
        n_live=cells.n_live,
        position=cells.position,
    )
    return sections.write(path, json.dumps(asdict(manifest)), _sections_of(state))


def _sections_of(state: ChatState) -> dict[str, Section]:
    """What a session is made of."""
    memory, cells = state.memory, state.memory.cells
    text = {name: getattr(state, name) for name in (*_STRINGS, "system", "messages")}
    text |= {name: value for name in _OPTIONAL if (value := getattr(state, name))}
    text["steps"] = [[step.begin, step.n_messages, step.draft, step.answer] for step in state.steps]
    text["pins"] = memory.pins
    raw = np.frombuffer(json.dumps(text).encode(), np.uint8)

    def planes(**kinds: Sequence[Array]) -> dict[str, Callable[[], Array]]:
        layers = range(len(cells.composed))
        return {f"{kind}.{i}": partial(_plane, arrays, i) for kind, arrays in kinds.items() for i in layers}

    made: dict[str, dict[str, Callable[[], Array]]] = {
        "text": {"json": lambda: raw},
        "tokens": {
            "read": lambda: np.array(memory.tokens, "<i4"),
            "pending": lambda: np.array(state.pending, "<i4"),
        },
        "scores": planes(scores=memory.scores, origins=memory.origins),
        "cells": planes(keys=cells.keys, values=cells.values),
    }
    if (scorer := memory.scorer) is not None and any(cells.composed):  # which these cells go on by
        made["scorer"] = planes(weights=scorer.weights, places=scorer.places)
        made["scorer"]["furthest"] = lambda: np.array([scorer.furthest], "<i4")
    if cells.state.size:
        made["window"] = {"bytes": lambda: cells.state}
    if memory.checkpoints:
        positions = [checkpoint.position for checkpoint in memory.checkpoints]
        made["checkpoints"] = {"positions": lambda: np.array(positions, "<i4")}
        for i, checkpoint in enumerate(memory.checkpoints):
            made["checkpoints"][f"state.{i}"] = partial(np.asarray, checkpoint.state)
    return {name: Section(VERSIONS[name], arrays, name != "checkpoints") for name, arrays in made.items()}


def _plane(planes: Sequence[Array], i: int) -> Array:
    array = planes[i]
    return array if array.dtype in (np.uint8, np.int32) else array.astype("<f4")


def _pin() -> str:
    return str(read_pin(data_file("patches")))


# -- loading ----------------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> Manifest:
    """What a session was made with. Raises SessionError for a file that is missing, damaged or none."""
    with opened(path) as (manifest, _parts):
        return manifest


def model_of(manifest: Manifest) -> str:
    """The path of the model that a session was made with. Raises SessionError where it is no longer there."""
    if not os.path.isfile(manifest.model_path):
        raise SessionError(f"the session's model is no longer at {manifest.model_path}: name it before --session")
    return manifest.model_path


def check_model(manifest: Manifest, setup: Setup, progress: Progress | None = None) -> None:
    """Raises SessionError where the session belongs to another model or cache type."""
    if model_digest(setup.model, progress, setup.files) != manifest.model_sha256:
        own = Path(manifest.model_path)
        if own.name == setup.model.name:
            raise SessionError(f"the session belongs to another model: {own.name} was another file when it was saved")
        raise SessionError(
            f"the session belongs to another model: {own.name}, not {setup.model.name}; "
            "`kvcompose-local run --session` without MODEL takes its own"
        )
    if setup.cache_type != manifest.cache_type:
        raise SessionError(
            f"the session's cells are {manifest.cache_type} and the cache is {setup.cache_type}: "
            f"start with --cache-type {manifest.cache_type}, or with --session and no --cache-type"
        )


def load(path: Path, chat: Chat, setup: Setup, progress: Progress | None = None) -> Manifest:
    """Put the conversation of a file in the place of a chat's own.

    Raises SessionError, before the chat is touched, where the file is damaged, belongs to another model or cache type
    or does not fit.
    """
    with opened(path) as (manifest, parts):
        check_model(manifest, setup, progress)
        state = _fitting_state(manifest, parts, chat.memory)
        before = chat.memory.position
        try:
            chat.restore(state)
        except KVComposeError as error:
            lost = "; the chat that was here is lost" if chat.memory.position < before else ""
            raise SessionError(f"it cannot be loaded: {error}{lost}") from error
    return manifest


def read_state(path: Path, memory: CacheMemory, setup: Setup) -> ChatState:
    """The state in a file, for a chat with this memory's engine. Raises SessionError as :func:`load`."""
    with opened(path) as (manifest, parts):
        check_model(manifest, setup)
        state = _fitting_state(manifest, parts, memory)
        held, cells = state.memory, state.memory.cells
        cells = replace(cells, keys=tuple(cells.keys), values=tuple(cells.values))
        return replace(state, memory=replace(held, scores=tuple(held.scores), origins=tuple(held.origins), cells=cells))


def _fitting_state(manifest: Manifest, parts: Sections, memory: CacheMemory) -> ChatState:
    """The state that the sections hold. Raises SessionError where a chat with this memory cannot have it."""
    shape = memory.engine.shape
    if manifest.position > memory.n_ctx:  # before anything of that size is read
        raise SessionError(f"the session spans {manifest.position} positions: raise --ctx to that at least")
    if manifest.rope_factors != shape.rope_factors:  # its keys were turned by others than the next ones will be
        raise SessionError(
            f"the session was made with the model's {manifest.rope_factors or 'only'} RoPE factors, and this chat "
            f"has its {shape.rope_factors or 'only'} ones: start with --ctx {manifest.n_ctx}"
        )
    state = _state_of(manifest, parts, shape)
    if state.memory.cells.state.size and manifest.llama_cpp != _pin():
        raise SessionError(
            f"the session's sliding windows or recurrent states were made by {manifest.llama_cpp}, and this is {_pin()}"
        )
    return state


@contextmanager
def opened(path: Path) -> Iterator[tuple[Manifest, Sections]]:
    """The manifest and the sections of a file whose checksums are right.

    Anything wrong with the file in this block is told as a SessionError.
    """
    try:
        with sections.opened(path, VERSIONS, check=Manifest.parse) as (manifest, parts):
            yield Manifest.parse(manifest), parts
    except SessionError as error:
        raise SessionError(f"{path.name}: {error}") from error
    except OSError as error:
        raise SessionError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, RecursionError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise SessionError(f"{path} is damaged or no session ({reason})") from error


def _state_of(manifest: Manifest, parts: Sections, shape: ModelShape) -> ChatState:
    """The state that the sections hold; cells and scores are read when they are looked at.

    Raises ValueError unless the tensors are exactly the expected ones.
    """
    n_live, position = manifest.n_live, manifest.position
    if len(manifest.composed) != len(shape.layers) or max(manifest.composed) + n_live > position:
        raise ValueError("its cells do not belong to this model")

    def tensor(name: str, dtype: str, *sizes: range) -> Array:
        parts.shape(name, dtype, *sizes)
        return parts.array(name)

    def planes(kind: str) -> Lazy[Array]:
        return Lazy(len(shape.layers), lambda i: parts.array(f"{kind}.{i}"))

    for section, kinds in (("cells", ("keys", "values")), ("scores", ("scores", "origins"))):
        if parts.names(section) != {f"{kind}.{i}" for kind in kinds for i in range(len(shape.layers))}:
            raise ValueError(f"its {section} do not belong to this model")
    for i, (layer, k) in enumerate(zip(shape.layers, manifest.composed, strict=True)):
        n, heads = _only(k + n_live), _only(layer.n_kv_heads)
        parts.shape(f"scores/scores.{i}", "F32", heads, _only(k))
        parts.shape(f"scores/origins.{i}", "I32", heads, _only(k))
        _, width = parts.shape(f"cells/keys.{i}", "U8", n, range(layer.row_bytes + 1))
        parts.shape(f"cells/values.{i}", "U8", n, _only(layer.row_bytes - width))
    anything = range(2**31)  # the file is there, so it is no larger than memory
    tokens = tensor("tokens/read", "I32", _only(position))
    pending = tensor("tokens/pending", "I32", anything)
    has_window = "window" in parts.versions
    window = tensor("window/bytes", "U8", anything) if has_window else np.zeros(0, np.uint8)
    text, pins = _text(tensor("text/json", "U8", anything).tobytes())
    composed = tuple(manifest.composed)
    cells = CacheSnapshot(composed, n_live, position, planes("cells/keys"), planes("cells/values"), window)
    scorer = _scorer_of(parts, shape) if "scorer" in parts.versions else None
    scores, origins = planes("scores/scores"), planes("scores/origins")
    checkpoints = _checkpoints_of(parts) if "checkpoints" in parts.versions else ()
    memory = MemoryState(tuple(tokens.tolist()), scores, origins, cells, pins, scorer, checkpoints)
    return ChatState(**text, pending=tuple(pending.tolist()), memory=memory)


def _checkpoints_of(parts: Sections) -> tuple[Checkpoint, ...]:
    """The checkpoints of the last turn. Raises ValueError where they are none."""
    parts.shape("checkpoints/positions", "I32", range(1, LEAST + 1))
    positions = parts.array("checkpoints/positions").tolist()
    if parts.names("checkpoints") != {"positions", *(f"state.{i}" for i in range(len(positions)))}:
        raise ValueError("its checkpoints are none")
    for i in range(len(positions)):
        parts.shape(f"checkpoints/state.{i}", "U8", range(1, 2**31))
    return tuple(Checkpoint(position, parts.array(f"checkpoints/state.{i}")) for i, position in enumerate(positions))


def _scorer_of(parts: Sections, shape: ModelShape) -> Scorer:
    """The scorer that the cells were scored by. Raises ValueError where it is none of this model."""
    layers = range(len(shape.layers))
    names = {f"{kind}.{i}" for kind in ("weights", "places") for i in layers} | {"furthest"}
    if parts.names("scorer") != names:
        raise ValueError("its scorer is not of this model")
    for i, layer in enumerate(shape.layers):
        parts.shape(f"scorer/weights.{i}", "F32", _only(layer.n_kv_heads), range(1, 2**20))
        parts.shape(f"scorer/places.{i}", "F32", _only(layer.n_kv_heads), _only(3))
    parts.shape("scorer/furthest", "I32", _only(1))
    weights, places = ([parts.array(f"scorer/{kind}.{i}") for i in layers] for kind in ("weights", "places"))
    try:
        return Scorer(
            tuple(w.astype(SCORER_DTYPE) for w in weights), tuple(places), int(parts.array("scorer/furthest")[0])
        )
    except InvalidInput as error:
        raise ValueError(str(error)) from error


def _only(n: int) -> range:
    return range(n, n + 1)


def _text(raw: bytes) -> tuple[dict[str, Any], tuple[tuple[int, int], ...]]:
    """The text fields of a ChatState, and the pins. Raises ValueError where they are not what they should be."""
    text = json.loads(raw)
    needed = {*_STRINGS, "system", "messages", "steps", "pins"}
    if not isinstance(text, dict) or not needed <= text.keys() <= needed | {*_OPTIONAL}:
        raise ValueError("its text is no chat's")
    if not all(isinstance(text[name], list) for name in ("messages", "steps", "pins")):
        raise ValueError("its text is no chat's")
    kinds = dict.fromkeys(_STRINGS, str) | _OPTIONAL
    if not all(type(text.get(name, kind())) is kind for name, kind in kinds.items()):
        raise ValueError("its text is no chat's")
    if not 0 <= text.get("began", 0.0) < 2**32:  # seconds since 1970
        raise ValueError("it began at no time")
    if not isinstance(text["system"], str | None):
        raise ValueError("its system prompt is no text")
    messages = tuple(map(_message, text["messages"]))
    steps = []
    for begin, n_messages, draft, answer in text["steps"]:
        (count,) = _counts([n_messages])
        if not isinstance(draft, str):
            raise ValueError("its text is no chat's")
        steps.append(Step(Place(*_two(begin)), count, draft, None if answer is None else Place(*_two(answer))))
    pins = tuple(_two(pin) for pin in text.pop("pins"))
    return {**text, "messages": messages, "steps": tuple(steps)}, pins


def _message(message: Any) -> dict[str, str]:
    """The same message. Raises ValueError for what is none."""
    if (
        not isinstance(message, dict)
        or not {"role", "content"} <= message.keys() <= {"role", "content", "reasoning", *_TOOL_KEYS}
        or not all(isinstance(value, str) for value in message.values())
        or message["role"] not in ("system", "user", "assistant", "tool")
    ):
        raise ValueError("its messages are no chat's")
    return message


def _counts(values: Any) -> list[int]:
    """The same list. Raises ValueError unless it holds numbers from 0 on."""
    if not isinstance(values, list) or not all(type(n) is int and 0 <= n < 2**31 for n in values):
        raise ValueError("its numbers are out of range")
    return values


def _two(values: Any) -> tuple[int, int]:
    first, second = _counts(values)
    return first, second
