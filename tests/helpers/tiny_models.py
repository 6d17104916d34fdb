"""Random F32 GGUF models of a few layers, one of each architecture the engines claim: exact tests in milliseconds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from kvcompose_local.composing.attention import AttentionMax
from kvcompose_local.interfaces import Engine

N_EMBD, N_FF, HEAD = 128, 96, 32
#: Byte-level vocabulary: three specials, then the 256 bytes.
N_VOCAB = 3 + 256
ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")
SLIDING = ("gemma2", "gemma3")
TEMPLATE = (  # the tests know it by heart
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_tiny_model(
    path: Path,
    arch: str = "llama",
    *,
    n_layers: int = 3,
    n_heads: int | tuple[int, ...] = 4,
    n_kv_heads: int | tuple[int, ...] = 2,
    head: int = HEAD,
    n_ctx: int = 4096,
    seed: int = 0,
    template: str | None = TEMPLATE,
    sliding_window: int = 64,
    longrope: int | None = None,
    name: str = "Tiny random",  # llama.cpp reads meaning into names such as phi3
) -> Path:
    """Write a model whose attention is peaked enough to tell cells apart; ``head`` values a head.

    n_heads, n_kv_heads: of all layers, or of each where the architecture (deci, openelm) allows that; longrope:
    positions that the short ones of two sets of RoPE factors are for.
    """
    all_heads, all_kv_heads = (
        list(n) if isinstance(n, tuple) else [0 if arch == "mamba" else n] * n_layers for n in (n_heads, n_kv_heads)
    )
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name(name)
    writer.add_context_length(n_ctx)
    _write_sizes(writer, arch, all_heads, all_kv_heads, head, by_layer=isinstance(n_heads, tuple))
    if arch in SLIDING:
        writer.add_sliding_window(sliding_window)
    if longrope:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(longrope)
        writer.add_tensor("rope_factors_long.weight", np.linspace(1, 40, head // 2, dtype=np.float32))
        writer.add_tensor("rope_factors_short.weight", np.ones(head // 2, np.float32))
    _write_vocabulary(writer, template)
    tensors = _Tensors(writer, np.random.default_rng(seed))
    tensors.matrix("token_embd.weight", N_VOCAB, N_EMBD, scale=1.0)
    tensors.norm("output_norm.weight")
    if arch not in (*SLIDING, "openelm"):
        tensors.matrix("output.weight", N_VOCAB, N_EMBD)
    for i in range(n_layers):
        if arch == "mamba":
            tensors.mamba_block(f"blk.{i}.")
        else:
            tensors.block(f"blk.{i}.", arch, all_heads[i], all_kv_heads[i], head)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_sizes(
    writer: gguf.GGUFWriter, arch: str, heads: list[int], kv_heads: list[int], head: int, *, by_layer: bool
) -> None:
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(len(heads))
    if arch == "mamba":
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * N_EMBD)
        writer.add_ssm_state_size(16)
        writer.add_ssm_time_step_rank(4)
    else:
        writer.add_key_length(head)
        writer.add_value_length(head)
    writer.add_feed_forward_length([N_FF] * len(heads) if by_layer else N_FF if any(heads) else 0)
    writer.add_head_count(heads if by_layer else heads[0])
    writer.add_head_count_kv(kv_heads if by_layer else kv_heads[0])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(N_VOCAB)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)


def _write_vocabulary(writer: gguf.GGUFWriter, template: str | None) -> None:
    """Bytes, and three tokens more."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>"] + [f"<0x{i:02X}>".encode() for i in range(256)])
    writer.add_token_scores([0.0] * N_VOCAB)
    kind = gguf.TokenType
    writer.add_token_types([kind.UNKNOWN, kind.CONTROL, kind.CONTROL] + [kind.BYTE] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    if template is not None:
        writer.add_chat_template(template)


class _Tensors:
    """Writes random tensors; their numbers depend on the order in which they are drawn."""

    def __init__(self, writer: gguf.GGUFWriter, rng: np.random.Generator) -> None:
        self._writer, self._rng = writer, rng

    def matrix(self, name: str, *shape: int, scale: float | None = None) -> None:
        scale = 1.0 / np.sqrt(shape[-1]) if scale is None else scale
        self._writer.add_tensor(name, (self._rng.standard_normal(shape) * scale).astype(np.float32))

    def norm(self, name: str, n: int = N_EMBD) -> None:
        self._writer.add_tensor(name, (1 + 0.1 * self._rng.standard_normal(n)).astype(np.float32))

    def mamba_block(self, block: str) -> None:
        self.norm(block + "attn_norm.weight")
        self.matrix(block + "ssm_in.weight", 4 * N_EMBD, N_EMBD)
        self.matrix(block + "ssm_conv1d.weight", 2 * N_EMBD, 4)
        self.norm(block + "ssm_conv1d.bias", 2 * N_EMBD)
        self.matrix(block + "ssm_x.weight", 4 + 2 * 16, 2 * N_EMBD)
        self.matrix(block + "ssm_dt.weight", 2 * N_EMBD, 4)
        self.norm(block + "ssm_dt.bias", 2 * N_EMBD)
        self._writer.add_tensor(block + "ssm_a", -np.ones((2 * N_EMBD, 16), np.float32))
        self.norm(block + "ssm_d", 2 * N_EMBD)
        self.matrix(block + "ssm_out.weight", N_EMBD, 2 * N_EMBD)

    def block(self, block: str, arch: str, n_heads: int, n_kv_heads: int, head: int) -> None:
        sharp, n_q, n_kv = 2.0 / np.sqrt(N_EMBD), n_heads * head, n_kv_heads * head
        if n_q:
            self.norm(block + "attn_norm.weight")
        if arch in ("phi3", "openelm"):
            self.matrix(block + "attn_qkv.weight", n_q + 2 * n_kv, N_EMBD, scale=sharp)
        elif n_kv:
            self.matrix(block + "attn_q.weight", n_q, N_EMBD, scale=sharp)
            self.matrix(block + "attn_k.weight", n_kv, N_EMBD, scale=sharp)
            self.matrix(block + "attn_v.weight", n_kv, N_EMBD)
        if arch == "qwen2":
            for name, n in (("q", n_q), ("k", n_kv), ("v", n_kv)):
                self.matrix(block + f"attn_{name}.bias", n, scale=0.1)
        if arch in ("qwen3", "gemma3", "openelm"):
            self.norm(block + "attn_q_norm.weight", head)
            self.norm(block + "attn_k_norm.weight", head)
        if n_q:
            self.matrix(block + "attn_output.weight", N_EMBD, n_q if n_kv else N_EMBD)
        self.norm(block + "ffn_norm.weight")
        if arch in SLIDING:
            self.norm(block + "post_attention_norm.weight")
            self.norm(block + "post_ffw_norm.weight")
        if arch == "phi3":
            self.matrix(block + "ffn_up.weight", 2 * N_FF, N_EMBD)
        else:
            self.matrix(block + "ffn_gate.weight", N_FF, N_EMBD)
            self.matrix(block + "ffn_up.weight", N_FF, N_EMBD)
        self.matrix(block + "ffn_down.weight", N_EMBD, N_FF)


def split_model(path: Path, folder: Path, n: int, *, name: str = "tiny", first_empty: bool = False) -> list[Path]:
    """The model of a file as ``n`` files, as llama-gguf-split writes them; ``first_empty``: a first one of no tensors.

    Only the first has the header's values, and the numbers of the files stand behind them.
    """
    reader = gguf.GGUFReader(path)
    tensors = list(reader.tensors)
    n_full = n - first_empty
    edges = [0] * first_empty + [len(tensors) * i // n_full for i in range(n_full + 1)]
    groups = [tensors[begin:end] for begin, end in itertools.pairwise(edges)]
    paths = [folder / f"{name}-{i + 1:05d}-of-{n:05d}.gguf" for i in range(n)]
    for i, (group, shard) in enumerate(zip(groups, paths, strict=True)):
        writer = gguf.GGUFWriter(str(shard), reader.fields["general.architecture"].contents())
        for field in reader.fields.values() if i == 0 else ():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", n)
        writer.add_int32("split.tensors.count", len(tensors))
        for tensor in group:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def replayed(engine: Engine, tokens: Sequence[int]) -> list[np.ndarray]:
    """What :meth:`Engine.replay` shows, for each layer float32 (Q, n_live)."""
    layers = engine.shape.layers
    seen = AttentionMax(len(layers), [layer.n_heads for layer in layers])
    engine.replay(tokens, seen)
    return seen.result()
