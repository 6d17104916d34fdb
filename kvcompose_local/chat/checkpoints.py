"""How a cache goes back, where a part of it may only move on: sliding windows, recurrent states.

Such a part drops no token that it has seen, so going back needs a copy of its earlier state. Copies are large, so there
are few: the newest ones, which belong to the last turn, and fewer and fewer of the older ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvcompose_local.interfaces import ByteArray, Engine

#: The newest turn has two: one where it begins, one where its answer begins.
LEAST = 2
MOST = 8
#: Bytes that all checkpoints together may take; the least number of them is kept in any case.
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

    def add(self, checkpoint: Checkpoint, most: int = MOST) -> None:
        """Keep one that is behind all others; where there are more than ``most``, an older one goes."""
        self._kept.append(checkpoint)
        while len(self._kept) > most:
            del self._kept[self._least_missed()]

    def _least_missed(self) -> int:
        """The index of the checkpoint whose loss leaves the smallest gap, in relation to how far back it is."""
        end = self._kept[-1].position
        gaps = []
        for i, kept in enumerate(self._kept[:-LEAST]):
            before = self._kept[i - 1].position if i else 0
            gaps.append((self._kept[i + 1].position - before) / max(end - kept.position, 1))
        return gaps.index(min(gaps))

    def of_last_turn(self, end: int) -> tuple[Checkpoint, ...]:
        """The newest checkpoints before ``end`` that fit into :data:`MOST_BYTES`: a session keeps these."""
        newest = [kept for kept in self._kept if kept.position < end][-LEAST:]
        while sum(kept.state.nbytes for kept in newest) > MOST_BYTES:
            newest.pop()
        return tuple(newest)

    def forget(self, position: int) -> None:
        """Drop all that are behind ``position``."""
        self._kept = [kept for kept in self._kept if kept.position <= position]


class WayBack(NamedTuple):
    """How to go back: to which position, with what checkpoint, and whether what stands before it is live there."""

    position: int
    checkpoint: Checkpoint | None
    is_live: bool

    @property
    def state(self) -> ByteArray | None:
        """What moves on, as it was there."""
        return None if self.checkpoint is None else self.checkpoint.state


class WaysBack:
    """The ways in which a cache can go back: by its live cells, by composed cells, by ``checkpoints``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.forget()

    def forget(self) -> None:
        """Start anew with an empty cache."""
        self.checkpoints = Checkpoints()
        self._furthest = 0  # the highest position that what moves on had to reach

    def restore(self, position: int, checkpoints: Sequence[Checkpoint]) -> None:
        """Take over checkpoints with cells that were put back; their moving part holds what the next token needs."""
        self.checkpoints = Checkpoints(checkpoints)
        self._furthest = position + (self._engine.max_drop if self.moves_on else 0)

    def reach(self, position: int) -> None:
        """Note that the moving part has reached this position."""
        self._furthest = max(self._furthest, position)

    @property
    def moves_on(self) -> bool:
        """Whether a part of the cache moves on."""
        return self._engine.state_bytes > 0

    def mark(self) -> None:
        """Keep a checkpoint of the present position, if coming back to it will need one."""
        position = self._engine.layout().position
        if self.moves_on and position > max(self.checkpoints.positions, default=0):
            most = most_of(self._engine.state_bytes)
            self.checkpoints.add(Checkpoint(position, self._engine.checkpoint()), most)

    def find(self, position: int, n_tail: int, is_enough: Callable[[int], bool]) -> WayBack | None:
        """How to go back to ``position``, or to where text is read on to it from; None where all must be read again.

        n_tail: tokens that are read again behind composed cells that were dropped, so that text goes on from whole
        sentences; is_enough: whether the composed cells before a position suffice. They were chosen in competition with
        what came after, so they are fewer than reading again would keep: going back by half or more reads again.
        """
        layout = self._engine.layout()
        n_forgotten = layout.position - position
        if n_forgotten <= layout.n_live and self._furthest - position <= self._engine.max_drop:
            return WayBack(position, None, True)
        checkpoint, start = None, position - n_tail
        if self.moves_on:
            checkpoint = self.checkpoints.before(position)
            if checkpoint is None:
                return None
            start = checkpoint.position
            if start >= layout.position - layout.n_live:
                return WayBack(start, checkpoint, True)
        worth_it = 2 * position > layout.position and start > 0 and is_enough(start)
        return WayBack(start, checkpoint, False) if worth_it else None

    def take(self, way: WayBack) -> None:
        """Note that the cache has gone back."""
        self.checkpoints.forget(way.position)
        if way.checkpoint is not None:
            self._furthest = way.position + self._engine.max_drop
