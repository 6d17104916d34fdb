"""One answer: from the conversation's pieces to events."""

from __future__ import annotations

from collections.abc import Callable

from kvcompose_local.chat import TurnStats
from kvcompose_local.server.conversation import Constraint, Conversation
from kvcompose_local.server.requests import Done, Job, Piece, Request


class Answer:
    """Answers a request by a conversation, whose cells are as good for it as they can be."""

    def __init__(self, conversation: Conversation, request: Request, job: Job) -> None:
        self._conversation, self._request, self._job = conversation, request, job

    def run(self, on_begin: Callable[[int, int, int], None], read_before: tuple[int, float]) -> Done:
        """Emit the answer's pieces; returns how it ended. read_before: tokens and seconds of its beginning."""
        conversation, request, job = self._conversation, self._request, self._job
        conversation.memory.engine.set_sampling(request.sampling)  # type: ignore[attr-defined]
        stats = TurnStats()
        max_tokens = conversation.memory.n_ctx if request.max_tokens is None else request.max_tokens
        before, conversation.stops = conversation.stops, (*conversation.stops, *request.stops)
        try:
            if request.prompt is not None:
                pieces = conversation.go_on(
                    request.prompt,
                    max_tokens=max_tokens,
                    constraint=Constraint(request.grammar),
                    n_logprobs=request.n_logprobs,
                    stats=stats,
                    on_begin=on_begin,
                )
            else:
                pieces = conversation.answer_to(
                    request.messages,
                    request.tools,
                    max_tokens=max_tokens,
                    forced=request.forced,
                    constraint=Constraint(request.grammar),
                    n_logprobs=request.n_logprobs,
                    stats=stats,
                    on_begin=on_begin,
                )
            n_reasoning = 0
            for piece in pieces:
                n_reasoning = stats.generated_tokens if piece.is_reasoning else n_reasoning
                chances = tuple(conversation.chances)
                conversation.chances.clear()
                job.emit(Piece(str(piece), piece.is_reasoning, chances))
        finally:
            conversation.stops = before
        finish = "length" if stats.stopped in ("length", "context") else "stop"
        return Done(
            finish,
            stats.stop,
            stats.prompt_tokens + read_before[0],
            stats.generated_tokens,
            n_reasoning,
            stats.prefill_seconds + read_before[1],
            stats.decode_seconds,
            stats.compactions,
            stats.compaction_seconds,
        )
