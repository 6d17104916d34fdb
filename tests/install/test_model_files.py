"""A model is all its files, whichever of them is named, and it is known by what they hold."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import program, refused
from tiny_models import split_model

from kvcompose_local.api import LocalChat
from kvcompose_local.chat import sessions
from kvcompose_local.commands.inspect import inspect
from kvcompose_local.errors import ModelError, SessionError
from kvcompose_local.install import model_files, models
from kvcompose_local.install.model_files import check_gguf, files_of, first_of, model_digest, size_of
from kvcompose_local.llama_ffi.library import library_path
from kvcompose_local.llama_ffi.model import Model

TinyModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def private_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def private_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs started by this test keep digests and sessions in its own folder."""
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(library_path().parent))
    monkeypatch.setenv("KVCOMPOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


# -- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_empty", [False, True])
def test_a_split_model_is_all_its_files(tmp_path: Path, tiny_model: TinyModel, first_empty: bool) -> None:
    whole = tiny_model()
    shards = split_model(whole, tmp_path, 3, first_empty=first_empty)
    n_bytes = sum(shard.stat().st_size for shard in shards)
    for shard in shards:
        assert first_of(shard) == shards[0]
        assert list(files_of(shard)) == shards
        assert size_of(shard) == n_bytes
        assert models.resolve(str(shard), pull=False) == shards[0]
        check_gguf(shard)
    assert inspect(shards[0]).file_bytes == n_bytes
    assert model_digest(shards[0]) == hashlib.sha256(b"".join(s.read_bytes() for s in shards)).hexdigest()
    with LocalChat(whole, budget=0.5, n_ctx=1024, n_threads=1) as chat:
        expected = chat.chat.model.tokenize("hi"), chat.memory.engine.shape
    with LocalChat(shards[1], budget=0.5, n_ctx=1024, n_threads=1) as chat:  # the one in the middle
        assert (chat.chat.model.tokenize("hi"), chat.memory.engine.shape) == expected
        chat.ask("hi", max_tokens=2)
        chat.save(tmp_path / "s.kvc")
        for shard in shards:  # what stands at their names may change
            shard.rename(shard.with_suffix(".moved"))
        chat.save(tmp_path / "s.kvc")
        chat.load(tmp_path / "s.kvc")


def test_a_shard_that_is_missing_or_of_another_model_is_named(tmp_path: Path, tiny_model: TinyModel) -> None:
    shards = split_model(tiny_model(), tmp_path, 3)
    other = split_model(tiny_model("llama", seed=7), tmp_path, 4, name="other")
    saved = [shard.read_bytes() for shard in shards]
    for i, words in ((1, "is missing: the model is made of 3 files"), (2, "is missing")):
        shards[i].unlink()
        with pytest.raises(ModelError, match=rf"{shards[i].name} {words}"):
            check_gguf(shards[0])
        shards[i].write_bytes(saved[i])
    shards[0].unlink()
    with pytest.raises(
        ModelError, match=rf"{shards[1].name} is one of 3 files of a model, and {shards[0].name} is miss"
    ):
        models.resolve(str(shards[1]), pull=False)
    shards[0].write_bytes(saved[0])
    for wrong in (saved[2], tiny_model().read_bytes(), b"GGUF", b"no model"):
        shards[1].write_bytes(wrong)
        with pytest.raises(ModelError, match=rf"{shards[1].name} is not file 2 of the model"):
            check_gguf(shards[0])
    shards[1].write_bytes(saved[1][: len(saved[1]) // 4])
    with pytest.raises(ModelError, match=rf"{shards[1].name} is cut off after {len(saved[1]) // 4} bytes"):
        check_gguf(shards[0])
    shutil.copy(other[0], shards[0])
    with pytest.raises(ModelError, match="is one of 4 files by its header, and of 3 by its name"):
        check_gguf(shards[0])


def test_a_name_like_a_shard_s_does_not_make_one(tmp_path: Path, tiny_model: TinyModel) -> None:
    path = tmp_path / "merged-00002-of-00003.gguf"
    shutil.copy(tiny_model(), path)
    assert files_of(path) == (path,)
    assert first_of(path) == path
    check_gguf(path)


@pytest.mark.parametrize("first_empty", [False, True])
def test_rope_factors_are_found_in_any_shard(tmp_path: Path, tiny_model: TinyModel, first_empty: bool) -> None:
    shards = split_model(tiny_model("phi3", longrope=256), tmp_path, 9, first_empty=first_empty)
    model = Model(shards[0])
    assert [model.rope_factors(n) for n in (256, 257)] == ["short", "long"]
    model.close()


def hub_cache(folder: Path, shards: list[Path]) -> Path:
    """The shards as a hub's client keeps them: blobs named by their hash, and links to them; returns the first link."""
    blobs, snapshot = folder / "hub" / "blobs", folder / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for shard in shards:
        blob = blobs / hashlib.sha256(shard.read_bytes()).hexdigest()
        shard.rename(blob)
        (snapshot / shard.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot / shards[0].name


def test_a_hub_s_cache_of_links(private_program: None, tmp_path: Path, tiny_model: TinyModel) -> None:
    """The names of the links tell what belongs together, also when a session finds its model again."""
    link = hub_cache(tmp_path, split_model(tiny_model(), tmp_path, 2))
    asked = ["--threads", 1, "--ctx", 1024, "--max-tokens", 2, "-p", "hi"]
    first = program("run", link, "--session", tmp_path / "s.kvc", *asked)
    assert first.returncode == 0, first.stderr
    again = program("run", "--session", tmp_path / "s.kvc", *asked)
    assert again.returncode == 0, again.stderr
    assert "loaded" in again.stderr
    assert sessions.read_manifest(tmp_path / "s.kvc").model_path == str(link)
    second = link.with_name(link.name.replace("00001-", "00002-"))
    second.unlink()
    refused(program("run", "--session", tmp_path / "s.kvc", *asked), 1, f"{second} is missing")
    refused(program("inspect", link), 1, f"{second} is missing")


def test_a_link_of_another_name_leads_to_the_shards(tmp_path: Path, tiny_model: TinyModel) -> None:
    shards = split_model(tiny_model(), tmp_path, 2)
    (tmp_path / "links").mkdir()
    link, loop = tmp_path / "links" / "latest.gguf", tmp_path / "loop.gguf"
    link.symlink_to(Path("..") / shards[1].name)
    loop.symlink_to(loop)
    assert [file.resolve() for file in files_of(link)] == shards
    assert files_of(shards[0]) == tuple(shards)
    with pytest.raises(ModelError, match="cannot read"):
        check_gguf(loop)


# -- identity ---------------------------------------------------------------------------------------------------------


def replace_copied(path: Path, content: bytes) -> None:
    path.write_bytes(content)  # over the same inode


def replace_moved(path: Path, content: bytes) -> None:
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


def replace_mapped(path: Path, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.write(content)


@pytest.mark.parametrize("replace", [replace_copied, replace_moved, replace_mapped])
@pytest.mark.parametrize("at", [0, 0.3, 0.77, 1], ids=str)
def test_a_file_of_the_same_size_and_time_is_seen(tmp_path: Path, replace: Callable[..., None], at: float) -> None:
    """One byte is another; the time of the last change is set back, as ``touch -r`` does."""
    path, content = tmp_path / "m.gguf", bytearray(os.urandom(3_000_000))
    path.write_bytes(content)
    os.utime(path, (0, 0))
    assert model_digest(path) == hashlib.sha256(content).hexdigest()
    content[int(at * (len(content) - 1))] ^= 1
    replace(path, bytes(content))
    os.utime(path, (0, 0))
    assert path.stat().st_mtime == 0
    assert model_digest(path) == hashlib.sha256(content).hexdigest()


def test_samples_see_what_a_file_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "_version_of", lambda status: (status.st_size,))
    path = tmp_path / "m.gguf"
    for seed in range(3):
        content = bytes([seed]) * 1_000_000
        path.write_bytes(content)
        assert model_digest(path) == hashlib.sha256(content).hexdigest()


def test_a_second_look_costs_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with open(path, "wb") as file:
        file.truncate(1 << 30)  # a file of holes
    started = time.perf_counter()
    digest = model_digest(path)
    first = time.perf_counter() - started
    reads: list[tuple[int, int]] = []
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        assert model_digest(path, lambda *n: reads.append(n)) == digest
        seconds.append(time.perf_counter() - started)
    assert not reads
    assert min(seconds) < first / 10


def test_each_shard_counts(tmp_path: Path, tiny_model: TinyModel) -> None:
    shards = split_model(tiny_model(), tmp_path, 3)
    seen = {model_digest(shards[0])}
    for shard in shards:
        raw = bytearray(shard.read_bytes())
        raw[-40] ^= 1
        shard.write_bytes(raw)
        os.utime(shard, (0, 0))
        seen.add(model_digest(shards[0]))
    assert len(seen) == 4


def test_a_session_knows_its_shards(tmp_path: Path, tiny_model: TinyModel) -> None:
    shards = split_model(tiny_model(), tmp_path, 2)
    with LocalChat(shards[0], budget=0.5, n_ctx=1024, n_threads=1) as chat:
        chat.ask("hi", max_tokens=2)
        chat.save(tmp_path / "s.kvc")
    raw = bytearray(shards[1].read_bytes())
    raw[-40] ^= 1
    shards[1].write_bytes(raw)
    with (
        LocalChat(shards[0], budget=0.5, n_ctx=1024, n_threads=1) as chat,
        pytest.raises(SessionError, match=r"belongs to another model: tiny-00001-of-00002\.gguf was another file"),
    ):
        chat.load(tmp_path / "s.kvc")


def test_a_file_that_is_written_to_while_it_is_read_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(2_000_000))

    def meanwhile(_done: int, _total: int) -> None:
        with open(path, "r+b") as file:
            file.write(b"x")

    model_digest(path, meanwhile)
    assert not list((tmp_path / "cache").glob("digests/*"))


def test_digests_are_kept_where_they_can_be(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    (tmp_path / "cache").write_text("a file in the folder's place")
    assert model_digest(path) == hashlib.sha256(b"GGUF").hexdigest()
    with pytest.raises(ModelError, match=re.escape(f"cannot read {tmp_path / 'none.gguf'}")):
        model_digest(tmp_path / "none.gguf")


def test_a_shard_of_another_name(tmp_path: Path, tiny_model: TinyModel) -> None:
    """llama.cpp finds the others by name; what it says of that is not enough."""
    renamed = split_model(tiny_model(), tmp_path, 2)[0].rename(tmp_path / "m.gguf")
    for command in (["run", renamed, "-p", "hi", "--threads", 1], ["inspect", renamed]):
        refused(program(*command), 1, "it is one of several files, name it as it was: NAME-00001-of-00003.gguf")
