"""Places in a transcript, and the steps of a conversation, which can be taken back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvcompose_local.chat.text_model import Message


class Place(NamedTuple):
    """A place in the transcript: how many tokens and how many characters stand before it."""

    n_tokens: int
    n_chars: int


#: Where a step begins that is told but not queued yet.
UNPLACED = Place(2**31, 2**31)


@dataclass(frozen=True)
class Step:
    """A message with its answer, or a document, with all that is needed to take it back.

    begin: where it begins; n_messages, draft: the messages and the draft before it; answer: where its answer begins,
    None for a document.
    """

    begin: Place
    n_messages: int
    draft: str
    answer: Place | None = None


class Reread(NamedTuple):
    """The cost of following the template, in tokens.

    n_again: tokens that are read again; n_new: tokens that are new; n_shared: tokens that were read and stay, None for
    all of them; is_kept: whether the template changes the past, and the cache cannot go back to change it.
    """

    n_again: int
    n_new: int
    n_shared: int | None = None
    is_kept: bool = False


class Saved(NamedTuple):
    """A transcript as it was at some time."""

    system: str | None
    draft: str
    fed: str
    messages: tuple[Message, ...]
    tokens: tuple[int, ...]
    steps: tuple[Step, ...]
    edges: tuple[Place, ...]
    tools: str = ""
