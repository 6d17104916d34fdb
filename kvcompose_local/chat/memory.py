"""The orchestrator: keeps a chat's cache inside its arena. It sees only the :class:`Engine` protocol.

Tokens are read as live cells until the next ones would not fit. Then one *compaction* runs:

1. Every live token except the newest few gets a score: the attention that questions are expected to pay it. A model's
   scorer (:mod:`composing.scorer`) predicts it from the cell's key, value and place; without a scorer, a replay of the
   text measures it (:mod:`scoring`). Composed cells have their scores already.
2. All cells compete for the arena's bytes, less the bytes that the live region needs (:mod:`composing.choice`).
3. The winners are aligned into composite tokens, and the engine rewrites its cells.

Nothing is compressed before the cache is full, and nothing is changed before step 3.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from kvcompose_local.chat.checkpoints import Checkpoints, WayBack, WaysBack
from kvcompose_local.chat.report import CompactionReport
from kvcompose_local.chat.scoring import Learned, Replayed, Scored, Scoring
from kvcompose_local.chat.spans import n_within, within
from kvcompose_local.chat.state import MemoryState
from kvcompose_local.composing.cell_scores import CellScores, by_layer, kept_shares
from kvcompose_local.composing.choice import Levels, choose, competing
from kvcompose_local.composing.policy import Policy, Room
from kvcompose_local.composing.scorer import Scorer
from kvcompose_local.errors import ContextFull, InvalidInput, PositionsFull
from kvcompose_local.interfaces import CacheLayout, Engine, FloatArray, IntArray, Progress, Selection
from kvcompose_local.interrupts import uninterrupted


class CacheMemory:
    """A cache that is fed tokens and compacts itself when it must.

    n_ctx: positions the chat may span; on_compaction is told of each; on_progress gets (tokens scored, in all) and
    may raise KeyboardInterrupt, which leaves the cache as it was. ``compose`` False never compacts (budget 1).
    ``scorer`` is the model's; without one a replay of the first text teaches one. With ``replay``, or where the engine
    does not read rows, all text is replayed. Raises InvalidInput for a scorer of another model.
    """

    def __init__(
        self,
        engine: Engine,
        n_ctx: int,
        *,
        compose: bool = True,
        policy: Policy | None = None,
        scorer: Scorer | None = None,
        replay: bool = False,
        on_compaction: Callable[[CompactionReport], None] | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        self.engine = engine
        self.n_ctx = n_ctx
        self.compose = compose
        n_cells = sum(engine.arena_bytes) // max(engine.shape.row_bytes, 1)
        self._policy = policy or Policy.for_cells(n_cells, on_device=max(engine.row_steps) > 1)
        self.scoring: Scoring
        if not engine.reads_rows or replay:
            self.scoring = Replayed(engine)
        elif scorer is None:
            self.scoring = Learned(engine)
        else:
            self.scoring = self._scored_by(scorer)
        self.on_compaction = on_compaction
        self.on_progress = on_progress
        self.reports: list[CompactionReport] = []
        self.n_asked = 0  # compactions that somebody asked for
        self.tokens: list[int] = []  # all that were seen, in their order
        self.pins: list[tuple[int, int]] = []  # (start, stop) in positions, read or yet to be read
        self._ways = WaysBack(engine)
        self._scores = CellScores(engine.shape.layers)

    def _scored_by(self, scorer: Scorer) -> Scored:
        scorer.check([layer.n_kv_heads for layer in self.engine.shape.layers])
        return Scored(self.engine, scorer)

    @property
    def policy(self) -> Policy:
        """How the arena is divided now. Scoring that feeds nothing needs no scratch, and compacts half as often."""
        if self.scoring.feeds:
            return self._policy
        return replace(self._policy, n_headroom=max(self._policy.n_headroom, 2 * self._policy.n_scratch), n_scratch=0)

    @property
    def room(self) -> Room:
        """What the arenas hold under the policy."""
        return Room(self.engine.shape.layers, self.engine.arena_bytes, self.policy)

    @property
    def position(self) -> int:
        """Tokens seen."""
        return self.engine.layout().position

    @property
    def used_bytes(self) -> int:
        """Bytes of the cells in use."""
        return self._bytes_of(self.engine.layout())

    def _bytes_of(self, layout: CacheLayout) -> int:
        layers = zip(self.engine.shape.layers, layout.composed, strict=True)
        return sum(layer.row_bytes * (k + layout.n_live) for layer, k in layers)

    def feed(self, tokens: Sequence[int], progress: Progress | None = None) -> None:
        """Append tokens; compact whenever the next ones would not fit.

        Raises ContextFull before anything is read when the positions run out. An interrupt keeps what was read:
        ``position`` tells how much that is.
        """
        self.check_positions(self.position, len(tokens))
        done = 0
        if progress is not None:
            progress(0, len(tokens))
        while done < len(tokens):
            room = self._room()
            if room <= 0:
                self.compact()
                room = self._room()
                if room <= 0:
                    raise ContextFull("compaction cannot make room: raise --ctx or --budget")
            piece = tokens[done : done + room]
            offset = done

            def piece_progress(n: int, _total: int, offset: int = offset) -> None:
                if progress is not None:
                    progress(offset + n, len(tokens))

            try:
                self.engine.decode(piece, piece_progress, logits=offset + len(piece) == len(tokens))
            finally:
                with uninterrupted():
                    if self.position < len(self.tokens):  # a failure left nothing
                        self._forget_cells()
                    self.tokens += piece[: self.position - len(self.tokens)]
                    self._ways.reach(len(self.tokens))
            done += len(piece)
            self._scores.settle()  # not before: a device reads now

    def check_positions(self, position: int, n_more: int) -> None:
        """Raises PositionsFull unless ``n_more`` tokens fit behind the first ``position`` ones."""
        if position + n_more > self.n_ctx:
            raise PositionsFull(
                f"{n_more} more tokens do not fit: {position} of --ctx {self.n_ctx} positions are used; "
                f"{self.way_to_more_positions(position + n_more)}"
            )

    def way_to_more_positions(self, n_wanted: int = 0) -> str:
        """What to do where they do not suffice for ``n_wanted`` tokens."""
        known = self.engine.shape.n_ctx_train
        if known <= self.n_ctx:
            return "the model knows no more: send less"
        if known < n_wanted:
            return f"send less, or start again with --ctx up to {known}, which is all that the model knows"
        return f"start again with --ctx up to {known}"

    def _room(self) -> int:
        layout = self.engine.layout()
        spared = self.policy.n_scratch if self.compose and not self._fits_to_the_end(layout) else 0
        return layout.n_free - spared

    def _fits_to_the_end(self, layout: CacheLayout) -> bool:
        """Whether each position that is left has a cell, so that nothing will have to be compacted any more."""
        return layout.n_free >= self.n_ctx - layout.position

    def compact(self, keep: float | None = None) -> CompactionReport | None:
        """Run one compaction now; ``keep`` in (0, 1] is the largest share of the bytes in use to keep.

        Returns None when there is nothing to compose. The logits are gone afterwards.
        """
        if keep is not None and not 0 < keep <= 1:
            raise InvalidInput(f"keep a share in (0, 1], not {keep}")
        if not self.compose:
            raise InvalidInput("this chat runs at budget 1: start it with --budget below 1 to compress")
        with self._scratch_made():
            report = self._compacted(keep)
            if report is not None:
                self.reports.append(report)
                self.n_asked += keep is not None
                if self.on_compaction is not None:
                    self.on_compaction(report)
        return report

    @contextlib.contextmanager
    def _scratch_made(self) -> Iterator[None]:
        """Forget the newest tokens where scoring has too few free cells, and read them again afterwards.

        This happens in chats that fit to their end, since these reserve no scratch.
        """
        before = self.engine.layout()
        n_short = min(self.policy.n_scratch // 2 - before.n_free, before.n_live)
        if n_short <= 0 or not self.can_drop(before.position - n_short):
            yield
            return
        again = self.tokens[before.position - n_short :]
        self.rewind(before.position - n_short)
        try:
            yield
        finally:
            if len(self.tokens) + len(again) == before.position:  # unless a failure left nothing
                self.feed(again)

    def would_keep(self, n_bytes: int) -> tuple[list[IntArray], int]:
        """What a compaction to so many bytes would keep now: nothing is changed but the logits, which are gone.

        Returns of each layer the positions of the tokens in its composed cells, int64 (H, K_l), and how many of the
        newest tokens would stay live. Raises as :meth:`compact`.
        """
        if not self.compose:
            raise InvalidInput("this chat runs at budget 1: start it with --budget below 1 to compress")
        with self._scratch_made():
            layout = self.engine.layout()
            n_tail = min(self.policy.least_tail, layout.n_live)
            n_scored, first = layout.n_live - n_tail, layout.position - layout.n_live
            composed = self._competing_composed(layout)
            live = self.scoring.scores(self.tokens, n_scored, self.policy.n_scratch, self.on_progress)
            selection = self._chosen(layout, composed, live, n_tail, n_bytes)
            kept = [
                np.take_along_axis(origins, rows, axis=1).astype(np.int64)
                for rows, (_, origins) in zip(selection, self._scores.rows(live, first), strict=True)
            ]
        return kept, n_tail

    def _compacted(self, keep: float | None) -> CompactionReport | None:
        """Score the live tokens, choose among all of them, and let the engine rewrite its cells."""
        before = self.engine.layout()
        n_tail = self.room.n_tail(before.n_live, self.n_pinned)
        if keep is not None:
            n_tail = min(self.policy.least_tail, before.n_live)
        n_scored = before.n_live - n_tail
        if n_scored == 0 and not any(before.composed):
            return None
        started = time.perf_counter()
        if self.scoring.feeds and self.engine.max_drop:  # a sliding window moves on by that
            self._ways.reach(before.position + self.policy.n_scratch)
        composed = self._competing_composed(before)
        live = self.scoring.scores(self.tokens, n_scored, self.policy.n_scratch, self.on_progress)
        scored = time.perf_counter()
        bytes_before = self._bytes_of(before)
        at_most = None if keep is None else int(keep * bytes_before)
        selection = self._chosen(before, composed, live, n_tail, at_most)
        selected = time.perf_counter()
        with self._emptied_on_failure(before):
            self.engine.rewrite(selection, n_tail)
            self._scores.keep(selection, live, before.position - before.n_live)
            if max(self.engine.row_steps) == 1:  # no device reads on meanwhile
                self._scores.settle()
        after = self.engine.layout()
        return CompactionReport(
            tokens_seen=after.position,
            tokens_scored=n_scored,
            composed=after.composed,
            n_live=after.n_live,
            bytes_before=bytes_before,
            bytes_after=self._bytes_of(after),
            score_seconds=scored - started,
            select_seconds=selected - scored,
            rewrite_seconds=time.perf_counter() - selected,
        )

    def _competing_composed(self, layout: CacheLayout) -> list[Levels]:
        """The levels at which the composed cells compete, of each layer uint16 (H, K_l).

        A device may read on meanwhile, which live cells wait for.
        """
        pinned, scorer = within(self.pins, layout.position), self.scoring.scorer
        return [
            competing(scorer, i, *self._scores.composed(i), layout.position, pinned)
            for i in range(len(layout.composed))
        ]

    def _chosen(
        self,
        layout: CacheLayout,
        composed: Sequence[Levels],
        live: FloatArray,
        n_tail: int,
        at_most: int | None,
    ) -> list[Selection]:
        """The rows that become composed cells, of each layer int (H, K_l).

        composed: of :meth:`_competing_composed`; live: the scores of the live tokens before the tail, float32
        (all heads, n); at_most: bytes that all cells may take.
        """
        first, room = layout.position - layout.n_live, self.room
        pinned, scorer = within(self.pins, layout.position), self.scoring.scorer
        places = np.arange(first, layout.position - n_tail)
        newer = competing(scorer, None, live, places, layout.position, pinned)
        n_pinned = int(pinned[: layout.position - n_tail].sum())
        return choose(
            [*zip(composed, by_layer(newer, self.engine.shape.layers), strict=True)],
            room.row_bytes,
            room.composed_bytes_within(at_most, n_tail, n_pinned),
            room.device,
            per_layer=self.engine.per_layer,
            steps=self.engine.row_steps,
            n_beside=room.n_beside(n_tail),
            at_least=n_pinned,
        )

    @contextlib.contextmanager
    def _emptied_on_failure(self, before: CacheLayout) -> Iterator[None]:
        """Rewrite cells in this block: a failure half-way empties the cache, and a Ctrl-C waits for the end."""
        with uninterrupted():
            try:
                yield
            except BaseException:
                if self.engine.layout() != before:
                    self._forget_cells()
                raise

    def pin(self, start: int, stop: int) -> bool:
        """Keep the tokens at positions ``start`` to ``stop``, read or yet to be read, in all layers and heads.

        Returns whether the pin holds from now on. False says that some of the tokens are composed, so that heads may
        have dropped them, and that the pin holds once ``rewind(start)`` has them read again. Raises ContextFull, with
        nothing changed, when a compaction could not keep all pinned tokens, and InvalidInput where none ever runs.
        """
        if not self.compose:
            raise InvalidInput("this chat runs at budget 1: nothing is ever dropped")
        if not 0 <= start <= stop:
            raise InvalidInput(f"there are no positions {start} to {stop}")
        before = self.pins
        self.pins = [*before, (start, stop)]
        try:
            self._check_pinned(self.n_pinned)
        except ContextFull:
            self.pins = before
            raise
        layout = self.engine.layout()
        return start >= layout.position - layout.n_live

    def _check_pinned(self, n_pinned: int) -> None:
        n_fitting = self.room.n_composed(self.policy.least_tail)
        if n_pinned > n_fitting:
            raise ContextFull(
                f"{n_pinned} pinned tokens are more than the {max(n_fitting, 0)} that a compaction can keep: "
                "raise --ctx or --budget"
            )

    def unpin(self, position: int) -> None:
        """Forget what is pinned from ``position`` on."""
        self.pins = [(start, min(stop, position)) for start, stop in self.pins if start < position]

    @property
    def n_pinned(self) -> int:
        """Tokens that are pinned."""
        return n_within(self.pins)

    def kept(self) -> FloatArray:
        """The share of all layers' heads that still hold each token that was seen: float32 (tokens,)."""
        layout = self.engine.layout()
        return kept_shares(self._scores.origins, layout.position, layout.n_live)

    def state(self) -> MemoryState:
        """A copy of everything, for :meth:`restore`."""
        view = self.view()
        return replace(view, scores=tuple(view.scores), origins=tuple(view.origins), cells=self.engine.snapshot())

    def view(self) -> MemoryState:
        """The same, but each layer is copied when it is looked at: the view is valid until anything changes."""
        scores, origins = self._scores.view()
        return MemoryState(
            tuple(self.tokens),
            scores,
            origins,
            self.engine.view(),
            tuple(self.pins),
            self.scoring.scorer,
            self.checkpoints.of_last_turn(self.position),
        )

    def restore(self, state: MemoryState) -> None:
        """Go on from a state, perhaps of another size of cache; the logits are gone.

        Raises InvalidInput, before anything is changed, where it belongs to another model or contradicts itself, and
        ContextFull where it does not fit. Where only the positions in the cells tell, the cache is empty afterwards.
        """
        cells = state.cells
        state.check(self.engine.shape.n_vocab, self.n_ctx)
        first_live = cells.position - cells.n_live
        scores = self._scores.restored(state.scores, state.origins, cells.composed, first_live)
        scoring = self.scoring
        if any(cells.composed):  # scores must be of one scale
            if state.scorer is not None and not self.engine.reads_rows:
                raise InvalidInput("these cells were scored by the patched engine: `kvcompose-local build` makes it")
            scoring = Replayed(self.engine) if state.scorer is None else self._scored_by(state.scorer)
        if self.compose:
            state.check_room(self.engine, self.n_ctx, self._policy.n_scratch if scoring.feeds else 0)
            self._check_pinned(n_within(state.pins))
        self.engine.restore(cells)
        layout = self.engine.layout()
        if (layout.composed, layout.n_live, layout.position) != (cells.composed, cells.n_live, cells.position):
            self._forget_cells()
            raise InvalidInput("the positions do not belong to these cells")
        self.tokens = [*state.tokens]
        self.pins = [*state.pins]
        self._ways.restore(cells.position, state.checkpoints)
        self._scores, self.scoring = scores, scoring

    def rewind(self, position: int, progress: Progress | None = None) -> bool:
        """Forget the tokens from ``position`` on; the logits are gone.

        Returns whether the older cells sufficed. Where they do not, everything is read again from the transcript; an
        interrupt may cut that short, and ``tokens`` tells what has been read. Pins stay: the positions are read again.
        """
        if not 0 <= position <= self.position:
            raise InvalidInput(f"cannot go back to position {position}: {self.position} tokens were seen")
        again, pins, way = self.tokens[:position], self.pins, self._way_back(position)
        if way is None:
            self.clear()
            self.pins = pins
            self.feed(again, progress)
            return False
        self._go_back(way)
        if way.position < position:
            self.feed(again[way.position :], progress)
        return True

    def can_drop(self, position: int) -> bool:
        """Whether what is older suffices to go back to ``position``."""
        return self._way_back(position) is not None

    def n_again(self, position: int) -> int:
        """How many of the first ``position`` tokens are read again by going back to there."""
        way = self._way_back(position)
        return position if way is None else position - way.position

    def mark(self) -> None:
        """Let :meth:`rewind` come back to the present position, where that needs a checkpoint."""
        self._ways.mark()

    @property
    def moves_on(self) -> bool:
        """Whether a part of the cache moves on: sliding windows, recurrent states."""
        return self._ways.moves_on

    @property
    def checkpoints(self) -> Checkpoints:
        """What :meth:`mark` kept."""
        return self._ways.checkpoints

    def _way_back(self, position: int) -> WayBack | None:
        layout = self.engine.layout()

        def is_enough(start: int) -> bool:
            pinned = within(self.pins, layout.position - layout.n_live)[:position]
            return bool(min(rows.shape[1] for rows in self._scores.before(start)) > pinned.sum())

        return self._ways.find(position, self.policy.n_tail, is_enough)

    def _go_back(self, way: WayBack) -> None:
        """Forget the tokens from a position on, and composed ones among them where it is not live."""
        before = self.engine.layout()
        n_forgotten = before.position - way.position
        with self._emptied_on_failure(before):
            if way.is_live:
                self.engine.drop_tail(n_forgotten, way.state)
            else:
                chosen = self._scores.before(way.position)
                if not self.engine.per_layer:  # as many in each as the layer with the fewest has
                    k = min(rows.shape[1] for rows in chosen)
                    chosen = [rows[:, :k] for rows in chosen]
                none = np.zeros((sum(layer.n_kv_heads for layer in self.engine.shape.layers), 0), np.float32)
                self.engine.rewrite(chosen, 0, n_forgotten, way.state)
                self._scores.keep(chosen, none, 0)
            del self.tokens[way.position :]
            self._ways.take(way)

    def clear(self) -> None:
        """Forget everything."""
        self._forget_cells()
        self.pins = []

    def _forget_cells(self) -> None:
        """Empty the cache, so that the chat reads its transcript again; pins name positions, and stay."""
        with uninterrupted():
            self.engine.clear()
            self.tokens = []
            self._ways.forget()
            self._scores.clear()
