"""The shapes of models that people run, and what is tried of each.

``python tests/helpers/real_shapes.py NAME [GPU_LAYERS]`` tries one.

Shapes are from the models' own configurations. ``scripts/shapes`` tries all and writes docs/models.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from hybrid_shapes import HYBRIDS
from random_models import N_FF, N_VOCAB, RandomModel, Shape

from kvcompose_local.architectures.trial import BUDGET, Length, chat

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"
_KINDS = {"q8_0/q4_0": "q8_0 keys, q4_0 values"}
LENGTH = Length(n_ctx=512, n_tokens=320, n_compactions=2)
#: Seconds that one shape may take; a GPU's kernels on a CPU take longer (scripts/gpu-tests).
TIME_LIMIT = int(os.environ.get("SHAPE_SECONDS", "300"))


def _narrow(shape: Shape) -> Shape:
    """For architectures whose embeddings are as wide as all heads: heads of 32 numbers, all of which RoPE turns."""
    note = f"heads of {shape.head}"
    if shape.n_rot:
        note += f", {shape.n_rot} of which RoPE turns"
    more = {key: value for key, value in shape.more.items() if "dimension_count" not in key}
    return replace(shape, head=32, n_rot=None, n_embd=32 * shape.n_heads, more=more, note=f"in the model {note}")


def _llama(name: str, *sizes: int) -> Shape:
    return Shape(name, "llama", *sizes)


def _gemma(name: str, arch: str, *sizes: int) -> Shape:
    window = {"attention.sliding_window": 128}
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    q_scale = sizes[-1] ** -0.5 if name.endswith("27B") else 1.0  # llama.cpp goes by the embedding there
    return Shape(name, arch, *sizes, more=window | caps if arch == "gemma2" else window, q_scale=q_scale)


_LONGROPE = {"rope.scaling.original_context_length": 4096, "rope.scaling.attn_factor": 1.19}
_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 16.0, "rope.scaling.original_context_length": 256}
_EXPERTS = {"expert_count": 4, "expert_used_count": 4, "expert_feed_forward_length": 32}  # the choice would be chaotic
#: As many at once make the most tensors of a graph for each that the model has.
_MANY_EXPERTS = _EXPERTS | {"expert_count": 8, "expert_used_count": 8}
_PHI3 = Shape("Phi 3 mini", "phi3", 32, 32, 32, 96, _LONGROPE)
_PHI4 = Shape("Phi 4 mini", "phi3", 32, 24, 8, 128, _LONGROPE, n_rot=96)

SHAPES = (
    _llama("Llama 3.2 1B", 16, 32, 8, 64),
    _llama("Llama 3.2 3B", 28, 24, 8, 128),
    _llama("Llama 3.1 8B, Mistral 7B", 32, 32, 8, 128),
    _llama("Llama 2 7B", 32, 32, 32, 128),
    _llama("Ministral 8B", 36, 32, 8, 128),
    Shape("Ministral 3 8B", "mistral3", 34, 32, 8, 128, _YARN | {"attention.temperature_scale": 0.1}),
    _llama("Falcon 3 7B", 28, 12, 4, 256),
    _llama("SmolLM2 135M", 30, 9, 3, 64),
    _llama("SmolLM2 360M", 32, 15, 5, 64),
    _llama("SmolLM2 1.7B", 24, 32, 32, 64),
    Shape("SmolLM3 3B", "smollm3", 36, 16, 4, 128),
    _narrow(Shape("Qwen2.5 0.5B", "qwen2", 24, 14, 2, 64)),
    _narrow(Shape("Qwen2.5 1.5B", "qwen2", 28, 12, 2, 128)),
    _narrow(Shape("Qwen2.5 3B", "qwen2", 36, 16, 2, 128)),
    _narrow(Shape("Qwen2.5 7B", "qwen2", 28, 28, 4, 128)),
    _narrow(Shape("Qwen2.5 14B", "qwen2", 48, 40, 8, 128)),
    Shape("Qwen3 0.6B, 1.7B", "qwen3", 28, 16, 8, 128),
    Shape("Qwen3 4B, 8B", "qwen3", 36, 32, 8, 128),
    Shape("Qwen3 14B", "qwen3", 40, 40, 8, 128),
    Shape("Qwen3 32B", "qwen3", 64, 64, 8, 128),
    Shape("Qwen3 30B-A3B", "qwen3moe", 48, 32, 4, 128, _EXPERTS),
    _narrow(_PHI3),
    replace(_PHI3, name="Phi 3 mini, 2 layers", n_layers=2, n_embd=32 * 96, note="in the model 32 layers"),
    _narrow(_PHI4),
    replace(_PHI4, name="Phi 4 mini, 2 layers", n_layers=2, n_embd=24 * 128, note="in the model 32 layers"),
    _gemma("Gemma 2 2B", "gemma2", 26, 8, 4, 256),
    _gemma("Gemma 2 9B", "gemma2", 42, 16, 8, 256),
    _gemma("Gemma 2 27B", "gemma2", 46, 32, 16, 128),
    _gemma("Gemma 3 270M", "gemma3", 18, 4, 1, 256),
    _gemma("Gemma 3 1B", "gemma3", 26, 4, 1, 256),
    _gemma("Gemma 3 4B", "gemma3", 34, 8, 4, 256),
    _gemma("Gemma 3 12B", "gemma3", 48, 16, 8, 256),
    _gemma("Gemma 3 27B", "gemma3", 62, 32, 16, 128),
    Shape("gpt-oss-20b", "gpt-oss", 24, 64, 8, 64, _YARN | _EXPERTS | {"attention.sliding_window": 128}, q_scale=0.25),
    _narrow(Shape("EXAONE 4 1.2B", "exaone4", 30, 32, 8, 64)),
    _narrow(Shape("EXAONE 4 32B", "exaone4", 64, 40, 8, 128, {"attention.sliding_window": 128})),
    Shape("GLM 4 9B", "glm4", 40, 32, 2, 128, n_rot=64),
    Shape("Granite 3 2B", "granite", 40, 32, 8, 64, {"logit_scale": 8.0, "attention.scale": 0.015625}),
    Shape("Granite 3 8B", "granite", 40, 32, 8, 128, {"logit_scale": 16.0, "attention.scale": 0.0078125}),
    Shape(
        "Granite 3 1B-A400M",
        "granitemoe",
        24,
        16,
        8,
        64,
        {"logit_scale": 16.0, "attention.scale": 0.0078125} | _MANY_EXPERTS,
    ),
    _narrow(Shape("OLMo 2 1B", "olmo2", 16, 16, 16, 128)),
    _narrow(Shape("OLMo 2 7B", "olmo2", 32, 32, 32, 128)),
    Shape(
        "Llama 3.3 Nemotron Super 49B",
        "deci",
        80,
        64,
        8,
        128,
        {
            "attention.head_count": [64, 64, 0, 64, 0] * 16,
            "attention.head_count_kv": [8, 8, 0, 8, 0] * 16,
            "feed_forward_length": [N_FF] * 80,
        },
        note="which layers have no attention is made up",
    ),
    *HYBRIDS,
)


def run(shape: Shape, gpu_layers: int = 0) -> str:
    """Read under a budget, answer, go back, save and restore; says what was done. Raises EngineError, and more."""
    cells, _ = chat(partial(RandomModel, shape), N_VOCAB, LENGTH, gpu_layers)
    return f"{_KINDS.get(cells, cells)}; compacted, undone, saved and restored"


def try_shape(shape: Shape, gpu_layers: int = 0) -> str:
    """:func:`run` in a process of its own, which an abort may end; says what was done. Raises AssertionError."""
    command = [sys.executable, __file__, shape.name, str(gpu_layers)]
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # as `run` has it: shapes are tried side by side
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIME_LIMIT, cwd=ROOT, check=False, env=env
        )
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{shape.name}: not done after {TIME_LIMIT} s") from None
    if done.returncode != 0:
        raise AssertionError(f"{shape.name}: exit code {done.returncode}\n{done.stdout[-500:]}{done.stderr[-2000:]}")
    return done.stdout.strip()


def page(outcomes: Sequence[str]) -> str:
    """docs/models.md: what was done with each of SHAPES."""
    lines = [
        "# Models whose shapes are tried",
        "",
        "A random model in memory has the layers, query heads, KV heads and head size of each of these, and a tiny",
        f"vocabulary and embedding. It reads {LENGTH.n_tokens} tokens under "
        f"`--ctx {LENGTH.n_ctx} --budget {BUDGET}`, which takes",
        "several compactions, answers, goes back and answers the same, and goes on the same from a saved state.",
        "Windows are of 128 tokens. This tells that a model runs; [results.md](results.md) tells how well one answers.",
        "`scripts/shapes` tries all, and makes this page; the tests try them, too (`tests/engines/test_shapes.py`).",
        "",
        "| model | architecture | layers × heads × KV heads × head size | what ran |",
        "|---|---|---|---|",
    ]
    for shape, outcome in zip(SHAPES, outcomes, strict=True):
        size = f"{shape.n_layers} × {shape.n_heads} × {shape.n_kv_heads} × {shape.head}"
        size += f" ({shape.note})" if shape.note else ""
        lines.append(f"| {shape.name} | {shape.arch} | {size} | {outcome} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(run(next(shape for shape in SHAPES if shape.name == sys.argv[1]), *map(int, sys.argv[2:3])))
