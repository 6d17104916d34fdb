"""One answer: from the conversation's pieces to events."""

from __future__ import annotations

from collections.abc import Callable

from kvcompose_local.chat import TurnStats
from kvcompose_local.server.conversation import Constraint, Conversation
from kvcompose_local.server.requests import Done, Job, Piece, Request


def answer(
    conversation: Conversation,
    request: Request,
    job: Job,
    stats: TurnStats,
    on_begin: Callable[[int, int, int], None],
) -> Done:
    """Answer a request by a conversation, whose cells are as good for it as they can be; emits the pieces.

    Returns how it ended. stats: of what was read for it already; on_begin: of :meth:`Conversation.answer_to`.
    """
    conversation.memory.engine.set_sampling(request.sampling)  # type: ignore[attr-defined]
    max_tokens = conversation.memory.n_ctx if request.max_tokens is None else request.max_tokens
    before, conversation.stops = conversation.stops, (*conversation.stops, *request.stops)
    n_reasoning = 0
    try:
        for piece in conversation.answer_to(
            request,
            Constraint(request.grammar),
            max_tokens=max_tokens,
            stats=stats,
            on_begin=on_begin,
        ):
            n_reasoning = stats.generated_tokens if piece.is_reasoning else n_reasoning
            job.emit(Piece(str(piece), piece.is_reasoning, conversation.take_chances()))
    finally:
        conversation.stops = before
    return Done(
        "length" if stats.stopped in ("length", "context") else "stop",
        stats.stop,
        stats.prompt_tokens,
        stats.generated_tokens,
        n_reasoning,
        stats.prefill_seconds,
        stats.decode_seconds,
        stats.compactions,
        stats.compaction_seconds,
    )
