"""Metadata of a tiny model of each architecture of llama.cpp.

llama.cpp makes a model from metadata alone and reads only the keys that the architecture knows, so that all can be made
from one list of keys and a few of their own. What an architecture insists on is from llama.cpp's own test of them all
(``tests/test-llama-archs.cpp``). Sizes are as small as the kernels of attention allow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from kvcompose_local.interfaces import FloatArray, Progress
from kvcompose_local.llama_ffi.random_models import RandomModel, Value, random_weights

N_VOCAB, N_CTX, WINDOW = 128, 1024, 32
_N_EMBD, _N_HEADS, _N_FF, _N_LAYERS = 256, 2, 384, 4

#: Architectures that llama.cpp's test does not make, and why: the words of its comments, shortened.
NOT_MADE: Mapping[str, str] = {
    "clip": "it reads images",
    "gptj": "llama.cpp only knows its name",
    "plm": "no shapes of it are known to run",
    "rwkv6qwen2": "no shapes of it are known to run",
    "graniteswitch": "it needs adapters",
    "chameleon": "llama.cpp has half of it",
    "wavtokenizer-dec": "it makes sound",
    "gemma4-assistant": "it drafts for a Gemma 4",
    "eagle3": "it drafts for another model",
    "dflash": "it drafts for another model",
}

#: One latent row a layer: its numbers, the rope's at the end, and the width of the values in it.
_MLA: Mapping[str, Value] = {
    "embedding_length": 128,
    "attention.head_count": 1,
    "attention.head_count_kv": 1,
    "feed_forward_length": 192,
    "attention.key_length": 576,
    "attention.value_length": 512,
    "attention.key_length_mla": 192,
    "attention.value_length_mla": 128,
    "rope.dimension_count": 64,
}
_EXPERTS: Mapping[str, Value] = {
    "expert_feed_forward_length": _N_FF,
    "expert_shared_feed_forward_length": _N_FF // 2,
    "expert_latent_length": _N_FF,
    "interleave_moe_layer_step": 2,
    "expert_count": 2,
    "expert_used_count": 2,
    "expert_shared_count": 1,
    "expert_gating_func": 2,
    "expert_group_scale": 1.0,
    "experts_per_group": 1,
}
#: Architectures without experts, or that can do without. All others get experts, and ignore them if they know none.
_DENSE = frozenset(
    """llama minicpm granite mistral3 refact granite_swa spark2_5 muse-glimmer hunyuan-dense hunyuan_vl gemma3 gemma3n
    gemma4 qwen35 lfm2 nemotron_h jamba plamo2 falcon-h1 nanbeige""".split()
)

#: Every other layer has a window.
_ALTERNATING = [0, 1] * (_N_LAYERS // 2)
#: Every other layer is recurrent.
_HYBRID_HEADS: Mapping[str, Value] = {
    "attention.head_count": [_N_HEADS, 0] * (_N_LAYERS // 2),
    "attention.head_count_kv": [_N_HEADS, 0] * (_N_LAYERS // 2),
}
_MLA_HYBRID: Mapping[str, Value] = {
    **_MLA,
    "attention.head_count": [1, 0] * (_N_LAYERS // 2),
    "attention.head_count_kv": [1, 0] * (_N_LAYERS // 2),
}
_N_PLE_HEADS, _PLE_NGRAM = 4, 3
#: Of qwen4exp and glm5-next.
_HYPER: Mapping[str, Value] = {
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 2,
    "hyper_connection.epsilon": 1e-6,
    "hyper_connection.low_rank": 8,
    "attention.compress_ratios": [4] * _N_LAYERS,
}

#: What an architecture has of its own; of two keys the later one counts.
_OWN: Mapping[str, Mapping[str, Value]] = {
    "gemma3n": {  # 20 layers have cells, and layer 24 is the first with full attention to read another's
        "embedding_length": 64,
        "attention.head_count": 1,
        "attention.head_count_kv": 1,
        "feed_forward_length": 96,
        "block_count": 25,
    },
    "gemma4": {
        "embedding_length": 128,
        "feed_forward_length": 192,
        "block_count": 6,
        "embedding_length_per_layer_input": 64,
        "attention.shared_kv_layers": 2,
        "attention.key_length_swa": 64,
        "attention.value_length_swa": 64,
        "rope.dimension_count": 64,
        "rope.dimension_count_swa": 64,
        "rope.freq_base_swa": 10000.0,
        "attention.sliding_window_pattern": [1, 0, 1, 0, 1, 0],
    },
    "step35": {"attention.sliding_window_pattern": _ALTERNATING},
    "llama-embed": {"attention.causal": False},
    "minicpm3": {"rope.dimension_count": 64},
    "qwen3": {"attention.head_count": 4, "attention.head_count_kv": 1},
    "deci": {  # a layer without attention, and one whose attention is a matrix
        "block_count": 4,
        "attention.head_count": [_N_HEADS, 0, _N_HEADS, _N_HEADS],
        "attention.head_count_kv": [_N_HEADS, 0, 0, _N_HEADS],
    },
    "muse-glimmer": {"attention.head_count": 4, "attention.sliding_window_pattern": _ALTERNATING},
    "afmoe": {"attention.head_count": 4},
    "hrm_text": {"block_count": 6, "hrm.layers_per_stack": 1, "hrm.h_cycles": 2, "hrm.l_cycles": 2},
    "qwen3tts": {"vocab_size": 3072},
    "minimax-m3": {"rope.dimension_count": 64, "attention.indexer.head_count": _N_HEADS},
    "maple": {"swiglu_clamp_exp": 7.0, "attention.sliding_window_pattern": _ALTERNATING},
    **{arch: {"attention.sliding_window_pattern": _ALTERNATING} for arch in ("cohere2moe", "mimo2", "spark2_5")},
    "granite_swa": {"attention.sliding_window_pattern": _ALTERNATING},
    "deepseek4": {
        "embedding_length": 512,
        "attention.head_count": 8,
        "attention.head_count_kv": 1,
        "feed_forward_length": 1024,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "rope.dimension_count": 32,
        "attention.q_lora_rank": 64,
        "attention.output_group_count": 8,
        "attention.output_lora_rank": 32,
        "attention.compress_ratios": [0, 0, 4, 128],
        "attention.compress_rope_freq_base": 160000.0,
        "hyper_connection.count": 4,
        "hyper_connection.sinkhorn_iterations": 2,
        "hyper_connection.epsilon": 1e-6,
        "hash_layer_count": 0,
        "swiglu_clamp_exp": 10.0,
        "expert_weights_scale": 1.0,
        "expert_weights_norm": True,
        "expert_gating_func": 4,
    },
    **dict.fromkeys(("deepseek2", "deepseek32", "glm-dsa", "mistral4"), _MLA),
    "dots3note": {
        **_MLA,
        "attention.sliding_window_pattern": _ALTERNATING,
        "attention.kv_lora_rank_swa": 512,
        "attention.key_length_swa": 576,
        "attention.value_length_swa": 512,
        "attention.key_length_mla_swa": 192,
        "attention.value_length_mla_swa": 128,
        "rope.freq_base_swa": 10000.0,
        "attention.indexer.types": [1, 0] * (_N_LAYERS // 2),
    },
    "hy_v4": {
        **_MLA,
        "hyper_connection.count": 4,
        "hyper_connection.epsilon": 1e-6,
        "hyper_connection.magnitude": 2.0,
        "swiglu_clamp_exp": 10.0,
        "expert_weights_scale": 1.0,
        "expert_weights_norm": True,
        "attention.indexer.types": [1, 0] * (_N_LAYERS // 2),
    },
    **dict.fromkeys(("plamo2", "jamba", "granitehybrid", "lfm2moe"), _HYBRID_HEADS),
    "lfm2": {**_HYBRID_HEADS, "attention.sliding_window": 0},  # windows would leave no layer with full attention
    **{arch: {**_HYBRID_HEADS, "feed_forward_length": [0, 0, 0, _N_FF]} for arch in ("nemotron_h", "nemotron_h_moe")},
    **{arch: {"ssm.inner_size": 256} for arch in ("qwen3next", "qwen35", "qwen35moe")},
    "qwen4exp": {
        **_HYPER,
        "ssm.inner_size": 256,
        "attention.indexer.key_length": _N_EMBD // _N_HEADS,
        "ple.layers": [0],
        "ple.ngram_size": _PLE_NGRAM,
        "ple.heads_per_ngram": _N_PLE_HEADS // (_PLE_NGRAM - 1),
        "ple.conv_kernel": 4,
        "ple.eos_token_id": 0,
        "embedding_length_per_layer_input": _N_EMBD // _N_PLE_HEADS,
        "ple.layer_multipliers": np.array([1, 3, 5], np.uint64),
        "ple.head_offsets": np.arange(_N_PLE_HEADS, dtype=np.uint64) * np.uint64(N_VOCAB),
        "ple.head_vocab_sizes": np.full(_N_PLE_HEADS, N_VOCAB, np.uint64),
    },
    "kimi-linear": _MLA_HYBRID,
    "kimi-k3": _MLA_HYBRID,
    "bailingmoe3": {
        **_MLA_HYBRID,
        "rope.dimension_sections": [8, 12, 12, 0],
        "swiglu_clamp_exp": [0.0] + [4.0] * (_N_LAYERS - 1),
        "swiglu_clamp_shexp": [0.0] + [5.0] * (_N_LAYERS - 1),
    },
    "glm5-next": {
        **_MLA,
        **_HYPER,
        "attention.head_count_kv": [1, 0] * (_N_LAYERS // 2),
        "attention.key_length": 512,
        "rope.dimension_count": 0,
    },
}


#: Architectures whose queries are made smaller, since so many layers make a model chaotic.
_SMALL_QUERIES = frozenset({"gemma3n"})


def weights(arch: str) -> Callable[[str, int, int], FloatArray]:
    """Random weights for a tensor: by its name, the number of its values, and of the values in a row."""

    def of_tensor(name: str, n: int, n_columns: int) -> FloatArray:
        small = arch in _SMALL_QUERIES and "attn_q" in name
        return np.asarray(random_weights(name, n, n_columns) * np.float32(0.25 if small else 1))

    return of_tensor


def metadata(arch: str) -> dict[str, Value]:
    """GGUF keys and values of a tiny model of an architecture."""
    own = _OWN.get(arch, {})
    n_embd, n_heads = own.get("embedding_length", _N_EMBD), own.get("attention.head_count", _N_HEADS)
    n_vocab = own.get("vocab_size", N_VOCAB)
    head = int(str(n_embd)) // (n_heads if isinstance(n_heads, int) else _N_HEADS)
    keys: dict[str, Value] = {
        "vocab_size": N_VOCAB,
        "context_length": N_CTX,
        "embedding_length": _N_EMBD,
        "features_length": n_embd,
        "block_count": _N_LAYERS,
        "leading_dense_block_count": 1,
        "feed_forward_length": _N_FF,
        "use_parallel_residual": False,
        "logit_scale": 1.0,
        "time_mix_extra_dim": 64,
        "time_decay_extra_dim": 128,
        "full_attention_interval": 2,
        "attention.head_count": _N_HEADS,
        "attention.head_count_kv": _N_HEADS,
        "attention.max_alibi_bias": 8.0,
        "attention.clamp_kqv": 1.0,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.group_norm_epsilon": 1e-5,
        "attention.group_norm_groups": 8,
        "attention.q_lora_rank": 512,
        "attention.kv_lora_rank": 512,
        "attention.relative_buckets_count": 8,
        "attention.sliding_window": WINDOW,
        "attention.sliding_window_pattern": 2,
        "attention.indexer.head_count": 64,
        "attention.indexer.key_length": 128,
        "attention.indexer.top_k": 131072,
        "attention.indexer.block_size": 4,
        "attention.indexer.kpool": 4,
        "attention.indexer.kpool_select_tail": True,
        "attention.indexer.local_blocks": 1,
        "rope.dimension_sections": [head // 8, head // 8 + 2, head // 4 - 2, 0],  # of the pairs, as real ones
        "posnet.embedding_length": n_embd,
        "posnet.block_count": _N_LAYERS,
        "convnext.embedding_length": n_embd,
        "convnext.block_count": _N_LAYERS,
        "ssm.inner_size": 2 * int(str(n_embd)),
        "ssm.conv_kernel": 4,
        "ssm.state_size": 128,
        "ssm.time_step_rank": n_heads if isinstance(n_heads, int) else _N_HEADS,
        "ssm.group_count": 0 if arch == "plamo2" else 2,
        "kda.head_dim": 128,
        "kda.safe_gate": True,
        "kda.gate_lower_bound": -5.0,
        "wkv.head_size": head,
        "token_shift_count": 1 if arch in ("rwkv6qwen2", "arwkv7") else 2,
        **{f"attention.{part}_lora_rank": 32 for part in ("decay", "iclr", "value_residual_mix", "gate")},
        "shortconv.l_cache": 3,
        "residual_scale": 3.5565588200778455,
        "attn_res.block_size": 12,
        "activation.situ_beta": 4.0,
        "activation.situ_linear_beta": 25.0,
        **({} if arch in _DENSE else _EXPERTS),
        **own,
    }
    return {
        "general.architecture": arch,
        "general.name": "Tiny random",  # llama.cpp reads meaning into names such as phi3
        **{f"{arch}.{key}": value for key, value in keys.items()},
        **{f"xielu.{key}": 1.0 for key in ("alpha_n", "alpha_p", "beta")},
        "xielu.eps": 1e-7,
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.model": "test",
        "tokenizer.ggml.tokens": [f"tok_{i}" for i in range(int(str(n_vocab)))],
        "tokenizer.ggml.scores": [0.0] * int(str(n_vocab)),
    }


def tiny(arch: str, *, gpu_layers: int = 0, progress: Progress | None = None) -> RandomModel:
    """The model. Raises ModelError where llama.cpp refuses it."""
    return RandomModel(metadata(arch), weights=weights(arch), gpu_layers=gpu_layers, progress=progress)
