"""Division of a cache's bytes between composed cells, the newest tokens and room to read on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvcompose_local.errors import ContextFull
from kvcompose_local.interfaces import IntArray, LayerShape

#: Tokens of the tail that stay even where pinned tokens need its room, or where the user asks for a compaction.
LEAST_TAIL = 8
#: Tokens of a micro-batch where layers are on a device, which a micro-batch costs more in launches than in products.
DEVICE_MICRO_BATCH = 512


@dataclass(frozen=True)
class Policy:
    """How the arena is divided, in cells of a uniform cache.

    n_tail: newest live tokens that a compaction leaves alone; n_headroom: live cells that it makes free;
    n_scratch: cells kept free for what scoring feeds, where it feeds anything.
    """

    n_tail: int = 8
    n_headroom: int = 256
    n_scratch: int = 128

    @classmethod
    def for_cells(cls, n_cells: int, *, on_device: bool = False) -> Policy:
        """A sixteenth of the cells for headroom, one for scratch and a sixth for the tail, all of them bounded.

        The tail is for reading well, not for answering: a text whose last sentence is half gone is misread
        (docs/decisions.md). On a device reading is so fast that a compaction costs as much as hundreds of tokens: there
        a quarter of the cells is headroom, in whole micro-batches.
        """
        chunk = min(max(-(-n_cells // 16), 24), 256)
        n_headroom = 2 * chunk if n_cells >= 31 * chunk else chunk
        if on_device:
            quarter = -(-n_cells // 4 // DEVICE_MICRO_BATCH) * DEVICE_MICRO_BATCH
            n_headroom = max(quarter if quarter <= n_cells // 3 else n_cells // 4, n_headroom)
        return cls(n_tail=min(max(n_cells // 6, 8), 128), n_headroom=n_headroom, n_scratch=chunk)

    @property
    def least_tail(self) -> int:
        """Tokens of the tail that always stay."""
        return min(self.n_tail, LEAST_TAIL)


@dataclass(frozen=True)
class Room:
    """What the arenas of some layers can hold under a policy.

    arena_bytes: one number a device; ``device`` of a layer says which arena holds it.
    """

    layers: Sequence[LayerShape]
    arena_bytes: Sequence[int]
    policy: Policy

    @property
    def row_bytes(self) -> IntArray:
        """Bytes of a cell of each layer: int64 (L,)."""
        return np.array([layer.row_bytes for layer in self.layers], np.int64)

    @property
    def device(self) -> IntArray:
        """The arena of each layer: int64 (L,)."""
        return np.array([layer.device for layer in self.layers], np.int64)

    @property
    def live_bytes(self) -> IntArray:
        """Bytes that one live token takes in each arena: int64 (devices,)."""
        sums = np.bincount(self.device, weights=self.row_bytes, minlength=len(self.arena_bytes))
        return sums.astype(np.int64)

    def composed_bytes(self, n_tail: int) -> IntArray:
        """Bytes that each arena has for composed cells beside tail, headroom and scratch: int64 (devices,)."""
        return np.array(self.arena_bytes, np.int64) - self.n_beside(n_tail) * self.live_bytes

    def n_beside(self, n_tail: int) -> int:
        """Live cells that every layer has beside its composed ones: tail, headroom and scratch."""
        return n_tail + self.policy.n_headroom + self.policy.n_scratch

    def n_composed(self, n_tail: int) -> int:
        """Composed cells that every layer may have beside a tail, below 0 where the tail itself does not fit."""
        return int((self.composed_bytes(n_tail) // np.maximum(self.live_bytes, 1)).min())

    def n_tail(self, n_live: int, n_pinned: int) -> int:
        """The newest of ``n_live`` tokens that a compaction leaves alone beside ``n_pinned`` ones."""
        n_tail = self.policy.n_tail
        n_missing = max(n_pinned - self.n_composed(n_tail), 0)
        return min(max(n_tail - n_missing, self.policy.least_tail), n_live)

    def composed_bytes_within(self, at_most: int | None, n_tail: int, n_pinned: int) -> IntArray:
        """:meth:`composed_bytes`, reduced so that all cells take ``at_most`` bytes or what pinned tokens need.

        Raises ContextFull where the tail leaves nothing.
        """
        room = self.composed_bytes(n_tail)
        if at_most is not None:
            share = np.array(self.arena_bytes, np.float64) / sum(self.arena_bytes)
            wanted = np.floor(share * at_most).astype(np.int64) - n_tail * self.live_bytes
            room = np.minimum(room, np.maximum(wanted, n_pinned * self.live_bytes))
        if (room < 0).any():
            raise ContextFull("the budget leaves no cells for composed tokens: raise --ctx or --budget")
        return room
