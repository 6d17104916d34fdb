"""OpenAI's protocol: ``/v1/models`` and ``/v1/chat/completions``."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from kvcompose_local.server.guard import refusal
from kvcompose_local.server.requests import Begun, Done, Failed, Piece, Refused, TokenChance, ToolCall, one_line
from kvcompose_local.server.service import Answering, Service
from kvcompose_local.server.shapes import ChatRequest, JsonRoute
from kvcompose_local.server.sse import EventStream

router = APIRouter(route_class=JsonRoute)


@router.get("/v1/models")
async def models(http: HttpRequest) -> Response:
    """The models that are served, as OpenAI's clients and Anthropic's look at them."""
    service: Service = http.app.state.service
    data = [_model(service, name) for name in service.models]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"], "has_more": False}
    return JSONResponse({"object": "list", "data": data, **ends})


@router.get("/v1/models/{name}")
async def model(http: HttpRequest, name: str) -> Response:
    """One of them."""
    service: Service = http.app.state.service
    if name not in service.models:
        raise Refused(404, f"there is no model {name[:100]!r}", code="model_not_found", param="model")
    return JSONResponse(_model(service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    started = datetime.fromtimestamp(service.started, timezone.utc).isoformat()
    of_openai = {"id": name, "object": "model", "created": service.started, "owned_by": "local"}
    return of_openai | {"type": "model", "display_name": name, "created_at": started}


@router.post("/v1/chat/completions")
async def chat_completions(http: HttpRequest, body: ChatRequest) -> Response:
    """An answer to a conversation, whole or as a stream of events."""
    service: Service = http.app.state.service
    answering = await Answering.start(http, service.ask(body.internal(service, http)), streams=bool(body.stream))
    model = service.hosted(body.model).name
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_chunks(answering, model, usage=usage, path=http.url.path), answering.headers)
    return await _whole(answering, model)


def _kvc(begun: Begun, done: Done | None = None) -> dict[str, Any]:
    told: dict[str, Any] = {"chat": begun.chat, "cached": begun.cached, "reread": begun.reread}
    return told | {"read": done.read if done else begun.prompt_tokens - begun.cached}


def usage_of(begun: Begun, done: Done) -> dict[str, Any]:
    """What a request took, in tokens."""
    return {
        "prompt_tokens": begun.prompt_tokens,
        "completion_tokens": done.generated,
        "total_tokens": begun.prompt_tokens + done.generated,
        "prompt_tokens_details": {"cached_tokens": begun.cached},
        "completion_tokens_details": {"reasoning_tokens": done.reasoning},
    }


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _chance(chance: TokenChance) -> dict[str, Any]:
    def one(raw: bytes, logprob: float) -> dict[str, Any]:
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": [*raw]}

    return one(chance.raw, chance.logprob) | {"top_logprobs": [one(raw, x) for raw, x in chance.likeliest]}


async def _whole(answering: Answering, model: str) -> Response:
    said, done = await answering.whole()
    pieces = [part for part in said if isinstance(part, Piece)]
    content, reasoning = ("".join(p.text for p in pieces if p.is_reasoning is kind) for kind in (False, True))
    calls = [_call(part) for part in said if isinstance(part, ToolCall)]
    chances = [_chance(chance) for piece in pieces for chance in piece.chances]
    message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    choice = {
        "index": 0,
        "message": message,
        "logprobs": {"content": chances} if chances else None,
        "finish_reason": done.finish,
    }
    return JSONResponse(
        {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [choice],
            "usage": usage_of(answering.begun, done),
            "timings": done.timings(),
            "kvc": _kvc(answering.begun, done),
        },
        headers=answering.headers,
    )


async def _chunks(answering: Answering, model: str, *, usage: bool, path: str) -> AsyncIterator[str]:
    frame = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
    }
    n_calls = 0

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": more.pop("logprobs", None)}
        nothing = {"usage": None} if usage else {}
        return f"data: {one_line({**frame, 'choices': [choice], **nothing, **more})}\n\n"

    async for event in answering:
        if isinstance(event, str):
            yield f": {event}\n\n"
        elif isinstance(event, Begun):
            yield chunk({"role": "assistant", "content": ""}, kvc=_kvc(event))
        elif isinstance(event, Piece):
            name = "reasoning_content" if event.is_reasoning else "content"
            chances = {"content": [*map(_chance, event.chances)]} if event.chances else None
            yield chunk({name: event.text}, logprobs=chances)
        elif isinstance(event, ToolCall):
            yield chunk({"tool_calls": [{"index": n_calls, **_call(event)}]})
            n_calls += 1
        elif isinstance(event, Failed):
            yield f"data: {one_line(refusal(path, event.error))}\n\n"
        elif isinstance(event, Done):
            begun = answering.begun
            yield chunk({}, event.finish, timings=event.timings(), kvc=_kvc(begun, event))
            if usage:
                yield f"data: {one_line({**frame, 'choices': [], 'usage': usage_of(begun, event)})}\n\n"
    yield "data: [DONE]\n\n"
