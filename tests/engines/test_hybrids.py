"""Models of attention and recurrent layers: their cells are composed, and what is recurrent is as if nothing were."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from cell_rows import assert_same, exported, gathered, identity, mask_dropped, uneven
from hybrid_shapes import SMALL
from random_models import N_VOCAB, RandomModel
from tiny_models import replayed

from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.errors import EngineError, InvalidInput
from kvcompose_local.interfaces import Sampling
from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.llama_ffi.library import bind, lib

pytestmark = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")

TOKENS = np.random.default_rng(3).integers(0, N_VOCAB, 900).tolist()
ARCHITECTURES = tuple(SMALL)


def hybrid(arch: str, *, n_cells: int = 256, cache_type: str = "f16", n_ubatch: int = 64) -> PatchedEngine:
    return PatchedEngine(
        RandomModel(SMALL[arch]),
        n_cells=n_cells,
        n_threads=1,
        cache_type=cache_type,
        n_ubatch=n_ubatch,
        n_outputs=n_ubatch,
        sampling=Sampling(temperature=0),
    )


@pytest.fixture
def engine() -> Iterator[PatchedEngine]:
    with hybrid("qwen3next") as opened:
        yield opened


@contextmanager
def pair(arch: str, cache_type: str = "f16") -> Iterator[tuple[PatchedEngine, PatchedEngine]]:
    with hybrid(arch, cache_type=cache_type) as one, hybrid(arch, cache_type=cache_type) as two:
        yield one, two


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("cache_type", ["f16", "q8_0/q4_0"])
def test_bytes(arch: str, cache_type: str) -> None:
    """A rewrite's rows equal a NumPy gather, and the recurrent state keeps every byte."""
    rng = np.random.default_rng(1)
    with hybrid(arch, cache_type=cache_type) as engine:
        assert len(engine.shape.layers) == 3
        assert engine.state_bytes > 0
        engine.decode(TOKENS[:100])
        before, state = exported(engine), engine.checkpoint()
        engine.rewrite(identity(engine, 8), 8)
        assert_same(before, exported(engine))
        for n_tail in (8, 0, 3):
            before, state = exported(engine), engine.checkpoint()
            selection = uneven(rng, engine, n_tail)
            engine.rewrite(selection, n_tail)
            assert_same(gathered(before, selection, n_tail), exported(engine))
            np.testing.assert_array_equal(engine.checkpoint(), state)
            position = engine.layout().position
            engine.decode(TOKENS[position : position + 20])
            assert engine.layout().position == position + 20
        assert np.isfinite(engine.logits()).all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention_sees_exactly_the_kept_cells(arch: str) -> None:
    """The reference keeps all cells and sets the logits of dropped ones, by layer and head, to minus infinity."""
    rng = np.random.default_rng(4)
    with ExitStack() as stack:
        engine, reference = stack.enter_context(pair(arch))
        for each in (engine, reference):
            stack.enter_context(each._cells.visible_softmax())
        n_heads = [layer.n_kv_heads for layer in engine.shape.layers]
        origin = [np.zeros((n, 0), np.int64) for n in n_heads]
        read = 0
        for n in (60, 40, 30):
            for each in (engine, reference):
                each.decode(TOKENS[read : read + n - 1])
                mask_dropped(reference, origin, read)
                each.decode(TOKENS[read + n - 1 : read + n])
            one, two = engine.logits(), reference.logits()
            np.testing.assert_allclose(one, two, atol=5e-3 * float(two.std()))
            live = np.arange(read - (4 if read else 0), read + n)
            rows = [np.concatenate([o, np.tile(live, (len(o), 1))], axis=1) for o in origin]
            read += n
            selection = uneven(rng, engine, 4)
            engine.rewrite(selection, 4)
            origin = [np.take_along_axis(r, s, axis=1) for r, s in zip(rows, selection, strict=True)]
            mask_dropped(reference, origin, read)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_going_back_restores_the_state_before_cells_are_dropped(arch: str) -> None:
    """The other order is refused: a recurrent state drops no token that it has seen."""
    with pair(arch) as (engine, other):
        for each in (engine, other):
            each.decode(TOKENS[:60])
            each.rewrite(uneven(np.random.default_rng(0), each, 8), 8)
            each.decode(TOKENS[60:80])
        checkpoint, before = engine.checkpoint(), exported(engine)
        engine.decode(TOKENS[200:230])
        moved = engine.layout()
        with pytest.raises(EngineError, match="cannot drop part"):
            engine._context.remove(80)
        assert engine.layout() == moved, "nothing was removed"

        engine._context.set_partial_state(checkpoint)
        engine._context.remove(80)
        assert engine.layout() == other.layout()
        assert_same(exported(engine), before)
        for each in (engine, other):
            each.decode(TOKENS[80:100])
        np.testing.assert_array_equal(engine.logits(), other.logits())
        engine.drop_tail(20, checkpoint)
        engine.decode(TOKENS[80:100])
        np.testing.assert_array_equal(engine.logits(), other.logits())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_going_back_behind_composed_cells(arch: str) -> None:
    kept = np.arange(0, 80, 2)
    with pair(arch) as (engine, other):
        rows = [np.tile(kept, (layer.n_kv_heads, 1)) for layer in engine.shape.layers]
        for each in (engine, other):
            each.decode(TOKENS[:80])
        checkpoint = engine.checkpoint()
        for each in (engine, other):
            each.decode(TOKENS[80:100])
        engine.rewrite([np.tile(np.arange(90), (len(r), 1)) for r in rows], 10)
        engine.decode(TOKENS[100:110])
        before = engine.layout()
        with pytest.raises(EngineError, match="do not go back"):
            engine.rewrite(rows, 0, 30)
        assert engine.layout() == before
        engine.rewrite(rows, 0, 30, checkpoint)
        assert (engine.layout().position, engine.layout().n_live) == (80, 0)
        other.drop_tail(20, checkpoint)
        other.rewrite(rows, 0)
        assert_same(exported(engine), exported(other))
        for each in (engine, other):
            each.decode(TOKENS[80:90])
        np.testing.assert_allclose(engine.logits(), other.logits(), atol=1e-3)


def test_checkpoints_of_another_place_or_model_are_refused(engine: PatchedEngine) -> None:
    engine.decode(TOKENS[:50])
    checkpoint = engine.checkpoint()
    with hybrid("falcon-h1") as another:
        another.decode(TOKENS[:50])
        foreign = another.checkpoint()
    for wrong in (checkpoint[:-1], checkpoint[:20], checkpoint[:0], np.zeros(100, np.uint8), foreign):
        memory = CacheMemory(engine, 2000)
        memory.clear()
        memory.feed(TOKENS[:50])
        memory.mark()
        memory.feed(TOKENS[50:60])
        memory.checkpoints._kept[:] = [memory.checkpoints._kept[0]._replace(state=wrong)]
        before, state = exported(engine), engine.checkpoint()
        with pytest.raises(EngineError):
            memory.rewind(50)
        assert memory.tokens == TOKENS[: memory.position]
        if memory.position:
            assert_same(before, exported(engine))
            np.testing.assert_array_equal(engine.checkpoint(), state)
        memory.feed(TOKENS[:20])
        assert np.isfinite(engine.logits()).all()
    engine.clear()
    engine.decode(TOKENS[:60])
    with pytest.raises(EngineError, match="position 50, not 55"):
        engine.drop_tail(5, checkpoint)
    with pytest.raises(InvalidInput):
        engine.drop_tail(1000, checkpoint)


class _Perf(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("t_start_ms", "t_load_ms", "t_p_eval_ms", "t_eval_ms")),
        *((name, ctypes.c_int32) for name in ("n_p_eval", "n_eval", "n_reused")),
    ]


_perf = bind("llama_perf_context", _Perf, ctypes.c_void_p)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_graph_of_an_old_layout_is_not_used_again(arch: str) -> None:
    """All else that a hybrid graph looks at is as before: as many tokens, cells and states, the same place of each."""

    def n_reused(engine: PatchedEngine) -> int:
        return int(_perf(engine._context._ctx).n_reused)

    with pair(arch) as (engine, other):
        for each in (engine, other):
            each.decode(TOKENS[:100])
        k = 40
        rows = [np.tile(np.arange(k), (layer.n_kv_heads, 1)) for layer in engine.shape.layers]
        engine._cells.rewrite(256 - k, 8, rows)  # as wide as what comes after it
        engine.note_composed()
        engine.decode(TOKENS[100:101])
        once = n_reused(engine)
        engine.decode(TOKENS[101:102])
        assert n_reused(engine) == once + 1, "graphs are used again at all"

        state = engine.checkpoint()
        lib.llama_memory_clear(engine._context._memory, True)  # which knows of no graph
        other.clear()
        for each in (engine, other):
            each.note_composed()
            each._context.set_partial_state(state)
        assert engine.layout() == other.layout()
        once = n_reused(engine)
        for each in (engine, other):
            each.decode(TOKENS[102:103])
        assert n_reused(engine) == once
        np.testing.assert_array_equal(engine.logits(), other.logits())
        for each in (engine, other):
            each.decode(TOKENS[103:110])
        np.testing.assert_array_equal(engine.logits(), other.logits())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_replay_leaves_no_trace(arch: str) -> None:
    with pair(arch) as (engine, other):
        for each in (engine, other):
            each.decode(TOKENS[:60])
            each.rewrite(uneven(np.random.default_rng(0), each, 8), 8)
            each.decode(TOKENS[60:80])
        before, state, layout = exported(engine), engine.checkpoint(), engine.layout()
        seen = replayed(engine, TOKENS[:20])
        assert [x.shape for x in seen] == [(layer.n_heads, 28) for layer in engine.shape.layers]
        assert all(0 < x.max() <= 1 for x in seen)
        assert engine.layout() == layout
        assert_same(before, exported(engine))
        np.testing.assert_array_equal(engine.checkpoint(), state)
        for each in (engine, other):
            each.decode(TOKENS[80:90])
        np.testing.assert_array_equal(engine.logits(), other.logits())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_stops_a_replay_half_way_leaves_no_trace(engine: PatchedEngine, error: type[BaseException]) -> None:
    engine.decode(TOKENS[:60])
    before, state, layout = exported(engine), engine.checkpoint(), engine.layout()

    class Stops:
        def update(self, layer: int, weights: np.ndarray, columns: object) -> None:
            if layer == 1:
                raise error

    with pytest.raises(error):
        engine.replay(TOKENS[:50], Stops())
    assert engine.layout() == layout
    assert_same(before, exported(engine))
    np.testing.assert_array_equal(engine.checkpoint(), state)


def test_what_stops_reading_keeps_what_was_read(engine: PatchedEngine) -> None:
    def stop(done: int, _total: int) -> None:
        if done > 60:
            raise KeyboardInterrupt

    memory = CacheMemory(engine, 2000)
    with pytest.raises(KeyboardInterrupt):
        memory.feed(TOKENS[:200], stop)
    assert 60 < memory.position == len(memory.tokens) < 200
    memory.feed(TOKENS[memory.position : 200])
    logits = engine.logits()
    memory.clear()
    memory.feed(TOKENS[:200])
    np.testing.assert_allclose(engine.logits(), logits, atol=1e-2 * logits.std())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_long_chat_is_compacted_taken_back_saved_and_gone_on_with(arch: str) -> None:
    with pair(arch, "q8_0/q4_0") as (engine, other):
        memory, again = CacheMemory(engine, 4000), CacheMemory(other, 4000)
        for start in range(0, 600, 100):
            memory.mark()
            memory.feed(TOKENS[start : start + 100])
        assert len(memory.reports) >= 5
        assert engine.cache_bytes >= memory.used_bytes
        memory.compact()
        memory.mark()
        memory.feed(TOKENS[600:604])
        logits, n_compactions = engine.logits(), len(memory.reports)
        memory.feed(TOKENS[700:706])
        assert memory.rewind(600)
        memory.feed(TOKENS[600:604])
        assert len(memory.reports) == n_compactions
        np.testing.assert_array_equal(engine.logits(), logits)

        memory.feed(TOKENS[604:620])
        state = memory.state()
        again.feed(TOKENS[:30])
        again.restore(state)
        assert (again.position, again.tokens) == (620, memory.tokens)
        for each in (memory, again):
            each.feed(TOKENS[620:640])
        # The order of the cells, and so of sums of rounded numbers, may differ.
        np.testing.assert_allclose(other.logits(), engine.logits(), atol=0.05 * engine.logits().std())
        assert again.reports == [], "what is taken back is live"
        assert again.checkpoints.positions == memory.checkpoints.positions[-2:]
        assert again.rewind(600), "the last turn is taken back from a session, too"
        again.feed(TOKENS[600:604])
        np.testing.assert_allclose(other.logits(), logits, atol=0.05 * logits.std())
