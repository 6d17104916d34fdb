"""Keeps chats that nobody saved: drafts of those that run, and earlier ones whose name another chat takes.

A draft is a session without cells beside the file that its chat is to be saved to: what was said, and its tokens, which
are read again. It is written after each turn, is a few times as large as the text, and goes when the chat is saved. One
that a crash leaves becomes the session.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvcompose_local.chat import Chat, ChatState, sessions
from kvcompose_local.chat.state import MemoryState
from kvcompose_local.errors import KVComposeError
from kvcompose_local.install.files import own_folder
from kvcompose_local.interfaces import CacheSnapshot, ModelShape, Progress

#: Chats without a name that are kept beside the last one, and the most bytes that they take together.
MOST_EARLIER, MOST_EARLIER_BYTES = 10, 2 << 30
_EARLIER = re.compile(rf"{sessions.LAST}-\d{{4}}-\d\d-\d\d(-\d+)?")
_DRAFT = re.compile(r"\.(.+)\.(\d+)\.draft")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In this block no other program of this user's looks which sessions there are, or writes one at its end.

    Two chats that end together would find the same name free.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(KVComposeError, OSError, ImportError):  # without it they are rarely so quick
            import fcntl  # not on Windows

            folder = sessions.sessions_folder()
            own_folder(folder)
            fcntl.flock(stack.enter_context(open(folder / "lock", "ab")), fcntl.LOCK_EX)
        yield


# -- drafts -----------------------------------------------------------------------------------------------------------


def draft_of(path: Path) -> Path:
    """The draft of this process for a session."""
    return path.with_name(f".{path.name}.{os.getpid()}.draft")


def write(path: Path, chat: Chat, setup: sessions.Setup, progress: Progress | None = None) -> int:
    """Write the draft of a chat that is to be saved to ``path``; returns its bytes. Raises SessionError."""
    state = _without_cells(chat.view(), chat.memory.engine.shape)
    return sessions.save_state(draft_of(path), state, chat.memory, setup, progress)


def remove(path: Path) -> None:
    """Remove the draft of this process, if there is one."""
    with contextlib.suppress(OSError):
        draft_of(path).unlink(missing_ok=True)


def recover(folder: Path) -> list[str]:
    """Make sessions of the drafts in a folder that a crash left; returns a line to say of each.

    A session that was there keeps all it holds, under another name.
    """
    told = []
    drafts = sorted((path for path in folder.glob(".*.draft") if _is_left(path)), key=_time_of)
    for draft in drafts:
        match = _DRAFT.fullmatch(draft.name)
        path = folder / (match[1] if match else draft.name)
        with contextlib.suppress(OSError):
            if path.exists() and path.stat().st_mtime_ns > draft.stat().st_mtime_ns:  # it was saved, then it crashed
                draft.unlink()
                continue
            aside = set_aside(path) if path.exists() else None
            draft.rename(path)
            earlier = f", and what was saved before as {aside.stem}" if aside else ""
            told.append(f"a chat ended without being saved: what was said is kept as {path.stem}{earlier}")
    return told


def _is_left(draft: Path) -> bool:
    """Whether a draft's process is gone; another one may have its number by now."""
    import psutil  # late: few starts find a draft

    match = _DRAFT.fullmatch(draft.name)
    if match is None:
        return False
    try:
        process = psutil.Process(int(match[2]))
        return process.status() == psutil.STATUS_ZOMBIE or bool(process.create_time() > draft.stat().st_mtime)
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError, OverflowError):
        return False


def _without_cells(state: ChatState, shape: ModelShape) -> ChatState:
    """The same chat before its tokens are read."""
    none = tuple(np.zeros((0, 0), np.uint8) for _ in shape.layers)
    rows = tuple(np.zeros((0, layer.row_bytes), np.uint8) for layer in shape.layers)
    cells = CacheSnapshot((0,) * len(shape.layers), 0, 0, none, rows, np.zeros(0, np.uint8))
    scores = tuple(np.zeros((layer.n_kv_heads, 0), np.float32) for layer in shape.layers)
    origins = tuple(np.zeros((layer.n_kv_heads, 0), np.int32) for layer in shape.layers)
    memory = MemoryState((), scores, origins, cells, state.memory.pins)
    return replace(state, memory=memory, pending=(*state.memory.tokens, *state.pending))


# -- earlier chats ----------------------------------------------------------------------------------------------------


def set_aside(path: Path) -> Path:
    """Give a session another name, of the day it was saved, so that another chat can have its own. Raises OSError."""
    day = time.strftime("%Y-%m-%d", time.localtime(path.stat().st_mtime))
    dated = path.with_name(f"{path.stem}-{day}{path.suffix}")
    return path.rename(sessions.beside(dated) if dated.exists() else dated)


def forget_oldest() -> list[str]:
    """Delete earlier chats without a name beyond what is kept, the oldest first; returns their names."""
    gone, n_bytes = [], 0
    earlier = [name for name in sessions.names() if _EARLIER.fullmatch(name)]
    for i, name in enumerate(earlier):
        with contextlib.suppress(OSError):
            path = sessions.path_of(name)
            n_bytes += path.stat().st_size
            if i >= MOST_EARLIER or (i and n_bytes > MOST_EARLIER_BYTES):
                path.unlink()
                gone.append(name)
    return gone


def _time_of(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0
