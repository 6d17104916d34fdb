"""All that is known of a chat, its memory and its turns, as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvcompose_local.chat.checkpoints import Checkpoint
from kvcompose_local.chat.steps import Step
from kvcompose_local.chat.text_model import Message
from kvcompose_local.composing.scorer import Scorer
from kvcompose_local.errors import ContextFull, InvalidInput
from kvcompose_local.interfaces import CacheSnapshot, Engine, FloatArray, Selection


@dataclass(frozen=True)
class MemoryState:
    """All that a :class:`CacheMemory` knows, so that it can go on later.

    tokens: all that were seen; scores: L float32 arrays (H, K_l), of composed cells, without age; origins: L int32
    arrays (H, K_l), the positions that their tokens stood at; cells: the engine's snapshot; pins: (start, stop) of
    pinned tokens; scorer: what made the scores, None for a replay; checkpoints: of the last turn.
    """

    tokens: tuple[int, ...]
    scores: Sequence[FloatArray]
    origins: Sequence[Selection]
    cells: CacheSnapshot
    pins: tuple[tuple[int, int], ...] = ()
    scorer: Scorer | None = None
    checkpoints: tuple[Checkpoint, ...] = ()

    def check(self, n_vocab: int, n_ctx: int) -> None:
        """Raises InvalidInput where it contradicts itself, and ContextFull for more than ``n_ctx`` positions."""
        position = self.cells.position
        if len(self.tokens) != position or not all(0 <= token < n_vocab for token in self.tokens):
            raise InvalidInput("the tokens do not belong to these cells")
        if any(not 0 <= start <= stop <= n_ctx for start, stop in self.pins):
            raise InvalidInput("the pins do not belong to these tokens")
        places = [0, *(checkpoint.position for checkpoint in self.checkpoints), position]
        if self.checkpoints and any(one >= other for one, other in pairwise(places)):
            raise InvalidInput("the checkpoints do not belong to these tokens")
        if position > n_ctx:
            raise ContextFull(f"{position} positions are more than --ctx {n_ctx}: raise --ctx")

    def check_room(self, engine: Engine, n_ctx: int, n_scratch: int) -> None:
        """Raises ContextFull unless the cells fit, with enough scratch for the next compaction or the rest of the chat.

        Where every position that is left has a cell, there will be no compaction.
        """
        cells = self.cells
        n_live = cells.n_live + min(n_scratch // 2, n_ctx - cells.position)
        if not any(cells.composed) and n_live <= engine.cache_bytes // engine.shape.row_bytes:
            return  # uncompressed, the whole cache is there: nothing is lost to alignment
        for device, arena_bytes in enumerate(engine.arena_bytes):
            layers = zip(engine.shape.layers, cells.composed, strict=True)
            needed = sum(layer.row_bytes * (k + n_live) for layer, k in layers if layer.device == device)
            if needed > arena_bytes:
                raise ContextFull(  # no layer has more cells than positions, so a budget of 1 holds them all
                    f"the cells need {needed / 2**20:.1f} MiB of cache and there are {arena_bytes / 2**20:.1f} MiB: "
                    "raise --budget"
                )


@dataclass
class TurnStats:
    """Counts and wall seconds of one turn; compaction seconds are not part of the other two.

    reread_tokens: tokens of the prompt that had been read before, and are read again since the template rewrites them;
    stopped: ``end``, ``length``, ``context`` or ``interrupt``; stop: the stop text that ended the answer, if one did.
    """

    prompt_tokens: int = 0
    reread_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    compactions: int = 0
    compaction_seconds: float = 0.0
    stopped: str = ""
    stop: str = ""


@dataclass(frozen=True)
class ChatState:
    """All that a :class:`Chat` knows, so that it can go on later.

    draft: the beginning of the next user message, which was fed already; fed: every character the cache was given;
    pending: tokens of it that are still to be read; began: seconds since 1970, for templates that tell the date;
    template: what ``--template`` named, empty for the model's own; tools: as in a Transcript.
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
    tools: str = ""
