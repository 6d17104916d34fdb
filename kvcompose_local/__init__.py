"""Local LLM chat whose KV cache stays inside the RAM you give it (KVCompose, arXiv 2509.05165, on llama.cpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcompose_local.api import LocalChat
    from kvcompose_local.chat_options import ChatOptions, Sampling
    from kvcompose_local.errors import KVComposeError

__version__ = "0.1.0"
__all__ = ["ChatOptions", "KVComposeError", "LocalChat", "Sampling", "__version__"]

_HOMES = {"LocalChat": "api", "KVComposeError": "errors", "Sampling": "chat_options", "ChatOptions": "chat_options"}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import on first use: the pure modules and ``--help`` need no llama.cpp."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
