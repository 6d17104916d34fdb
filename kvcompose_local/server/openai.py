"""OpenAI's protocol: ``/v1/models``, ``/v1/chat/completions`` and ``/v1/completions``."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from kvcompose_local.chat import Message
from kvcompose_local.chat_options import Sampling
from kvcompose_local.server.guard import refusal
from kvcompose_local.server.requests import (
    Begun,
    Done,
    Failed,
    Piece,
    Refused,
    Request,
    TokenChance,
    ToolCall,
    one_line,
)
from kvcompose_local.server.service import Answering, Service, client_of
from kvcompose_local.server.sse import EventStream

router = APIRouter()

#: Most stop texts of a request, and characters of one.
_STOPS, _LONGEST_STOP = 16, 200
Unit = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Loose(BaseModel):
    """Fields that are unknown are left alone: clients send many that mean nothing here."""

    model_config = ConfigDict(extra="ignore")


class TextPart(Loose):
    """A part of a message."""

    type: str
    text: str | None = None


class Function(Loose):
    """A function's call in an assistant's message; arguments are JSON in a text."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    arguments: str = ""


class Call(Loose):
    """A tool call in an assistant's message."""

    id: str = ""
    type: Literal["function"] = "function"
    function: Function


class ChatMessage(Loose):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Usage(Loose):
    """What a stream's last chunk tells."""

    include_usage: bool = False


class Sampled(Loose):
    """How tokens are drawn."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Unit | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Unit | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    stop: str | list[str] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: Usage | None = None
    user: str | None = None

    def sampling(self, defaults: Sampling) -> Sampling:
        """The defaults, and what the request says."""

        def told(name: str) -> Any:
            value = getattr(self, name)
            return getattr(defaults, name) if value is None else value

        names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repeat_penalty")
        seed = None if self.seed is None or self.seed == -1 else self.seed % 2**32
        return Sampling(seed=seed, **{name: told(name) for name in names})

    def stops(self) -> tuple[str, ...]:
        """Raises Refused."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > _STOPS or any(not 0 < len(stop) <= _LONGEST_STOP for stop in stops):
            raise Refused(400, f"stop: at most {_STOPS} texts of 1 to {_LONGEST_STOP} characters", param="stop")
        return tuple(stops)

    def check_n(self) -> None:
        """Raises Refused."""
        if self.n not in (None, 1):
            raise Refused(400, f"n: one answer at a time, not {self.n}", param="n")


class ChatRequest(Sampled):
    """A chat completion that is asked for."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_id: str | None = None

    def internal(self, service: Service, http: HttpRequest) -> Request:
        """What the engine's thread is asked. Raises Refused."""
        self.check_n()
        longest = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return Request(
            model=self.model or "",
            messages=tuple(internal(message) for message in self.messages),
            sampling=self.sampling(service.defaults),
            max_tokens=longest,
            stops=self.stops(),
            n_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            chat_id=self.chat_id,
            client=f"{client_of(http)} {self.user or ''}"[:300],
        )


def internal(message: ChatMessage) -> Message:
    """A message as conversations have it. Raises Refused for what is no text."""
    content = message.content
    if isinstance(content, list):
        if any(part.type not in ("text", "input_text", "output_text") or part.text is None for part in content):
            raise Refused(400, "this server reads text alone: a message has a part that is none", param="messages")
        content = "".join(part.text or "" for part in content)
    result = {"role": "system" if message.role == "developer" else message.role, "content": content or ""}
    if message.role == "assistant" and message.reasoning_content:
        result["reasoning"] = message.reasoning_content
    if message.role == "assistant" and message.tool_calls:
        result["tool_calls"] = one_line(
            [internal_call(c.id, c.function.name, c.function.arguments) for c in message.tool_calls]
        )
    if message.role == "tool":
        result |= {k: v for k, v in (("tool_call_id", message.tool_call_id), ("name", message.name)) if v}
    return result


def internal_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A tool call as conversations have it. Raises Refused where its arguments are no JSON object."""
    try:
        told = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise Refused(400, f"the arguments of a call of {name[:50]!r} are no JSON object", param="messages")
    return {"id": call_id, "name": name, "arguments": told}


@router.get("/v1/models")
async def models(http: HttpRequest) -> Response:
    """The models that are served."""
    service: Service = http.app.state.service
    data = [{"id": name, "object": "model", "created": service.started, "owned_by": "local"} for name in service.models]
    return JSONResponse({"object": "list", "data": data})


@router.get("/v1/models/{name}")
async def model(http: HttpRequest, name: str) -> Response:
    """One of them."""
    service: Service = http.app.state.service
    if name not in service.models:
        raise Refused(404, f"there is no model {name[:100]!r}", code="model_not_found", param="model")
    return JSONResponse({"id": name, "object": "model", "created": service.started, "owned_by": "local"})


@router.post("/v1/chat/completions")
async def chat_completions(http: HttpRequest, body: ChatRequest) -> Response:
    """An answer to a conversation, whole or as a stream of events."""
    service: Service = http.app.state.service
    answering = Answering(service, http, service.ask(body.internal(service, http)))
    await answering.start(patience=5 if body.stream else 10**6)
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
    content, reasoning = "", ""
    calls: list[dict[str, Any]] = []
    chances: list[dict[str, Any]] = []
    begun, done = answering.begun, None
    has_chances = False
    async for event in answering:
        if isinstance(event, Piece):
            content += "" if event.is_reasoning else event.text
            reasoning += event.text if event.is_reasoning else ""
            chances += map(_chance, event.chances)
            has_chances = has_chances or bool(event.chances)
        elif isinstance(event, ToolCall):
            calls.append(_call(event))
        elif isinstance(event, Failed):
            raise event.error
        elif isinstance(event, Done):
            begun, done = answering.begun, event
    if begun is None or done is None:
        raise Refused(503, "the server is stopping", retry_after=5)
    message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    choice = {
        "index": 0,
        "message": message,
        "logprobs": {"content": chances} if has_chances else None,
        "finish_reason": done.finish,
    }
    return JSONResponse(
        {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [choice],
            "usage": usage_of(begun, done),
            "timings": done.timings(),
            "kvc": _kvc(begun, done),
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
            assert begun is not None
            yield chunk({}, event.finish, timings=event.timings(), kvc=_kvc(begun, event))
            if usage:
                yield f"data: {one_line({**frame, 'choices': [], 'usage': usage_of(begun, event)})}\n\n"
    yield "data: [DONE]\n\n"
