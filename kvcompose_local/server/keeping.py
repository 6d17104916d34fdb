"""The chats that are kept: their texts on disk, their cells in memory and then on disk, the oldest out first.

A chat is two files of one folder, which is its model's: ``ID.json`` holds its text, is written before a client is told
that the answer is whole, and is all that is promised; ``ID.kvc`` holds its cells, as
:mod:`kvcompose_local.chat.sessions` writes them, so that they need not be read again. A *prefix* is a chat without
messages: a system prompt and tools that other chats begin with. It has cells alone, in ``prefix-DIGEST.kvc``, and what
tells which chats begin so in ``prefix-DIGEST.marks``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from kvcompose_local.chat import ChatState, Message
from kvcompose_local.chat.comparing import told
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.composing.scorer import DTYPE
from kvcompose_local.errors import KVComposeError
from kvcompose_local.install.files import own_folder, replacing
from kvcompose_local.interfaces import Lazy

log = logging.getLogger("kvcompose_local.server")

#: Chats whose texts are kept; beyond that the oldest are forgotten.
MOST_CHATS = 10_000
#: Version of a chat's text on disk.
_FORMAT = 1
_ID = re.compile(r"[0-9a-f]{16}")
_TITLE = 60

#: A digest of each message, and how many characters it has; the first is of the tools.
Marks = tuple[tuple[bytes, int], ...]


def marks_of(messages: Sequence[Message], tools: str) -> Marks:
    """What tells which conversations begin alike; what the model thought does not count."""
    return ((_digest(tools), len(tools)), *map(_mark, messages))


def _mark(message: Message) -> tuple[bytes, int]:
    text = json.dumps([message["role"], *told(message)])
    return _digest(text), len(text)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def n_alike(one: Marks, other: Marks) -> int:
    """How many messages two conversations share from their beginning, the tools among them."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@dataclass
class Kept:
    """A chat that is kept.

    state: its cells in memory, None where they are not; n_bytes: of that; is_small: whether they were compacted to be
    kept; is_stale: whether the chat has gone on since; file_bytes: of its cells on disk, 0 where they are not there;
    is_written: whether these stem from its last turn.
    """

    id: str
    created: float
    used: float
    marks: Marks
    title: str = ""
    n_tokens: int = 0
    began: float = 0.0
    is_prefix: bool = False
    state: ChatState | None = None
    n_bytes: int = 0
    is_small: bool = False
    is_stale: bool = False
    file_bytes: int = 0
    is_written: bool = False
    text_bytes: int = 0

    @property
    def n_messages(self) -> int:
        return len(self.marks) - 1


class Keeping:
    """All chats of one model. For the engine's thread; any thread may call :meth:`listed` and :meth:`text`, and count.

    folder: where they are written, None for nowhere; bound: bytes of cells in memory; disk_bound: of all files; write:
    writes a state to a file and returns its bytes.
    """

    def __init__(
        self, folder: Path | None, bound: int, disk_bound: int, write: Callable[[Path, ChatState], int]
    ) -> None:
        self.folder, self.bound, self.disk_bound = folder, bound, disk_bound
        self._write = write
        self._chats: dict[str, Kept] = {}
        self._lock = threading.Lock()
        self._lock_file: BinaryIO | None = None
        if folder is not None:
            own_folder(folder)
            self._lock_file = _locked(folder)
            if self._lock_file is None:
                log.warning("another server keeps its chats in %s: this one keeps them in memory alone", folder)
                self.folder = None
        self._find()

    def close(self) -> None:
        """Let another server have the folder."""
        if self._lock_file is not None:
            self._lock_file.close()

    # -- what there is ------------------------------------------------------------------------------------------------

    def __contains__(self, kept: Kept) -> bool:
        with self._lock:
            return self._chats.get(kept.id) is kept

    def __iter__(self) -> Iterator[Kept]:
        with self._lock:
            return iter([*self._chats.values()])

    def get(self, chat_id: str) -> Kept | None:
        """A chat of that name, no prefix."""
        with self._lock:
            found = self._chats.get(chat_id)
        return None if found is None or found.is_prefix else found

    @property
    def n_bytes(self) -> int:
        """Bytes of cells in memory."""
        return sum(kept.n_bytes for kept in self)

    @property
    def disk_bytes(self) -> int:
        """Bytes of all files."""
        return sum(kept.file_bytes + kept.text_bytes for kept in self)

    def best(self, marks: Marks, n: int) -> list[Kept]:
        """The ``n`` chats that share most with a conversation, the best first; of equal ones the last used."""
        shared = [(sum(size for _, size in marks[: n_alike(marks, kept.marks)]), kept.used, kept) for kept in self]
        found = sorted((x for x in shared if n_alike(marks, x[2].marks) > 1), key=lambda x: x[:2], reverse=True)
        return [kept for *_, kept in found[:n]]

    # -- what comes ---------------------------------------------------------------------------------------------------

    def new(self) -> Kept:
        """A chat that nobody knows yet."""
        now = time.time()
        return Kept(secrets.token_hex(8), now, now, ())

    def prefix(self, messages: Sequence[Message], tools: str, state: ChatState) -> Kept:
        """Keep what other chats begin with."""
        marks = marks_of(messages, tools)
        digest = hashlib.blake2b(b"".join(digest for digest, _ in marks), digest_size=8).hexdigest()
        now = time.time()
        kept = Kept(f"prefix-{digest}", now, now, marks, n_tokens=len(state.memory.tokens), is_prefix=True)
        with self._lock:
            self._chats[kept.id] = kept
        self.hold(kept, state, is_small=False)
        return kept

    def tell(
        self, kept: Kept, messages: Sequence[Message], tools: str, n_tokens: int, began: float, model: str
    ) -> None:
        """A chat says this now. It is on disk when this returns, unless the disk refuses, which is logged."""
        kept.used, kept.marks, kept.n_tokens, kept.began = time.time(), marks_of(messages, tools), n_tokens, began
        first = next((m["content"] for m in messages if m["role"] == "user"), "")
        kept.title = " ".join(first[: 4 * _TITLE].split())[:_TITLE]
        kept.is_stale, kept.is_written = True, False  # cells that are held or written stem from an earlier turn
        with self._lock:
            self._chats[kept.id] = kept
        if self.folder is None:
            kept.text_bytes = 0
            self._texts[kept.id] = (tuple(messages), tools)
        else:
            text = {"format": _FORMAT, "model": model, "created": kept.created, "used": kept.used, "began": began}
            text |= {"tools": tools, "messages": list(messages), "n_tokens": n_tokens}
            raw = json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass")
            try:
                with replacing(self.folder / f"{kept.id}.json") as file:
                    file.write(raw)
                kept.text_bytes = len(raw)
            except KVComposeError as error:
                log.error("chat %s is not on disk: %s", kept.id, error)
        self._forget_oldest()

    def hold(self, kept: Kept, state: ChatState, *, is_small: bool) -> None:
        """Keep its cells in memory; :meth:`make_room` says what else must go."""
        kept.state, kept.n_bytes = compact(state)
        kept.is_small, kept.is_stale, kept.is_written = is_small, False, False

    def touch(self, kept: Kept) -> None:
        """It was used now."""
        kept.used = time.time()

    # -- what goes ----------------------------------------------------------------------------------------------------

    def over(self) -> int:
        """Bytes in memory beyond the bound."""
        return max(self.n_bytes - self.bound, 0)

    def shrinkable(self) -> tuple[Kept, ChatState] | None:
        """The chat used longest ago that has all its cells still, and these."""
        found = [(kept, kept.state) for kept in self if kept.state and not (kept.is_small or kept.is_stale)]
        return min(found, key=lambda pair: pair[0].used, default=None)

    def drop_stale(self, n_bytes: int) -> None:
        """Forget cells of earlier turns, the oldest first, until there is room for so many bytes more, or none left."""
        for kept in sorted(self, key=lambda kept: kept.used):
            if self.n_bytes + n_bytes > self.bound and kept.is_stale:
                kept.state, kept.n_bytes = None, 0

    def evict(self) -> bool:
        """Let the cells used longest ago be on disk alone; returns whether there were any."""
        found = [kept for kept in self if kept.state is not None]
        if not found:
            return False
        oldest = min(found, key=lambda kept: kept.used)
        self.write(oldest)
        oldest.state, oldest.n_bytes = None, 0
        return True

    def write(self, kept: Kept) -> None:
        """Have a chat's cells on disk, where there is one that takes them."""
        if self.folder is None or kept.state is None or kept.is_written or kept.is_stale:
            return
        path = self.file_of(kept)
        if path is None or kept.n_bytes > self.disk_bound:
            return
        try:
            if kept.is_prefix:
                marks = [[mark.hex(), size] for mark, size in kept.marks]
                with replacing(path.with_suffix(".marks")) as file:
                    file.write(json.dumps(marks).encode())
            kept.file_bytes, kept.is_written = self._write(path, kept.state), True
        except KVComposeError as error:
            log.warning("the cells of chat %s are not on disk: %s", kept.id, error)
        for other in sorted(self, key=lambda kept: kept.used):
            if self.disk_bytes > self.disk_bound and other is not kept and other.file_bytes:
                self.forget_file(other)

    def unwritten(self) -> Kept | None:
        """The chat used last whose cells are in memory alone."""
        if self.folder is None:
            return None
        found = [k for k in self if k.state is not None and not k.is_written and not k.is_stale]
        return max(found, key=lambda kept: kept.used, default=None)

    def forget(self, kept: Kept) -> None:
        """Forget all of a chat, its files as well."""
        with self._lock:
            self._chats.pop(kept.id, None)
            self._texts.pop(kept.id, None)
        kept.state, kept.n_bytes = None, 0
        self.forget_file(kept)
        if self.folder is not None and not kept.is_prefix:
            (self.folder / f"{kept.id}.json").unlink(missing_ok=True)

    def file_of(self, kept: Kept) -> Path | None:
        """Where its cells are on disk, or would be."""
        return None if self.folder is None else self.folder / f"{kept.id}.kvc"

    def forget_file(self, kept: Kept) -> None:
        """Forget its cells on disk."""
        kept.file_bytes, kept.is_written = 0, False
        if (path := self.file_of(kept)) is not None:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _forget_oldest(self) -> None:
        chats = [kept for kept in self if not kept.is_prefix]
        for kept in sorted(chats, key=lambda kept: kept.used)[: max(len(chats) - MOST_CHATS, 0)]:
            self.forget(kept)

    # -- for others ---------------------------------------------------------------------------------------------------

    def listed(self) -> list[Kept]:
        """Chats as they are now, the last used first; copies, without cells."""
        chats = [replace(kept, state=None) for kept in self if not kept.is_prefix]
        return sorted(chats, key=lambda kept: kept.used, reverse=True)

    def text(self, chat_id: str) -> tuple[tuple[Message, ...], str] | None:
        """The messages and the tools of a chat, None where there is none."""
        if self.folder is None or self.get(chat_id) is None:
            return self._texts.get(chat_id)
        return _read(self.folder / f"{chat_id}.json")[0]

    # -- after a restart ----------------------------------------------------------------------------------------------

    def _find(self) -> None:
        """The chats that are on disk. What is damaged is left alone, and said."""
        self._texts: dict[str, tuple[tuple[Message, ...], str]] = {}
        if self.folder is None:
            return
        for path in self.folder.glob("*.json"):
            if not _ID.fullmatch(path.stem):
                continue
            try:
                (messages, tools), told = _read(path)
                kept = Kept(path.stem, float(told["created"]), float(told["used"]), marks_of(messages, tools))
                kept.n_tokens, kept.began = int(told["n_tokens"]), float(told["began"])
                first = next((m["content"] for m in messages if m["role"] == "user"), "")
                kept.title = " ".join(first[: 4 * _TITLE].split())[:_TITLE]
                kept.text_bytes = path.stat().st_size
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("%s is damaged: %s", path.name, " ".join(str(error).split())[:100])
                continue
            self._chats[kept.id] = kept
        for path in self.folder.glob("*.kvc"):
            with suppress(OSError):
                status = path.stat()
                found = self._chats.get(path.stem) or self._prefix_of(path, status.st_mtime)
                if found is None:
                    path.unlink()
                else:
                    found.file_bytes, found.is_written = status.st_size, True

    def _prefix_of(self, path: Path, used: float) -> Kept | None:
        """A prefix that is on disk: its marks stand in a file beside it."""
        name, _, digest = path.stem.partition("-")
        if name != "prefix" or not _ID.fullmatch(digest):
            return None
        try:
            raw = json.loads(path.with_suffix(".marks").read_text())
            marks = tuple((bytes.fromhex(mark), int(size)) for mark, size in raw)
        except (OSError, ValueError, TypeError):
            return None
        self._chats[path.stem] = Kept(path.stem, used, used, marks, is_prefix=True)
        return self._chats[path.stem]


def bytes_of_waiting(memory: CacheMemory, text: str) -> int:
    """Bytes that a chat of this text and these cells will take by :func:`compact`, without a part that moves on."""
    layout = memory.engine.layout()
    layers = zip(memory.engine.shape.layers, layout.composed, strict=True)
    a_row: int = DTYPE().itemsize + np.min_scalar_type(max(layout.position, 1)).itemsize
    n_bytes = memory.used_bytes + a_row * sum(layer.n_kv_heads * k for layer, k in layers)
    return n_bytes + array("i").itemsize * len(memory.tokens) + 2 * len(text)


def compact(state: ChatState) -> tuple[ChatState, int]:
    """The same with scores, origins and tokens as small as they can be, and its bytes."""
    memory, cells = state.memory, state.memory.cells
    scores = [plane.astype(DTYPE) for plane in memory.scores]
    width = np.min_scalar_type(max(cells.position, 1))
    origins = [plane.astype(width) for plane in memory.origins]
    arrays: list[npt.NDArray[Any]] = [*cells.keys, *cells.values, *scores, *origins, cells.state]
    arrays += [checkpoint.state for checkpoint in memory.checkpoints]
    tokens = array("i", memory.tokens)
    n_bytes = sum(plane.nbytes for plane in arrays) + tokens.itemsize * len(tokens) + 2 * len(state.fed)
    n = len(scores)
    small = replace(
        memory,
        tokens=cast("tuple[int, ...]", tokens),  # a list of Python's takes nine times as much
        scores=Lazy(n, lambda i: scores[i].astype(np.float32)),
        origins=Lazy(n, lambda i: origins[i].astype(np.int32)),
    )
    return replace(state, memory=small), n_bytes


def _read(path: Path) -> tuple[tuple[tuple[Message, ...], str], dict[str, Any]]:
    """The messages and tools of a file, and the rest of it. Raises OSError and ValueError."""
    told = json.loads(path.read_bytes())
    if not isinstance(told, dict) or told.get("format") != _FORMAT:
        raise ValueError("it is of another version")
    messages = tuple(told["messages"])
    if not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
        raise ValueError("its messages are none")
    return (messages, str(told["tools"])), told


def _locked(folder: Path) -> BinaryIO | None:
    """A file that says that the folder is used, None where another process has it."""
    file = open(folder / "lock", "ab")  # noqa: SIM115 - it is held as long as the server runs
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError:
        file.close()
        return None
    return file
