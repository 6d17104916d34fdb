"""Opens a chat by its options. Its progress is shown, and its conversation outlives an abort."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvcompose_local.chat_options import ChatOptions
from kvcompose_local.errors import KVComposeError
from kvcompose_local.install.resources import state_folder
from kvcompose_local.terminal.status import Status

if TYPE_CHECKING:
    from kvcompose_local.api import LocalChat
    from kvcompose_local.chat import Chat
    from kvcompose_local.interrupts import Interrupts
    from kvcompose_local.llama_ffi.loading import Loading


def begin_loading(context: click.Context, model: str | None, options: ChatOptions) -> Loading | None:
    """Let another thread load a model that is there; None where something is wrong, which is told in its turn."""
    from kvcompose_local.install import models
    from kvcompose_local.install.model_files import check_gguf

    try:
        path = models.resolve(model, pull=False)
        check_gguf(path)
    except KVComposeError:
        return None
    from kvcompose_local.llama_ffi.devices import layers_to_offload
    from kvcompose_local.llama_ffi.loading import Loading

    n_layers = layers_to_offload(path, options.gpu_layers, n_ctx=options.n_ctx, budget=options.budget)
    loading = Loading(path, gpu_layers=n_layers)
    context.call_on_close(loading.close)
    return loading


def fetched(model: str | None, status: Status) -> Path:
    """The file of a model, which is fetched where it is known by name. Raises ModelError for what cannot chat."""
    from kvcompose_local.install import models
    from kvcompose_local.install.model_files import check_gguf

    path = models.resolve(model, pull=True, progress=status.fetching)
    check_gguf(path)
    return path


@contextlib.contextmanager
def open_chat(
    path: Path, options: ChatOptions, *, interrupts: Interrupts, status: Status, load: Loading | None = None
) -> Iterator[LocalChat]:
    """The chat, closed in the end; load: of the same model, begun earlier."""
    # llama.cpp is loaded only now, so that wrong usage and --help answer at once.
    from kvcompose_local.api import LocalChat
    from kvcompose_local.llama_ffi.library import found
    from kvcompose_local.llama_ffi.model import Model

    if load is not None:  # it takes of the memory that decides the number
        options = replace(options, gpu_layers=load.gpu_layers)
    with interrupts.caught():  # an exception would be lost in native frames
        local = LocalChat(
            path,
            options,
            on_compaction=status.compacted,
            on_loading=lambda done, total: status.progress("loading:", done, total, "%"),
            on_reading=status.reading,
            on_compacting=lambda done, total: status.progress("compacting:", done, total),
            on_rebuild=lambda n: status.line(f"going back takes reading {n} tokens again"),
            on_note=status.line,
            should_stop=interrupts,
            load=load or Model,
        )
    with local:
        if interrupts.requested:  # after anybody had looked at it
            raise KeyboardInterrupt
        if local.memory.engine.name == "stock" and options.budget < 1:
            status.line(
                "stock engine: every layer keeps equally many cells, which forgets more than it must; "
                f"{found.why_stock}"
            )
        with saved_on_abort(local.chat):
            try:
                yield local
            finally:
                status.settle()


@contextlib.contextmanager
def saved_on_abort(chat: Chat) -> Iterator[None]:
    """Write the transcript down if llama.cpp aborts meanwhile, as it does when a worker is lost."""
    from kvcompose_local.llama_ffi.library import on_abort

    def save(_reason: str) -> None:
        messages = chat.messages + ([{"role": "assistant", "content": chat.answering}] if chat.answering else [])
        if messages:
            try:
                path = state_folder() / f"lost-{os.getpid()}.json"
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                path.touch(mode=0o600)
            except OSError:
                path = Path(tempfile.mkstemp(prefix="kvcompose-lost-", suffix=".json")[1])
            path.write_text(json.dumps(messages, ensure_ascii=False, indent=1), encoding="utf-8")
            print(f"the conversation is kept in {path}", file=sys.stderr, flush=True)

    on_abort.append(save)
    try:
        yield
    finally:
        on_abort.remove(save)
