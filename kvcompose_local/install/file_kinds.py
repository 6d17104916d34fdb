"""Recognizes files that cannot chat, before native code sees them, and says in one line what they are."""

from __future__ import annotations

import glob
import re
import shlex
from pathlib import Path

from kvcompose_local.install.gguf_header import MAGIC, VERSIONS, BadHeader, Header, read_header
from kvcompose_local.install.holes import hole_in

_FETCH_AGAIN = "fetch it again"
_TAKE_GGUF = "take the model's GGUF file, or one of `kvcompose-local models list`"
_UNPACK = "unpack it, and name the GGUF file in it"
_CONVERT = "convert it with llama.cpp's convert_hf_to_gguf.py, or take one of `kvcompose-local models list`"

#: The first bytes of a file, what such a file is, and what to do. The first match counts.
_SIGNATURES = (
    (rb"version https://git-lfs\.github\.com", "is a Git LFS pointer, not the file itself", "run `git lfs pull`"),
    (rb"lmgg|fmgg|tjgg", "is of the GGML format that GGUF replaced in 2023, or of whisper.cpp", _TAKE_GGUF),
    (rb"algg", "is a LoRA adapter of the format before GGUF", "take a model that has it merged"),
    (rb"MZqFpD|jartsr='", "is a llamafile, a program with a model in it", _UNPACK),
    (rb"PK\x03\x04(?s:.{0,200})data\.pkl", "holds PyTorch weights", _CONVERT),
    (rb"PK\x03\x04", "is a zip archive", _UNPACK),
    (rb"\x80[\x02-\x05][\x95\x8a\x8c}\](c]", "is a Python pickle, such as PyTorch weights", _CONVERT),
    (
        rb'(?s:.{6})\x00\x00\{"__metadata__": *\{"checksum"(?s:.{0,90})"manifest"',
        "is a saved session",
        "give it to `kvcompose-local run --session`",
    ),
    (rb"(?s:.{6})\x00\x00\{", "holds safetensors", _CONVERT),
    (rb"\x08[\x01-\x14]\x12", "is an ONNX model", _TAKE_GGUF),
    (rb"(?s:.{4})TFL3", "is a TensorFlow Lite model", _TAKE_GGUF),
    (rb"\x89HDF", "is an HDF5 file, such as Keras weights", _TAKE_GGUF),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "is a packed archive", _UNPACK),
    (rb"(?s:.{257})ustar", "is a tar archive", _UNPACK),
    (rb"%PDF", "is a PDF document", "read it by -f, and name a model"),
    (rb"\x7fELF|MZ|\xcf\xfa\xed\xfe|\xca\xfe\xba\xbe", "is a program", _TAKE_GGUF),
    (
        rb"(?:\xef\xbb\xbf)?\s*(?i:<!doctype|<html|<head|<\?xml|<!--)",
        "is a web page in a model's place",
        _FETCH_AGAIN,
    ),
    (rb"(?:\xef\xbb\xbf)?\s*\{", "is JSON, such as a server's error message or a model's configuration", _TAKE_GGUF),
    (rb"\x00{64}", "begins with zeros, as a download does that is not finished", _FETCH_AGAIN),
)
_COMPILED = tuple((re.compile(pattern), what, advice) for pattern, what, advice in _SIGNATURES)

#: Names of the parts of a file that was split by bytes: x.gguf.part1of2, x.gguf-split-a, x.gguf.aa, x.gguf.001.
_PART = re.compile(
    r"(?P<whole>.+\.gguf)(?:(?P<joint>[._-]?(?:part|split)[._-]?|\.)(?P<number>[0-9]{1,5}(?:of[0-9]+)?|[a-z]{1,3}))",
    re.IGNORECASE,
)

#: Architectures of GGUF files that are no language models, as patterns.
_OTHERS = (
    (r"clip|mmproj", "is a projector for pictures or sound (mmproj), which only goes beside a model"),
    (r"controlvector", "is a control vector, which only changes a model"),
    (r"imatrix", "is an importance matrix, which only quantizing needs"),
    (r"eagle\d*|dflash|.*-assistant", "is a draft model, which only runs beside a larger one"),
    (r"dream|llada.*|rnd1", "is a diffusion language model, which does not write one token after another"),
    (r"t5|t5encoder", "is an encoder-decoder model, which continues no chat"),
    (r".*bert.*|.*-embed|.*-embedding", "is an embedding model, which writes no text"),
    (r"wavtokenizer.*|.*tts.*|whisper|kokoro|dia|csm|snac", "is a speech model, which writes no text"),
    (
        r"flux|sd\d?|sdxl|aura|hidream|cosmos|ltxv|hyvid|wan|lumina2|qwen_image|pig|z_image|omnigen2?",
        "is a model of pictures or video, which writes no text",
    ),
)
#: Numbers that every language model's header tells, and the largest that llama.cpp can hold.
_NEEDED = {"context_length": ("context length", (1 << 31) - 1), "block_count": ("number of layers", 512)}
#: The names of llama.cpp's ways to scale RoPE.
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
#: llama.cpp's numbers of how embeddings are pooled: none, and the score of a reranker.
_NO_POOLING, _RANK = 0, 4


def complaint(path: Path) -> str | None:
    """Why a file cannot be a model that chats, and what to do; None where nothing speaks against it.

    The text continues a sentence that begins with the file's name. Reading the header takes milliseconds. Raises
    OSError.
    """
    if (part := _PART.fullmatch(path.name)) and path.is_file() and _is_part(path):
        return _of_part(path, part)
    if path.is_dir():
        return f"is a folder, not a GGUF file: {_in_folder(path)}"
    if path.exists() and not path.is_file():
        return "is not a plain file"
    with open(path, "rb") as file:
        head = file.read(512)
        if not head:
            return f"is empty: {_FETCH_AGAIN}"
        if not head.startswith(MAGIC):
            return _other_format(head)
        if len(head) < 24:
            return f"is cut off: {_FETCH_AGAIN}"
        version = int.from_bytes(head[4:8], "little")
        if version == 1:
            return "has GGUF version 1, of August 2023, which llama.cpp no longer reads: fetch a newer conversion"
        if version & 0xFFFF == 0 and version >> 16:
            return (
                "is big-endian, for machines such as IBM Z: fetch the usual file, or turn a copy by "
                "`gguf-convert-endian FILE native`"
            )
        if version not in VERSIONS:
            return f"has GGUF version {version}, which this program's llama.cpp does not read: a newer one may"
        try:
            header = read_header(file)
            if not header.n_tensors:  # a first shard may hold none, and tells so behind the vocabulary
                header = read_header(file, whole=True)
            missing = hole_in(file)
        except BadHeader as error:
            return f"is damaged, its header {error}: {_FETCH_AGAIN}"
    return _other_kind(header) or (f"{missing}: {_FETCH_AGAIN}" if missing else None)


def _is_part(path: Path) -> bool:
    """Whether a file is cut off, or holds what nothing tells of: as the first part of a file, and another."""
    with open(path, "rb") as file:
        head = file.read(512)
        if not head.startswith(MAGIC):
            return not any(pattern.match(head) for pattern, _, _ in _COMPILED)
        try:
            return read_header(file, whole=True).n_bytes >= path.stat().st_size
        except BadHeader:
            return True


def _of_part(path: Path, name: re.Match[str]) -> str:
    """What to do with a part of a file, whose parts have names that tell their order."""
    others = "*" if len(name["joint"]) > 1 else "?" * len(name["number"])
    names = sorted(p.name for p in path.parent.glob(f"{glob.escape(name['whole'] + name['joint'])}{others}"))
    by_number = sorted(names, key=lambda text: [int(n) for n in re.findall(r"\d+", text.removeprefix(name["whole"]))])
    whole = str(path.with_name(name["whole"]))
    parts = shlex.quote(whole + name["joint"]) + others
    parts = parts if names == by_number else f"$(ls -v {parts})"  # 10 before 2
    return f"is one part of a file: `cat {parts} > {shlex.quote(whole)}` joins them"


def _other_format(head: bytes) -> str:
    for pattern, what, advice in _COMPILED:
        if pattern.match(head):
            return f"{what}, not a GGUF file: {advice}"
    return f"is not a GGUF file: {_TAKE_GGUF}"


def _in_folder(path: Path) -> str:
    """The advice where a folder was named."""
    for file in sorted(path.glob("*.gguf")):
        return f"name a file in it, such as {file.name}"
    if any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
        return _CONVERT
    return "name the model's file"


def _other_kind(header: Header) -> str | None:
    """The kind of a GGUF file by its header; None for a language model."""
    values, arch = header.values, header.architecture
    kind = values.get("general.type")
    if kind == "adapter" or "adapter.type" in values:
        what = "LoRA" if values.get("adapter.type", "") == "lora" else ""
        return f"is {_article(f'{what} adapter'.strip())}, which only changes a model: name a model that has it merged"
    for name in (kind, arch):
        for pattern, what in _OTHERS:
            if isinstance(name, str) and re.fullmatch(pattern, name):
                return f"{what}: name a language model"
    if (values.get("split.count") or 1) == 1 and not header.n_tensors:
        return "holds a vocabulary or metadata and no weights: name a language model"
    if values.get("split.no"):
        return None  # the first shard tells the rest
    if not arch:
        return f"does not say what model it is (general.architecture): {_TAKE_GGUF}"
    pooling = header.number("{arch}.pooling_type")
    if pooling == _RANK:
        return "is a reranker, which writes no text: name a language model"
    if values.get(f"{arch}.attention.causal") is False or (pooling or _NO_POOLING) > _NO_POOLING:
        return "is an embedding model, which writes no text: name a language model"
    for name, (what, most) in _NEEDED.items():
        key = f"{arch}.{name}"
        number = header.number(key)
        if number is None or not 0 < number <= most:
            told = f"no {what}" if number is None else f"a {what} of {number}"
            return f"is no language model or damaged, its header tells {told} ({key}): take another conversion"
    return _impossible(header)


def _impossible(header: Header) -> str | None:
    """What of a language model's header llama.cpp asserts, and would end the process by."""
    scaling = header.values.get(f"{header.architecture}.rope.scaling.type")
    if isinstance(scaling, str) and scaling not in _ROPE_SCALINGS:
        told = f"scales RoPE by {scaling[:40]!r}, and llama.cpp by {', '.join(_ROPE_SCALINGS)}"
        return f"{told}: take another conversion"
    heads, kv_heads = (_by_layer(header, f"attention.head_count{of}") for of in ("", "_kv"))
    for n, n_kv in zip(heads, kv_heads, strict=False):
        if n > 0 and n_kv > 0 and n % n_kv:
            return f"is damaged, its header tells {n} query heads for {n_kv} KV heads: take another conversion"
    return None


def _by_layer(header: Header, name: str) -> list[int]:
    """A number of each layer, which a header tells once if all layers have the same."""
    key = f"{header.architecture}.{name}"
    number = header.number(key)
    return header.array(key, int) if number is None else [number] * (header.number("{arch}.block_count") or 0)


def _article(noun: str) -> str:
    return f"an {noun}" if noun[:1].lower() in "aeiou" else f"a {noun}"
