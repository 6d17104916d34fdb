"""Chats as files: all that a chat knows and all its cells, in a container that holds numbers and text and no code.

The container is safetensors. Its metadata are the manifest (JSON) and a checksum; its tensors, for layer ``l``::

    keys.l, values.l  U8 (K_l + n_live, row bytes)     scores.l  F32 (H, K_l)
    seen.l            F32 (H, at most K_l + n_live)    popularity.l  U8 (H, K_l)
    tokens            I32 (position,)                  pending   I32 (n,)           window   U8 (bytes,)
    text              U8 (bytes,): JSON of system prompt, messages, draft, the text that was fed, steps and pins

A file takes its name only when it is whole, and nothing of it is believed, allocated or handed on before its sizes and
its checksum, blake2b over every byte, were looked at.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import platformdirs
import psutil
from safetensors import SafetensorError, safe_open

from kvcompose_local import __version__
from kvcompose_local.chat import Chat, ChatState, Place, Step
from kvcompose_local.compaction import MemoryState
from kvcompose_local.errors import InvalidInput, KVComposeError, SessionError
from kvcompose_local.interfaces import CacheSnapshot, Lazy, ModelShape, Progress
from kvcompose_local.pin import read_pin
from kvcompose_local.popularity import packed
from kvcompose_local.resources import DISK_FULL, cache_folder, data_file, sha256_of

FORMAT = 4
#: Before there was popularity; it counts for nothing then.
_WITHOUT_POPULARITY = 3
SUFFIX = ".kvc"
#: The session that the REPL leaves behind when it was given none.
LAST = "last"
#: A manifest and the names of some hundred tensors take 100 kB.
_MAX_HEADER_BYTES = 4 << 20
_CHUNK = 1 << 20
#: Bytes of a file name, almost everywhere.
_LONGEST_NAME = 255
_CHECKSUM = b'"checksum": "'
_DIGITS = 64
_DTYPES = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4"), "U8": np.dtype("u1")}
_NAME = re.compile(r"[\w-][\w -]*")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Setup:
    """What a chat runs with, beside what its engine knows: the model's file, ``--cache-type`` and ``--budget``.

    file: the model as it was when it was loaded; what stands at its path may be another by now, or none.
    """

    model: Path
    cache_type: str
    budget: float
    file: BinaryIO | None = None


@dataclass(frozen=True)
class Manifest:
    """What a session was made with, and how many cells it holds; ``llama_cpp`` is the pin, ``composed`` K_l."""

    format: int
    program: str
    llama_cpp: str
    engine: str
    cache_type: str
    model_path: str
    model_sha256: str
    n_ctx: int
    budget: float
    composed: list[int]
    n_live: int
    position: int

    @classmethod
    def parse(cls, text: str) -> Manifest:
        """Raises SessionError for a manifest of another format, ValueError for what is none."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
        if (version := values.get("format")) not in (_WITHOUT_POPULARITY, FORMAT) and isinstance(version, int):
            raise SessionError(
                f"has format {version} and was made by version {str(values.get('program'))[:20]} of this program; "
                f"this is version {__version__}, which reads format {FORMAT}"
            )
        kinds = {"str": str, "int": int, "float": float, "list[int]": list}
        if values.keys() != {field.name for field in fields(cls)} or any(
            type(values[field.name]) is not kinds[str(field.type)] for field in fields(cls)
        ):
            raise ValueError("its values are not those of a manifest")
        manifest = cls(**values)
        _counts([manifest.n_ctx, manifest.n_live, manifest.position, *manifest.composed])
        if not (manifest.n_ctx and 0 < manifest.budget <= 1):
            raise ValueError("its numbers are out of range")
        return manifest


# -- names ------------------------------------------------------------------------------------------------------------


def sessions_folder() -> Path:
    """Where sessions with a plain name live; not made here."""
    return platformdirs.user_state_path("kvcompose-local") / "sessions"


def path_of(name: str) -> Path:
    """The file of a session: a plain name is one of the sessions folder, what has a slash or a suffix is a path."""
    path = Path(os.path.expanduser(name))
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


def _part_of(path: Path) -> Path:
    """What a session is written to before it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def check_writable(path: Path) -> None:
    """Raises SessionError where a session cannot be written for sure: better told before the chat than after it.

    Nor is a file replaced that is something else: ``-o notes.txt`` is soon typed for ``-o notes.kvc``.
    """
    folder = path.resolve().parent
    if path.is_dir():
        raise SessionError(f"{path} is a folder, and a session is a file")
    if path.exists() and not path.is_file():
        raise SessionError(f"{path} is a device or a pipe, and a session is a file: give another name")
    if len(os.fsencode(_part_of(path).name)) > _LONGEST_NAME:
        raise SessionError(f"a file name of {len(os.fsencode(path.name))} bytes is too long: give a shorter one")
    if folder == sessions_folder().resolve():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise SessionError(f"cannot make {folder}: {error.strerror or error}") from error
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise SessionError(f"cannot write to {folder}: make the folder, or give another path")
    if path.suffix != SUFFIX and path.is_file() and path.stat().st_size:
        try:
            read_manifest(path)
        except SessionError as error:
            raise SessionError(f"{path} is no session, and is not overwritten: give another name") from error


# -- the model's identity ---------------------------------------------------------------------------------------------


def model_digest(path: Path, progress: Progress | None = None, file: BinaryIO | None = None) -> str:
    """The sha256 of a model file, kept in the cache folder for the file's path, size and time of change.

    progress gets (MiB read, MiB in all); file: the open file, in place of what stands at the path. Raises SessionError
    when it cannot be read.
    """

    def in_mib(done: int, total: int) -> None:
        if progress is not None:
            progress(done >> 20, total >> 20)

    if file is not None and file.closed:
        raise SessionError("the model is closed")
    try:
        path = path.resolve()
        with open(path, "rb") if file is None else nullcontext(file) as model:
            status = os.fstat(model.fileno())
            key = json.dumps([str(path), status.st_size, status.st_mtime_ns])
            known = cache_folder() / "digests" / hashlib.sha256(key.encode()).hexdigest()
            with suppress(OSError, UnicodeDecodeError):
                if re.fullmatch("[0-9a-f]{64}", digest := known.read_text(encoding="ascii")):
                    return digest
            digest = sha256_of(model, in_mib)
    except OSError as error:
        raise SessionError(f"cannot read {path}: {error.strerror or error}") from error
    with suppress(SessionError), replacing(known) as kept:  # a cache that cannot be written costs time, nothing else
        kept.write(digest.encode())
    return digest


# -- saving -----------------------------------------------------------------------------------------------------------


def save(path: Path, chat: Chat, setup: Setup, progress: Progress | None = None) -> int:
    """Write a chat to a file, which is there either whole or as it was before; returns its bytes.

    Raises SessionError, with nothing left behind, where it cannot be written.
    """
    check_writable(path)
    digest = model_digest(setup.model, progress, setup.file)
    state = chat.view()  # all cells must not be in memory a second time
    cells = state.memory.cells
    manifest = Manifest(
        format=FORMAT,
        program=__version__,
        llama_cpp=_pin(),
        engine=chat.memory.engine.name,
        cache_type=setup.cache_type,
        model_path=str(setup.model.resolve()),
        model_sha256=digest,
        n_ctx=chat.memory.n_ctx,
        budget=float(setup.budget),
        composed=list(cells.composed),
        n_live=cells.n_live,
        position=cells.position,
    )
    arrays = _arrays_of(state)
    # Not the package's writer, which holds all cells in memory and tells a full disk as text only.
    head = _header(manifest, arrays)
    checksum = hashlib.blake2b(head, digest_size=_DIGITS // 2)
    with replacing(path) as file:
        file.write(head)
        for make in arrays.values():
            part = np.ascontiguousarray(make()).reshape(-1).view(np.uint8).data
            checksum.update(part)
            file.write(part)
        n_bytes = file.tell()
        file.seek(head.index(_CHECKSUM) + len(_CHECKSUM))
        file.write(checksum.hexdigest().encode())
    return n_bytes


def _arrays_of(state: ChatState) -> dict[str, Callable[[], Array]]:
    """What makes the tensors of a session, those of four bytes first, so that all of them are aligned."""
    memory, cells = state.memory, state.memory.cells
    text = {
        "system": state.system,
        "messages": state.messages,
        "draft": state.draft,
        "fed": state.fed,
        "steps": [[step.begin, step.n_messages, step.draft, step.answer] for step in state.steps],
        "pins": memory.pins,
    }
    arrays: dict[str, Callable[[], Array]] = {
        "tokens": lambda: np.array(memory.tokens, "<i4"),
        "pending": lambda: np.array(state.pending, "<i4"),
    }
    kinds: dict[str, Sequence[Array]] = {
        "scores": memory.scores,
        "seen": memory.seen,
        "popularity": memory.popularity,
        "keys": cells.keys,
        "values": cells.values,
    }
    for kind, planes in kinds.items():
        arrays |= {f"{kind}.{i}": partial(_plane, planes, i) for i in range(len(cells.composed))}
    raw = np.frombuffer(json.dumps(text).encode(), np.uint8)
    return arrays | {"window": lambda: cells.window, "text": lambda: raw}


def _plane(planes: Sequence[Array], i: int) -> Array:
    array = planes[i]
    return array if array.dtype == np.uint8 else array.astype("<f4")


def _header(manifest: Manifest, arrays: dict[str, Callable[[], Array]]) -> bytes:
    """The head of a safetensors file (its README, "Format"), with zeros for the checksum."""
    # No text inside can look like the checksum: quotes within JSON strings are escaped.
    metadata = {"checksum": "0" * _DIGITS, "manifest": json.dumps(asdict(manifest))}
    entries: dict[str, Any] = {"__metadata__": metadata}
    dtypes = {dtype: name for name, dtype in _DTYPES.items()}
    end = 0
    for name, make in arrays.items():
        array = make()
        begin, end = end, end + array.nbytes
        entries[name] = {"dtype": dtypes[array.dtype], "shape": array.shape, "data_offsets": [begin, end]}
    raw = json.dumps(entries).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path``, at once and on the disk, when the block ends well."""
    try:
        path = path.resolve()  # a link stays a link
        if any(path.is_relative_to(own.resolve()) for own in (sessions_folder(), cache_folder())):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_leftovers(path)
        part = _part_of(path)
        try:
            with open(part, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise SessionError(f"the disk is full: make room in {path.parent}, then save again") from error
        raise SessionError(f"cannot write {path}: {error.strerror or error}") from error


def _remove_leftovers(path: Path) -> None:
    """Delete what saves left that were killed."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        pid = part.name.split(".")[-2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a power cut, where the file system lets us: the file is there all the same."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _pin() -> str:
    return str(read_pin(data_file("patches")))


# -- loading ----------------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> Manifest:
    """What a session was made with. Raises SessionError for a file that is missing, damaged or none."""
    with _opened(path) as (manifest, _tensors):
        return manifest


def model_of(manifest: Manifest) -> str:
    """The path of the model that a session was made with. Raises SessionError where it is no longer there."""
    if not os.path.isfile(manifest.model_path):
        raise SessionError(f"the session's model is no longer at {manifest.model_path}: name it before --session")
    return manifest.model_path


def check_model(manifest: Manifest, setup: Setup, progress: Progress | None = None) -> None:
    """Raises SessionError where the session belongs to another model or cache type."""
    if model_digest(setup.model, progress, setup.file) != manifest.model_sha256:
        raise SessionError(
            f"the session belongs to another model: {Path(manifest.model_path).name}, not {setup.model.name}; "
            "`kvcompose-local run --session` without MODEL takes its own"
        )
    if setup.cache_type != manifest.cache_type:
        raise SessionError(
            f"the session's cells are {manifest.cache_type} and the cache is {setup.cache_type}: "
            f"start with --cache-type {manifest.cache_type}, or with --session and no --cache-type"
        )


def load(path: Path, chat: Chat, setup: Setup, progress: Progress | None = None) -> Manifest:
    """Replace a chat's conversation by that of a file.

    Raises SessionError, before the chat is touched, where the file is damaged, belongs to another model or cache type
    or does not fit.
    """
    with _opened(path) as (manifest, tensors):
        check_model(manifest, setup, progress)
        if manifest.position > chat.memory.n_ctx:  # before anything of that size is read
            raise SessionError(f"the session spans {manifest.position} positions: raise --ctx to that at least")
        state = _state_of(manifest, tensors, chat.memory.engine.shape)
        if state.memory.cells.window.size and manifest.llama_cpp != _pin():
            raise SessionError(f"the session's sliding windows are those of {manifest.llama_cpp}, and this is {_pin()}")
        before = chat.memory.position
        try:
            chat.restore(state)
        except KVComposeError as error:
            lost = "; the chat that was here is lost" if chat.memory.position < before else ""
            raise SessionError(f"it cannot be loaded: {error}{lost}") from error
    return manifest


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Manifest, Any]]:
    """The manifest and the tensors of a file whose checksum is right.

    Anything wrong with the file in this block is told as a SessionError.
    """
    try:
        # A pipe would keep a plain open waiting.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a plain file")
            head = file.read(8)
            if int.from_bytes(head, "little") > _MAX_HEADER_BYTES:
                raise ValueError("its header is too large")
            if status.st_size > psutil.virtual_memory().total:
                raise ValueError("it is larger than this machine's memory")
            with safe_open(path, "numpy") as tensors:
                if not os.path.samestat(status, os.stat(path)):
                    raise ValueError("it was replaced meanwhile")
                metadata = tensors.metadata() or {}
                manifest = Manifest.parse(metadata.get("manifest", "{}"))
                if metadata.get("checksum") != _checksum_of(file):
                    raise ValueError("its checksum is wrong")
                yield manifest, tensors
    except SessionError as error:
        raise SessionError(f"{path.name}: {error}") from error
    except OSError as error:
        raise SessionError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, RecursionError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise SessionError(f"{path} is damaged or no session ({reason})") from error


def _checksum_of(file: BinaryIO) -> str:
    """The checksum that a file should have: over all its bytes, with zeros in the checksum's place."""
    file.seek(0)
    head = file.read(8)
    head += file.read(int.from_bytes(head, "little"))
    at = head.find(_CHECKSUM) + len(_CHECKSUM)
    checksum = hashlib.blake2b(head[:at] + b"0" * _DIGITS + head[at + _DIGITS :], digest_size=_DIGITS // 2)
    while chunk := file.read(_CHUNK):
        checksum.update(chunk)
    return checksum.hexdigest()


def _state_of(manifest: Manifest, tensors: Any, shape: ModelShape) -> ChatState:
    """The state that the tensors hold, of which what is large is read when it is looked at.

    Raises ValueError unless there are just the tensors that belong there.
    """
    n_live, position = manifest.n_live, manifest.position
    if len(manifest.composed) != len(shape.layers) or max(manifest.composed) + n_live > position:
        raise ValueError("its cells are not those of this model")

    def check(name: str, dtype: str, *sizes: range) -> list[int]:
        """The shape of a tensor, which is not read yet."""
        view = tensors.get_slice(name)
        found = view.get_shape()
        if view.get_dtype() != dtype or len(found) != len(sizes):
            raise ValueError(f"tensor {name} is {view.get_dtype()} {found}")
        if not all(n in allowed for n, allowed in zip(found, sizes, strict=True)):
            raise ValueError(f"tensor {name} has shape {found}")
        return [*found]

    def tensor(name: str, dtype: str, *sizes: range) -> Array:
        check(name, dtype, *sizes)
        return tensors.get_tensor(name)  # type: ignore[no-any-return]

    kinds = ["scores", "seen", "keys", "values"]
    if manifest.format != _WITHOUT_POPULARITY:
        kinds.append("popularity")
    expected = {"tokens", "pending", "window", "text"} | {f"{k}.{i}" for k in kinds for i in range(len(shape.layers))}
    if set(tensors.keys()) != expected:
        raise ValueError("its tensors are not those of this model")
    for i, (layer, k) in enumerate(zip(shape.layers, manifest.composed, strict=True)):
        n = _only(k + n_live)
        check(f"scores.{i}", "F32", _only(layer.n_kv_heads), _only(k))
        if "popularity" in kinds:
            check(f"popularity.{i}", "U8", _only(layer.n_kv_heads), _only(k))
        check(f"seen.{i}", "F32", _only(layer.n_kv_heads), range(k + n_live + 1))
        _, width = check(f"keys.{i}", "U8", n, range(layer.row_bytes + 1))
        check(f"values.{i}", "U8", n, _only(layer.row_bytes - width))

    def planes(kind: str) -> Lazy:
        return Lazy(len(shape.layers), lambda i: tensors.get_tensor(f"{kind}.{i}"))

    def indifferent(i: int) -> Array:
        return packed(np.ones((shape.layers[i].n_kv_heads, manifest.composed[i]), np.float32))

    scores, seen, keys, values = map(planes, kinds[:4])
    popularity = planes("popularity") if "popularity" in kinds else Lazy(len(shape.layers), indifferent)
    anything = range(2**31)  # the file is there, so it is no larger than memory
    tokens = tensor("tokens", "I32", _only(position))
    pending = tensor("pending", "I32", anything)
    window = tensor("window", "U8", anything)
    text, pins = _text(tensor("text", "U8", anything).tobytes())
    cells = CacheSnapshot(tuple(manifest.composed), n_live, position, keys, values, window)
    memory = MemoryState(tuple(tokens.tolist()), scores, popularity, seen, cells, pins)
    return ChatState(**text, pending=tuple(pending.tolist()), memory=memory)


def _only(n: int) -> range:
    return range(n, n + 1)


def _text(raw: bytes) -> tuple[dict[str, Any], tuple[tuple[int, int], ...]]:
    """The text fields of a ChatState, and the pins. Raises ValueError where they are not what they should be."""
    text = json.loads(raw)
    if not isinstance(text, dict) or text.keys() != {"system", "messages", "draft", "fed", "steps", "pins"}:
        raise ValueError("its text is not that of a chat")
    if not all(isinstance(text[name], list) for name in ("messages", "steps", "pins")):
        raise ValueError("its text is not that of a chat")
    messages = tuple(text["messages"])
    roles = ("system", "user", "assistant")
    if not all(isinstance(m, dict) and m.keys() == {"role", "content"} and m["role"] in roles for m in messages):
        raise ValueError("its messages are not those of a chat")
    steps = []
    for begin, n_messages, draft, answer in text["steps"]:
        (count,) = _counts([n_messages])
        steps.append(Step(Place(*_two(begin)), count, draft, None if answer is None else Place(*_two(answer))))
    system = "" if text["system"] is None else text["system"]
    strings = [system, text["draft"], text["fed"], *(m["content"] for m in messages), *(step.draft for step in steps)]
    if not all(isinstance(string, str) for string in strings):
        raise ValueError("its text is not that of a chat")
    pins = tuple(_two(pin) for pin in text.pop("pins"))
    return {**text, "messages": messages, "steps": tuple(steps)}, pins


def _counts(values: Any) -> list[int]:
    """The same list. Raises ValueError unless it holds numbers from 0 on."""
    if not isinstance(values, list) or not all(type(n) is int and 0 <= n < 2**31 for n in values):
        raise ValueError("its numbers are out of range")
    return values


def _two(values: Any) -> tuple[int, int]:
    first, second = _counts(values)
    return first, second
