"""The chat templates that llama.cpp knows by name and renders without Jinja."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from kvcompose_local.errors import ModelError
from kvcompose_local.llama_ffi.library import lib

if TYPE_CHECKING:
    from datetime import datetime

    from kvcompose_local.chat.rendering import Renderer


def builtin_templates() -> list[str]:
    """Names of the templates that llama.cpp renders without Jinja."""
    n = lib.llama_chat_builtin_templates(None, 0)
    names = (ctypes.c_char_p * n)()
    lib.llama_chat_builtin_templates(names, n)
    return sorted(name.decode() for name in names)


def builtin_renderer(name: str) -> Renderer:
    """llama.cpp's own renderer of a template that has a name."""

    def render(messages: list[dict[str, Any]], add_generation_prompt: bool, _now: datetime, _tools: Any = ()) -> str:
        said = [(str(message["role"]).encode(), str(message["content"]).encode()) for message in messages]
        array = (lib.llama_chat_message * len(said))(*(lib.llama_chat_message(*pair) for pair in said))
        size = 2 * sum(map(len, (text for pair in said for text in pair))) + 1024
        for _ in range(2):
            buffer = ctypes.create_string_buffer(size)
            n = lib.llama_chat_apply_template(name.encode(), array, len(said), add_generation_prompt, buffer, size)
            if n < 0:
                raise ModelError(f"llama.cpp's template {name} takes no such conversation")
            if n <= size:
                return buffer.raw[:n].decode("utf-8", "replace")
            size = n
        raise ModelError(f"llama.cpp's template {name} failed")

    return render
