"""No text ends the process in a tokenizer, and cutting it up changes no token where that can be."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from bpe_vocabulary import MARKERS, learned_merges, write_bpe_vocabulary

from kvcompose_local.evaluation.tasks import prose
from kvcompose_local.install.pin import read_pin
from kvcompose_local.install.resources import cache_folder, data_file
from kvcompose_local.llama_ffi.model import Model
from kvcompose_local.llama_ffi.text_parts import LONGEST_PART, parts_of

#: Every name that llama.cpp's ``tokenizer.ggml.pre`` knows.
PRE_TOKENIZERS = """
a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx deepseek-coder
deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3 gemma4
gigachat glm4 glm5 gpt-2 gpt-4o gpt3-finnish granite-docling granite-embed-multi-311m granite-embed-multi-97m grok-2
hunyuan hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano
joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 llama3 llama4 megrez mellum mellum2 midm-2.0
minerva-7b minicpm5 minimax-m2 modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe sarvam-moe
seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2 starcoder superbpe talkie tekken tiny_aya trillion ufakzeka
viking whitespace youtu
""".split()
#: What a long run may be of.
RUNS = {
    "letters": "a",
    "capitals": "A",
    "mixed case": "aB",
    "digits": "7",
    "letters and digits": "a1",
    "spaces": " ",
    "no-break spaces": "\u00a0",
    "tabs": "\t",
    "newlines": "\n",
    "CRLF": "\r\n",
    "empty lines": "\n ",
    "full stops": ".",
    "slashes": "/",
    "quotes": "'",
    "symbols": "$+",
    "punctuation and lines": "!\n",
    "base64": "aB3/+x",
    "a table": "a,",
    "control characters": "\x01",
    "plain words": "the harbour office opens at nine ",
    "capital words": "THE Harbour ",
    "contractions": "it's ",
    "numbers": "1 22 333 4444 ",
    "Chinese": "漢",
    "Chinese with punctuation": "漢字。",
    "Japanese": "かな",
    "Korean": "가 나",
    "Thai": "เก็บ",
    "Arabic": "عربي",
    "combining marks": "e\u0301",
    "marks alone": "\u0301",
    "emoji": "😀",
    "joined emoji": "👩\u200d💻",
    "markers": "<|end|>",
    "brackets": "[a",
}
#: These write white space in another way, or leave it out.
_NORMALIZED = {"gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace"}
_PROGRAM = """
import sys, threading
from functools import cache
from pathlib import Path
from kvcompose_local.llama_ffi.model import Model

def read():
    for path in sys.argv[1:]:
        model = Model(Path(path), header_only=True)
        piece = cache(model.token_bytes)
        for name, unit in RUNS.items():
            text = "so " + unit * (LENGTH // len(unit)) + " it is"
            print(Path(path).stem, name, flush=True)
            tokens = model.tokenize(text, special=False)
            if Path(path).stem not in NORMALIZED:
                assert b"".join(map(piece, tokens)).decode() == text
        model.close()
    print("done")

threading.stack_size(512 * 1024)  # the smallest that a thread has on macOS
thread = threading.Thread(target=read)
thread.start()
thread.join()
"""


def test_the_names_are_those_of_the_pinned_llama_cpp() -> None:
    archive = cache_folder() / "archives" / read_pin(data_file("patches")).archive_name
    if not archive.is_file():
        pytest.skip("the source of llama.cpp is not in the cache folder")
    with tarfile.open(archive) as tar:
        member = next(m for m in tar if m.name.endswith("vendor/llama.cpp/src/llama-vocab.cpp"))
        source = tar.extractfile(member)
        assert source is not None
        assert set(re.findall(r'tokenizer_pre == "([^"]+)"', source.read().decode())) == set(PRE_TOKENIZERS)


@pytest.mark.parametrize("group", range(4))
def test_long_runs_are_read_by_every_pre_tokenizer(tmp_path: Path, group: int) -> None:
    """A fault in a tokenizer takes the process with it, so they run in one of their own."""
    paths = [write_bpe_vocabulary(tmp_path / f"{pre}.gguf", pre) for pre in PRE_TOKENIZERS[group::4]]
    length = int(os.environ.get("KVCOMPOSE_TEST_RUN", 3 * LONGEST_PART))
    settings = f"RUNS, LENGTH, NORMALIZED = {RUNS!r}, {length}, {_NORMALIZED!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", settings + _PROGRAM, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = done.stdout.splitlines() or ["nothing"]
    assert (done.returncode, lines[-1]) == (0, "done"), f"{lines[-1]}: {done.stderr[-500:]}"


@cache
def merges() -> list[tuple[str, str]]:
    return learned_merges("\n".join(prose())[:20000] + texts()["code"], 150)


def texts() -> dict[str, str]:
    """Texts longer than a part that have places to cut."""
    lines = "\n".join(prose())[:6000]
    return {
        "prose": lines,
        "prose of one line": " ".join(lines.split()),
        "lines": "\n".join(lines.split(". ")),
        "code": "def f(x):\n    return [x's, -1, 22, 3333]\n\n\nclass A:\n\tb = 'c'  # d\n" * 60,
        "a table": "2024,Smith,12.50,/usr/lib\n" * 150,
        "addresses": "see https://example.org/a_b/c.html?q=1&r=22#top and more of it " * 60,
        "Chinese": "港口办公室九点开门。请带上您的文件，谢谢！" * 120,
        "accents": "le garçon naïf était là où l'élève l’a vu, " * 80,
    }


#: Their expressions, or their merges, run over spaces and whole lines: cuts may show.
_ACROSS_WORDS = {"superbpe", "exaone-moe", "bloom", "gpt3-finnish", "poro-chat", "viking", "whitespace"}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_cutting_changes_no_token(tmp_path: Path, pre: str) -> None:
    model = Model(write_bpe_vocabulary(tmp_path / "vocabulary.gguf", pre, merges()), header_only=True)
    changed = []
    for name, text in texts().items():
        whole = model._tokens_of(text, True)
        assert len(parts_of(text)) > 2
        if model.tokenize(text) != whole:
            changed.append(name)
    assert changed == [] or pre in _ACROSS_WORDS


@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "gemma-4", "deepseek-llm", "falcon", "qwen35"])
def test_cutting_changes_no_token_of_a_real_vocabulary(tmp_path: Path, name: str) -> None:
    archive = cache_folder() / "archives" / read_pin(data_file("patches")).archive_name
    if not archive.is_file():
        pytest.skip("the source of llama.cpp is not in the cache folder")
    path = tmp_path / "vocabulary.gguf"
    with tarfile.open(archive) as tar:
        member = tar.extractfile(next(m for m in tar if m.name.endswith(f"/ggml-vocab-{name}.gguf")))
        assert member is not None
        path.write_bytes(member.read())
    model = Model(path, header_only=True)
    unspaced = "港口办公室九点开门。请带上您的文件，谢谢！" * 1000
    for text in (*texts().values(), " ".join(prose())[:40_000], "\n".join(texts().values()), unspaced):
        assert model.tokenize(text) == model._tokens_of(text, True)


def test_sentencepiece_reads_what_it_has_no_pieces_for_in_time(tiny_model: Callable[..., Path]) -> None:
    """llama.cpp copies all tokens once for each that is a byte: 200,000 take it minutes in one part."""
    model = Model(tiny_model(), header_only=True)
    text = "harbour " * 25_000
    started = time.monotonic()
    assert b"".join(map(model.token_bytes, model.tokenize(text))).decode().replace("▁", " ") == text
    assert time.monotonic() - started < 20


def test_parts_are_the_text_and_keep_characters_whole() -> None:
    for unit in RUNS.values():
        text = unit * (5 * LONGEST_PART // len(unit) + 7)
        parts = parts_of(text)
        assert "".join(parts) == text
        assert max(map(len, parts)) <= LONGEST_PART
        assert min(map(len, parts[:-1])) >= LONGEST_PART // 2
    assert parts_of("") == [""]
    assert not any(part[0] == "\u0301" for part in parts_of("e\u0301" * 3000))
    assert not any(part[0] == "\n" for part in parts_of("\r\n" * 3000))


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("around", ["word ", "a", "line\n", "/+"])
def test_no_marker_is_cut(tmp_path: Path, marker: str, around: str) -> None:
    model = Model(write_bpe_vocabulary(tmp_path / "vocabulary.gguf", "qwen2"), header_only=True)
    (token,) = model._tokens_of(marker, True)
    for shift in range(len(marker) + 2):
        text = "x" * shift + (around * 10 + marker) * 300
        assert model.tokenize(text).count(token) == 300
