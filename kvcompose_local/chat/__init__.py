"""A conversation: its turns (:mod:`turns`), its text (:mod:`transcript`), and what templates and models make of it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcompose_local.chat.reasoning import Said
    from kvcompose_local.chat.state import ChatState, TurnStats
    from kvcompose_local.chat.steps import Place, Step
    from kvcompose_local.chat.text_model import Message, TextModel
    from kvcompose_local.chat.transcript import Transcript
    from kvcompose_local.chat.turns import Chat

__all__ = ["Chat", "ChatState", "Message", "Place", "Said", "Step", "TextModel", "Transcript", "TurnStats"]

_HOMES = {
    "Chat": "turns",
    "ChatState": "state",
    "TurnStats": "state",
    "Said": "reasoning",
    "Place": "steps",
    "Step": "steps",
    "Message": "text_model",
    "TextModel": "text_model",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line needs :mod:`inputs` before NumPy is worth loading."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'transcript')}"), name)
