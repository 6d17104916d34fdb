"""OpenAI's older protocol, ``/v1/completions``: a text to go on with."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from kvcompose_local.server.guard import refusal
from kvcompose_local.server.openai import usage_of
from kvcompose_local.server.requests import Done, Failed, Piece, Refused, Request, TokenChance, one_line
from kvcompose_local.server.service import Answering, Service, client_of
from kvcompose_local.server.shapes import JsonRoute, Sampled
from kvcompose_local.server.sse import EventStream

router = APIRouter(route_class=JsonRoute)

#: Tokens of an answer where nobody says, as OpenAI has it.
_USUAL_LENGTH = 16


class CompletionRequest(Sampled):
    """A text that is to be gone on with."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    suffix: str | None = None

    def internal(self, service: Service, http: HttpRequest) -> Request:
        """What the engine's thread is asked. Raises Refused."""
        self.check_known()
        prompt = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        if not prompt:
            raise Refused(400, "prompt: there is no text in it", param="prompt")
        return Request(
            model=self.model or "",
            prompt=prompt,
            sampling=self.sampling(service.defaults),
            max_tokens=self.max_tokens or _USUAL_LENGTH,
            stops=self.stops(),
            n_logprobs=self.logprobs,
            client=f"{client_of(http)} {self.user or ''}"[:300],
        )


@router.post("/v1/completions")
async def completions(http: HttpRequest, body: CompletionRequest) -> Response:
    """How a text goes on, whole or as a stream of events."""
    service: Service = http.app.state.service
    answering = await Answering.start(http, service.ask(body.internal(service, http)), streams=bool(body.stream))
    frame = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.hosted(body.model).name,
    }
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_chunks(answering, frame, usage=usage, path=http.url.path), answering.headers)
    said, done = await answering.whole()
    pieces = [part for part in said if isinstance(part, Piece)]
    text = "".join(piece.text for piece in pieces)
    chances = [chance for piece in pieces for chance in piece.chances]
    choice = {"index": 0, "text": text, "finish_reason": done.finish}
    choice["logprobs"] = _chances(chances) if body.logprobs is not None else None
    told = {**frame, "choices": [choice], "usage": usage_of(answering.begun, done), "timings": done.timings()}
    return JSONResponse(told, headers=answering.headers)


def _chances(chances: list[TokenChance]) -> dict[str, Any]:
    texts = [chance.raw.decode("utf-8", "replace") for chance in chances]
    offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
    top = [{raw.decode("utf-8", "replace"): logprob for raw, logprob in chance.likeliest} for chance in chances]
    return {
        "tokens": texts,
        "token_logprobs": [max(chance.logprob, -9999.0) for chance in chances],
        "top_logprobs": top,
        "text_offset": offsets,
    }


async def _chunks(answering: Answering, frame: dict[str, Any], *, usage: bool, path: str) -> AsyncIterator[str]:
    def chunk(text: str, finish: str | None, chances: tuple[TokenChance, ...] = (), **more: Any) -> str:
        logprobs = _chances([*chances]) if chances else None
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return f"data: {one_line({**frame, 'choices': [choice], **more})}\n\n"

    async for event in answering:
        if isinstance(event, str):
            yield f": {event}\n\n"
        elif isinstance(event, Piece):
            yield chunk(event.text, None, event.chances)
        elif isinstance(event, Failed):
            yield f"data: {one_line(refusal(path, event.error))}\n\n"
        elif isinstance(event, Done):
            begun = answering.begun
            yield chunk("", event.finish, timings=event.timings())
            if usage:
                yield f"data: {one_line({**frame, 'choices': [], 'usage': usage_of(begun, event)})}\n\n"
    yield "data: [DONE]\n\n"
