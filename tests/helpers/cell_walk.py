"""Random operations on the cells of a patched llama.cpp, each checked against a NumPy twin of the cache.

``python cell_walk.py MODEL TYPE SEED STEPS`` does some, in a process of its own, because what it looks for is an abort;
under a sanitizer where the library was built with one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from kvcompose_local.errors import KVComposeError
from kvcompose_local.llama_ffi.cells import PerLayerCells
from kvcompose_local.llama_ffi.context import Context
from kvcompose_local.llama_ffi.model import Model


class Walk:
    """A context, what its cache must hold, and one method for each operation."""

    def __init__(self, path: Path, cache_type: str, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.context = Context(
            Model(path), n_ctx=256, n_ubatch=64, n_threads=1, flash_attention=True, cache_type=cache_type
        )
        self.cells = PerLayerCells(self.context)
        self.n_layers = self.cells.n_layers
        self.heads = [self.cells.layer(i).n_head_kv for i in range(self.n_layers)]
        self.n_live_cap = self.cells.info().n_live_cap
        self.saved: tuple | None = None
        self.marks: list[tuple[int, np.ndarray]] = []  # positions, and the recurrent states there

    def rows(self) -> list[np.ndarray]:
        """K and V of each layer, uint8 (rows, H, head bytes)."""
        planes = [self.cells.rows(i, values=v) for i in range(self.n_layers) for v in (False, True)]
        return [x.reshape(len(x), self.heads[i // 2], -1) for i, x in enumerate(planes)]

    def live(self) -> np.ndarray:
        positions = self.cells.positions()[: self.cells.info().n_live_cap]
        order = np.argsort(positions, kind="stable")
        return order[positions[order] >= 0]

    def decode(self) -> None:
        info = self.cells.info()
        n = int(self.rng.integers(1, 50))
        try:
            self.context.decode(self.rng.integers(3, 259, n).tolist())
        except KVComposeError:
            assert n > info.n_live_cap - info.n_live
            assert self.cells.info().n_live == info.n_live
            return
        assert n <= info.n_live_cap - info.n_live
        assert np.isfinite(self.context.logits()).all()
        assert self.cells.info().pos_next == info.pos_next + n

    def choose(self) -> tuple[int, int, list[np.ndarray]]:
        """Room for live cells, the length of a tail, and for each layer and head the cells to take."""
        info, positions, n_live = self.cells.info(), self.cells.positions(), len(self.live())
        n_tail = int(self.rng.integers(0, min(n_live, 20) + 1))
        sources = []
        for i, heads in enumerate(self.heads):
            n_composed = self.cells.layer(i).n_composed
            there = np.flatnonzero(positions[info.n_live_cap :][:n_composed] >= 0)
            pool = np.concatenate([there, n_composed + np.arange(n_live - n_tail)])
            n = int(self.rng.choice([0, len(pool), self.rng.integers(len(pool) + 1)], p=[0.1, 0.1, 0.8]))
            sources.append(np.array([self.rng.permutation(pool)[:n] for _ in range(heads)]).reshape(heads, n))
        return int(self.rng.integers(max(n_tail, 1), 150)), n_tail, sources

    def rewrite(self) -> None:
        self.checked_rewrite(*self.choose())

    def wrong_rewrite(self) -> None:
        n_live_cap, n_tail, sources = self.choose()
        layer, far = int(self.rng.integers(self.n_layers)), int(self.rng.choice([-1, 10**6, 2**31 - 1, -(2**31)]))
        heads, n_composed = self.heads[layer], self.cells.layer(layer).n_composed
        n_live = len(self.live())
        kind = int(self.rng.integers(6))
        if kind == 0:
            n_live_cap = far
        elif kind == 1:
            n_tail = far
        elif kind == 2:
            n_tail = n_live + 1
        elif kind == 3:
            sources[layer] = np.full((heads, 1), far)
        elif kind == 4:
            sources[layer] = np.tile(np.append(sources[layer][:1, :1], sources[layer][:1, :1]), (heads, 1))
        else:
            sources[layer] = np.tile(np.arange(n_composed + n_live + 1), (heads, 1))
        self.checked_rewrite(n_live_cap, n_tail, sources)

    def checked_rewrite(self, n_live_cap: int, n_tail: int, sources: list[np.ndarray]) -> None:
        before, positions, info, live = self.rows(), self.cells.positions(), self.cells.info(), self.live()
        n_old = [self.cells.layer(i).n_composed for i in range(self.n_layers)]
        try:
            self.cells.rewrite(n_live_cap, n_tail, sources)
        except KVComposeError:
            assert all((a == b).all() for a, b in zip(before, self.rows(), strict=True))
            assert (self.cells.positions() == positions).all()
            return
        tail = live[len(live) - n_tail :]
        for i, (old, new) in enumerate(zip(before, self.rows(), strict=True)):
            source, row = sources[i // 2], np.append(info.n_live_cap + np.arange(n_old[i // 2]), live)
            expected = np.zeros((n_live_cap + source.shape[1], *old.shape[1:]), np.uint8)
            expected[:n_tail] = old[tail]
            for h, cells in enumerate(source):
                expected[n_live_cap:, h] = old[row[cells], h]
            assert (expected == new).all()
        end = positions[tail[0]] if n_tail else info.pos_next
        n_composed = max(s.shape[1] for s in sources)
        unused = np.full(n_live_cap - n_tail, -1)
        found = self.cells.positions()
        assert (found[:n_live_cap] == np.append(positions[tail], unused)).all()
        assert (np.sort(found[n_live_cap:]) == np.arange(end - n_composed, end)).all()
        assert self.cells.info().pos_next == info.pos_next

    def mark(self) -> None:
        if self.context.is_recurrent and self.cells.info().pos_next:
            self.marks.append((self.cells.info().pos_next, self.context.partial_state()))

    def go_back(self) -> None:
        """Restore the state of an earlier position, then drop the cells behind it."""
        n_marks = len(self.marks)
        if n_marks:
            position, state = self.marks[int(self.rng.integers(n_marks))]
            self.context.set_partial_state(state)
            self.context.remove(position)
            self.marks = [mark for mark in self.marks if mark[0] <= position]
            assert self.cells.info().pos_next in (position, 0)
            if self.cells.info().pos_next != position:  # cells up to there are gone, and all before them
                self.clear()

    def remove(self) -> None:
        if self.context.is_recurrent:
            before = self.cells.positions()
            if self.cells.info().pos_next > 1:
                with pytest.raises(KVComposeError):
                    self.context.remove(int(self.rng.integers(1, self.cells.info().pos_next)))
            assert (self.cells.positions() == before).all()
            return
        self.context.remove(int(self.rng.integers(0, self.cells.info().pos_next + 2)))
        if self.cells.positions().max() + 1 != self.cells.info().pos_next:
            assert self.cells.info().has_window  # more is gone than the window still holds: llama.cpp starts at 0
            self.clear()

    def dig(self) -> None:
        """Remove from the middle: live cells have holes then, and composed ones that are gone keep their number."""
        info = self.cells.info()
        if not info.has_window and not self.context.is_recurrent and info.pos_next > 2:
            start, stop = np.sort(self.rng.choice(info.pos_next - 1, 2, replace=False))
            self.context.remove(int(start), int(stop))
            assert self.cells.info().pos_next == info.pos_next

    def clear(self) -> None:
        self.marks = []
        self.context.clear()
        info = self.cells.info()
        assert (info.composed, info.n_live, info.n_live_cap) == (0, 0, self.n_live_cap)
        assert not any(x.any() for x in self.rows())

    def export(self) -> None:
        info, live = self.cells.info(), self.live()
        n_composed = [self.cells.layer(i).n_composed for i in range(self.n_layers)]
        positions = self.cells.positions()[live]
        end = int(positions[0]) if len(live) else info.pos_next
        rows = [np.concatenate([x[live], x[info.n_live_cap :]]) for x in self.rows()]
        self.saved = info.n_live_cap, positions, end, n_composed, rows

    def restore(self) -> None:
        if self.saved is None:
            return
        n_live_cap, positions, end, n_composed, rows = self.saved
        try:
            self.cells.set_layout(n_live_cap, positions, end, n_composed)
        except KVComposeError:  # nothing was saved, or more composed cells than positions before ``end``
            assert len(positions) + max(n_composed) == 0 or max(n_composed) > end
            return
        for i, x in enumerate(rows):
            whole = np.zeros((n_live_cap + n_composed[i // 2], *x.shape[1:]), np.uint8)
            whole[: len(positions)] = x[: len(positions)]
            whole[n_live_cap:] = x[len(positions) :]
            self.cells.set_rows(i // 2, whole.reshape(len(whole), -1), values=bool(i % 2))
            assert (self.rows()[i] == whole).all()
        if self.cells.info().has_window or self.context.is_recurrent:
            self.clear()  # what moves on would have to be restored as well

    def wrong_layout(self) -> None:
        positions = np.sort(self.rng.integers(-1, 400, int(self.rng.integers(0, 5))))
        end = int(self.rng.integers(-3, 500))
        if len(positions) and positions[0] == end:
            return
        n_live_cap = int(self.rng.integers(-2, len(positions) + 1))
        before = self.rows()
        try:
            self.cells.set_layout(n_live_cap, positions, end, self.rng.integers(-1, 200, self.n_layers))
        except KVComposeError:
            assert all((a == b).all() for a, b in zip(before, self.rows(), strict=True))
        else:
            self.marks = []

    def look(self) -> None:
        seen: list[float] = []
        self.context.tap = lambda _layer, weights: seen.append(float(abs(weights.sum(axis=2) - 1).max()))
        with self.cells.visible_softmax():
            self.decode()
        self.context.tap = None
        assert not seen or max(seen) < 1e-3

    def serialize(self) -> None:
        """llama.cpp's own state functions: refused while composed, a round trip otherwise."""
        if self.cells.info().composed:
            for call in (self.context.state, lambda: self.context.set_state(np.zeros(100, np.uint8))):
                with pytest.raises(KVComposeError):
                    call()
        else:
            state = self.context.state()
            self.context.clear()
            self.context.set_state(state)
            assert (self.context.state() == state).all()

    def step(self) -> str:
        operation = self.rng.choice(
            [self.decode] * 6 + [self.rewrite] * 4 + [self.wrong_rewrite] * 2
            + [self.remove, self.dig, self.dig, self.clear, self.export, self.restore, self.wrong_layout]
            + [self.look, self.serialize, self.mark, self.mark, self.go_back]
        )  # fmt: skip
        operation()
        info = self.cells.info()
        assert 0 <= info.n_live <= info.n_live_cap <= info.n_cells
        for i in range(info.n_arenas):
            arena = self.cells.arena(i)
            assert arena.used <= arena.peak_used <= arena.size
        return str(operation.__name__)


def main(path: str, cache_type: str, seed: str, steps: str) -> None:
    walk = Walk(Path(path), cache_type, int(seed))
    done: list[str] = []
    try:
        for _ in range(int(steps)):
            done.append(walk.step())
    except BaseException:
        print("the step after", *done[-10:])
        raise
    print(len(done), "steps:", {name: done.count(name) for name in sorted(set(done))})


if __name__ == "__main__":
    main(*sys.argv[1:])
