"""The memory of a chat, token by token, for a page to show: the share of heads that hold a cell of each."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvcompose_local.chat import ChatState, Message
from kvcompose_local.composing.cell_scores import kept_shares
from kvcompose_local.interfaces import ModelShape, Selection
from kvcompose_local.server.conversation import Conversation


def texts_of(conversation: Conversation, tokens: Sequence[int]) -> list[str]:
    """The text of each token; a character of several tokens belongs to the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    model, texts = conversation.model, []
    for token in tokens:
        control = model.control_text(token)
        texts.append(control or decoder.decode(model.token_bytes(token)))
    return texts


def spans_of(texts: Sequence[str], messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Where messages stand: of each the first token and the one behind its last; thinking has a span of its own."""
    whole = "".join(texts)
    ends = np.cumsum([len(text) for text in texts])
    spans, place = [], 0
    for i, message in enumerate(messages):
        for part in ("reasoning", "content"):
            said = message.get(part, "").strip()
            if not said or (found := whole.find(said, place)) < 0:
                continue
            place = found + len(said)
            start, stop = np.searchsorted(ends, [found, place - 1], side="right")
            role = "reasoning" if part == "reasoning" else message["role"]
            spans.append({"message": i, "role": role, "start": int(start), "stop": int(stop) + 1})
    return spans


def memory_view(
    conversation: Conversation, state: ChatState, *, kept: tuple[Sequence[Selection], int] | None = None
) -> dict[str, Any]:
    """What a page shows of a chat's memory; kept: what another budget would keep, as :meth:`CacheMemory.would_keep`.

    The engine need not hold the chat.
    """
    memory, cells = state.memory, state.memory.cells
    tokens = [*memory.tokens, *state.pending]
    origins, n_live = (memory.origins, cells.n_live) if kept is None else kept
    origins = [origins[i] for i in range(len(origins))]
    shape: ModelShape = conversation.memory.engine.shape
    read = kept_shares(origins, len(memory.tokens), n_live)
    texts = texts_of(conversation, tokens)
    layers = zip(shape.layers, origins, strict=True)
    return {
        "n_tokens": len(tokens),
        "n_layers": len(shape.layers),
        "n_heads": sum(layer.n_kv_heads for layer in shape.layers),
        "texts": texts,
        "shares": [round(float(share), 3) for share in read] + [0.0] * len(state.pending),
        "spans": spans_of(texts, state.messages),
        "pins": [[*pin] for pin in memory.pins],
        "n_live": n_live,
        "bytes": sum(layer.row_bytes * (places.shape[1] + n_live) for layer, places in layers),
        "f16_bytes": len(tokens) * shape.uncompressed_row_bytes,
    }
