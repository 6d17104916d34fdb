"""What is known of a chat and its turns, as values."""

from __future__ import annotations

from dataclasses import dataclass

from kvcompose_local.chat.memory import MemoryState
from kvcompose_local.chat.transcript import Message, Step


@dataclass
class TurnStats:
    """Counts and wall seconds of one turn; compaction seconds are not part of the other two.

    reread_tokens: how many of the prompt's tokens were read before, since the template rewrites what was said.
    """

    prompt_tokens: int = 0
    reread_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    compactions: int = 0
    compaction_seconds: float = 0.0
    stopped: str = ""

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.generated_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class ChatState:
    """All that a :class:`Chat` knows, to go on from later.

    draft: what the next user message begins with already; fed: every character the cache was given; pending: tokens of
    it that are still to be read; began: when the chat did, in seconds since 1970, for templates that tell the date;
    template: what ``--template`` named, empty for the model's own.
    """

    system: str | None
    messages: tuple[Message, ...]
    draft: str
    fed: str
    pending: tuple[int, ...]
    memory: MemoryState
    steps: tuple[Step, ...] = ()
    began: float = 0.0
    template: str = ""
