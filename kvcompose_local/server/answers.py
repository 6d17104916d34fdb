"""One answer: from the conversation's pieces to events, with the calls of tools told apart from what is said."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Iterable
from typing import Any

from kvcompose_local.chat import Message, TurnStats
from kvcompose_local.chat.calls import CallReader, ToolFormat
from kvcompose_local.chat.notations import Call
from kvcompose_local.server.conversation import Constraint, Conversation
from kvcompose_local.server.requests import Done, Job, Piece, Request, ToolCall
from kvcompose_local.server.schemas import arguments_of, grammar_of, grammar_of_call, grammar_of_either

_LETTERS = string.ascii_letters + string.digits
#: Beginnings of calls, which are part of what is said where there are tools, also where the thinking has not ended.
_CALL_MARKERS = {
    "harmony": (
        "<|channel|>commentary to=*<|message|>",
        "<|channel|>analysis to=functions.*<|message|>",
        "<|channel|>commentary to=functions.*<|channel|>commentary*<|message|>",
        " to=functions.*<|channel|>commentary*<|message|>",
        " to=functions.*<|channel|>analysis*<|message|>",
    ),
    "hermes": tuple(f"<tool_call>{space}{begun}" for space in ("\n", "") for begun in ('{"name":', "<function=")),
}


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
    reader, forced = _calls_of(conversation, request)
    constraint = Constraint(_grammar(conversation, request), waits=_waits(conversation, request))
    if forced:
        constraint = Constraint(forced[1])
        conversation.forced = _end_of_thinking(conversation, request) + forced[0]
    elif request.begun:
        is_harmony = conversation.model.reasoning_format.name == "harmony"
        header = "<|channel|>final<|message|>" if is_harmony else _end_of_thinking(conversation, request)
        conversation.forced, conversation.begun = header, request.begun
    calls: list[ToolCall] = []
    n_reasoning, said = 0, ""

    def emit(parts: Iterable[str | Call]) -> None:
        nonlocal said
        for part in parts:
            if calls and not request.parallel_calls:
                return
            if isinstance(part, Call):
                calls.append(ToolCall(_new_id(), part.name, json.dumps(part.arguments, ensure_ascii=False)))
                job.emit(calls[-1])
            else:
                said += part
                job.emit(Piece(part, False, conversation.take_chances()))

    pieces = conversation.answer_to(request, constraint, max_tokens=max_tokens, stats=stats, on_begin=on_begin)
    try:
        if forced and reader is not None:
            emit(reader.take(forced[0]))
        for piece in pieces:
            n_reasoning = stats.generated_tokens if piece.is_reasoning else n_reasoning
            if piece.is_reasoning or reader is None:
                job.emit(Piece(str(piece), piece.is_reasoning, conversation.take_chances()))
                continue
            emit(reader.take(str(piece)))
            if calls and not request.parallel_calls:
                pieces.close()
                stats.stopped = "end"  # by us, and as whole as was asked for
                break
        is_cut = stats.stopped in ("length", "context")
        if reader is not None:
            rest = reader.finish(is_cut=is_cut)
            emit(part for part in rest if isinstance(part, Call) or not (is_cut and forced))
    finally:
        pieces.close()
        conversation.stops, conversation.forced, conversation.begun = before, "", ""
        conversation.shown, conversation.call_markers = frozenset(), ()
    if reader is not None:
        _note_calls(conversation, said, calls)
    if request.begun and conversation.messages[-1]["role"] == "assistant":
        conversation.messages[-1]["content"] = request.begun + conversation.messages[-1]["content"]
    return Done(
        "length" if is_cut else "tool_calls" if calls else "stop",
        stats.stop,
        stats.prompt_tokens,
        stats.generated_tokens,
        n_reasoning,
        stats.prefill_seconds,
        stats.decode_seconds,
        stats.compactions,
        stats.compaction_seconds,
    )


def _waits(conversation: Conversation, request: Request) -> bool:
    """Whether an answer under a grammar begins only once the model says so: it thinks before, or has a header."""
    form = conversation.model.reasoning_format
    return form.name == "harmony" or bool(request.messages and form.opens_at_end(conversation.want_of(request)))


def _calls_of(conversation: Conversation, request: Request) -> tuple[CallReader | None, tuple[str, str] | None]:
    """What reads the calls of an answer, None where there can be none; and how a forced one begins, and its grammar."""
    if not request.tools or request.tool_choice == "none":
        return None, None
    functions = [tool["function"] for tool in json.loads(request.tools)]
    template = conversation.model.template
    form = template.tool_format
    reader = CallReader(form, {function["name"]: function.get("parameters") for function in functions})
    conversation.shown = form.shown
    conversation.call_markers = _CALL_MARKERS.get(form.name, ())
    if request.tool_choice == "auto":
        return reader, None
    if request.tool_choice != "required":
        functions = [function for function in functions if function["name"] == request.tool_choice]
    begun = _opening(form, [function["name"] for function in functions])
    if begun.endswith("<|message|>") and len(functions) == 1:
        grammar = grammar_of(arguments_of(functions[0]))
    else:
        grammar = grammar_of_call(form, functions)
    return reader, (begun, grammar)


def _end_of_thinking(conversation: Conversation, request: Request) -> str:
    """What stands before an answer that is begun, where the template has the model think first; else nothing."""
    thinking = conversation.model.reasoning_format
    opened = thinking.opens_at_end(conversation.want_of(request))
    if not opened:
        return ""
    closed = thinking.answers[thinking.opens.index(opened)] if len(thinking.answers) > 1 else thinking.answers[0]
    return f"{closed}\n\n"


def _grammar(conversation: Conversation, request: Request) -> str:
    """The grammar of an answer that has a form; where there are tools it may call them instead."""
    form = conversation.model.template.tool_format
    if not request.grammar or not request.tools or request.tool_choice != "auto" or form.name == "harmony":
        return request.grammar  # gpt-oss calls in a channel of its own
    return grammar_of_either(request.grammar, form, [tool["function"] for tool in json.loads(request.tools)])


def _opening(form: ToolFormat, names: list[str]) -> str:
    """What a forced call begins with, behind which its grammar holds."""
    if form.name == "harmony":
        if len(names) == 1:
            return f"<|channel|>commentary to=functions.{names[0]} <|constrain|>json<|message|>"
        return "<|channel|>final<|message|>"
    return form.forced


def _note_calls(conversation: Conversation, said: str, calls: list[ToolCall]) -> None:
    """Let the transcript have calls as protocols send them back."""
    messages = conversation.messages
    if not calls or not messages or messages[-1]["role"] != "assistant":
        return
    told: list[dict[str, Any]] = [
        {"id": call.id, "name": call.name, "arguments": json.loads(call.arguments)} for call in calls
    ]
    message: Message = {**messages[-1], "content": said.strip(), "tool_calls": json.dumps(told, ensure_ascii=False)}
    messages[-1] = message


def _new_id() -> str:
    """Nine letters and digits, as Mistral's templates want an id."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))
