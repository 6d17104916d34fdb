"""A conversation: its turns (:mod:`turns`), its text (:mod:`transcript`), and what templates and models make of it."""

from kvcompose_local.chat.reasoning import Said
from kvcompose_local.chat.transcript import Message, Place, Step, TextModel, Transcript
from kvcompose_local.chat.turns import Chat, ChatState, TurnStats

__all__ = ["Chat", "ChatState", "Message", "Place", "Said", "Step", "TextModel", "Transcript", "TurnStats"]
