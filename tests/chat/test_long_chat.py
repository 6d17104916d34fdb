"""Hours of chat in miniature: the cap holds at every step, memory stays flat, pieces do not matter."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from programs import PROSE

from kvcompose_local import LocalChat, Sampling
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.chat.report import CompactionReport
from kvcompose_local.engines import open_engine
from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.interfaces import FloatArray, IntArray, Selection
from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.llama_ffi.context import Context
from kvcompose_local.llama_ffi.model import Model

pytestmark = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")

RNG = np.random.default_rng(5)
TOKENS = RNG.integers(3, 259, 12_000).tolist()


def opened(path: Path, n_ctx: int, budget: float) -> PatchedEngine:
    engine, _ = open_engine(path, n_ctx=n_ctx, budget=budget, n_threads=1, sampling=Sampling(temperature=0))
    assert isinstance(engine, PatchedEngine)
    return engine


@pytest.mark.parametrize("name", ["llama", "gemma3", "smollm2-135m"])
def test_a_hundred_compactions(tiny_model: Callable[..., Path], real_model: Callable[[str], Path], name: str) -> None:
    """Time is not tested, the work is; the seconds are printed: pytest -rP -k hundred."""
    if name == "smollm2-135m":
        path, n_ctx = real_model(name), 8192
    else:
        path, n_ctx = tiny_model(name, n_layers=7 if name == "gemma3" else 3, n_ctx=16384), 12_000
    rss: list[int] = []
    process = psutil.Process()
    with opened(path, n_ctx, 0.025) as engine:

        def check(_report: CompactionReport | None = None) -> None:
            arena = engine._cells.arena(0)
            assert arena.used <= arena.peak_used <= arena.size == engine.cache_bytes
            assert memory.used_bytes <= min(arena.used, engine.arena_bytes[0])
            rss.append(process.memory_info().rss)

        memory = CacheMemory(engine, n_ctx, on_compaction=check)
        n_types = len(ctypes._pointer_type_cache)  # type: ignore[attr-defined]
        while len(memory.reports) < 100 and memory.position < n_ctx - 60:
            n = int(RNG.integers(1, 60))
            memory.feed(TOKENS[memory.position : memory.position + n], lambda _done, _total: check())
            check()
            assert engine.layout().position == len(memory.tokens)
    early, late = memory.reports[10:40], memory.reports[-30:]
    assert max(r.tokens_scored for r in late) <= max(r.tokens_scored for r in early)
    assert max(sum(r.composed) for r in late) <= max(sum(r.composed) for r in early) + 1
    seconds = [1000 * float(np.median([r.seconds for r in part])) for part in (early, late)]
    print(f"{name}: {seconds[0]:.2f} ms a compaction, 11th to 40th; {seconds[1]:.2f} ms, the last 30")
    # ctypes keeps every type for good, so none may depend on how wide the cache is.
    assert len(ctypes._pointer_type_cache) == n_types  # type: ignore[attr-defined]
    # The allocators settle for some hundred compactions; one layer's cells lost in each would be 6 MB.
    assert max(rss[len(rss) // 2 :]) - max(rss[: len(rss) // 2]) < 4 << 20


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_chat_put_back_before_its_first_compaction_compacts_as_any(
    tiny_model: Callable[..., Path], arch: str
) -> None:
    path = tiny_model(arch, n_layers=7 if arch == "gemma3" else 3, n_ctx=4096)
    with opened(path, 4096, 0.125) as engine:
        memory = CacheMemory(engine, 4096, replay=True)  # what a text taught stays, and would differ
        memory.feed(TOKENS[:300])
        early = memory.state()
        assert not any(early.cells.composed)
        memory.feed(TOKENS[300:1200])
        straight = memory.state()
        memory.restore(early)
        memory.feed(TOKENS[300:1200])
        again = memory.state()
    assert any(straight.cells.composed)
    assert again.cells.composed == straight.cells.composed
    if arch == "llama":  # a sliding window put back stands in other cells and sums them in another order
        for ours, theirs in zip(again.cells.keys, straight.cells.keys, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("real", [False, True])
def test_a_full_budget_answers_as_llama_cpp_does(
    tiny_model: Callable[..., Path], real_model: Callable[[str], Path], real: bool
) -> None:
    """What was fed is read again by a plain context, which has to choose the same token wherever the chat chose one."""
    path = real_model("smollm2-135m") if real else tiny_model()
    messages = ["Hello there, who are you?", "And then? " * 20, "Ünïcödé 🙂"]
    chosen: dict[int, int] = {}  # at which position: which token
    with LocalChat(path, budget=1.0, n_ctx=2048, n_threads=1, sampling=Sampling(temperature=0)) as chat:
        engine = chat.memory.engine
        sample = engine.sample

        def watched() -> int:
            chosen[engine.layout().position] = token = sample()
            return token

        engine.sample = watched  # type: ignore[method-assign]
        n_asked = [0]
        answers = []
        for message in messages:
            answers.append(chat.ask(message, max_tokens=48))
            n_asked.append(len(chosen))
        seen = list(chat.memory.tokens)
    model = Model(path)
    with Context(model, n_ctx=2048, n_ubatch=512, n_threads=1, flash_attention=True) as context:
        position = 0
        for place, token in chosen.items():
            context.decode(seen[position:place])
            assert int(context.logits().argmax()) == token
            position = place
    tokens = list(chosen.values())
    for answer, start, stop in zip(answers, n_asked, n_asked[1:], strict=False):
        said = b"".join(model.token_bytes(t) for t in tokens[start:stop] if not model.is_end(t))
        assert said.decode("utf-8", "replace") == answer
    model.close()
    assert len(chosen) > 30


def follow(engine: PatchedEngine) -> list[IntArray]:
    """For each layer int64 (H, K_l), kept up to date: the position that each composed cell comes from."""
    origin = [np.zeros((layer.n_kv_heads, 0), np.int64) for layer in engine.shape.layers]
    rewrite = engine.rewrite

    def tracked(selection: Sequence[Selection], n_tail: int) -> None:
        layout = engine.layout()
        live = np.arange(layout.position - layout.n_live, layout.position)
        for i, rows in enumerate(selection):
            whole = np.concatenate([origin[i], np.tile(live, (len(rows), 1))], axis=1)
            origin[i] = np.take_along_axis(whole, rows, axis=1)
        rewrite(selection, n_tail)

    engine.rewrite = tracked  # type: ignore[method-assign]
    return origin


def log_softmax(logits: FloatArray) -> FloatArray:
    return np.asarray(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())


@pytest.mark.parametrize("real", [False, True])
def test_pieces_keep_nearly_what_one_piece_keeps(
    tiny_model: Callable[..., Path], real_model: Callable[[str], Path], real: bool
) -> None:
    """Where the cuts between pieces fall moves a few cells, and neither way is much further from the full cache.

    The figures are printed: pytest -rP -k pieces.
    """
    path, n, n_composed = real_model("smollm2-135m") if real else tiny_model(), 600, 0
    text = TOKENS
    if real:
        model = Model(path)
        text = model.tokenize(PROSE[:6000])
        model.close()
    kept: list[list[set[int]]] = []
    logits = []
    with opened(path, 1024, 1.0) as engine:
        engine.decode(text[:n])
        full = log_softmax(engine.logits())
    for piece in (n, n // 20):
        with opened(path, 1024, 0.5) as engine:
            origin = follow(engine)
            memory = CacheMemory(engine, 1024)
            for start in range(0, n - 1, piece):
                memory.feed(text[start : min(start + piece, n - 1)])
            memory.compact(0.6)
            memory.feed(text[n - 1 : n])
            logits.append(log_softmax(engine.logits()))
            n_composed = sum(rows.shape[1] for rows in origin)
            kept.append([set(rows[0].tolist()) for rows in origin])
    assert n_composed > 100
    common = sum(len(a & b) for a, b in zip(*kept, strict=True)) / max(sum(map(len, kept[0])), sum(map(len, kept[1])))
    divergences = [float((np.exp(full) * (full - part)).sum()) for part in logits]
    name, kl = path.stem, " and ".join(f"{divergence:.3f}" for divergence in divergences)
    print(f"{name}: {common:.0%} of the cells agree; KL to the full cache {kl}")
    assert common > 0.6
    assert max(divergences) < 3 * min(divergences) + 0.05
