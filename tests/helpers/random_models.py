"""Random models in memory, of the layers, heads and head sizes of real ones: llama.cpp makes them from metadata alone.

What is not attention is tiny: a vocabulary of 260, embeddings of 32 numbers where the architecture lets heads be wider.
They have every tensor that the architecture may have, so that llama.cpp bounds their graphs less tightly than those of
a file, which has fewer: test_shapes.py has files, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from tiny_models import TEMPLATE

from kvcompose_local.interfaces import FloatArray, Progress
from kvcompose_local.llama_ffi import random_models
from kvcompose_local.llama_ffi.random_models import Value, random_weights

N_VOCAB, N_EMBD, N_FF = 260, 32, 32


_NUMBERS: dict[str, Value] = {
    "tokenizer.ggml.model": "test",
    "tokenizer.ggml.tokens": [f"tok_{i}" for i in range(N_VOCAB)],
}
_SPECIALS = ["<unk>", "<s>", "<pad>", "<end>"]
BYTES: dict[str, Value] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [*_SPECIALS, *(f"<0x{i:02X}>" for i in range(256))],
    "tokenizer.ggml.scores": [0.0] * N_VOCAB,
    "tokenizer.ggml.token_type": [2, 3, 3, 3] + [6] * 256,  # unknown, control, byte
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.chat_template": TEMPLATE,
}


@dataclass(frozen=True)
class Shape:
    """A model's attention: layers, query heads, KV heads, numbers of a head; ``more`` are the architecture's own keys.

    n_rot: numbers of a head that RoPE turns; n_embd: what the architecture wants, if not any size will do; q_scale: of
    the queries, where random ones would make the model chaotic; note: what is not as in the model; speaks: bytes as
    tokens and a chat template.
    """

    name: str
    arch: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head: int
    more: Mapping[str, Value] = field(default_factory=dict)
    n_rot: int | None = None
    n_embd: int = N_EMBD
    q_scale: float = 1.0
    note: str = ""
    speaks: bool = False

    def metadata(self) -> dict[str, Value]:
        """GGUF keys and values."""
        own: dict[str, Value] = {
            "vocab_size": N_VOCAB,
            "context_length": 4096,
            "embedding_length": self.n_embd,
            "block_count": self.n_layers,
            "feed_forward_length": N_FF,
            "attention.head_count": self.n_heads,
            "attention.head_count_kv": self.n_kv_heads,
            "attention.key_length": self.head,
            "attention.value_length": self.head,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": self.n_rot or self.head,
            "rope.freq_base": 10000.0,
            **self.more,
        }
        return {
            "general.architecture": self.arch,
            "general.name": self.name,
            **{f"{self.arch}.{key}": value for key, value in own.items()},
            **(BYTES if self.speaks else _NUMBERS),
        }


class RandomModel(random_models.RandomModel):
    """A model of a :class:`Shape`. Raises ModelError where llama.cpp refuses the metadata."""

    def __init__(self, shape: Shape, *, gpu_layers: int = 0, progress: Progress | None = None) -> None:
        def weights(name: str, n: int, n_columns: int) -> FloatArray:
            return random_weights(name, n, n_columns) * np.float32(shape.q_scale if "attn_q" in name else 1)

        super().__init__(shape.metadata(), weights=weights, gpu_layers=gpu_layers, progress=progress)
