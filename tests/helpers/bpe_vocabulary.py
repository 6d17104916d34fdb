"""GGUF headers with a byte-level BPE vocabulary, whose words are split as any of llama.cpp's pre-tokenizers does."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import gguf

MARKERS = ("<|end|>", "[/INST]", "<|a marker|>")


def byte_signs() -> list[str]:
    """The character that stands for each byte in such a vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(256 + others.index(byte)) if byte in others else chr(byte) for byte in range(256)]


def learned_merges(text: str, n: int) -> list[tuple[str, str]]:
    """The ``n`` merges that byte-pair encoding learns of a text's words, each with the white space before it."""
    signs = byte_signs()
    words = Counter(
        tuple(signs[byte] for byte in word.encode()) for word in re.findall(r"\s+|\s?\w+|[^\w\s]+\n*", text)
    )
    merges = []
    for _ in range(n):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        merged: Counter[tuple[str, ...]] = Counter()
        for word, count in words.items():
            symbols, i = [], 0
            while i < len(word):
                take = 2 if word[i : i + 2] == best else 1
                symbols.append("".join(word[i : i + take]))
                i += take
            merged[tuple(symbols)] += count
        words = merged
    return merges


def write_bpe_vocabulary(path: Path, pre: str, merges: list[tuple[str, str]] | None = None) -> Path:
    """A header with the bytes, what ``merges`` make of them (default ``aa``), and :data:`MARKERS`."""
    merges = [("a", "a")] if merges is None else merges
    tokens = list(dict.fromkeys([*byte_signs(), *map("".join, merges)]))
    writer = _header(path)
    writer.add_tokenizer_model("whitespace" if pre == "whitespace" else "gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *MARKERS])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * len(MARKERS))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(len(tokens))
    return _written(writer)


def write_no_vocabulary(path: Path) -> Path:
    """A header whose model has no tokens."""
    writer = _header(path)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(8)
    return _written(writer)


def _header(path: Path) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    return writer


def _written(writer: gguf.GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Path(writer.path)
