"""The memory of a chat, part by part, for ``/memory``: the share of heads that hold a cell of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcompose_local.chat.turns import Chat


@dataclass(frozen=True)
class Remembered:
    """A part of a conversation.

    kind: "document" or "message", with the template's text around it, or "answer", or "system" where the system prompt
    was read alone; text: its beginning; n_tokens: its tokens; kept: the share of them that a head still has, the mean
    over heads and layers.
    """

    kind: str
    text: str
    n_tokens: int
    kept: float


def remembered(chat: Chat, n_shown: int = 60) -> list[Remembered]:
    """The parts of a conversation in order, without empty ones; n_shown: characters that are shown of each part."""
    said, kept = chat.transcript, chat.memory.kept()
    n_read, steps = len(kept), said.steps
    starts = [*(step.begin.n_tokens for step in steps), n_read]
    parts = [("system", said.system or "", 0, starts[0])]
    for i, (step, end) in enumerate(zip(steps, starts[1:], strict=True)):
        drafted = said.messages[step.n_messages]["content"] if step.n_messages < len(said.messages) else said.draft
        if i + 1 < len(steps) and steps[i + 1].n_messages == step.n_messages:  # a document, and more behind it
            drafted = steps[i + 1].draft
        kind = "document" if step.answer is None else "message"
        begun = end if step.answer is None else step.answer.n_tokens
        parts.append((kind, drafted[len(step.draft) :], step.begin.n_tokens, begun))
        if begun < end:
            answers = said.messages[step.n_messages + 1 : step.n_messages + 2]
            parts.append(("answer", answers[0]["content"] if answers else "", begun, end))
    return [
        Remembered(
            kind, " ".join(text[: 4 * n_shown].split())[:n_shown].strip(), stop - start, float(kept[start:stop].mean())
        )
        for kind, text, start, stop in ((kind, text, start, min(stop, n_read)) for kind, text, start, stop in parts)
        if stop > start
    ]
