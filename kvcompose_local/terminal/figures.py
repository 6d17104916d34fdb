"""The figures of a chat, for programs (``--json``) and for people (``/stats``, the greeting)."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvcompose_local.chat.checkpoints import most_of
from kvcompose_local.chat.reasoning import shown
from kvcompose_local.chat.remembered import remembered

if TYPE_CHECKING:
    from kvcompose_local.chat import Chat
    from kvcompose_local.chat.memory import CacheMemory

MIB = 2**20


def peak_rss_bytes() -> int:
    """The most resident memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def last_exchange(chat: Chat) -> str:
    """What was asked and answered last, a line each, shortened to 72 characters."""
    told = [message for message in chat.messages if message["role"] in ("user", "assistant")][-2:]
    lines = [
        f"{'> ' if message['role'] == 'user' else ''}{' '.join(message['content'].split())}"
        for message in told
        if message["content"].strip()
    ]
    return "\n".join(line if len(line) <= 72 else f"{line[:71]}…" for line in lines)


def left(chat: Chat, width: int) -> str:
    """What of each part of the conversation the cache still holds, a line each; empty where nothing was dropped."""
    parts = remembered(chat, n_shown=max(width - 24, 8))
    if all(part.kept == 1 for part in parts):
        return ""
    lines = [f"{part.kept:4.0%} {part.n_tokens:>7} {part.kind:<8} {part.text}"[:width] for part in parts]
    return "\n".join(["what is left of what was read, its tokens, and how it begins:", *lines])


def result(chat: Chat, *, since: int = 0, hides_thinking: bool = False) -> dict[str, Any]:
    """What ``--json`` prints: the answers, counts over all turns, and the cache's measured size.

    since: answers of earlier, which are left out.
    """
    memory, turns = chat.memory, chat.turns
    engine = memory.engine
    layout = engine.layout()
    prefill = sum(turn.prefill_seconds for turn in turns)
    decode = sum(turn.decode_seconds for turn in turns)
    prompt_tokens = sum(turn.prompt_tokens for turn in turns)
    generated = sum(turn.generated_tokens for turn in turns)
    said = [message for message in chat.messages if message["role"] == "assistant"][since:]
    reasoning = ["" if hides_thinking else message.get("reasoning", "") for message in said]
    answers = [shown(thought, message["content"]) for thought, message in zip(reasoning, said, strict=True)]
    return {
        "text": answers[-1] if answers else "",
        "answer": said[-1]["content"] if said else "",
        "reasoning": reasoning[-1] if said else "",
        "answers": answers,
        "stopped": turns[-1].stopped if turns else "",
        "prompt_tokens": prompt_tokens,
        "reread_tokens": sum(turn.reread_tokens for turn in turns),
        "generated_tokens": generated,
        "positions": layout.position,
        "kv_bytes": engine.cache_bytes,
        "kv_bytes_used": memory.used_bytes,
        "state_bytes": engine.state_bytes,
        "checkpoint_bytes": memory.checkpoints.n_bytes,
        "kv_bytes_full": memory.n_ctx * engine.shape.uncompressed_row_bytes,
        "compute_bytes": engine.compute_bytes,
        "layer_cells": [composed + layout.n_live for composed in layout.composed],
        "remembered": [{**asdict(part), "kept": round(part.kept, 4)} for part in remembered(chat)],
        "compactions": len(memory.reports),
        "prefill_tokens_per_second": round(prompt_tokens / prefill, 2) if prefill else 0.0,
        "decode_tokens_per_second": round(generated / decode, 2) if decode else 0.0,
        "compaction_seconds": round(sum(report.seconds for report in memory.reports), 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "engine": engine.name,
        "model": engine.shape.name,
    }


def beside(memory: CacheMemory) -> str:
    """The memory that a cache takes beside its cells and beside any budget; empty where there is none."""
    n_bytes, kept = memory.engine.state_bytes, memory.checkpoints
    if not n_bytes:
        return ""
    return (
        f"beside the budget: {n_bytes / MIB:.1f} MiB of recurrent states or sliding windows, "
        f"{kept.n_bytes / MIB:.1f} MiB of copies of them to go back to "
        f"({len(kept.positions)} of at most {most_of(n_bytes)})"
    )


def greeting(chat: Chat, hint: str = "") -> str:
    """What the REPL says first; hint: one more line, of the model."""
    memory = chat.memory
    engine = memory.engine
    lines = [
        f"{engine.shape.name}: {memory.n_ctx} positions in {engine.cache_bytes / MIB:.1f} MiB of cache "
        f"(uncompressed: {memory.n_ctx * engine.shape.uncompressed_row_bytes / MIB:.1f} MiB), {engine.name} engine",
        beside(memory),
        hint,
        "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.",
    ]
    return "\n".join(line for line in lines if line)


def describe(chat: Chat) -> str:
    """The chat's numbers for people."""
    memory = chat.memory
    engine = memory.engine
    layout = engine.layout()
    full = memory.n_ctx * engine.shape.uncompressed_row_bytes
    numbers = result(chat)
    lines = [
        f"{engine.shape.name} ({engine.shape.architecture}), engine {engine.name}",
        f"positions: {layout.position} of {memory.n_ctx} used",
        f"cache: {memory.used_bytes / MIB:.1f} MiB in use of {engine.cache_bytes / MIB:.1f} MiB; "
        f"uncompressed it would take {full / MIB:.1f} MiB",
        *filter(None, [beside(memory)]),
    ]
    if layout.position:
        low, high = min(layout.composed), max(layout.composed)
        composed = f"{low}" if low == high else f"{low}–{high}"
        n_bytes = engine.compute_bytes
        buffers = "" if n_bytes is None else f"; beside the cache, {n_bytes / MIB:.1f} MiB of buffers to compute in"
        lines += [
            f"cells a layer: {composed} composed, {layout.n_live} live, {layout.n_free} free",
            f"since the chat was opened: prefill {numbers['prefill_tokens_per_second']} tokens/s, "
            f"decode {numbers['decode_tokens_per_second']} tokens/s, "
            f"{numbers['compactions']} compactions of {numbers['compaction_seconds']:.1f} s in all"
            if chat.turns or memory.reports
            else "since the chat was opened: nothing read",
            f"{memory.n_pinned} tokens pinned{', the system prompt too' if memory.n_pinned and chat.system else ''}",
            f"memory of this process: {peak_rss_bytes() / MIB:.0f} MiB at its peak{buffers}",
        ]
    return "\n".join(lines)
