"""Going back where a part of the cache only moves on: by checkpoints, of which there are few."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine, FakeModel

from kvcompose_local.chat import Chat
from kvcompose_local.chat.checkpoints import LEAST, MOST, MOST_BYTES, Checkpoint, Checkpoints, most_of
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.composing.policy import Policy
from kvcompose_local.errors import InvalidInput

POLICY = Policy(n_tail=4, n_headroom=8, n_scratch=8)


def checkpoint(position: int, n_bytes: int = 1) -> Checkpoint:
    return Checkpoint(position, np.zeros(n_bytes, np.uint8))


def memory_of(n_cells: int = 200, **options: Any) -> tuple[FakeEngine, CacheMemory]:
    engine = FakeEngine(n_cells, moves_on=True, **options)
    return engine, CacheMemory(engine, 10_000, policy=POLICY)


def state_after(tokens: list[int]) -> int:
    engine = FakeEngine(10_000, moves_on=True)
    engine.decode(tokens)
    return engine.state


@pytest.mark.parametrize(
    ("n_bytes", "n"),
    [(1, MOST), (MOST_BYTES // MOST, MOST), (MOST_BYTES // 3, 3), (MOST_BYTES, LEAST), (10**10, LEAST)],
)
def test_there_are_as_many_as_their_bytes_allow(n_bytes: int, n: int) -> None:
    assert most_of(n_bytes) == n


def test_old_ones_thin_out_and_the_last_turn_keeps_both() -> None:
    kept = Checkpoints()
    for turn in range(1, 101):
        kept.add(checkpoint(100 * turn))
        kept.add(checkpoint(100 * turn + 40))
        assert kept.positions[-2:] == [100 * turn, 100 * turn + 40]
        assert len(kept.positions) <= MOST
    assert kept.positions == sorted(kept.positions)
    back = [10_040 - position for position in kept.positions]
    assert back[0] > 3000, "far back"
    assert all(older <= 4 * newer + 200 for older, newer in pairwise(back)), back
    assert kept.n_bytes == len(back)
    assert kept.before(10_039) is not None
    assert kept.before(10_039).position == 10_000  # type: ignore[union-attr]
    assert kept.before(kept.positions[0] - 1) is None
    kept.forget(10_000)
    assert kept.positions[-1] == 10_000


def test_large_ones_are_the_last_turn_alone() -> None:
    engine, memory = memory_of(2000)
    engine.state_bytes = MOST_BYTES
    for _ in range(10):
        memory.feed(range(10))
        memory.mark()
    assert memory.checkpoints.positions == [90, 100]


def test_a_session_keeps_what_is_small() -> None:
    small = Checkpoints([checkpoint(10), checkpoint(20), checkpoint(30)])
    assert [kept.position for kept in small.of_last_turn(100)] == [20, 30]
    assert [kept.position for kept in small.of_last_turn(30)] == [10, 20]
    large = Checkpoints([checkpoint(10, MOST_BYTES // 2 + 1), checkpoint(20, MOST_BYTES // 2 + 1)])
    assert [kept.position for kept in large.of_last_turn(100)] == [10], "where the turn begins"
    assert Checkpoints([checkpoint(10, MOST_BYTES + 1)]).of_last_turn(100) == ()


def test_going_back_leads_to_a_checkpoint_and_reads_on_from_it() -> None:
    engine, memory = memory_of()
    memory.feed(range(10))
    memory.mark()
    memory.feed(range(10, 20))
    assert memory.can_drop(20)
    assert memory.can_drop(10)
    assert memory.can_drop(15)
    assert not memory.can_drop(9)
    assert [memory.n_again(position) for position in (20, 15, 10, 9)] == [0, 5, 0, 9]
    engine.fed = b""
    assert memory.rewind(15)
    assert engine.fed == bytes(range(10, 15))
    assert (memory.tokens, engine.state) == ([*range(15)], state_after([*range(15)]))
    assert memory.rewind(10)
    assert engine.state == state_after([*range(10)])
    engine.fed = b""
    assert not memory.rewind(9)
    assert engine.fed == bytes(range(9)), "from the beginning"
    assert memory.checkpoints.positions == []


def test_marks_are_made_once_and_not_of_nothing() -> None:
    _, memory = memory_of()
    memory.mark()
    memory.feed(range(5))
    memory.mark()
    memory.mark()
    assert memory.checkpoints.positions == [5]
    memory.clear()
    assert memory.checkpoints.positions == []
    plain = CacheMemory(FakeEngine(200), 1000, policy=POLICY)
    plain.feed(range(5))
    plain.mark()
    assert plain.checkpoints.positions == []


def test_going_back_behind_composed_cells_leads_to_a_checkpoint() -> None:
    engine, memory = memory_of(120, per_layer=True, reads_rows=True)
    tokens = np.random.default_rng(2).integers(0, 256, 400).tolist()
    memory.feed(tokens[:330])
    memory.mark()
    memory.feed(tokens[330:])
    memory.compact(0.9)
    assert memory.position - engine.layout().n_live > 330
    engine.fed = b""
    assert memory.rewind(332)
    assert engine.fed == bytes(tokens[330:332])
    assert (memory.tokens, engine.state) == (tokens[:332], state_after(tokens[:332]))
    assert all((origins < 330).all() for origins in memory.state().origins)


def test_a_state_is_what_was_read_though_it_was_replayed() -> None:
    engine, memory = memory_of(120, per_layer=True, reads_rows=True)
    tokens = np.random.default_rng(2).integers(0, 256, 400).tolist()
    memory.feed(tokens)
    assert engine.replayed
    assert engine.state == state_after(tokens)


def test_a_restored_memory_takes_back_its_last_turn_and_refuses_checkpoints_of_no_place() -> None:
    _, memory = memory_of()
    for start in (0, 10, 20):
        memory.feed(range(start, start + 10))
        memory.mark()
    memory.feed(range(30, 35))
    state = memory.state()
    assert [kept.position for kept in state.checkpoints] == [20, 30]
    engine, other = memory_of()
    other.restore(state)
    assert other.rewind(20)
    assert engine.state == state_after([*range(20)])
    for wrong in ((0,), (35,), (20, 20), (30, 20), (-1,)):
        with pytest.raises(InvalidInput, match="checkpoints"):
            other.restore(replace(state, checkpoints=tuple(map(checkpoint, wrong))))


def test_a_chat_keeps_where_a_turn_and_its_answer_begin() -> None:
    engine, memory = memory_of(1000)
    engine.answers = ["one", "two", "twice", "three", "four"]
    rebuilt: list[int] = []
    chat = Chat(FakeModel(), memory, on_rebuild=rebuilt.append)
    list(chat.ask("Hi", max_tokens=9))
    begin = memory.position
    list(chat.ask("Go", max_tokens=9))
    text = bytes(memory.tokens).decode()
    assert memory.checkpoints.positions[-2:] == [begin, text.index("two") - 1]
    engine.fed = b""
    assert "".join(chat.ask_again(max_tokens=9)) == "twice"
    assert engine.fed == b"]twice", "the last token before the answer is read again"
    chat.undo()
    assert (memory.position, engine.state) == (begin, state_after(memory.tokens))
    chat.read("A long document. " * 10)
    list(chat.ask("Well?", max_tokens=9))
    assert memory.checkpoints.positions[-3] == begin
    chat.undo()
    chat.undo()
    assert memory.position == begin
    assert rebuilt == []
    assert engine.state == state_after(memory.tokens)


def test_a_template_that_drops_thinking_goes_back_to_where_the_answer_began() -> None:
    engine, memory = memory_of(1000)
    engine.answers = ["<think>hm, hm</think>one", "two"]
    rebuilt: list[int] = []
    chat = Chat(FakeModel(forgets=True), memory, on_rebuild=rebuilt.append)
    list(chat.ask("Hi", max_tokens=99))
    assert b"hm, hm" in bytes(memory.tokens)
    engine.fed = b""
    list(chat.ask("Go", max_tokens=9))
    assert engine.fed == b"]one[/][u]Go[/][a]two"
    assert bytes(memory.tokens) == b"[u]Hi[/][a]one[/][u]Go[/][a]two"
    assert rebuilt == []
    assert engine.state == state_after(memory.tokens)


def test_reading_all_again_keeps_where_the_last_turn_begins() -> None:
    engine, memory = memory_of(1000)
    engine.answers = ["one", "two", "three"]
    rebuilt: list[int] = []
    chat = Chat(FakeModel(), memory, on_rebuild=rebuilt.append)
    for text in ("Hi", "Go"):
        list(chat.ask(text, max_tokens=9))
    chat.set_system("Be brief.")
    assert rebuilt == [memory.position]
    assert engine.state == state_after(memory.tokens)
    chat.undo()
    assert len(rebuilt) == 1, "the last turn is taken back without reading"
    assert bytes(memory.tokens) == b"[s]Be brief.[/][u]Hi[/][a]one"
    assert engine.state == state_after(memory.tokens)
