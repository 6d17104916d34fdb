"""The patched engine on tiny F32 models: bytes against NumPy and the stock twin, attention against masked logits."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cell_rows import assert_same, exported, gathered, identity, mask_dropped, uneven
from tiny_models import ARCHITECTURES, SLIDING, replayed

from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.engines import base, open_engine
from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.engines.state_format import parse_state
from kvcompose_local.engines.stock import StockEngine
from kvcompose_local.errors import ContextFull, EngineError, InvalidInput, ModelError
from kvcompose_local.interfaces import Sampling
from kvcompose_local.llama_ffi import context as context_module
from kvcompose_local.llama_ffi.cells import PerLayerCells, library_is_patched
from kvcompose_local.llama_ffi.library import lib
from kvcompose_local.llama_ffi.model import Model
from kvcompose_local.llama_ffi.rpc import add_workers

pytestmark = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")

GREEDY = Sampling(temperature=0)
UNIFORM = tuple(arch for arch in ARCHITECTURES if arch not in SLIDING)
TYPES = ["f16", "bf16", "q8_0", "q4_0", "q5_1", "q8_0/q4_0"]
#: test_rpc.py runs this file again with the model and its cells on these workers.
WORKERS = [w for w in os.environ.get("KVCOMPOSE_TEST_WORKERS", "").split(",") if w]
if WORKERS:
    add_workers(WORKERS)
GPU_LAYERS = 999 if WORKERS else 0
TOKENS = np.random.default_rng(3).integers(3, 259, 400).tolist()


def patched(path: Path, *, n_cells: int = 256, cache_type: str = "f16", n_ubatch: int = 64) -> PatchedEngine:
    return PatchedEngine(
        Model(path, gpu_layers=GPU_LAYERS),
        n_cells=n_cells,
        n_threads=1,
        cache_type=cache_type,
        n_ubatch=n_ubatch,
        n_outputs=n_ubatch,
        sampling=GREEDY,
    )


@pytest.fixture
def llama(tiny_model: Callable[..., Path]) -> Iterator[PatchedEngine]:
    with patched(tiny_model("llama")) as engine:
        yield engine


@pytest.mark.parametrize("cache_type", TYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bytes(tiny_model: Callable[..., Path], arch: str, cache_type: str) -> None:
    """Identity keeps every byte; an uneven rewrite, and a rewrite of it, equal a NumPy gather."""
    rng = np.random.default_rng(1)
    with patched(tiny_model(arch, n_layers=7 if arch == "gemma3" else 6), cache_type=cache_type) as engine:
        assert len(engine.shape.layers) == {"gemma2": 3, "gemma3": 1}.get(arch, 6)
        engine.decode(TOKENS[:100])
        before = exported(engine)
        engine.rewrite(identity(engine, 8), 8)
        assert_same(before, exported(engine))
        assert engine.layout().position == 100
        for n_tail in (8, 0, 3):
            before = exported(engine)
            selection = uneven(rng, engine, n_tail)
            engine.rewrite(selection, n_tail)
            assert_same(gathered(before, selection, n_tail), exported(engine))
            assert engine.layout().composed == tuple(s.shape[1] for s in selection)
            position = engine.layout().position
            engine.decode(TOKENS[position : position + 20])
            assert engine.layout().position == position + 20
        assert WORKERS or engine._cells.arena(0).staging_peak == 0, "rows that the host reaches are moved in place"
        engine.clear()
        assert not any(x.any() for planes in exported(engine) for x in planes)
        engine.decode(TOKENS[:100])


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_attention_is_the_same_where_it_must_be_fetched(
    tiny_model: Callable[..., Path], arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    with patched(tiny_model(arch)) as engine:
        for in_place in (True, False):
            if not in_place:
                monkeypatch.setattr(context_module, "_kvc_host_data", None)
            engine.clear()
            engine.decode(TOKENS[:100])
            shown.append(replayed(engine, TOKENS[:20]))
    assert_same([shown[0]], [shown[1]])


@pytest.mark.parametrize("arch", UNIFORM)
def test_uniform_budgets_equal_the_stock_twin(tiny_model: Callable[..., Path], arch: str) -> None:
    rng = np.random.default_rng(2)
    with (
        patched(tiny_model(arch)) as engine,
        StockEngine(Model(tiny_model(arch)), n_cells=256, n_threads=1, sampling=GREEDY, n_ubatch=64) as twin,
    ):
        for e in (engine, twin):
            e.decode(TOKENS[:100])
        # Both engines read the same text with different attention kernels, so the rows agree to float tolerance only:
        # the twin's bytes are put into the patched cache, and from there on every byte must agree.
        cells = parse_state(twin._context.state())
        for i in range(3):
            values = cells.values[i].data.transpose(1, 0, 2).reshape(100, -1)
            rows = {False: cells.keys[i].data, True: values}
            for is_v, data in rows.items():
                whole = engine._cells.rows(i, values=is_v)
                whole[:100] = data
                engine._cells.set_rows(i, whole, values=is_v)
        selection = [np.stack([rng.permutation(92)[:31] for _ in range(2)]).astype(np.int64) for _ in range(3)]
        for e in (engine, twin):
            e.rewrite(selection, 8)
        cells = parse_state(twin._context.state())
        for i, (k, v) in enumerate(exported(engine)):
            assert (k.reshape(39, -1) == cells.keys[i].data).all()
            assert (v.reshape(39, -1) == cells.values[i].data.transpose(1, 0, 2).reshape(39, -1)).all()
        np.testing.assert_allclose(replayed(engine, TOKENS[:20]), replayed(twin, TOKENS[:20]), atol=2e-3)


@pytest.mark.parametrize("arch", UNIFORM)
def test_attention_sees_exactly_the_kept_cells(tiny_model: Callable[..., Path], arch: str) -> None:
    """The reference keeps all cells and sets the logits of dropped ones, by layer and head, to minus infinity.

    Three rounds of reading and uneven rewriting; after each, the next token's logits agree.
    """
    rng = np.random.default_rng(4)
    path = tiny_model(arch)
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(patched(path))
        twin = StockEngine(Model(path), n_cells=256, n_threads=1, sampling=GREEDY, n_ubatch=64)
        reference = stack.enter_context(twin)
        # The same kernels on both sides, so that the tolerance is that of summing in another order.
        stack.enter_context(engine._cells.visible_softmax())
        # origin[layer]: (H, rows) the position that each head of each row came from
        origin = [np.zeros((2, 0), np.int64)] * 3
        read = 0
        for n in (60, 40, 30):
            for e in (engine, reference):
                e.decode(TOKENS[read : read + n - 1])
                mask_dropped(reference, origin, read)
                e.decode(TOKENS[read + n - 1 : read + n])
            np.testing.assert_allclose(engine.logits(), reference.logits(), atol=3e-3)
            live = np.tile(np.arange(read - (4 if read else 0), read + n), (2, 1))
            rows = [np.concatenate([o[:, :], live], axis=1) for o in origin]
            read += n
            selection = uneven(rng, engine, 4)
            engine.rewrite(selection, 4)
            origin = [np.take_along_axis(r, s, axis=1) for r, s in zip(rows, selection, strict=True)]
            mask_dropped(reference, origin, read)


def test_the_explicit_softmax_gives_what_flash_attention_gives(tiny_model: Callable[..., Path]) -> None:
    for arch in ARCHITECTURES:
        for cache_type in ("f16", "q8_0", "q4_0", "q8_0/q4_0"):
            with patched(tiny_model(arch, n_layers=6), cache_type=cache_type) as engine:
                engine.decode(TOKENS[:90])
                engine.rewrite(uneven(np.random.default_rng(0), engine, 8), 8)
                engine.decode(TOKENS[90:91])
                flash = engine.logits()
                engine.drop_tail(1)
                with engine._cells.visible_softmax():
                    engine._context.decode(TOKENS[90:91])
                    explicit = engine.logits()
                # It rounds queries to 8 bits beside quantized keys.
                np.testing.assert_allclose(explicit, flash, atol=0.05 if cache_type == "f16" else 0.1)
                engine.drop_tail(1)
                engine._context.decode(TOKENS[90:91])
                assert (engine.logits() == flash).all()


@pytest.mark.parametrize(
    ("budget", "options", "tiny", "cache_type"),
    [
        (0.5, {}, {}, "q8_0/q4_0"),
        (0.5, {"gpu_layers": 1}, {}, "q8_0"),
        (0.5, {}, {"head": 40}, "f16"),
        (0.5, {}, {"n_heads": 8}, "q8_0/q4_0"),  # heads of 32 where the width divided by their number is 16
        (1.0, {}, {}, "f16"),
        (0.5, {"cache_type": "q5_1"}, {}, "q5_1"),
    ],
)
def test_a_budget_is_spent_on_small_cells_where_they_can_be(
    tiny_model: Callable[..., Path], budget: float, options: dict[str, Any], tiny: dict[str, Any], cache_type: str
) -> None:
    engine, n_ctx = open_engine(tiny_model("llama", **tiny), n_ctx=2048, budget=budget, n_threads=1, **options)
    with engine:
        assert engine.shape.cache_type == cache_type
        assert engine.cache_bytes <= budget * n_ctx * engine.shape.uncompressed_row_bytes
        engine.decode(TOKENS[:100])


def test_a_type_that_heads_do_not_fit_is_refused_by_name(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(InvalidInput, match=r"blocks of 32 values, and the heads of .* are of 40: leave it out"):
        open_engine(tiny_model("llama", head=40), n_ctx=2048, budget=0.5, n_threads=1, cache_type="q8_0/q4_0")


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("cache_type", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q8_0/q4_0"])
def test_quantized_cells_are_read_in_tiles(tiny_model: Callable[..., Path], cache_type: str, n_tokens: int) -> None:
    """64 queries of several heads and 64 cells make a tile: both with less than a whole one left over (0004, 0005).

    One layer, whose keys do not depend on how attention is computed: rounding would carry a difference on.
    """
    text = TOKENS + TOKENS[:200]
    for arch in UNIFORM:
        with patched(tiny_model(arch, n_layers=1), n_cells=768, cache_type=cache_type, n_ubatch=128) as engine:
            engine.decode(text[:70] if n_tokens == 100 else text[:530])
            tiled = engine.decode_all(TOKENS[70 : 70 + n_tokens])
            engine.drop_tail(n_tokens)
            with engine._cells.visible_softmax():
                explicit = engine.decode_all(TOKENS[70 : 70 + n_tokens])
            np.testing.assert_allclose(tiled, explicit, atol=0.1)  # which rounds queries to 8 bits, too
            assert np.abs(tiled - explicit).mean() < 0.02


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_threads_share_a_query_of_quantized_cells(tiny_model: Callable[..., Path], n_threads: int) -> None:
    """Each takes a part of the cells, and one may get none that is unmasked."""
    with patched(tiny_model("llama", n_layers=1), n_cells=1024, cache_type="q8_0/q4_0") as engine:
        engine.decode(TOKENS + TOKENS[:200])
        engine.rewrite(uneven(np.random.default_rng(0), engine, 40), 8)
        engine.decode(TOKENS[:3])
        lib.llama_set_n_threads(engine._context._ctx, n_threads, n_threads)
        found = engine.decode_all(TOKENS[3:4])
        engine.drop_tail(1)
        lib.llama_set_n_threads(engine._context._ctx, 1, 1)
        np.testing.assert_allclose(found, engine.decode_all(TOKENS[3:4]), rtol=1e-3, atol=1e-4)


def test_replay_leaves_no_trace_and_rows_sum_to_one(llama: PatchedEngine) -> None:
    llama.decode(TOKENS[:60])
    llama.rewrite(uneven(np.random.default_rng(0), llama, 8), 8)
    llama.decode(TOKENS[60:80])
    before, layout = exported(llama), llama.layout()
    tapped: dict[int, np.ndarray] = {}
    with llama._cells.visible_softmax():
        llama._context.tap = lambda layer, w: tapped.__setitem__(layer, w.copy())
        llama._context.decode(TOKENS[:20])
        llama._context.tap = None
    llama._context.remove(80)
    seen = replayed(llama, TOKENS[:20])
    assert_same(before, exported(llama))
    assert llama.layout() == layout
    for i in range(3):
        rows = llama._cells.layer(i).n_rows
        assert tapped[i].shape == (4, 20, rows)
        np.testing.assert_allclose(tapped[i].sum(axis=2), 1, atol=1e-5)
        np.testing.assert_allclose(seen[i], tapped[i][:, :, :28].max(axis=1), atol=1e-6)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_long_chat_stays_in_its_arena(tiny_model: Callable[..., Path], arch: str) -> None:
    with patched(tiny_model(arch, n_layers=6), n_cells=256) as engine:
        memory = CacheMemory(engine, 4000)
        for start in range(0, 2000, 100):
            memory.feed([TOKENS[i % 400] for i in range(start, start + 100)])
            for device, size in enumerate(engine.arena_bytes):
                arena = engine._cells.arena(device)
                assert arena.used <= arena.size
                assert arena.peak_used <= arena.size
                assert size <= arena.size
        assert len(memory.reports) > 5
        assert engine.layout().position == 2000
        assert np.isfinite(engine.logits()).all()


def test_a_replay_as_long_as_the_text_stays_within_the_softmax_bound(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The columns grow while it runs: a micro-batch must fit the last of them."""
    largest = 0

    class Bytes:
        def update(self, layer: int, weights: np.ndarray, columns: object, *_: object, **__: object) -> None:
            nonlocal largest
            largest = max(largest, weights.nbytes)

    monkeypatch.setattr(base, "SOFTMAX_BYTES", (1 << 18, 1 << 18))
    with patched(tiny_model("llama"), n_cells=4096, n_ubatch=512) as engine:
        engine.decode((TOKENS * 5)[:1900])
        before = engine.compute_bytes
        assert before > 0
        engine.replay((TOKENS * 5)[:1900], Bytes())
        assert engine.compute_bytes <= before + 2 * (1 << 18)  # the tensor itself, and half as much to work in
    assert 1 << 17 < largest <= 1 << 18


@pytest.mark.skipif(bool(WORKERS), reason="two devices have an arena each, in which no layer becomes that wide")
def test_the_mask_stays_as_large_as_it_was_when_a_layer_becomes_wide(tiny_model: Callable[..., Path]) -> None:
    with patched(tiny_model("llama"), n_ubatch=320) as engine:
        assert engine.micro_batch() == 256
        engine.decode(TOKENS[:220])
        engine.rewrite([np.tile(np.arange(n), (2, 1)) for n in (210, 1, 1)], 10)
        n_cells = engine._cells.info().n_cells
        assert n_cells > 256
        assert 64 <= engine.micro_batch() < 256
        widest = max(stop - start for n in range(1, 400) for start, stop in engine._micro_batches(n))
        assert engine.micro_batch() <= widest  # a last one is joined by what is less than a tile
        assert widest * n_cells <= 256 * 320
        engine.decode(TOKENS[220:360])
        assert engine.layout().position == 360


def test_wrong_input_changes_nothing(llama: PatchedEngine) -> None:
    llama.decode(TOKENS[:100])
    llama.rewrite(uneven(np.random.default_rng(0), llama, 8), 8)
    llama.decode(TOKENS[100:120])
    before, layout, cells = exported(llama), llama.layout(), llama._cells
    good = uneven(np.random.default_rng(1), llama, 8)
    raw = [np.zeros((2, 0), np.int64)] * 3
    n_cells = layout.composed[2] + layout.n_live
    wrong = (-1, 10**6, n_cells, n_cells - 8, 2**16, 2**31 - 1, 2**32 - 1, 2**32)
    wrong_rows = [[*raw[:2], np.array([[row], [row]])] for row in wrong]
    twice = [*raw[:2], np.array([[3, 3], [3, 4]])]
    shapes = [[*raw[:2], np.zeros(shape, np.int64)] for shape in ((1, 1), (3, 1), (2,), (2, 1, 1))]
    numbers = (ctypes.c_void_p * 3)()
    counts = np.array([0, 0, 1], np.int32).ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    for call in (
        lambda: llama.rewrite(good[:2], 8),
        lambda: llama.rewrite(good, 29),
        lambda: llama.rewrite(good, -1),
        lambda: llama.rewrite(raw, 0),
        lambda: llama.rewrite([g + 10**6 for g in good], 8),
        *(lambda rows=rows: cells.rewrite(50, 8, rows) for rows in [*wrong_rows, twice, *shapes]),
        lambda: cells.rewrite(0, 8, raw),
        lambda: cells.rewrite(7, 8, raw),
        lambda: cells.rewrite(2**31 - 1, 8, raw),
        lambda: cells.rewrite(-5, 8, raw),
        lambda: cells.rewrite(300, 8, raw),
        lambda: cells.rewrite(50, -1, raw),
        lambda: cells.rewrite(50, layout.n_live + 1, raw),
        lambda: cells.rewrite(50, 2**31 - 1, raw),
        lambda: cells._call("rewrite", 50, 8, 0, counts, None, 2),
        lambda: cells._call("rewrite", 50, 8, 0, counts, numbers, 2),
        lambda: cells._call("rewrite", 50, 8, 0, None, numbers, 2),
        *(lambda size=size: cells._call("rewrite", 50, 8, 0, counts, numbers, size) for size in (-2, 0, 1, 3, 8)),
        lambda: cells.set_layout(50, np.arange(3), 5, np.zeros(3, np.int64)),
        lambda: cells.set_layout(50, np.array([5, 5]), 5, np.zeros(3, np.int64)),
        lambda: cells.set_layout(50, np.array([5]), 5, np.array([6, 0, 0])),
        lambda: cells.set_layout(10**6, np.array([5]), 5, np.array([1, 0, 0])),
        lambda: cells.set_layout(50, np.array([5]), 5, np.array([-1, 0, 0])),
        lambda: cells.set_layout(50, np.array([], np.int64), 0, np.zeros(3, np.int64)),
        lambda: cells.set_layout(50, np.arange(3), 0, np.zeros(2, np.int64)),
        lambda: cells.layer(3),
        lambda: cells.layer(-1),
        lambda: cells.arena(2),
        lambda: cells.rows(7, values=False),
        lambda: cells.set_rows(0, np.zeros((10**4, 128), np.uint8), values=False),
        lambda: cells.set_rows(0, np.zeros((3, 5), np.uint8), values=True),
        lambda: cells._call("set_explicit_softmax", 2),
        lambda: cells._call("get_compute_bytes", None),
        lambda: llama._context.state(),
        lambda: llama.decode(TOKENS[:256]),
        lambda: replayed(llama, TOKENS[:256]),
    ):
        with pytest.raises((EngineError, InvalidInput)):
            call()
        assert llama.layout() == layout
    assert_same(before, exported(llama))
    llama.rewrite(good, 8)
    assert_same(gathered(before, good, 8), exported(llama))


def test_sources_may_have_four_bytes(tiny_model: Callable[..., Path]) -> None:
    """As they have where a layer has more than 65,536 cells."""
    with patched(tiny_model("llama")) as small, patched(tiny_model("llama")) as large:
        for engine in (small, large):
            engine.decode(TOKENS[:100])
        selection = uneven(np.random.default_rng(0), small, 8)
        small.rewrite(selection, 8)
        wide = [np.ascontiguousarray(rows, np.uint32) for rows in selection]
        table = (ctypes.c_void_p * len(wide))(*(rows.ctypes.data for rows in wide))
        counts = (ctypes.c_int32 * len(wide))(*(rows.shape[1] for rows in wide))
        large._cells._call("rewrite", small._cells.info().n_live_cap, 8, 0, counts, table, 4)
        for i in range(len(wide)):
            for values in (False, True):
                assert (small._cells.rows(i, values=values) == large._cells.rows(i, values=values)).all()


def test_more_than_the_arena_is_refused(llama: PatchedEngine) -> None:
    llama.decode(TOKENS[:250])
    with pytest.raises(ContextFull):
        llama._cells.rewrite(30, 8, identity(llama, 8))


@pytest.mark.parametrize("cache_type", ["f16", "q8_0/q4_0"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
def test_a_snapshot_restores_bytes_and_future(tiny_model: Callable[..., Path], arch: str, cache_type: str) -> None:
    path = tiny_model(arch, n_layers=7 if arch == "gemma3" else 3)
    with patched(path, cache_type=cache_type) as first, patched(path, cache_type=cache_type) as second:
        second.decode(TOKENS[:33])
        second.rewrite(uneven(np.random.default_rng(1), second, 5), 5)
        for n_composed in (0, 1):
            first.decode(TOKENS[:60])
            if n_composed:
                first.rewrite(uneven(np.random.default_rng(0), first, 8), 8)
                first.decode(TOKENS[100:110])
            taken = first.snapshot()
            second.restore(taken)
            assert second.layout() == first.layout()
            assert_same(exported(second), exported(first))
            for engine in (first, second):
                engine.decode(TOKENS[110:120])
            # A sliding window's cells are restored without gaps, and tiles of quantized ones are summed up in blocks.
            moved = arch == "gemma3" and cache_type != "f16"
            np.testing.assert_allclose(first.logits(), second.logits(), atol=0, rtol=1e-4 if moved else 0)
        first.restore(taken)
        assert first.layout().position == 140
        first.clear()
        second.restore(first.snapshot())
        assert second.layout() == first.layout()


def test_a_snapshot_of_the_stock_twin_is_taken_over(tiny_model: Callable[..., Path]) -> None:
    path = tiny_model("llama")
    stock = StockEngine(Model(path), n_cells=256, n_threads=1, n_ubatch=64, sampling=Sampling(temperature=0))
    with patched(path) as engine, stock:
        stock.decode(TOKENS[:100])
        even = [np.tile(np.arange(40), (layer.n_kv_heads, 1)) for layer in stock.shape.layers]
        stock.rewrite(even, 8)
        engine.restore(stock.snapshot())
        assert engine.layout().composed == stock.layout().composed
        stock.clear()
        stock.decode(TOKENS[:3])
        stock.restore(engine.snapshot())
        for twin in (engine, stock):
            twin.decode(TOKENS[100:110])
        np.testing.assert_allclose(stock.logits(), engine.logits(), atol=1e-2)
        stock.clear()
        engine.restore(stock.snapshot())
        assert engine.layout().position == 0


def test_a_snapshot_that_does_not_belong_changes_nothing(tiny_model: Callable[..., Path], llama: PatchedEngine) -> None:
    llama.decode(TOKENS[:100])
    llama.rewrite(uneven(np.random.default_rng(0), llama, 8), 8)
    taken, before = llama.snapshot(), exported(llama)
    with patched(tiny_model("llama"), cache_type="q8_0") as quantized:
        quantized.decode(TOKENS[:9])
        wrong = [quantized.snapshot()]
    wrong += [
        replace(taken, n_live=taken.n_live + 1),
        replace(taken, position=taken.n_live),
        replace(taken, composed=taken.composed[1:]),
        replace(taken, composed=(-1, *taken.composed[1:])),
        replace(taken, state=np.zeros(5, np.uint8)),
        replace(taken, keys=taken.values[:0]),
    ]
    for snapshot in wrong:
        with pytest.raises(InvalidInput, match="belong to another model"):
            llama.restore(snapshot)
    many = np.zeros((1000, taken.keys[0].shape[1]), np.uint8)
    with pytest.raises(ContextFull):
        llama.restore(replace(taken, composed=(992,) * 3, position=2000, keys=(many,) * 3, values=(many,) * 3))
    assert_same(exported(llama), before)


def test_the_patched_engine_is_chosen_and_the_stock_one_runs_the_rest(tiny_model: Callable[..., Path]) -> None:
    engine, _ = open_engine(tiny_model("gemma3", n_layers=6), n_ctx=1024, budget=0.5)
    with engine:
        assert engine.name == "patched"
        assert engine.max_replay <= engine.softmax_micro_batch(1000), "more would overwrite what it needs"
    engine, _ = open_engine(tiny_model("llama"), n_ctx=1024, budget=0.5, engine_name="stock")
    with engine:
        assert engine.name == "stock"
        with pytest.raises(ModelError, match="flash attention"):
            PerLayerCells(engine._context)


@pytest.mark.parametrize("cache_type", ["f16", "q8_0/q4_0"])
def test_going_back_behind_composed_cells(tiny_model: Callable[..., Path], cache_type: str) -> None:
    """The rows that stay keep their bytes, the next token stands where it should, and answers as those rows make it."""
    kept = np.arange(0, 80, 2)
    with (
        patched(tiny_model("llama", head=32), cache_type=cache_type) as engine,
        patched(tiny_model("llama", head=32), cache_type=cache_type) as other,
    ):
        rows = [np.tile(kept, (2, 1))] * len(engine.shape.layers)
        for each in (engine, other):
            each.decode(TOKENS[:100])
        engine.rewrite([np.tile(np.arange(90), (2, 1))] * len(rows), 10)
        engine.decode(TOKENS[100:110])
        engine.rewrite(rows, 0, 30)
        assert (engine.layout().position, engine.layout().n_live) == (80, 0)
        other.drop_tail(20)
        other.rewrite(rows, 0)
        for one, two in zip(exported(engine), exported(other), strict=True):
            for plane, twin in zip(one, two, strict=True):
                np.testing.assert_array_equal(plane, twin)
        for each in (engine, other):
            each.decode(TOKENS[80:90])
        np.testing.assert_allclose(engine.logits(), other.logits(), atol=1e-3)
        before = engine.layout()
        for n_tail, n_forgotten in ((1, 1), (0, -1), (0, 1000)):
            with pytest.raises((InvalidInput, EngineError)):
                engine.rewrite(rows, n_tail, n_forgotten)
        assert engine.layout() == before
