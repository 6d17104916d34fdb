"""A GGUF model that says one thing: each token is followed by the one that was written after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
from tiny_models import TEMPLATE

N_EMBD, HEAD = 128, 32


def write_scripted_model(
    path: Path,
    pieces: Sequence[str],
    *,
    name: str = "Scripted",
    template: str = TEMPLATE,
    last: str = "]",
    kinds: Mapping[str, gguf.TokenType] | None = None,
) -> Path:
    """A model that answers with ``pieces``, each a token of its own, and ends its turn.

    Attention and feed-forward add nothing, so what comes next depends on the last token alone: the pieces differ, and
    are longer than a character. last: the last token of a prompt, a character or one of ``kinds``, which tells of
    pieces and of more tokens that they are no plain text, but markers.
    """
    kinds = kinds or {}
    specials = [b"<unk>", b"<s>", b"</s>"]
    texts = [*pieces, *(text for text in kinds if text not in pieces)]
    tokens = [*specials, *(f"<0x{byte:02X}>".encode() for byte in range(256)), *(text.encode() for text in texts)]
    n_before = len(specials) + 256
    first = n_before + texts.index(last) if last in texts else len(specials) + ord(last)
    chain, end = [first, *range(n_before, n_before + len(pieces)), 2], 2
    rng = np.random.default_rng(0)
    embedding = rng.choice([-1.0, 1.0], size=(len(tokens), N_EMBD)).astype(np.float32)
    output = np.zeros_like(embedding)
    output[end] = 0.01 * embedding.sum(axis=0)
    for before, after in pairwise(chain):
        output[after] += embedding[before]
    kind = gguf.TokenType
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name(name)
    writer.add_context_length(4096)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HEAD)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    of_texts = [kinds.get(text, kind.NORMAL) for text in texts]
    writer.add_token_types([kind.UNKNOWN, kind.CONTROL, kind.CONTROL] + [kind.BYTE] * 256 + of_texts)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(template)
    shapes = {
        "attn_q": (2 * HEAD, N_EMBD),
        "attn_k": (2 * HEAD, N_EMBD),
        "attn_v": (2 * HEAD, N_EMBD),
        "ffn_gate": (HEAD, N_EMBD),
        "ffn_up": (HEAD, N_EMBD),
    }
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output.weight", output)
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{norm}.weight", np.ones(N_EMBD, np.float32))
    for part, shape in shapes.items():
        writer.add_tensor(f"blk.0.{part}.weight", rng.standard_normal(shape).astype(np.float32) * np.float32(0.1))
    writer.add_tensor("blk.0.attn_output.weight", np.zeros((N_EMBD, 2 * HEAD), np.float32))
    writer.add_tensor("blk.0.ffn_down.weight", np.zeros((N_EMBD, HEAD), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
