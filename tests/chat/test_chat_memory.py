"""The memory policy, on the fake engine."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.chat.report import CompactionReport
from kvcompose_local.composing.policy import LEAST_TAIL, Policy
from kvcompose_local.composing.scorer import Scorer
from kvcompose_local.errors import ContextFull, InvalidInput
from kvcompose_local.interfaces import CacheSnapshot, Selection

POLICY = Policy(n_tail=4, n_headroom=8, n_scratch=8)


def test_nothing_is_composed_before_it_must_be() -> None:
    engine = FakeEngine(40)
    memory = CacheMemory(engine, 1000, policy=POLICY)
    memory.feed(range(32))
    assert memory.reports == []
    memory.feed([99])
    assert len(memory.reports) == 1
    assert engine.layout().position == 33


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_best_tokens_stay_and_the_newest_stay_live(per_layer: bool) -> None:
    engine = FakeEngine(40, per_layer=per_layer)
    memory = CacheMemory(engine, 1000, policy=POLICY)
    tokens = [5, 250, 7, 240, *[100] * 24, 11, 12, 13, 14]
    memory.feed([*tokens, 15])
    # 40 cells less tail, headroom and scratch leave 20 composed a layer (40 in all where layers may differ).
    budgets = [c.shape[1] for c in engine.composed]
    assert budgets == [20, 20] if not per_layer else sum(budgets) == 40
    assert {250, 240} <= set(engine.composed[0][0])
    assert {5, 7} <= set(engine.composed[1][1])
    assert engine.live == [11, 12, 13, 14, 15]
    assert memory.tokens[-5:] == engine.live


def test_the_replay_is_chunked_with_a_lead_in() -> None:
    engine = FakeEngine(40)
    memory = CacheMemory(engine, 1000, policy=POLICY)
    memory.feed(range(65, 65 + 33))
    assert engine.replayed == [b"ABCD", b"ABCDEFGH", b"EFGHIJKL", b"IJKLMNOP", b"MNOPQRST", b"QRSTUVWX", b"UVWXYZ[\\"]
    engine.replayed.clear()
    memory.feed(range(100, 110))
    assert engine.replayed == [b"YZ[\\]^_`", b"]^_`adef"], "led in by what is composed"


def test_composed_cells_keep_their_scores() -> None:
    """A token that won once wins again without being replayed, and loses to better ones."""
    engine = FakeEngine(40)
    memory = CacheMemory(engine, 10_000, policy=POLICY)
    memory.feed([200] * 3 + [50] * 29)
    memory.feed([60] * 80)
    assert len(memory.reports) > 2
    assert list(engine.composed[0][0][:3]) == [200] * 3
    assert 50 not in engine.composed[0][0]


@settings(deadline=None, max_examples=50)
@given(
    n_cells=st.integers(28, 120),
    pieces=st.lists(st.integers(1, 60), max_size=12),
    per_layer=st.booleans(),
    seed=st.integers(0, 10),
)
def test_the_arena_holds_at_every_moment(n_cells: int, pieces: list[int], per_layer: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    engine = FakeEngine(n_cells, per_layer=per_layer)
    memory = CacheMemory(engine, 10_000, policy=POLICY)
    for n in pieces:
        memory.feed(rng.integers(0, 256, n).tolist())
        layout = engine.layout()
        assert layout.n_free >= 0
        assert memory.tokens[len(memory.tokens) - layout.n_live :] == engine.live
        assert memory.used_bytes <= engine.arena_bytes[0]
    assert engine.position == sum(pieces)


def test_budget_one_never_compacts_and_says_when_positions_run_out() -> None:
    engine = FakeEngine(16)
    memory = CacheMemory(engine, 16, compose=False, policy=POLICY)
    memory.feed(range(16))
    with pytest.raises(ContextFull, match="16 of --ctx 16 positions"):
        memory.feed([1])
    with pytest.raises(InvalidInput, match="budget 1"):
        memory.compact()
    assert engine.layout().position == 16


def test_an_interrupt_in_a_compaction_changes_nothing_and_one_in_reading_keeps_what_was_read() -> None:
    engine = FakeEngine(40)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    memory = CacheMemory(engine, 1000, policy=POLICY, on_progress=stop)
    memory.feed(range(32))
    with pytest.raises(KeyboardInterrupt):
        memory.feed([1])
    assert engine.layout().composed == (0, 0)
    assert engine.live == list(range(32))

    memory.clear()

    def stop_at_five(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memory.feed(range(20), stop_at_five)
    assert memory.tokens == engine.live == [0, 1, 2, 3, 4]
    memory.feed([5])
    assert engine.live == [0, 1, 2, 3, 4, 5]


def test_compress_on_demand_halves_what_is_in_use() -> None:
    engine = FakeEngine(200)
    memory = CacheMemory(engine, 1000, policy=POLICY)
    assert memory.compact(0.5) is None
    memory.feed(range(100))
    report = memory.compact(0.5)
    assert report is not None
    assert report.bytes_before == 2000
    assert report.bytes_after <= 1000
    assert report.bytes_after > 900
    with pytest.raises(InvalidInput):
        memory.compact(0.0)
    with pytest.raises(InvalidInput):
        memory.compact(float("nan"))


def test_compressing_twice_compresses_what_is_composed() -> None:
    memory = CacheMemory(FakeEngine(600, per_layer=True), 2000)
    memory.feed([*range(100)] * 3)
    first, second = memory.compact(0.5), memory.compact(0.5)
    assert first is not None
    assert second is not None
    assert second.bytes_after <= 0.5 * second.bytes_before == 0.5 * first.bytes_after
    assert second.tokens_scored == 0
    memory.feed([*range(100)] * 10)


def test_ctrl_c_while_cells_are_rewritten_waits_for_their_scores() -> None:
    class PressesCtrlC(FakeEngine):
        def rewrite(self, selection: Sequence[Selection], n_tail: int, *more: Any) -> None:
            super().rewrite(selection, n_tail, *more)
            signal.raise_signal(signal.SIGINT)

    memory = CacheMemory(PressesCtrlC(200), 1000)
    with pytest.raises(KeyboardInterrupt):
        memory.feed([*range(100)] * 3)
    composed = memory.engine.layout().composed
    assert composed[0] > 0
    assert [layer.shape[1] for layer in memory.state().scores] == list(composed)


def test_ctrl_c_while_tokens_are_forgotten_waits_until_all_of_them_are() -> None:
    class PressesCtrlC(FakeEngine):
        def clear(self) -> None:
            super().clear()
            if self.is_read:
                signal.raise_signal(signal.SIGINT)

        def drop_tail(self, n: int, checkpoint: Any = None) -> None:
            super().drop_tail(n, checkpoint)
            signal.raise_signal(signal.SIGINT)

        is_read = False

    engine = PressesCtrlC(200)
    memory = CacheMemory(engine, 1000)
    memory.feed(range(100))
    engine.is_read = True
    with pytest.raises(KeyboardInterrupt):
        memory.rewind(90)
    assert memory.position == len(memory.tokens) == 90
    with pytest.raises(KeyboardInterrupt):
        memory.clear()
    assert memory.position == len(memory.tokens) == 0


def test_an_arena_too_small_is_told() -> None:
    memory = CacheMemory(FakeEngine(16), 1000, policy=POLICY)
    with pytest.raises(ContextFull, match="raise --ctx or --budget"):
        memory.feed(range(20))


def test_rewinding_uses_live_cells_or_reads_the_transcript_again() -> None:
    engine = FakeEngine(200)
    memory = CacheMemory(engine, 1000, policy=POLICY)
    memory.feed(range(10))
    assert memory.rewind(6)
    assert engine.live == memory.tokens == [0, 1, 2, 3, 4, 5]
    memory.feed(range(6, 20))
    memory.compact(0.5)
    engine.fed = b""
    assert not memory.rewind(9)
    assert memory.tokens == list(engine.fed) == list(range(9))
    for wrong in (-1, 10):
        with pytest.raises(InvalidInput):
            memory.rewind(wrong)


def pinned_cells(engine: FakeEngine, tokens: set[int]) -> list[set[int]]:
    """For each layer and head, which of these tokens stand in its composed or live cells."""
    return [tokens & {*head.tolist(), *engine.live} for layer in engine.composed for head in layer]


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("pins", [True, False])
def test_pinned_tokens_survive_every_compaction_in_all_layers_and_heads(per_layer: bool, pins: bool) -> None:
    engine = FakeEngine(60, per_layer=per_layer)
    memory = CacheMemory(engine, 10_000, policy=POLICY)
    poor = {1, 2, 252, 253}  # in one layer or the other
    memory.feed([100] * 10)
    if pins:
        assert memory.pin(10, 14), "before they are read"
    memory.feed([*poor, *[100] * 30])
    memory.feed([120, 130] * 100)
    if pins:
        assert memory.pin(memory.position, memory.position + 1)
    memory.feed([3, 254])
    if pins:
        assert memory.pin(memory.position - 1, memory.position), "when they are live"
    memory.feed([100, 140] * 100)
    memory.compact(0.1)
    poor |= {3, 254}
    assert len(memory.reports) > 5
    kept = pinned_cells(engine, poor)
    assert kept == [poor] * 4 if pins else all(cells != poor for cells in kept)
    assert memory.n_pinned == (6 if pins else 0)


def test_pins_that_do_not_fit_or_come_too_late() -> None:
    engine = FakeEngine(60)
    memory = CacheMemory(engine, 10_000, policy=POLICY)
    with pytest.raises(ContextFull, match="41 pinned tokens are more than the 40 that a compaction can keep"):
        memory.pin(0, 41)
    assert memory.n_pinned == 0
    assert memory.pin(0, 40)
    assert memory.pin(20, 40), "twice is once"
    with pytest.raises(ContextFull):
        memory.pin(90, 91)
    memory.unpin(10)
    memory.feed([*range(1, 11), *[100] * 100])
    assert not memory.pin(10, 12), "they are composed"
    assert not memory.rewind(12)
    assert pinned_cells(engine, {*range(1, 11)}) == [{*range(1, 11)}] * 4
    smaller = CacheMemory(FakeEngine(26), 10_000, policy=POLICY)
    with pytest.raises(ContextFull, match="10 pinned tokens are more than the 6 that a compaction can keep"):
        smaller.restore(
            replace(memory.state(), tokens=(1,) * 12, pins=((0, 10),), scores=(np.zeros((2, 0), "f4"),) * 2)
        )
    with pytest.raises(InvalidInput):
        memory.pin(4, 3)
    with pytest.raises(InvalidInput, match="budget 1"):
        CacheMemory(engine, 60, compose=False).pin(0, 1)


def test_a_window_that_moved_on_is_not_rewound_into() -> None:
    engine = FakeEngine(200)
    engine.max_drop = 10
    memory = CacheMemory(engine, 1000, compose=False, policy=POLICY)
    memory.feed(range(50))
    assert memory.rewind(42)
    assert not memory.rewind(36), "14 behind what the window had to reach"
    assert memory.tokens == list(range(36))
    assert memory.rewind(30)


def test_the_report_line() -> None:
    report = CompactionReport(900, 800, (10, 300), 8, 3 << 20, 1 << 20, 0.5, 0.25, 0.25)
    assert report.line() == (
        "compacted: 900 tokens seen, 10–300 composed + 8 live cells a layer, 3.0 → 1.0 MiB in 1.0 s"
    )
    earlier = CompactionReport(700, 700, (9, 250), 8, 3 << 20, 2 << 20, 1.5, 0.0, 0.0)
    assert report.line(earlier, earlier) == (
        "compacted: 900 tokens seen, 10–300 composed + 8 live cells a layer, 3.0 → 1.0 MiB in 4.0 s, 3 times"
    )


def test_policies_fit_their_arena() -> None:
    for n_cells in (256, 512, 2048, 32768):
        policy = Policy.for_cells(n_cells)
        assert policy.n_tail + policy.n_headroom + policy.n_scratch < n_cells / 2
    assert [Policy.for_cells(n).n_tail for n in (32, 256, 768, 8192)] == [8, 42, 128, 128]


def test_the_tail_gives_way_to_pins_and_to_those_who_ask() -> None:
    engine = FakeEngine(400)
    memory = CacheMemory(engine, 4000)
    policy = memory.policy
    assert policy.n_tail == 66
    n_pinned = 400 - policy.n_headroom - policy.n_scratch - LEAST_TAIL - 10
    memory.pin(0, n_pinned)
    memory.feed([65] * n_pinned)
    memory.feed([66] * 1000)
    assert {r.n_live for r in memory.reports} == {LEAST_TAIL + 10}
    assert all((layer[:, :n_pinned] == 65).all() for layer in engine.composed)
    memory.clear()
    memory.feed([67] * 60)
    assert memory.compact(0.5) is not None
    assert engine.layout().n_live == LEAST_TAIL


def test_a_cell_for_every_position_is_used_without_a_compaction() -> None:
    engine = FakeEngine(40)
    memory = CacheMemory(engine, 40, policy=POLICY)
    memory.feed([100] * 40)
    assert (memory.reports, engine.replayed) == ([], [])
    assert engine.layout().n_free == 0
    again = CacheMemory(FakeEngine(40), 40, policy=POLICY)
    again.restore(memory.state())
    assert again.position == 40
    with pytest.raises(ContextFull, match="raise --budget"):
        CacheMemory(FakeEngine(40), 1000, policy=POLICY).restore(memory.state())


@pytest.mark.parametrize("stops", [False, True])
def test_compressing_a_full_cache_makes_its_own_room(stops: bool) -> None:
    def on_progress(done: int, _total: int) -> None:
        if stops and done:
            raise KeyboardInterrupt

    engine = FakeEngine(40, per_layer=True)
    memory = CacheMemory(engine, 40, policy=POLICY, on_progress=on_progress)
    memory.feed(range(40))
    if stops:
        with pytest.raises(KeyboardInterrupt):
            memory.compact(0.5)
        assert engine.live == [*range(40)]
    else:
        report = memory.compact(0.5)
        assert report is not None
        assert report.bytes_after <= 0.5 * report.bytes_before
        assert max(map(len, engine.replayed)) > 1, "not one token at a time"
        assert engine.live[-POLICY.n_scratch // 2 :] == [36, 37, 38, 39]
    assert memory.position == 40
    assert memory.tokens == [*range(40)]


@pytest.mark.parametrize("rewrites_first", [False, True])
def test_a_rewrite_that_fails_half_way_leaves_an_empty_cache_and_the_pins(
    rewrites_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the transcript reads it again; nobody goes on from half of it."""
    engine = FakeEngine(40)
    memory = CacheMemory(engine, 1000, policy=POLICY)
    memory.pin(0, 2)
    memory.feed([100] * 30)

    def fail(*_arguments: object, **_named: object) -> None:
        if not rewrites_first:
            engine.clear()
        raise MemoryError

    monkeypatch.setattr(memory._scores if rewrites_first else engine, "keep" if rewrites_first else "rewrite", fail)
    with pytest.raises(MemoryError):
        memory.feed([100] * 10)
    assert (memory.position, memory.tokens, memory.pins) == (0, [], [(0, 2)])
    monkeypatch.undo()
    memory.feed([100] * 40)
    assert memory.position == len(memory.tokens) == 40


def test_a_refused_rewrite_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(40)
    memory = CacheMemory(engine, 1000, policy=POLICY)
    memory.feed([100] * 30)

    def refuse(*_arguments: object) -> None:
        raise InvalidInput("no")

    monkeypatch.setattr(engine, "rewrite", refuse)
    with pytest.raises(InvalidInput):
        memory.compact()
    assert memory.position == len(memory.tokens) == 30


def test_composed_cells_give_way_where_a_smaller_cache_has_no_room_to_read() -> None:
    memory = CacheMemory(FakeEngine(60), 1000, policy=POLICY)
    memory.feed([100] * 50)
    memory.compact(1.0)
    memory.compact(1.0)  # what was the tail is composed as well
    cells = memory.engine.layout()
    assert cells.n_live == POLICY.n_tail
    n_cells = max(cells.composed) + cells.n_live + POLICY.n_scratch // 2
    smaller = CacheMemory(FakeEngine(n_cells), 1000, policy=POLICY)
    smaller.restore(memory.state())
    smaller.feed([100] * 30)
    assert smaller.position == 80


def test_cells_at_other_positions_than_they_say_are_not_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = CacheMemory(FakeEngine(60), 1000, policy=POLICY)
    memory.feed([100] * 40)
    engine = FakeEngine(60)
    other = CacheMemory(engine, 1000, policy=POLICY)
    other.feed([7] * 10)
    other.pin(0, 2)
    restore = engine.restore

    def elsewhere(cells: CacheSnapshot) -> None:
        restore(cells)
        engine.position = -(2**31)

    monkeypatch.setattr(engine, "restore", elsewhere)
    with pytest.raises(InvalidInput, match="positions"):
        other.restore(memory.state())
    assert (other.position, other.tokens, other.pins) == (0, [], [(0, 2)])


# -- by a scorer ------------------------------------------------------------------------------------------------------


def scored(n_cells: int, *, age: float = 0.0, n_ctx: int = 10_000, **options: Any) -> tuple[FakeEngine, CacheMemory]:
    """A memory whose scorer likes what the fake engine's layers do: high tokens, or low ones."""
    engine = FakeEngine(n_cells, per_layer=True, reads_rows=True)
    weights, places = np.array([[4.0, 4.0]] * 2, np.float16), np.array([[age, 0.0, -8.0]] * 2, np.float32)
    scorer = Scorer((weights,) * 2, (places,) * 2, 1000)
    return engine, CacheMemory(engine, n_ctx, policy=POLICY, scorer=scorer, **options)


def test_a_scorer_feeds_nothing_and_keeps_the_best_of_all_time() -> None:
    engine, memory = scored(60)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, 600).tolist()
    memory.feed(tokens)
    assert engine.replayed == []
    assert engine.fed == bytes(tokens), "nothing is read twice"
    assert len(memory.reports) > 5
    older = tokens[: memory.position - engine.layout().n_live]
    for layer, composed in enumerate(engine.composed):
        ranked = sorted(older, reverse=layer == 0)[: composed.shape[1]]
        for head in composed.tolist():
            assert sorted(head, reverse=layer == 0) == ranked, "as if all had been chosen at once"


def test_age_moves_cells_to_newer_tokens() -> None:
    tokens = [*range(256)] * 3
    places = []
    for age in (0.0, -2.0):
        _, memory = scored(60, age=age)
        memory.feed(tokens)
        places.append(np.mean([origins.mean() for origins in memory.state().origins]))
    assert places[1] > places[0] + 50


def test_where_tokens_stood_is_known_of_each_head() -> None:
    engine, memory = scored(60)
    memory.feed(np.random.default_rng(1).integers(0, 256, 300).tolist())
    for composed, origins in zip(engine.composed, memory.state().origins, strict=True):
        assert [[memory.tokens[i] for i in head] for head in origins.tolist()] == composed.tolist()


def test_composed_tokens_are_dropped_from_a_position_on() -> None:
    engine, memory = scored(120)
    tokens = np.random.default_rng(2).integers(0, 256, 400).tolist()
    memory.feed(tokens)
    memory.compact(0.9)
    before = memory.state()
    engine.fed = b""
    position = 330
    assert memory.can_drop(position)
    assert memory.rewind(position)
    assert len(engine.fed) == POLICY.n_tail, "the text that goes on is read again, and no more"
    assert memory.tokens == tokens[:position]
    assert memory.position == engine.position == position
    for composed, origins, old in zip(engine.composed, memory.state().origins, before.origins, strict=True):
        assert [[tokens[i] for i in head] for head in origins.tolist()] == composed.tolist()
        older = (old < position - POLICY.n_tail).sum(axis=1)
        assert origins.shape[1] == older.min()
    memory.feed([1, 2, 3] * 100)
    assert memory.position == position + 300


def test_going_far_back_or_past_what_is_left_reads_again() -> None:
    engine, memory = scored(120)
    memory.feed(np.random.default_rng(2).integers(0, 256, 400).tolist())
    assert not memory.can_drop(150), "more than half of it"
    assert not memory.rewind(150)
    assert (memory.position, len(memory.tokens)) == (150, 150)
    memory.feed([9] * 200)
    memory.compact(0.5)
    assert memory.can_drop(300)
    engine.state_bytes, engine.max_drop = 12, 0
    assert not memory.can_drop(300), "what moves on was not kept"


def test_pins_hold_in_composed_cells() -> None:
    _, memory = scored(80)
    memory.pin(3, 6)
    memory.feed([100, 100, 100, 128, 128, 128, *[5, 250] * 200])
    assert len(memory.reports) > 3
    for origins in memory.state().origins:
        assert all({3, 4, 5} <= {*head} for head in origins.tolist())
    memory.unpin(0)
    memory.feed([5, 250] * 100)
    assert not all({3, 4, 5} <= {*head} for origins in memory.state().origins for head in origins.tolist())


def test_a_replay_of_the_first_text_teaches_a_scorer() -> None:
    engine = FakeEngine(120, per_layer=True, reads_rows=True)
    memory = CacheMemory(engine, 10_000, policy=POLICY)
    assert memory.policy.n_scratch == POLICY.n_scratch
    tokens = np.random.default_rng(3).integers(0, 256, 400).tolist()
    memory.feed(tokens)
    replayed = b"".join(engine.replayed)
    assert 100 < len(replayed) < 250, "what was live at the first compaction, with its lead-ins, and nothing after"
    assert memory.policy.n_scratch == 0
    state = memory.state()
    assert state.scorer is not None
    assert np.mean(engine.composed[0]) > 150 > 100 > np.mean(engine.composed[1]), "as the fake layers look"
    assert all({0, 1, 2, 3} <= {*head} for origins in state.origins for head in origins.tolist()), "sinks stay"
    again = CacheMemory(FakeEngine(120, per_layer=True, reads_rows=True), 10_000, policy=POLICY)
    again.restore(state)
    assert again.state().scorer is state.scorer
    again.feed(tokens)
    assert again.engine.replayed == [], "it goes on by what it had learnt"  # type: ignore[attr-defined]
    other = CacheMemory(FakeEngine(120, per_layer=True, reads_rows=True), 10_000, policy=POLICY, replay=True)
    other.feed(tokens)
    assert other.state().scorer is None


def test_an_engine_that_reads_no_rows_goes_on_from_no_scored_cells() -> None:
    _, memory = scored(60)
    memory.feed([*range(200)])
    blind = CacheMemory(FakeEngine(60), 10_000, policy=POLICY)
    with pytest.raises(InvalidInput, match="kvcompose-local build"):
        blind.restore(memory.state())
    assert blind.position == 0


def test_a_scorer_of_another_model_is_refused() -> None:
    engine = FakeEngine(60, reads_rows=True)
    weights, places = np.ones((3, 2), np.float16), np.zeros((3, 3), np.float32)
    with pytest.raises(InvalidInput, match="measure it again"):
        CacheMemory(engine, 100, scorer=Scorer((weights,) * 2, (places,) * 2, 10))
