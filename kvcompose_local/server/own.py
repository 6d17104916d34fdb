"""What the page asks beside OpenAI's protocol: the chats that are kept, and what they remember."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from kvcompose_local.chat import Message
from kvcompose_local.errors import InvalidInput
from kvcompose_local.server import texts
from kvcompose_local.server.hosted import Hosted
from kvcompose_local.server.keeping import Keeping, Kept
from kvcompose_local.server.requests import Job, Refused, Result
from kvcompose_local.server.service import Service

router = APIRouter(prefix="/kvc")


class Passage(BaseModel):
    """Tokens of a chat, by their positions, the end excluded."""

    model_config = ConfigDict(extra="forbid")
    start: Annotated[int, Field(ge=0, lt=2**31)]
    stop: Annotated[int, Field(gt=0, lt=2**31)]


def _told(hosted: Hosted, kept: Kept) -> dict[str, Any]:
    where = "text only"
    if hosted.is_current(kept):
        where = "in use"
    elif kept.n_bytes:
        where = "memory"
    elif kept.file_bytes:
        where = "disk"
    return {
        "id": kept.id,
        "model": hosted.name,
        "title": kept.title,
        "created": kept.created,
        "used": kept.used,
        "n_messages": kept.n_messages,
        "n_tokens": kept.n_tokens,
        "where": where,
        "bytes": kept.n_bytes or kept.file_bytes,
    }


def _find(service: Service, chat_id: str) -> tuple[Hosted, Keeping, Kept]:
    """The model of a chat, where it is kept, and the chat. Raises Refused."""
    for hosted in service.models.values():
        if (keeping := hosted.keeping) is not None and (kept := keeping.get(chat_id)) is not None:
            return hosted, keeping, kept
    raise Refused(404, "there is no such chat", code="chat_not_found")


def shown(message: Message) -> dict[str, Any]:
    """A message in OpenAI's shape."""
    result: dict[str, Any] = {"role": message["role"], "content": message["content"]}
    if "reasoning" in message:
        result["reasoning_content"] = message["reasoning"]
    if "tool_calls" in message:
        result["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
            }
            for call in json.loads(message["tool_calls"])
        ]
    return result | {name: message[name] for name in ("tool_call_id", "name") if name in message}


@router.get("/chats")
async def chats(http: HttpRequest, model: str | None = None) -> dict[str, Any]:
    """The chats that are kept, the last used first."""
    service: Service = http.app.state.service
    found = []
    for hosted in service.models.values():
        if hosted.keeping is not None and model in (None, hosted.name):
            found += [_told(hosted, kept) for kept in hosted.keeping.listed()]
    return {"chats": sorted(found, key=lambda chat: -chat["used"])}


@router.get("/chats/{chat_id}")
async def chat(http: HttpRequest, chat_id: str) -> dict[str, Any]:
    """The text of a chat."""
    hosted, keeping, kept = _find(http.app.state.service, chat_id)
    try:
        text = await run_in_threadpool(keeping.text, chat_id)
    except (OSError, ValueError) as error:
        raise Refused(404, "the text of this chat is gone or damaged", code="chat_not_found") from error
    if text is None:
        raise Refused(404, "there is no such chat", code="chat_not_found")
    messages, tools = text
    return _told(hosted, kept) | {
        "messages": [shown(message) for message in messages],
        "tools": json.loads(tools) if tools else [],
    }


@router.delete("/chats/{chat_id}", status_code=204)
async def forget(http: HttpRequest, chat_id: str) -> Response:
    """Forget a chat: its text, its cells, its files."""
    service: Service = http.app.state.service
    hosted, _, kept = _find(service, chat_id)

    def work(job: Job) -> None:
        hosted.forget(kept)
        job.emit(Result(None))

    await service.result(http, work)
    return Response(status_code=204)


@router.get("/chats/{chat_id}/memory")
async def memory(
    http: HttpRequest, chat_id: str, budget: Annotated[float | None, Query(gt=0, le=1)] = None
) -> dict[str, Any]:
    """Of each token of a chat the share of layers and heads that hold it, or would at another budget."""
    service: Service = http.app.state.service
    hosted, _, kept = _find(service, chat_id)

    def work(job: Job) -> None:
        job.emit(Result(hosted.memory_view(kept, budget, job)))

    told: dict[str, Any] = await service.result(http, work)
    return {"id": chat_id, **told}


@router.post("/chats/{chat_id}/pins")
async def pin(http: HttpRequest, chat_id: str, passage: Passage) -> dict[str, Any]:
    """Keep a passage in all layers and heads."""
    service: Service = http.app.state.service
    hosted, _, kept = _find(service, chat_id)

    def work(job: Job) -> None:
        job.emit(Result(hosted.pin(kept, passage.start, passage.stop, job)))

    told: dict[str, Any] = await service.result(http, work)
    return told


@router.delete("/chats/{chat_id}/pins")
async def unpin(http: HttpRequest, chat_id: str) -> dict[str, Any]:
    """Let all passages compete again, but the system prompt."""
    service: Service = http.app.state.service
    hosted, _, kept = _find(service, chat_id)

    def work(job: Job) -> None:
        job.emit(Result(hosted.unpin(kept, job)))

    told: dict[str, Any] = await service.result(http, work)
    return told


@router.post("/text")
async def text(http: HttpRequest, name: Annotated[str, Query(max_length=1000)] = "") -> dict[str, str]:
    """The text of a file, its bytes being the body: in any encoding that tells itself, or a PDF."""
    try:
        return {"text": await texts.text_of(await http.body(), name)}
    except InvalidInput as error:
        raise Refused(400, str(error)) from error
