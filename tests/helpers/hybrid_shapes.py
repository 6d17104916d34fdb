"""The shapes of models of which some layers have attention, and some or all a recurrent state.

Attention is as in the models' own configurations; recurrent states have fewer heads, so that they are small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from random_models import N_EMBD, N_FF, Shape, Value

_EXPERTS = {"expert_count": 4, "expert_used_count": 4, "expert_feed_forward_length": 32}  # the choice would be chaotic
#: Gated DeltaNet: two heads of keys and of values.
_DELTA = {
    "ssm.conv_kernel": 4,
    "ssm.state_size": 32,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 2,
    "ssm.inner_size": 64,
    "full_attention_interval": 4,
}
_SHARED = {"expert_shared_feed_forward_length": 32, "expert_shared_count": 1}
#: The sections that IMROPE turns by time, height and width: alike in text.
_SECTIONS = {"rope.dimension_sections": (11, 11, 10, 0)}
_SMALL_SECTIONS = {"rope.dimension_sections": (6, 5, 5, 0)}


def _mamba(n_embd: int = N_EMBD, *, groups: int | None = 1) -> dict[str, Value]:
    """Mamba 2, or Mamba without groups: the inner size is twice the embedding, as some architectures want."""
    more: dict[str, Value] = {
        "ssm.conv_kernel": 4,
        "ssm.state_size": 16,
        "ssm.time_step_rank": 4,
        "ssm.inner_size": 2 * n_embd,
    }
    return more if groups is None else more | {"ssm.group_count": groups}


def _only_at(layers: Sequence[int], n_layers: int, n: int) -> tuple[int, ...]:
    """A number of each layer: ``n`` of some, 0 of the rest."""
    return tuple(n if i in layers else 0 for i in range(n_layers))


def _of_some_layers(shape: Shape, layers: Sequence[int]) -> Shape:
    """``layers`` have attention, the others a recurrent state, as the KV heads of each layer tell."""
    kv_heads = _only_at(layers, shape.n_layers, shape.n_kv_heads)
    note = f"attention in {len(layers)} layers"
    return replace(
        shape,
        more={"attention.head_count_kv": kv_heads, **shape.more},
        note=", ".join(filter(None, (note, shape.note))),
    )


def _nemotron(name: str, arch: str, pattern: str, *sizes: int, **more: Value) -> Shape:
    """pattern: a letter for each layer: M for Mamba, * for attention, anything else for a feed-forward one."""
    n_layers, attention = len(pattern), [i for i, kind in enumerate(pattern) if kind == "*"]
    n_ff = tuple(0 if kind in "M*" else N_FF for kind in pattern)
    own = {"feed_forward_length": n_ff, "attention.layer_norm_epsilon": 1e-5}
    shape = Shape(name, arch, n_layers, *sizes, more=own | _mamba() | more)
    return _of_some_layers(shape, attention)


def _qwen(name: str, arch: str, *sizes: int, **more: Value) -> Shape:
    note = f"attention in {sizes[0] // 4} layers"
    experts = {} if arch == "qwen35" else _EXPERTS | _SHARED
    sections = {} if arch == "qwen3next" else _SECTIONS
    return Shape(name, arch, *sizes, more=_DELTA | experts | sections | more, n_rot=64, note=note)


_NEMOTRON_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
_NEMOTRON_30B = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
_JAMBA = Shape("Jamba Reasoning 3B", "jamba", 28, 20, 1, 32, _mamba(640, groups=None), n_embd=640)
_LFM2_CACHE = {"shortconv.l_cache": 3}
_LFM2_EXPERTS = _EXPERTS | {"leading_dense_block_count": 2, "expert_gating_func": 2}
_NO_ROPE = {"rope.scaling.finetuned": False, "attention.scale": 0.0078125, "logit_scale": 3.0}

HYBRIDS = (
    _qwen("Qwen3-Next 80B-A3B", "qwen3next", 48, 16, 2, 256),
    _of_some_layers(
        Shape("LFM2 1.2B", "lfm2", 16, 32, 8, 32, _LFM2_CACHE, n_embd=1024, note="in the model heads of 64"),
        (2, 5, 8, 10, 12, 14),
    ),
    _of_some_layers(
        Shape(
            "LFM2 8B-A1B",
            "lfm2moe",
            24,
            32,
            8,
            32,
            _LFM2_CACHE | _LFM2_EXPERTS,
            n_embd=1024,
            note="in the model heads of 64",
        ),
        (2, 6, 10, 14, 18, 21),
    ),
    _of_some_layers(
        Shape("Granite 4 H Tiny", "granitehybrid", 40, 12, 4, 128, _mamba() | _NO_ROPE | _EXPERTS | _SHARED),
        (5, 15, 25, 35),
    ),
    _of_some_layers(Shape("Granite 4 H 350M", "granitehybrid", 32, 12, 4, 64, _mamba() | _NO_ROPE), (10, 13, 17, 27)),
    _nemotron("Nemotron Nano 9B v2", "nemotron_h", _NEMOTRON_9B, 40, 8, 128),
    _nemotron("Nemotron 3 Nano 30B-A3B", "nemotron_h_moe", _NEMOTRON_30B, 32, 2, 128, **_EXPERTS, **_SHARED),
    Shape("Falcon-H1 0.5B", "falcon-h1", 36, 8, 2, 64, _mamba(), note="attention and Mamba in all layers"),
    Shape("Falcon-H1 1.5B", "falcon-h1", 24, 8, 2, 128, _mamba(), note="attention and Mamba in all layers"),
    _of_some_layers(replace(_JAMBA, note="in the model heads of 128"), (7, 21)),
    Shape(
        "MiniMax-Text-01",
        "minimax-01",
        8,
        64,
        8,
        128,
        _EXPERTS | {"full_attention_interval": 8, "residual_scale": 3.5},
        n_rot=64,
        note="attention in 1 layer, in the model in 10 of 80",
    ),
    _qwen("Qwen3.5 0.8B", "qwen35", 24, 8, 2, 256),
    _qwen("Qwen3.5 4B, 9B", "qwen35", 32, 16, 4, 256),
    _qwen("Qwen3.6 27B", "qwen35", 64, 24, 4, 256),
    _qwen("Qwen3.6 35B-A3B", "qwen35moe", 40, 16, 2, 256),
)


def _small(arch: str, more: Mapping[str, Value], *, n_layers: int = 7) -> Shape:
    """Three layers with attention, whose heads are of 32."""
    shape = Shape(arch, arch, n_layers, 4, 2, 32, more, n_embd=128)
    return shape if n_layers != 7 else _of_some_layers(shape, (1, 3, 6))


#: One of each architecture, with three layers of attention, for exact tests.
SMALL = {
    shape.arch: shape
    for shape in (
        _small("qwen35", _DELTA | _SMALL_SECTIONS | {"full_attention_interval": 2}, n_layers=6),
        _small("qwen35moe", _DELTA | _EXPERTS | _SHARED | _SMALL_SECTIONS | {"full_attention_interval": 2}, n_layers=6),
        _small("qwen3next", _DELTA | _EXPERTS | _SHARED | {"full_attention_interval": 2}, n_layers=6),
        _small("lfm2", _LFM2_CACHE),
        _small("lfm2moe", _LFM2_CACHE | _LFM2_EXPERTS),
        _small("granitehybrid", _mamba(128) | _NO_ROPE),
        replace(
            _nemotron("nemotron_h", "nemotron_h", "M*-M*-*", 4, 2, 32, **_mamba(128)), name="nemotron_h", n_embd=128
        ),
        _small("falcon-h1", _mamba(128), n_layers=3),
        _small("jamba", _mamba(128, groups=None)),
        _small("plamo2", _mamba(128, groups=0)),
        _small("minimax-01", _EXPERTS | {"full_attention_interval": 2, "residual_scale": 3.5}, n_layers=6),
    )
}
#: The same of sliding windows.
WINDOWS = {
    "gemma3": Shape("gemma3", "gemma3", 6, 4, 2, 32, {"attention.sliding_window": 64}),
    "gpt-oss": Shape(
        "gpt-oss",
        "gpt-oss",
        4,
        4,
        2,
        32,
        {"attention.sliding_window": 64, "expert_count": 4, "expert_used_count": 4, "expert_feed_forward_length": 32},
        q_scale=0.25,
    ),
}
