"""Anthropic's protocol: ``/v1/messages``, its stream of events, and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from kvcompose_local.chat import Message
from kvcompose_local.server.guard import refusal
from kvcompose_local.server.requests import (
    Begun,
    Done,
    Failed,
    Job,
    Piece,
    Refused,
    Request,
    Result,
    ToolCall,
    one_line,
)
from kvcompose_local.server.service import Answering, Service, client_of
from kvcompose_local.server.shapes import (
    MOST_MESSAGES,
    JsonRoute,
    Loose,
    Unit,
    checked_choice,
    left_out,
    schema_grammar,
)
from kvcompose_local.server.sse import EventStream

router = APIRouter(prefix="/v1/messages", route_class=JsonRoute)

#: A line that Claude Code puts before its system prompt for who bills it. It differs in each chat, and would have all
#: that follows read again.
_BILLING = "x-anthropic-billing-header:"


class Block(Loose):
    """A block of content: a text, a tool's call, what came of one, or what the model thought."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | dict[str, Any] | None = None
    is_error: bool | None = None
    thinking: str | None = None
    source: Source | str | None = None


class Source(Loose):
    """Where a document is."""

    type: str
    data: str | None = None


class Turn(Loose):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(Loose):
    """A tool that the model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None


class ToolChoice(Loose):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Form(Loose):
    """The form of an answer."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class Output(Loose):
    """What the answer is like."""

    format: Form | None = None


_THINKING = {"enabled": "on", "adaptive": "on", "disabled": "off"}


class CountRequest(Loose):
    """A conversation whose tokens are to be counted."""

    model: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MOST_MESSAGES)]
    system: str | list[Block] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    output_config: Output | None = None
    output_format: Form | None = None
    thinking: Any = None

    def internal(self) -> Request:
        """What the engine's thread is asked. Raises Refused."""
        messages: list[Message] = []
        blocks = [Block(type="text", text=self.system)] if isinstance(self.system, str) else self.system or []
        if system := _text([block for block in blocks if not (block.text or "").startswith(_BILLING)], "system"):
            messages.append({"role": "system", "content": system})
        for turn in self.messages:
            messages += _messages(turn)
        tools = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    **({"description": tool.description} if tool.description else {}),
                    "parameters": tool.input_schema,
                },
            }
            for tool in self.tools or []
            if tool.input_schema is not None  # the others are Anthropic's own
        ]
        choice = "auto"
        if self.tool_choice is not None:
            choice = {"any": "required", "tool": self.tool_choice.name or ""}.get(
                self.tool_choice.type, self.tool_choice.type
            )
        form = (self.output_config.format if self.output_config else None) or self.output_format
        return Request(
            model=self.model or "",
            messages=tuple(messages),
            tools=one_line(tools) if tools else "",
            grammar=schema_grammar(form.schema_, "output_config.format") if form else "",
            tool_choice=checked_choice(choice, tools),
            thinking=_THINKING.get(str(self.thinking.get("type"))) if isinstance(self.thinking, dict) else None,
            parallel_calls=not (self.tool_choice is not None and self.tool_choice.disable_parallel_tool_use),
        )


class Metadata(Loose):
    """Who asks."""

    user_id: str | None = None


class MessagesRequest(CountRequest):
    """An answer that is asked for."""

    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)]
    temperature: Unit | None = None
    top_p: Unit | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop_sequences: Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None

    def asked(self, service: Service, http: HttpRequest) -> Request:
        """What the engine's thread is asked. Raises Refused."""
        stops = self.stop_sequences or []
        if any(not 0 < len(stop) <= 200 for stop in stops):
            raise Refused(400, "stop_sequences: texts of 1 to 200 characters", param="stop_sequences")
        told = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        sampling = replace(service.defaults, **{name: value for name, value in told.items() if value is not None})
        user = self.metadata.user_id if self.metadata and self.metadata.user_id else ""
        asked = self.internal()
        *before, last = asked.messages
        if before and last["role"] == "assistant" and "tool_calls" not in last:
            asked = replace(asked, messages=tuple(before), begun=last["content"])  # the answer goes on from it
        if asked.begun and asked.grammar:
            raise Refused(400, "an answer that is begun already cannot be given a form", param="messages")
        return replace(
            asked,
            sampling=sampling,
            max_tokens=self.max_tokens,
            stops=tuple(stops),
            client=f"{client_of(http)} {user}"[:300],
        )


def _text(content: str | list[Block] | dict[str, Any], where: str) -> str:
    """Raises Refused for what is no text."""
    if isinstance(content, str):
        return content
    texts = [None] if isinstance(content, dict) else [_text_of(block) for block in content]
    if None in texts:
        raise Refused(400, f"this server reads text alone: {where} has a block that is none", param=where)
    return "\n".join(text or "" for text in texts)


def _text_of(block: Block) -> str | None:
    """The text of a block, None where it has none."""
    if block.type == "document" and isinstance(block.source, Source) and block.source.type == "text":
        return block.source.data
    return block.text if block.type == "text" else None


def _result(block: Block) -> str:
    """The text of what came of a tool, without what a tool has shown beside: an agent could not go on otherwise."""
    content = block.content or ""
    if isinstance(content, str):
        return content
    parts = [content] if isinstance(content, dict) else content
    texts = [(_text_of(part), part.type) if isinstance(part, Block) else (None, "object") for part in parts]
    return "\n".join(left_out(kind) if text is None else text for text, kind in texts)


def _messages(turn: Turn) -> list[Message]:
    """A message's blocks as messages: what came of tools stands before what is said with it."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results: list[Message] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    thought = ""
    for block in turn.content:
        if block.type == "tool_result" and turn.role == "user":
            results.append(
                {
                    "role": "tool",
                    "content": _result(block),
                    "tool_call_id": (block.tool_use_id or "").removeprefix("toolu_"),
                }
            )
        elif block.type == "tool_use" and turn.role == "assistant":
            calls.append(
                {
                    "id": (block.id or "").removeprefix("toolu_"),
                    "name": block.name or "",
                    "arguments": block.input or {},
                }
            )
        elif block.type in ("thinking", "redacted_thinking"):
            thought += block.thinking or ""
        elif turn.role == "user" or _text_of(block) is not None:  # of the others Anthropic's own tools are the source
            texts.append(_text([block], "a message"))
    if not texts and results:
        return results
    message: Message = {"role": turn.role, "content": "\n".join(texts)}
    if calls:
        message["tool_calls"] = one_line(calls)
    if thought and turn.role == "assistant":
        message["reasoning"] = thought
    return [*results, message]


@router.post("/count_tokens")
async def count_tokens(http: HttpRequest, body: CountRequest) -> dict[str, int]:
    """How many tokens a conversation is."""
    service: Service = http.app.state.service
    hosted, request = service.hosted(body.model), body.internal()

    def work(job: Job) -> None:
        job.emit(Result(hosted.count(request)))

    return {"input_tokens": await service.result(http, work)}


@router.post("")
async def messages(http: HttpRequest, body: MessagesRequest) -> Response:
    """An answer to a conversation, whole or as a stream of events."""
    service: Service = http.app.state.service
    answering = await Answering.start(http, service.ask(body.asked(service, http)), streams=bool(body.stream))
    frame = {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": service.hosted(body.model).name,
    }
    if body.stream:
        return EventStream(_events(answering, frame, http.url.path), answering.headers)
    blocks: list[dict[str, Any]] = []
    said, done = await answering.whole()
    for part in said:
        if isinstance(part, ToolCall):
            blocks.append(_use(part))
            continue
        kind = "thinking" if part.is_reasoning else "text"
        if not blocks or blocks[-1]["type"] != kind:
            blocks.append({"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})})
        blocks[-1][kind] += part.text
    told = {**frame, "content": blocks, **_end(done), "usage": _usage(answering.begun, done.generated)}
    return JSONResponse(told, headers=answering.headers)


def _use(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{call.id}", "name": call.name, "input": json.loads(call.arguments)}


def _end(done: Done) -> dict[str, Any]:
    reasons = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "stop_sequence" if done.stop else "end_turn"}
    return {"stop_reason": reasons[done.finish], "stop_sequence": done.stop or None}


def _usage(begun: Begun, generated: int) -> dict[str, int]:
    return {
        "input_tokens": begun.prompt_tokens - begun.cached,
        "cache_read_input_tokens": begun.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": generated,
    }


def _sse(kind: str, **told: Any) -> str:
    return f"event: {kind}\ndata: {one_line({'type': kind, **told})}\n\n"


async def _events(answering: Answering, frame: dict[str, Any], path: str) -> AsyncIterator[str]:
    index, kind = -1, ""

    def close() -> str:
        return _sse("content_block_stop", index=index) if kind else ""

    async for event in answering:
        if isinstance(event, str):
            yield f": {event}\n\n" + (_sse("ping") if answering.has_begun else "")
        elif isinstance(event, Begun):
            empty: dict[str, Any] = {
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": _usage(event, 0),
            }
            yield _sse("message_start", message={**frame, **empty})
        elif isinstance(event, Piece):
            wanted = "thinking" if event.is_reasoning else "text"
            if kind != wanted:
                yield close()
                index, kind = index + 1, wanted
                block = {"type": wanted, wanted: "", **({"signature": ""} if wanted == "thinking" else {})}
                yield _sse("content_block_start", index=index, content_block=block)
            yield _sse("content_block_delta", index=index, delta={"type": f"{wanted}_delta", wanted: event.text})
        elif isinstance(event, ToolCall):
            yield close()
            index, kind = index + 1, "tool_use"
            yield _sse("content_block_start", index=index, content_block={**_use(event), "input": {}})
            delta = {"type": "input_json_delta", "partial_json": event.arguments}
            yield _sse("content_block_delta", index=index, delta=delta)
        elif isinstance(event, Failed):
            yield f"event: error\ndata: {one_line(refusal(path, event.error))}\n\n"
        elif isinstance(event, Done):
            yield close()
            yield _sse("message_delta", delta=_end(event), usage=_usage(answering.begun, event.generated))
            yield _sse("message_stop")
