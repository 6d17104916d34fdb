"""What is no model that chats is told by name, in one line, by every command, before native code sees it."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import pickle
import random
import re
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from programs import program
from safetensors.numpy import save as safetensors_of
from tiny_models import write_tiny_model

from kvcompose_local.errors import KVComposeError, ModelError
from kvcompose_local.install.gguf_header import BadHeader, read_header
from kvcompose_local.install.model_files import check_gguf
from kvcompose_local.llama_ffi.model import Model

TinyModel = Callable[..., Path]


def told(path: Path) -> str:
    """The one line that a file is refused by."""
    with pytest.raises(ModelError) as error:
        check_gguf(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- other formats ----------------------------------------------------------------------------------------------------


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x" * 100)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.gguf"))
    return buffer.getvalue()


FORMATS = {
    "empty": (b"", "is empty: fetch it again"),
    "short": (b"GG", "is not a GGUF file"),
    "text": (
        b"Call me Ishmael.",
        "is not a GGUF file: take the model's GGUF file, or one of `kvcompose-local models",
    ),
    "session": (
        b"\x80\0\0\0\0\0\0\0" + json.dumps({"__metadata__": {"checksum": "0" * 64, "manifest": "{}"}}).encode(),
        "is a saved session, not a GGUF file: give it to `kvcompose-local run --session`",
    ),
    "safetensors": (safetensors_of({"x": np.ones(3, np.float32)}), "holds safetensors, not a GGUF file: convert it"),
    "torch": (zipped("archive/data.pkl", "archive/data/0"), "holds PyTorch weights, not a GGUF file: convert it"),
    "old torch": (pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2), "is a Python pickle, such as PyTorch weights"),
    "state dict": (pickle.dumps({"x": [1, 2]}, protocol=4), "is a Python pickle, such as PyTorch weights"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x051.9", "is an ONNX model, not a GGUF file"),
    "ggml": (struct.pack("<I", 0x67676D6C) + bytes(100), "is of the GGML format that GGUF replaced in 2023"),
    "ggjt": (struct.pack("<II", 0x67676A74, 3) + bytes(100), "is of the GGML format that GGUF replaced in 2023"),
    "ggla": (struct.pack("<II", 0x67676C61, 1) + bytes(100), "is a LoRA adapter of the format before GGUF"),
    "zip": (zipped("model.gguf"), "is a zip archive, not a GGUF file: unpack it"),
    "tar": (tarred(), "is a tar archive, not a GGUF file: unpack it"),
    "gz": (gzip.compress(b"GGUF"), "is a packed archive, not a GGUF file: unpack it"),
    "page": (b"\n<!DOCTYPE html><html><head><title>404</title>", "is a web page in a model's place"),
    "error": (b'{"error":"Repository not found"}', "is JSON, such as a server's error message"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:9f86d081884c7d659a2feaa0c55ad015a3bf\nsize 5\n",
        "is a Git LFS pointer, not the file itself, not a GGUF file: run `git lfs pull`",
    ),
    "zeros": (bytes(5000), "begins with zeros, as a download does that is not finished"),
    "llamafile": (b"MZqFpD='\n" + bytes(100), "is a llamafile, a program with a model in it"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_told_by_name(tmp_path: Path, name: str) -> None:
    content, words = FORMATS[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert told(path).startswith(f"{path} {words}")


def test_folders_and_what_cannot_be_read(tmp_path: Path) -> None:
    assert told(tmp_path) == f"{tmp_path} is a folder, not a GGUF file: name the model's file"
    (tmp_path / "model.safetensors").touch()
    assert "is a folder, not a GGUF file: convert it with" in told(tmp_path)
    (tmp_path / "m.gguf").touch()
    assert told(tmp_path).endswith("name a file in it, such as m.gguf")
    assert re.fullmatch(r"cannot read .*none\.gguf: No such file or directory", told(tmp_path / "none.gguf"))
    assert re.fullmatch(r"cannot read .*: File name too long", told(tmp_path / ("x" * 5000)))


# -- kinds of GGUF ----------------------------------------------------------------------------------------------------


def mini(path: Path, arch: str, values: dict[str, Any], *, tensors: int = 1) -> Path:
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in values.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
        add[type(value)](key, value)
    for i in range(tensors):
        writer.add_tensor(f"x{i}", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if tensors:
        writer.write_tensors_to_file()
    writer.close()
    return path


CONTEXT = {"llama.context_length": 2048, "llama.block_count": 2}
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "vision": ("clip", {"clip.has_vision_encoder": True}, "is a projector for pictures or sound (mmproj)"),
    "audio": ("clip", {"general.type": "mmproj"}, "is a projector for pictures or sound (mmproj)"),
    "lora": ("llama", {"general.type": "adapter", "adapter.type": "lora"}, "is a LoRA adapter, which only changes"),
    "some adapter": ("qwen3", {"general.type": "adapter"}, "is an adapter, which only changes a model"),
    "control vector": ("controlvector", {"controlvector.layer_count": 30}, "is a control vector"),
    "imatrix": ("", {"general.type": "imatrix", "imatrix.chunk_count": 5}, "is an importance matrix, which only quan"),
    "bert": ("nomic-bert", {"nomic-bert.context_length": 512}, "is an embedding model, which writes no text"),
    "embedding": ("llama", CONTEXT | {"llama.attention.causal": False}, "is an embedding model, which writes no text"),
    "pooled": ("qwen3", {"qwen3.context_length": 99, "qwen3.pooling_type": 3}, "is an embedding model"),
    "reranker": ("qwen3", {"qwen3.context_length": 99, "qwen3.pooling_type": 4}, "is a reranker, which writes no text"),
    "t5": ("t5", {"t5.context_length": 512}, "is an encoder-decoder model"),
    "diffusion": ("llada", {"llada.context_length": 512}, "is a diffusion language model"),
    "image": ("flux", {}, "is a model of pictures or video, which writes no text"),
    "speech": ("wavtokenizer-dec", {"wavtokenizer-dec.context_length": 512}, "is a speech model, which writes no text"),
    "draft": ("eagle3", {"eagle3.context_length": 512}, "is a draft model, which only runs beside a larger one"),
    "no context": (
        "llama",
        {},
        "is no language model or damaged, its header tells no context length (llama.context_length)",
    ),
    "context of 0": (
        "llama",
        {"llama.context_length": 0},
        "is no language model or damaged, its header tells a context length of 0",
    ),
    "large context": (
        "llama",
        {"llama.context_length": 2**32 - 1},
        "is no language model or damaged, its header tells a context length",
    ),
    "no layers": (
        "llama",
        {"llama.context_length": 9},
        "is no language model or damaged, its header tells no number of layers",
    ),
    "many layers": (
        "llama",
        CONTEXT | {"llama.block_count": 513},
        "is no language model or damaged, its header tells a number of layers",
    ),
    "nameless": ("", {}, "does not say what model it is (general.architecture)"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_no_chat_model_says_what_it_is(tmp_path: Path, name: str) -> None:
    arch, values, words = KINDS[name]
    path = mini(tmp_path / "m.gguf", arch, values)
    assert told(path).startswith(f"{path} {words}")


def test_a_vocabulary_alone(tmp_path: Path) -> None:
    path = mini(tmp_path / "m.gguf", "llama", CONTEXT | {"tokenizer.ggml.model": "llama"}, tensors=0)
    assert told(path) == f"{path} holds a vocabulary or metadata and no weights: name a language model"


def test_versions_and_byte_order(tmp_path: Path, tiny_model: TinyModel) -> None:
    path, whole = tmp_path / "m.gguf", tiny_model().read_bytes()

    def with_version(version: int) -> str:
        path.write_bytes(whole[:4] + struct.pack("<I", version) + whole[8:])
        return told(path)

    assert "has GGUF version 1, of August 2023, which llama.cpp no longer reads" in with_version(1)
    assert "has GGUF version 4, which this program's llama.cpp does not read" in with_version(4)
    assert "is big-endian" in with_version(3 << 24)
    assert "is big-endian" in with_version(2 << 24)
    check_gguf(tiny_model())
    path.write_bytes(whole[:4] + struct.pack("<I", 2) + whole[8:])
    check_gguf(path)


@pytest.mark.parametrize("command", ["run", "inspect", "bench", "eval", "profile", "compress"])
@pytest.mark.parametrize("name", ["audio", "lora", "imatrix", "no context", "lfs"])
def test_every_command_says_the_same(tmp_path: Path, command: str, name: str) -> None:
    path = tmp_path / "m.gguf"
    if name in FORMATS:
        path.write_bytes(FORMATS[name][0])
    else:
        mini(path, *KINDS[name][:2])
    (tmp_path / "notes.txt").write_text("some words")
    more = {"run": ["-p", "hi"], "compress": [tmp_path / "notes.txt", "-o", tmp_path / "o.kvc"]}.get(command, [])
    done = program(command, path, *more)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {told(path)}\n")
    for option in re.findall(r"--[a-z-]+", done.stderr):
        assert option in program("run", "--help").stdout


# -- hostile headers --------------------------------------------------------------------------------------------------


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"llama.rope.scaling.type": "dynamic"},
            "scales RoPE by 'dynamic', and llama.cpp by none, linear, yarn, longrope",
        ),
        ({"llama.attention.head_count": 4, "llama.attention.head_count_kv": 3}, "4 query heads for 3 KV heads"),
        ({"llama.attention.head_count": 4, "llama.attention.head_count_kv": [2, 3]}, "4 query heads for 3 KV heads"),
        (
            {"llama.attention.head_count": [4, 9], "llama.attention.head_count_kv": [0, 2]},
            "9 query heads for 2 KV heads",
        ),
        ({"llama.attention.head_count": [4, 0], "llama.attention.head_count_kv": [2, 3]}, ""),
        ({"llama.rope.scaling.type": "yarn", "llama.attention.head_count": 4}, ""),
    ],
)
def test_what_llama_cpp_asserts_of_a_header(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    path = mini(tmp_path / "m.gguf", "llama", {"llama.context_length": 64, "llama.block_count": 2, **values})
    if not words:
        check_gguf(path)
        return
    assert words in told(path)
    assert told(path).endswith(": take another conversion")


# -- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "parts"),
    [
        ("x.gguf.part1of2", "x.gguf.part2of2", "x.gguf.part*"),
        ("x.gguf-split-a", "x.gguf-split-b", "x.gguf-split-*"),
        ("x.gguf.aa", "x.gguf.ab", "x.gguf.??"),
        ("x.gguf.001", "x.gguf.002", "x.gguf.???"),
    ],
)
def test_a_part_of_a_file_that_was_split_by_bytes(tmp_path: Path, first: str, second: str, parts: str) -> None:
    whole = write_tiny_model(tmp_path / "whole.gguf").read_bytes()
    half = len(whole) // 2
    (tmp_path / first).write_bytes(whole[:half])
    (tmp_path / second).write_bytes(whole[half:])
    for name in (first, second):
        joined = f"`cat {tmp_path}/{parts} > {tmp_path}/x.gguf` joins them"
        assert told(tmp_path / name) == f"{tmp_path / name} is one part of a file: {joined}"
    (tmp_path / first).write_bytes(whole)  # a name alone says nothing
    check_gguf(tmp_path / first)


def test_parts_are_joined_by_their_numbers(tmp_path: Path) -> None:
    for i in (1, 2, 10):
        (tmp_path / f"a b.gguf.part{i}of10").write_bytes(b"x" * 99)
    line = told(tmp_path / "a b.gguf.part2of10")
    assert f"`cat $(ls -v '{tmp_path}/a b.gguf.part'*) > '{tmp_path}/a b.gguf'` joins them" in line


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of some MB."""
    return write_tiny_model(tmp_path_factory.mktemp("large") / "large.gguf", n_layers=12)


@pytest.mark.parametrize(
    ("begin", "end", "words"),
    [
        (0.5, 1, "ends in zeros, from byte "),
        (0.9, 1, "ends in zeros, from byte "),
        (0.3, 0.4, "holds zeros from "),
    ],
)
def test_a_download_that_is_not_finished_but_has_its_size(
    tmp_path: Path, large: Path, begin: float, end: float, words: str
) -> None:
    raw = bytearray(large.read_bytes())
    first, last = int(len(raw) * begin) | 1, int(len(raw) * end)
    raw[first:last] = bytes(last - first)
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    line = told(path)
    assert line.startswith(f"{path} {words}")
    assert line.endswith(", as a download does that is not finished: fetch it again")


def test_tensors_that_are_zero_are_no_missing_part(tmp_path: Path, large: Path) -> None:
    """A block that adds nothing, and rows of tokens that nobody uses."""
    path = tmp_path / "m.gguf"
    path.write_bytes(large.read_bytes())
    reader = gguf.GGUFReader(path, "r+")
    last = max(reader.tensors, key=lambda tensor: tensor.data_offset)
    for tensor in reader.tensors:
        if tensor.name.startswith(("blk.3.", "blk.4.attn_v", last.name)):
            tensor.data[:] = 0
        if tensor.name == "token_embd.weight":
            tensor.data[-130:] = 0
    reader.data.flush()
    check_gguf(path)
    path.write_bytes(large.read_bytes())
    reader = gguf.GGUFReader(path, "r+")
    reader.data[min(tensor.data_offset for tensor in reader.tensors) :] = 0
    reader.data.flush()
    check_gguf(path)


def header(*pairs: bytes, n_tensors: int = 1, n_pairs: int | None = None, more: bytes = bytes(4096)) -> bytes:
    return (
        b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(pairs) if n_pairs is None else n_pairs) + b"".join(pairs) + more
    )


ARCH = pair(b"general.architecture", 8, struct.pack("<Q", 5) + b"llama")
HOSTILE = {
    "tensors": (header(n_tensors=2**63), f"promises {2**63} tensors"),
    "pairs": (header(n_pairs=2**64 - 1), f"promises {2**64 - 1} values"),
    "key": (header(struct.pack("<Q", 2**60)), "ends too soon"),
    "long key": (header(struct.pack("<Q", 2**17), more=bytes(2**18)), "has a key that is too long"),
    "text": (header(pair(b"a", 8, struct.pack("<Q", 2**63))), "ends too soon"),
    "array": (header(pair(b"a", 9, struct.pack("<IQ", 4, 2**62))), f"promises an array of {2**62} values"),
    "texts": (header(pair(b"a", 9, struct.pack("<IQ", 8, 2**40))), f"promises an array of {2**40} values"),
    "text in texts": (header(pair(b"a", 9, struct.pack("<IQ", 8, 5000)), more=b"\xff" * 50_000), "ends too soon"),
    "arrays": (header(pair(b"a", 9, struct.pack("<IQ", 9, 1))), "has an array of arrays"),
    "type": (header(pair(b"a", 77, b"")), "has a value of the unknown type 77"),
    "twice": (header(ARCH, ARCH), "tells 'general.architecture' twice"),
    "cut": (header(ARCH, n_pairs=3, more=b""), "ends too soon"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_headers_that_promise_too_much(tmp_path: Path, name: str) -> None:
    content, words = HOSTILE[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    started = time.perf_counter()
    assert told(path).startswith(f"{path} is damaged, its header {words}")
    assert time.perf_counter() - started < 1


def test_a_text_from_the_header_cannot_break_the_line(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    key = b"a\n\x1b[2J"
    path.write_bytes(header(pair(key, 0, b"\0"), pair(key, 0, b"\0")))
    assert told(path).endswith(r"its header tells 'a\n\x1b[2J' twice: fetch it again")


def checked_and_loaded(path: Path) -> Model:
    check_gguf(path)
    return Model(path)


def test_every_cut_is_one_line_and_no_abort(tmp_path: Path) -> None:
    """What the header's reader lets through, llama.cpp refuses by itself."""
    whole = write_tiny_model(tmp_path / "whole.gguf", n_layers=1).read_bytes()
    path = tmp_path / "m.gguf"
    end = whole.index(b"token_embd.weight")
    for n in [*range(8, end, 97), *range(end, len(whole), len(whole) // 20)]:
        path.write_bytes(whole[:n])
        with pytest.raises(KVComposeError) as error:
            checked_and_loaded(path)
        assert "\n" not in str(error.value)


def test_bytes_of_a_header_that_flipped(tmp_path: Path) -> None:
    """The reader raises BadHeader or reads on; it takes neither time nor memory."""
    whole = bytearray(write_tiny_model(tmp_path / "whole.gguf", n_layers=1).read_bytes())
    end = whole.index(b"blk.0.attn")
    path, rng = tmp_path / "m.gguf", random.Random(0)
    started = time.perf_counter()
    for _ in range(1500):
        raw = bytearray(whole)
        for _ in range(rng.choice((1, 3))):
            raw[rng.randrange(8, end)] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        with open(path, "rb") as file, contextlib.suppress(BadHeader):
            read_header(file, whole=True)
    assert time.perf_counter() - started < 60


def test_values_behind_a_vocabulary_are_found(tmp_path: Path) -> None:
    """Most files tell them before it, and then it is passed over."""
    values = {"tokenizer.ggml.tokens": ["x"] * 5000, **CONTEXT, "tokenizer.ggml.merges": ["y"] * 5000, "z.z": 1}
    path = mini(tmp_path / "m.gguf", "llama", values)
    check_gguf(path)
    with open(path, "rb") as file:
        assert "z.z" not in read_header(file).values
        assert read_header(file, whole=True).number("z.z") == 1


def test_the_reader_agrees_with_the_library(tiny_model: TinyModel) -> None:
    path = tiny_model("gemma3")
    reader = gguf.GGUFReader(path)
    with open(path, "rb") as file:
        header = read_header(file, whole=True)
    expected = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.n_tensors == len(reader.tensors)
    assert header.values.keys() == expected.keys()
    for name, value in header.values.items():
        if isinstance(value, list) and isinstance(value[0], float):
            assert np.allclose(value, expected[name])
        elif not (isinstance(value, list) and isinstance(value[0], str)):
            assert value == expected[name] or np.isclose(value, expected[name]), name
