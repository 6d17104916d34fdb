"""Places that a chat can come back to where a part of its cache only moves on: sliding windows, recurrent states.

Such a part drops no token that it has seen, so that going back needs a copy of what it was. Copies are large, so there
are few: the newest ones, of the last turn, and of older ones the fewer the older they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvcompose_local.interfaces import ByteArray

#: Of the newest turn: where it begins, and where its answer does.
LEAST = 2
MOST = 8
#: What all of them together may take, unless that is fewer than the least.
MOST_BYTES = 64 << 20


class Checkpoint(NamedTuple):
    """What moves on (:meth:`kvcompose_local.interfaces.Engine.checkpoint`), as it was at a position."""

    position: int
    state: ByteArray


def most_of(state_bytes: int) -> int:
    """How many checkpoints of a size there are at most."""
    return min(max(MOST_BYTES // max(state_bytes, 1), LEAST), MOST)


class Checkpoints:
    """The checkpoints of one cache, by ascending position."""

    def __init__(self, kept: Sequence[Checkpoint] = ()) -> None:
        self._kept = [*kept]

    @property
    def positions(self) -> list[int]:
        """Where they are."""
        return [kept.position for kept in self._kept]

    @property
    def n_bytes(self) -> int:
        """What they take now."""
        return sum(kept.state.nbytes for kept in self._kept)

    def before(self, position: int) -> Checkpoint | None:
        """The last one that is at ``position`` or before it."""
        return next((kept for kept in reversed(self._kept) if kept.position <= position), None)

    def add(self, checkpoint: Checkpoint) -> None:
        """Keep one that is behind all others, and perhaps an older one less."""
        self._kept.append(checkpoint)
        largest = max(kept.state.nbytes for kept in self._kept)
        while len(self._kept) > most_of(largest):
            del self._kept[self._least_missed()]

    def _least_missed(self) -> int:
        """Which one leaves the smallest gap, measured by how far back it is."""
        end = self._kept[-1].position
        gaps = []
        for i, kept in enumerate(self._kept[: len(self._kept) - LEAST]):
            before = self._kept[i - 1].position if i else 0
            gaps.append((self._kept[i + 1].position - before) / max(end - kept.position, 1))
        return gaps.index(min(gaps))

    def of_last_turn(self, end: int) -> tuple[Checkpoint, ...]:
        """The newest ones before ``end``, as far as they are small: what a session keeps."""
        newest = [kept for kept in self._kept if kept.position < end][-LEAST:]
        while sum(kept.state.nbytes for kept in newest) > MOST_BYTES:
            newest.pop()
        return tuple(newest)

    def forget(self, position: int) -> None:
        """Drop all that are behind ``position``."""
        self._kept = [kept for kept in self._kept if kept.position <= position]
