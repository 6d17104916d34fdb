"""Saved chats: they go on as if never saved, they refuse what is not theirs, and no file, kill or full disk hurts."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from fake_engine import FakeEngine, FakeModel
from programs import PROSE, endless, program, refused
from safetensors import safe_open
from safetensors.numpy import load_file
from session_chats import fake_chat, fake_engine, next_tokens, real_chat, same_state, talked

from kvcompose_local.api import LocalChat
from kvcompose_local.chat import Chat, sessions
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.chat.sessions import Setup
from kvcompose_local.composing.scorer import Scorer
from kvcompose_local.errors import EngineError, InvalidInput, ModelError, SessionError
from kvcompose_local.install import model_files
from kvcompose_local.interfaces import CacheSnapshot
from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.llama_ffi.library import library_path

TinyModel = Callable[..., Path]
needs_patches = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")
WORDS = "".join(chr(97 + n % 23) + " " * (n % 5 == 0) for n in range(300))


@pytest.fixture(autouse=True)
def private_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions and digests of this test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(sessions, "sessions_folder", lambda: tmp_path / "state" / "sessions")
    monkeypatch.setattr(model_files, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    """Of the fake engine, whose model is a file of a few bytes."""
    model = tmp_path / "fake.gguf"
    model.write_bytes(b"GGUF of nothing")
    return Setup(model, "f16", 0.5)


# -- going on ---------------------------------------------------------------------------------------------------------


def test_a_chat_goes_on_as_if_it_had_never_been_saved(tmp_path: Path, setup: Setup) -> None:
    kept = talked()
    first, second = tmp_path / "first.kvc", tmp_path / "second.kvc"
    n_bytes = sessions.save(first, kept, setup)
    assert n_bytes == first.stat().st_size
    assert first.stat().st_mode & 0o777 == 0o600
    loaded = fake_chat()
    manifest = sessions.load(first, loaded, setup)
    assert same_state(loaded.state(), kept.state())
    assert loaded.state().began == kept.state().began
    assert (manifest.n_ctx, manifest.budget, manifest.position) == (400, 0.5, kept.memory.position)
    sessions.save(second, loaded, setup)
    assert second.read_bytes() == first.read_bytes()
    for chat in (kept, loaded):
        engine = fake_engine(chat)
        engine.answers, engine.fed, engine.replayed, engine.glance = ["yes"], b"", [], {ord("z"): 0.3}
        assert list(chat.ask("?" + "z" * 60, max_tokens=9)) == list("yes")
        assert engine.replayed
    assert fake_engine(loaded).fed == fake_engine(kept).fed
    assert fake_engine(loaded).fed.startswith(b"?zzz")  # the document and the turn's head were read before
    assert fake_engine(loaded).replayed == fake_engine(kept).replayed
    assert same_state(loaded.state(), kept.state())


def test_text_that_an_interrupt_left_unread_is_saved_too(tmp_path: Path, setup: Setup) -> None:
    stop = [False]
    chat = fake_chat(should_stop=lambda: stop[0], on_read=lambda n, of: stop.__setitem__(0, n >= 4))
    list(chat.ask("Hello", max_tokens=9))
    sessions.save(tmp_path / "s.kvc", chat, setup)
    loaded = fake_chat(["x"])
    sessions.load(tmp_path / "s.kvc", loaded, setup)
    assert loaded.unread_tokens == len("ello[/][a]")
    list(loaded.ask("Go", max_tokens=9))
    assert fake_engine(loaded).fed == b"ello[/][a][/][u]Go[/][a]x"


def test_an_empty_chat_is_saved_and_loaded(tmp_path: Path, setup: Setup, tiny_model: TinyModel) -> None:
    sessions.save(tmp_path / "s.kvc", fake_chat(), setup)
    chat = talked()
    sessions.load(tmp_path / "s.kvc", chat, setup)
    assert chat.memory.position == 0
    assert chat.messages == []
    for engine_name in ("stock", "patched") if library_is_patched() else ("stock",):
        with real_chat(tiny_model(), engine_name=engine_name) as real:
            tiny = Setup(tiny_model(), "f16", 0.25)
            sessions.save(tmp_path / "t.kvc", real, tiny)
            real.read("something")
            sessions.load(tmp_path / "t.kvc", real, tiny)
            assert real.memory.position == 0


@needs_patches
@pytest.mark.parametrize("cache", ["f16", "q8_0", "q8_0/q4_0"])
@pytest.mark.parametrize(("arch", "n_layers"), [("llama", 3), ("gemma3", 7)])
def test_the_next_200_tokens_are_those_of_the_chat_that_was_never_saved(
    tmp_path: Path, tiny_model: TinyModel, arch: str, n_layers: int, cache: str
) -> None:
    model = tiny_model(arch, n_layers=n_layers)
    setup, path = Setup(model, cache, 0.25), tmp_path / "s.kvc"
    with real_chat(model, cache=cache) as kept, real_chat(model, cache=cache) as loaded:
        kept.read(WORDS)
        list(kept.ask("What is it?", max_tokens=30))
        assert kept.memory.reports
        sessions.save(path, kept, setup)
        loaded.read("something else")  # which must leave no trace
        sessions.load(path, loaded, setup)
        assert same_state(loaded.state(), kept.state())
        sessions.save(tmp_path / "again.kvc", loaded, setup)
        assert (tmp_path / "again.kvc").read_bytes() == path.read_bytes()
        n_compactions = len(kept.memory.reports)
        for n, walk in ((200, 0), (60, 7)):
            tokens, logits = next_tokens(kept, n, walk=walk)
            tokens_loaded, logits_loaded = next_tokens(loaded, n, walk=walk)
            assert tokens_loaded == tokens
            # A window comes back with its cells in another order, and so are the sums over them: of two cells that
            # score alike a compaction may then keep the other.
            np.testing.assert_allclose(logits_loaded, logits, rtol=0, atol=0.5 if arch == "gemma3" else 0)
        assert len(set(tokens)) > 10
        assert len(kept.memory.reports) > n_compactions  # scores and attention were needed
        assert arch == "gemma3" or same_state(loaded.state(), kept.state())


@needs_patches
def test_a_real_chat_goes_on_with_the_same_200_tokens(tmp_path: Path, real_model: Callable[[str], Path]) -> None:
    """What users run: a real model, and the cells that a budget takes by default."""
    model, path = real_model("qwen2.5-coder-0.5b"), tmp_path / "s.kvc"
    with real_chat(model, cache=None) as kept, real_chat(model, cache=None) as loaded:
        setup = Setup(model, kept.memory.engine.shape.cache_type, 0.25)
        assert setup.cache_type == "q8_0/q4_0"
        kept.read(PROSE[:2600])
        list(kept.ask("Who is it about?", max_tokens=20))
        assert kept.memory.reports
        sessions.save(path, kept, setup)
        sessions.load(path, loaded, setup)
        assert same_state(loaded.state(), kept.state())
        n_compactions = len(kept.memory.reports)
        tokens, logits = next_tokens(kept, 200)
        tokens_loaded, logits_loaded = next_tokens(loaded, 200)
        assert tokens_loaded == tokens
        np.testing.assert_array_equal(logits_loaded, logits)
        assert len(set(tokens)) > 10
        assert len(kept.memory.reports) > n_compactions


@needs_patches
def test_a_session_of_one_size_is_loaded_into_others(tmp_path: Path, tiny_model: TinyModel) -> None:
    model, path = tiny_model(), tmp_path / "s.kvc"
    setup = Setup(model, "f16", 0.5)
    with real_chat(model, budget=0.5) as chat:
        chat.read(WORDS + WORDS[:150])
        n = chat.memory.position
        sessions.save(path, chat, setup)
    for n_ctx, budget in ((4096, 0.25), (1024, 1.0), (2048, 0.5)):
        with real_chat(model, n_ctx=n_ctx, budget=budget) as chat:
            sessions.load(path, chat, setup)
            assert chat.memory.position == n
            next_tokens(chat, 200)
    for n_ctx, budget, told in ((512, 0.5, "raise --ctx"), (1024, 0.25, "raise --budget")):
        with real_chat(model, n_ctx=n_ctx, budget=budget) as chat:
            chat.read("the chat that runs")
            before = chat.state()
            with pytest.raises(SessionError, match=told):
                sessions.load(path, chat, setup)
            assert same_state(chat.state(), before)


@needs_patches
def test_cells_are_not_in_memory_twice(tmp_path: Path, tiny_model: TinyModel) -> None:
    """Python's own count, while a full cache of twelve layers is saved and loaded."""
    path = tiny_model("llama", n_layers=12)
    setup, target = Setup(path, "f16", 0.5), tmp_path / "s.kvc"
    peaks = []
    with real_chat(path, n_ctx=4096, budget=0.5) as chat:
        chat.memory.feed([n % 200 for n in range(3000)])
        cells = chat.memory.engine.cache_bytes
        sessions.save(target, chat, setup)  # what is imported and hashed once
        for call in (sessions.save, sessions.load):
            tracemalloc.start()
            call(target, chat, setup)
            peaks.append(tracemalloc.get_traced_memory()[1] / cells)
            tracemalloc.stop()
        assert chat.memory.position == 3000
    assert max(peaks) < 0.35  # above 1 when a session was made, or read, as a whole


@needs_patches
def test_sessions_cross_engines_where_the_cells_can(tmp_path: Path, tiny_model: TinyModel) -> None:
    model, path = tiny_model(), tmp_path / "s.kvc"
    setup = Setup(model, "f16", 0.25)
    with real_chat(model, engine_name="stock") as stock, real_chat(model) as patched:
        stock.read(WORDS)
        stock.memory.compact(0.5)  # so that what comes next fits: the engines' own choices differ
        assert stock.memory.reports
        sessions.save(path, stock, setup)
        sessions.load(path, patched, setup)
        assert same_state(patched.state(), stock.state())
        assert next_tokens(patched, 5)[0] == next_tokens(stock, 5)[0]
        patched.clear()
        patched.read(WORDS)
        assert len(set(patched.memory.engine.layout().composed)) > 1
        sessions.save(path, patched, setup)
        before = stock.state()
        with pytest.raises(SessionError, match="only the patched engine can hold"):
            sessions.load(path, stock, setup)
        assert same_state(stock.state(), before)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_another_model_cache_type_format_or_size_is_refused(tmp_path: Path, setup: Setup) -> None:
    path = tmp_path / "s.kvc"
    sessions.save(path, talked(), setup)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF of nothing else")
    manifest, arrays = taken_apart(path)

    def refused(words: str, chat: Chat | None = None, with_setup: Setup = setup) -> None:
        chat = chat or talked()
        before = chat.state()
        with pytest.raises(SessionError, match=words) as told:
            sessions.load(path, chat, with_setup)
        assert "\n" not in str(told.value)
        assert same_state(chat.state(), before)

    refused(r"belongs to another model: fake.gguf, not other.gguf", with_setup=replace(setup, model=other))
    refused(
        "cells are f16 and the cache is q8_0: start with --cache-type f16", with_setup=replace(setup, cache_type="q8_0")
    )
    refused("raise --budget", fake_chat(n_cells=100))
    refused("spans 246 positions: raise --ctx", fake_chat(n_cells=200, n_ctx=200))
    put_together(path, manifest | {"format": sessions.FORMAT + 1, "program": "9.9"}, arrays)
    refused(f"has format {sessions.FORMAT + 1} and was made by version 9.9 of this program")
    put_together(path, manifest, arrays | {"cells/more": np.zeros(1, np.uint8)})
    refused("damaged or no session")
    put_together(path, manifest | {"llama_cpp": "other"}, arrays | {"window/bytes": np.zeros(1, np.uint8)})
    refused("sliding windows or recurrent states were made by other")


def taken_apart(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["manifest"]), dict(
            sorted(load_file(path).items(), key=lambda x: x[1].itemsize)
        )


def put_together(path: Path, manifest: Any, arrays: dict[str, Any], **rows: dict[str, Any]) -> None:
    """A file whose checksums are right, whatever it holds; rows: other values in the table of sections."""
    table: dict[str, Any] = {name.split("/")[0]: {"version": 1, "required": True} for name in arrays}
    for name in table:
        data = b"".join(array.tobytes() for key, array in arrays.items() if key.startswith(f"{name}/"))
        table[name] |= {"checksum": hashlib.blake2b(data, digest_size=32).hexdigest()} | rows.get(name, {})
    metadata = {"checksum": "0" * 64, "manifest": json.dumps(manifest), "sections": json.dumps(table)}
    entries: dict[str, Any] = {"__metadata__": metadata}
    end, data = 0, b""
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        kind = {"f": "F32", "i": "I32", "u": "U8"}[array.dtype.kind]
        entries[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [begin, end]}
        data += array.tobytes()
    head = json.dumps(entries).encode()
    raw = struct.pack("<Q", len(head)) + head
    digest = hashlib.blake2b(raw, digest_size=32).hexdigest().encode()
    path.write_bytes(raw.replace(b'"checksum": "' + b"0" * 64, b'"checksum": "' + digest) + data)


def test_sections_of_later_programs(tmp_path: Path, setup: Setup) -> None:
    """What need not be known is skipped, read or not; what must be is told in one line, before the chat is touched."""
    path, chat = tmp_path / "s.kvc", talked()
    sessions.save(path, chat, setup)
    manifest, arrays = taken_apart(path)
    more = arrays | {"recurrent/state.0": np.ones((3, 5), np.uint8)}
    put_together(path, manifest, more, recurrent={"required": False})
    loaded = fake_chat()
    sessions.load(path, loaded, setup)
    assert same_state(loaded.state(), chat.state())
    put_together(path, manifest, more, recurrent={"required": False, "checksum": "0" * 64})
    sessions.load(path, loaded, setup)  # it is not even read
    for rows, words in (
        ({"recurrent": {}}, "does not read 'recurrent' in version 1"),
        ({"recurrent": {"required": False}, "scores": {"version": 2}}, "does not read 'scores' in version 2"),
        ({"recurrent": {"required": False}, "text": {"version": 0}}, "does not read 'text' in version 0"),
    ):
        put_together(path, manifest, more, **rows)
        with pytest.raises(SessionError, match=f"needs a newer version of this program: this one {words}") as told:
            sessions.load(path, loaded, setup)
        assert "\n" not in str(told.value)
    assert same_state(loaded.state(), chat.state())


def test_each_section_has_a_checksum(tmp_path: Path, setup: Setup) -> None:
    path = tmp_path / "s.kvc"
    sessions.save(path, talked(), setup)
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    entries = json.loads(whole[8:begin])
    del entries["__metadata__"]
    assert {name.split("/")[0] for name in entries} == {"text", "tokens", "cells", "scores"}
    for name, entry in entries.items():
        if entry["data_offsets"][0] < entry["data_offsets"][1]:
            damaged = bytearray(whole)
            damaged[begin + entry["data_offsets"][0]] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(SessionError, match=f"the checksum of its {name.split('/')[0]} is wrong"):
                sessions.load(path, fake_chat(), setup)


def test_a_chat_of_other_rope_factors_is_refused(tmp_path: Path, setup: Setup) -> None:
    path = tmp_path / "s.kvc"

    def chat_of(factors: str) -> Chat:
        chat = talked()
        chat.memory.engine.shape = replace(chat.memory.engine.shape, rope_factors=factors)
        return chat

    for saved in ("short", "long"):
        sessions.save(path, chat_of(saved), setup)
        assert sessions.read_manifest(path).rope_factors == saved
        sessions.load(path, chat_of(saved), setup)
        for other in {"short", "long", ""} - {saved}:
            before = chat_of(other)
            with pytest.raises(SessionError, match=f"the model's {saved} RoPE factors, .* start with --ctx 400"):
                sessions.load(path, before, setup)
            assert same_state(before.state(), talked().state())


def test_reasoning_and_the_template_are_kept(tmp_path: Path, setup: Setup) -> None:
    path, chat = tmp_path / "s.kvc", talked()
    chat.messages[-1]["reasoning"] = "they greet me"
    chat.model.use_template("chatml")
    sessions.save(path, chat, setup)
    loaded = fake_chat()
    sessions.load(path, loaded, setup)
    assert loaded.messages[-1] == {"role": "assistant", "content": "hello", "reasoning": "they greet me"}
    assert loaded.model.template_name == "chatml"
    assert same_state(loaded.state(), chat.state())


@pytest.mark.parametrize("number", [3, 4, 6])
def test_sessions_of_other_formats_are_one_line(tmp_path: Path, setup: Setup, number: int) -> None:
    """Older ones have no sections: their tensors have plain names."""
    path = tmp_path / "s.kvc"
    sessions.save(path, talked(), setup)
    manifest, arrays = taken_apart(path)
    plain = {name.split("/")[1]: array for name, array in arrays.items()}
    put_together(path, manifest | {"format": number, "program": "0.3"}, plain)
    with pytest.raises(SessionError, match=f"has format {number} and was made by version 0.3 of this program; "):
        sessions.load(path, fake_chat(), setup)


def test_ten_thousand_damaged_files(tmp_path: Path, tiny_model: TinyModel) -> None:
    """None is accepted, none raises anything else, none touches the chat, and none takes memory or time."""
    path, model = tmp_path / "s.kvc", tiny_model()
    setup = Setup(model, "f16", 0.5)
    with real_chat(model, budget=0.5) as chat, real_chat(model, budget=0.5) as small:
        for one, text in ((chat, WORDS[:300]), (small, "y" * 110)):
            one.read(text, pin=True)
            list(one.ask("Well?", max_tokens=9))
            one.memory.compact(0.5)
        sessions.save(path, small, setup)
        before = chat.state()
        _load_damaged(path, chat, setup)
        assert same_state(chat.state(), before)
        sessions.load(path, chat, setup)
        assert same_state(chat.state(), small.state())


def _load_damaged(path: Path, chat: Chat, setup: Setup) -> None:
    """Ten thousand files made of the one at ``path``, which is there again at the end."""
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    rss, started = psutil.Process().memory_info().rss, time.monotonic()

    def flipped() -> bytes:
        raw = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 30))):
            raw[rng.randrange(head if rng.random() < 0.7 else len(raw))] ^= 1 << rng.randrange(8)
        return bytes(raw)

    def cut() -> bytes:
        return whole[: rng.randrange(len(whole))]

    numbers = [match.span() for match in re.finditer(rb"\b\d+\b", whole[:head]) if match.start() > 8]

    def header_number() -> bytes:
        """Another number in the header: sizes, offsets, counts."""
        at, end = rng.choice(numbers)
        number = rng.choice((b"0", b"-1", b"1", b"9", b"4294967296", b"99999999999999999999", b"1e30", b"%d" % 2**62))
        edited = whole[8:at] + number + whole[end:head]
        return struct.pack("<Q", len(edited)) + edited + whole[head:]

    def spliced() -> bytes:
        a, b = sorted(rng.randrange(len(whole)) for _ in range(2))
        return rng.choice(
            (whole[:a] + whole[b:], whole[:b] + whole[a:], whole + whole[a:b], whole[:a] + bytes(b - a) + whole[b:])
        )

    def length() -> bytes:
        return struct.pack("<Q", rng.choice((0, 1, head, 2**20, 2**32, 2**63, 2**64 - 1))) + whole[8:]

    def nested() -> bytes:
        edited = b"[" * rng.randrange(1, 100_000)
        return struct.pack("<Q", len(edited)) + edited

    kinds = [flipped] * 12 + [cut] * 4 + [header_number] * 8 + [spliced] * 4 + [length] + [nested]
    for i in range(10_000):
        raw = rng.choice(kinds)()
        path.write_bytes(raw)
        if raw == whole:
            continue
        with pytest.raises(SessionError) as told:
            sessions.load(path, chat, setup)
        assert "\n" not in str(told.value), i
        assert len(str(told.value)) < 400
    assert psutil.Process().memory_info().rss - rss < 64 << 20
    assert time.monotonic() - started < 300
    path.write_bytes(whole)


def forged_checkpoints(position: int) -> Iterator[dict[str, Any]]:
    """Sections of checkpoints that are none."""
    state = {"checkpoints/state.0": np.zeros(12, np.uint8)}
    for wrong in ([0], [-1], [position], [2**31 - 1]):
        yield state | {"checkpoints/positions": np.array(wrong, np.int32)}
    yield state
    yield {"checkpoints/positions": np.array([5], np.int32)}
    yield state | {"checkpoints/positions": np.array([5, 6], np.int32)}
    yield state | {"checkpoints/positions": np.array([[5]], np.int32)}
    yield state | {"checkpoints/positions": np.array([5.0], np.float32)}
    yield {"checkpoints/positions": np.array([5], np.int32), "checkpoints/state.0": np.zeros(3, np.float32)}
    many = {f"checkpoints/state.{i}": np.zeros(12, np.uint8) for i in range(9)}
    yield many | {"checkpoints/positions": np.arange(1, 10, dtype=np.int32)}
    two = {f"checkpoints/state.{i}": np.zeros(12, np.uint8) for i in range(2)}
    yield two | {"checkpoints/positions": np.array([6, 5], np.int32)}


#: Fields of the text that are not what they should be.
FORGED_TEXTS: tuple[dict[str, Any], ...] = (
    {"messages": "x"},
    {"messages": [1]},
    {"messages": [{"role": "user", "content": 3}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": "x", "more": "y"}]},
    {"messages": [{"role": "assistant", "content": "x", "reasoning": 1}]},
    {"messages": [{"role": "root", "content": "x"}]},
    {"messages": [{"role": ["user"], "content": "x"}]},
    {"draft": None},
    {"template": 1},
    {"began": "now"},
    {"began": -1.0},
    {"began": 1e300},
    {"began": float("nan")},
    {"system": 7},
    {"system": 0},
    {"more": "x"},
    {"steps": None},
    {"steps": [1]},
    {"steps": [[[0, 0], 0, 5, None]]},
    {"steps": [[[0, -1], 0, "", None]]},
    {"steps": [[[0, 0], 99, "", None]]},
    {"steps": [[[0, 0], 0, "", [10**6, 0]]]},
    {"steps": [[[0, 0, 0], 0, "", None]]},
    {"pins": [[1]]},
    {"pins": [[True, 2]]},
    {"pins": {}},
    {"pins": [[5, 3]]},
    {"steps": {}},
)


def forged_arrays(manifest: Any, arrays: Any) -> Iterator[Any]:
    """Tensors that are missing, too many, of another type or shape, or out of range."""
    text = json.loads(arrays["text/json"].tobytes())

    def altered(name: str, value: Any) -> Any:
        array = arrays[name].copy()
        array.flat[0] = value
        return arrays | {name: array}

    for left_out in arrays:
        yield {name: a for name, a in arrays.items() if name != left_out}
    for fields in FORGED_TEXTS:
        yield arrays | {"text/json": np.frombuffer(json.dumps(text | fields).encode(), np.uint8)}
    yield from (
        altered("scores/scores.1", np.nan),
        altered("scores/scores.0", np.inf),
        altered("scores/origins.0", -1),
        altered("scores/origins.0", manifest["position"] - manifest["n_live"]),
        altered("tokens/read", -1),
        altered("tokens/read", 257),
        altered("text/json", 0),
        arrays | {"tokens/pending": np.array([-1], np.int32)},
        arrays | {"tokens/pending": np.array([257], np.int32)},
        arrays | {"tokens/pending": np.array([[1]], np.int32)},
        arrays | {"tokens/read": arrays["tokens/read"].astype(np.float32)},
        arrays | {"tokens/read": arrays["tokens/read"][1:]},
        arrays | {"scores/scores.0": arrays["scores/scores.0"][:1]},
        arrays | {"scores/scores.0": arrays["scores/scores.0"][:, 1:]},
        arrays | {"scores/origins.0": arrays["scores/origins.0"][:, 1:]},
        arrays | {"scores/origins.0": arrays["scores/origins.0"].astype(np.float32)},
        arrays | {"scorer/furthest": np.array([1], np.int32)},
        arrays | {"cells/keys.0": arrays["cells/keys.0"][1:]},
        arrays | {"cells/keys.0": arrays["cells/keys.0"][:, 1:]},
        arrays | {"cells/values.0": np.zeros((len(arrays["cells/keys.0"]), 3), np.uint8)},
        arrays | {"window/bytes": np.zeros((1, 1), np.uint8)},
        *(arrays | checkpoints for checkpoints in forged_checkpoints(manifest["position"])),
        arrays | {"text/json": np.frombuffer(b"[" * 100_000, np.uint8)},
        arrays | {"plain": np.zeros(1, np.uint8)},
        arrays | {"other/more": np.zeros(1, np.uint8)},
        arrays | {"scores/more.0": np.zeros(1, np.uint8)},
    )


def forged_manifests(manifest: Any) -> Iterator[Any]:
    yield [manifest]
    yield manifest | {"more": 1}
    for field, values in {
        "position": (0, manifest["position"] + 1, 2**31, -1, 1.5, None),
        "n_live": (0, manifest["n_live"] + 1, -1, True, "3"),
        "composed": ([], [1], [0, 0], [*manifest["composed"], 0], [[], []], [-1, 1], 5),
        "budget": (0.0, 2.0, float("nan"), 1),
        "n_ctx": (-5, 2**40, "many"),
        "format": ("1", None, 1.0, 0),
        "model_sha256": ("", None, "0" * 64),
        "cache_type": ("f17", 1),
        "engine": (None,),
        "rope_factors": (None, 1),
    }.items():
        for value in values:
            yield manifest | {field: value}


def test_forged_files_of_the_right_checksum(tmp_path: Path, setup: Setup) -> None:
    """What contradicts itself or the model is refused before the chat is touched."""
    path = tmp_path / "s.kvc"
    chat = talked()
    sessions.save(path, chat, setup)
    manifest, arrays = taken_apart(path)
    put_together(path, manifest, arrays)
    sessions.load(path, chat, setup)  # the forger knows the format
    forged = [(manifest, wrong) for wrong in forged_arrays(manifest, arrays)]
    forged += [(wrong, arrays) for wrong in forged_manifests(manifest)]
    assert len(forged) > 100
    for i, (wrong_manifest, wrong_arrays) in enumerate(forged):
        put_together(path, wrong_manifest, wrong_arrays)
        with pytest.raises(SessionError) as error:
            sessions.load(path, chat, setup)
        assert "\n" not in str(error.value), i
        assert same_state(chat.state(), talked().state()), i


def test_what_is_no_file_of_sensible_size_is_refused_at_once(tmp_path: Path, setup: Setup) -> None:
    chat = talked()
    pipe, huge, bomb, tiny = (tmp_path / f"{name}.kvc" for name in ("pipe", "huge", "bomb", "tiny"))
    os.mkfifo(pipe)
    entry = {"keys.0": {"dtype": "U8", "shape": [2**44], "data_offsets": [0, 2**44]}}
    head = json.dumps(entry).encode()
    with open(huge, "wb") as file:  # a file of holes that says it is one tensor of 16 TiB
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(min(8 + len(head) + 2**44, 2**43))
    bomb.write_bytes(struct.pack("<Q", len(head)) + head)
    tiny.write_bytes(b"\x01")
    started = time.monotonic()
    for path, words in (
        (pipe, "not a plain file"),
        (huge, "larger than this machine's memory"),
        (bomb, "damaged or no session"),
        (tiny, "damaged or no session"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none.kvc", "No such file"),
        (Path("/dev/zero"), "not a plain file"),
    ):
        with pytest.raises(SessionError, match=words):
            sessions.load(path, chat, setup)
    assert time.monotonic() - started < 5
    assert same_state(chat.state(), talked().state())


def test_an_engine_that_fails_on_the_way_leaves_an_empty_chat(tmp_path: Path, setup: Setup) -> None:
    class Failing(FakeEngine):
        def restore(self, snapshot: CacheSnapshot) -> None:
            self.clear()
            self.live = [1, 2, 3]
            raise EngineError("llama_kvc_set_rows failed")

    sessions.save(tmp_path / "s.kvc", talked(), setup)
    chat = Chat(FakeModel(), CacheMemory(Failing(200, ["yes"], per_layer=True), 400))
    list(chat.ask("Hello", max_tokens=9))
    with pytest.raises(SessionError, match=r"s\.kvc: it cannot be loaded: llama_kvc_set_rows failed; .* is lost"):
        sessions.load(tmp_path / "s.kvc", chat, setup)
    assert same_state(chat.state(), fake_chat().state())


# -- writing ----------------------------------------------------------------------------------------------------------

#: Begins a chat of 5 MB and says how to save it, each time three tokens longer.
SAVER = """
import sys
from pathlib import Path
from session_chats import fake_chat
from kvcompose_local.chat import sessions
from kvcompose_local.chat.sessions import Setup
from kvcompose_local.install import model_files
path, setup = Path(sys.argv[1]), Setup(Path(sys.argv[2]), "f16", 0.5)
model_files.cache_folder = lambda: Path(sys.argv[2]).parent
chat = fake_chat(n_ctx=10**6)
chat.messages[:] = [{"role": "user", "content": "w" * 5_000_000}]
def save():
    chat.memory.feed([1, 2, 3])
    sessions.save(path, chat, setup)
    return chat.memory.position
"""
#: Kills processes that save and save again. (A process of its own, since those with native threads do not fork well.)
KILLER = """
import os, random, signal, time
rng = random.Random(1)
save()
while_writing = 0
for kills in range(1, 201):
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        while True:
            os.write(tell, b"%d " % save())
    os.close(tell)
    time.sleep(rng.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(told, "rb") as pipe:
        position = int((b"%d " % chat.memory.position + pipe.read()).split()[-1])
    while_writing += len(list(path.parent.glob(".*.part")))
    sessions.load(path, chat, setup)
    # The last save that was told, or the one after it, killed between its end and the telling.
    assert chat.memory.position - position in (0, 3), (chat.memory.position, position)
    if while_writing >= 10 and kills >= 25:
        break
print(while_writing)
"""


def saver(path: Path, setup: Setup, code: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(path), str(setup.model)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_file(tmp_path: Path, setup: Setup) -> None:
    path = tmp_path / "folder" / "s.kvc"
    path.parent.mkdir()
    done = saver(path, setup, SAVER + KILLER)
    assert (done.stderr, done.returncode) == ("", 0)
    assert int(done.stdout) >= 10
    sessions.save(path, talked(), setup)
    assert [file.name for file in path.parent.iterdir()] == ["s.kvc"], "what the killed saves left is gone"


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path: Path, setup: Setup) -> None:
    path = tmp_path / "folder" / "s.kvc"
    path.parent.mkdir()
    sessions.save(path, talked(), setup)
    # A limit on the size of files stops the write in the middle, as a full disk does.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))\n"
    done = saver(path, setup, limit + SAVER + "save()")
    assert (done.stdout, done.stderr.splitlines()[-1]) == (
        "",
        f"kvcompose_local.errors.SessionError: the disk is full: make room in {path.parent}, then save again",
    )
    assert [file.name for file in path.parent.iterdir()] == ["s.kvc"]
    chat = fake_chat()
    sessions.load(path, chat, setup)
    assert same_state(chat.state(), talked().state())


def test_what_cannot_be_written(tmp_path: Path, setup: Setup) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "s.kvc", "make the folder"),
        (tmp_path / "pipe", "is a device or a pipe"),
        (tmp_path / ("b" * 243 + ".kvc"), "file name of 247 bytes is too long"),
    ):
        with pytest.raises(SessionError, match=words):
            sessions.check_writable(path)
        with pytest.raises(SessionError, match=words):
            sessions.save(path, talked(), setup)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fake.gguf", "pipe"]
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(ModelError, match="cannot read"):
        sessions.save(tmp_path / "s.kvc", talked(), replace(setup, model=tmp_path / "gone.gguf"))
    link = tmp_path / "link.kvc"
    link.symlink_to(tmp_path / "target.kvc")
    sessions.save(link, talked(), setup)
    assert link.is_symlink()
    sessions.load(tmp_path / "target.kvc", fake_chat(), setup)


def test_a_file_that_is_no_session_is_not_overwritten(tmp_path: Path, setup: Setup) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("what I must not lose")
    with pytest.raises(SessionError, match="not overwritten"):
        sessions.save(notes, talked(), setup)
    assert notes.read_text() == "what I must not lose"
    notes.write_text("")
    for _ in range(2):  # an empty file, then a session
        sessions.save(notes, talked(), setup)
    sessions.load(notes, fake_chat(), setup)


def test_turns_that_a_session_does_not_tell_of_cannot_be_taken_back() -> None:
    chat = fake_chat()
    chat.restore(replace(talked().state(), steps=()))
    with pytest.raises(InvalidInput, match="no message"):
        list(chat.ask_again(max_tokens=3))


def test_a_session_that_another_chat_wrote_is_noticed(tmp_path: Path, setup: Setup) -> None:
    path = tmp_path / "s.kvc"
    assert sessions.version_of(path) == ()
    sessions.save(path, talked(), setup)
    version = sessions.version_of(path)
    assert version == sessions.version_of(path)
    sessions.save(path, talked(), setup)
    assert version != sessions.version_of(path)
    assert sessions.beside(path) == tmp_path / "s-2.kvc"
    sessions.beside(path).touch()
    assert sessions.beside(path) == tmp_path / "s-3.kvc"


def test_names_and_paths(tmp_path: Path, setup: Setup) -> None:
    folder = tmp_path / "state" / "sessions"
    assert sessions.names() == []
    assert sessions.path_of("notes") == folder / "notes.kvc"
    assert sessions.path_of("./notes") == Path("notes")
    assert sessions.path_of("notes.kvc") == Path("notes.kvc")
    assert sessions.path_of("~no-such-user/notes") == Path("~no-such-user/notes")
    for name in ("", "..", "a?b", " ", "a\nb", "-"):
        if name != "-":
            with pytest.raises(InvalidInput):
                sessions.path_of(name)
    for i, name in enumerate(("older", "newer")):
        sessions.check_writable(sessions.path_of(name))
        sessions.save(sessions.path_of(name), talked(), setup)
        os.utime(sessions.path_of(name), (i, i))
    assert sessions.names() == ["newer", "older"]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_model_is_hashed_once(tmp_path: Path, setup: Setup) -> None:
    reads: list[tuple[int, int]] = []
    content = bytes(range(256)) * 10_000
    setup.model.write_bytes(content)
    for _ in range(2):
        digest = model_files.model_digest(setup.model, lambda *n: reads.append(n))
        assert digest == hashlib.sha256(content).hexdigest()
        assert reads == [(1, 2), (2, 2), (2, 2)]
    setup.model.write_bytes(content[::-1])
    assert model_files.model_digest(setup.model) == hashlib.sha256(content[::-1]).hexdigest()


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def private_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs started by this test keep digests and sessions in its own folder."""
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(library_path().parent))
    monkeypatch.setenv("KVCOMPOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))


@needs_patches
def test_a_document_is_read_once_and_answered_about_at_once(
    private_program: None, tmp_path: Path, tiny_model: TinyModel
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(endless(tiny_model).read_bytes())
    notes, out = tmp_path / "notes.txt", tmp_path / "notes.kvc"
    notes.write_text(WORDS * 3)
    n = 1 + len(f"[user]{(WORDS * 3).rstrip()}\n\n".replace(" ", "▁").encode())
    made = program("compress", model, notes, "-o", out, "--ctx", 2048, "--budget", 0.75, "--keep", 0.3, "--threads", 1)
    assert made.returncode == 0, made.stderr
    assert re.fullmatch(
        rf"{out}: {n} tokens in 0\.\d MiB \(uncompressed: 1\.1 MiB\)\n"
        rf"ask about it: kvcompose-local run --session {out}\n"
        r"the chat is saved to it at the end; with --no-autosave it stays as it is\n",
        made.stdout,
    )
    assert f"compacted: {n} tokens seen" in made.stderr
    before = out.read_bytes()
    asked = ["run", "--session", out, "-p", "Who?", "--json", "--temp", 0, "--max-tokens", 8, "--threads", 1]
    first, second = (program(*asked, "--no-autosave") for _ in range(2))
    assert "loaded" in first.stderr
    assert out.read_bytes() == before
    told, again = json.loads(first.stdout), json.loads(second.stdout)
    assert told["text"] == again["text"]
    assert (told["prompt_tokens"], told["positions"]) == (
        len("Who?[/][assistant]"),
        n + len("Who?[/][assistant]") + 8,
    )
    assert told["kv_bytes"] == told["kv_bytes_full"] * 13 / 32  # all 2,048 positions, and 0.75 more than buys
    assert told["kv_bytes_full"] == 2048 * 3 * 256
    assert told["kv_bytes_used"] < 0.35 * n * 3 * 256
    program(*asked)
    saved = program(*asked)
    assert saved.stderr.startswith(f"loaded {out}: 2 messages, ")
    assert json.loads(saved.stdout)["positions"] > told["positions"]

    short = ["run", "--session", out, "-p", "Who?", "--threads", 1]
    refused(program(*short, "--ctx", 512), 1, "raise --ctx")
    refused(program(*short, "--budget", 0.06), 1, "raise --budget")
    refused(
        program(*short, "--cache-type", "f16"),
        1,
        "start with --cache-type q8_0/q4_0, or with --session and no --cache-type",
    )
    refused(program(*short, "--system", "Other."), 1, "a system prompt of its own")
    refused(program("run", tiny_model("llama", seed=5), *short[1:]), 1, "belongs to another model: model.gguf")
    moved = model.rename(tmp_path / "moved.gguf")
    refused(program(*short), 1, f"no longer at {model}")
    assert program("run", moved, *short[1:], "--max-tokens", 1).returncode == 0
    out.write_bytes(before[:-1])
    refused(program(*short), 1, "notes.kvc is damaged or no session")


@needs_patches
def test_what_compress_reads_and_refuses(private_program: None, tmp_path: Path, tiny_model: TinyModel) -> None:
    out = tmp_path / "out.kvc"
    compress = ["compress", tiny_model(), "-", "-o", out, "--ctx", 1024, "--threads", 1]
    refused(program(*compress), 2, "there is no text to read")
    refused(program(*compress, stdin=b"\xff\xfe"), 2, "there is no text to read")
    refused(program(*compress, stdin="x" * 5000), 1, "more tokens do not fit: 0 of --ctx 1024 positions are used")
    refused(program(*compress, "--budget", 1, stdin="x"), 2, "a budget of 1 never compresses")
    refused(program(*compress, "--keep", 0, stdin="x"), 2, "--keep")
    refused(program(*compress, "-o", tmp_path / "no" / "out.kvc", stdin="x"), 1, "make the folder")
    refused(program("compress", tiny_model(), tmp_path / "none.txt", "-o", out), 2, "cannot read")
    assert not out.exists()
    little = program(*compress, "--keep", 1e-9, stdin="some words " * 50)
    assert little.returncode == 0
    assert little.stderr.startswith("--keep 1e-09 leaves too little of this text to read on by: 0."), little.stderr
    made = out.read_bytes()
    refused(program(*compress, stdin="some words " * 50), 2, f"{out} exists, and may hold a chat by now")
    assert out.read_bytes() == made
    out.unlink()
    short = program(*compress, stdin="A few words.\n")
    assert short.returncode == 0
    assert short.stderr == "the text is too short to compress: it is kept whole\n"
    assert json.loads(program("run", "--session", out, "-p", "x", "--json", "--threads", 1, "--max-tokens", 1).stdout)[
        "layer_cells"
    ][0] > len("A few words.")


def test_a_chat_is_saved_when_its_model_was_moved_or_replaced(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, moved, saved = tmp_path / "m.gguf", tmp_path / "moved.gguf", tmp_path / "s.kvc"
    shutil.copy(tiny_model("llama"), model)
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    with LocalChat(model, budget=0.5, n_ctx=1024, n_threads=1) as chat:
        chat.ask("hi", max_tokens=2)
        model.rename(moved)
        chat.save(saved)
        assert sessions.read_manifest(saved).model_sha256 == digest
        shutil.copy(tiny_model("qwen2"), model)
        chat.save(saved)
        assert sessions.read_manifest(saved).model_sha256 == digest, "of the model that the cells belong to"
        chat.load(saved)
    with (
        LocalChat(model, budget=0.5, n_ctx=1024, n_threads=1) as other,
        pytest.raises(SessionError, match="belongs to another model"),
    ):
        other.load(saved)


def own_scorer(engine: Any, seed: int) -> Scorer:
    """Of any weights, for an engine's layers."""
    rng = np.random.default_rng(seed)
    layers = engine.shape.layers
    n_features = engine.live_rows(0)[0][0].shape[2] + engine.live_rows(0)[0][1].shape[2]
    weights = tuple(rng.standard_normal((layer.n_kv_heads, n_features)).astype(np.float16) for layer in layers)
    return Scorer(weights, tuple(np.full((layer.n_kv_heads, 3), -0.1, np.float32) for layer in layers), 1000)


@needs_patches
def test_a_session_goes_on_by_the_scorer_that_its_cells_were_scored_by(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model, path = tiny_model("llama"), tmp_path / "s.kvc"
    setup = Setup(model, "f16", 0.25)
    text = [*range(20, 220)] * 3
    with real_chat(model) as first:
        engine = first.memory.engine
        first.memory.feed([7])  # how keys are turned is known when something was decoded
        scorer = own_scorer(engine, 0)
        chat = Chat(first.model, CacheMemory(engine, 1024, scorer=scorer))
        chat.memory.clear()
        chat.memory.feed(text)
        assert chat.memory.reports
        sessions.save(path, chat, setup)
        saved = chat.state()
        chat.memory.feed(text[:200])
        went_on = chat.state()
    for other in (None, 1):
        with real_chat(model) as again:
            engine = again.memory.engine
            again.memory.feed([7])
            mine = None if other is None else own_scorer(engine, other)
            chat = Chat(again.model, CacheMemory(engine, 1024, scorer=mine))
            chat.memory.clear()
            sessions.load(path, chat, setup)
            assert same_state(chat.state(), saved)
            chat.memory.feed(text[:200])
            assert same_state(chat.state(), went_on), "nothing of its scale has changed"
