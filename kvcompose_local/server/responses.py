"""OpenAI's newer protocol, ``/v1/responses``, without a memory: each request brings the whole conversation."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from kvcompose_local.chat import Message
from kvcompose_local.server.guard import kind_of
from kvcompose_local.server.requests import Begun, Done, Failed, Piece, Refused, Request, ToolCall, one_line
from kvcompose_local.server.service import Answering, Service, client_of
from kvcompose_local.server.shapes import (
    MOST_MESSAGES,
    JsonRoute,
    Length,
    Loose,
    Sampled,
    TextPart,
    checked_choice,
    internal_call,
    result_of,
    schema_grammar,
    text_of,
    thinking_of,
)
from kvcompose_local.server.sse import EventStream

router = APIRouter(route_class=JsonRoute)


class Item(Loose):
    """A message, a tool's call, what came of one, or what the model thought."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[TextPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[TextPart] | None = None


class Tool(Loose):
    """A function that the model may call."""

    type: str
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")] | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolChoice(Loose):
    """A call that is forced."""

    type: Literal["function"]
    name: str


class TextFormat(Loose):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class TextOptions(Loose):
    """What the answer's text is like."""

    format: TextFormat | None = None


class ResponsesRequest(Sampled):
    """A response that is asked for."""

    input: str | Annotated[list[Item], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: str | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    max_output_tokens: Length | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    reasoning: Any = None

    def internal(self, service: Service, http: HttpRequest) -> Request:
        """What the engine's thread is asked. Raises Refused."""
        self.check_known()
        for name in ("previous_response_id", "conversation", "background"):
            if getattr(self, name):
                raise Refused(400, f"{name}: this server keeps no responses: send the whole conversation", param=name)
        tools = [
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}
            for tool in self.tools or []
            if tool.type == "function" and tool.name
        ]
        choice = self.tool_choice.name if isinstance(self.tool_choice, ToolChoice) else self.tool_choice
        return Request(
            model=self.model or "",
            messages=tuple(self._messages()),
            tools=one_line(tools) if tools else "",
            tool_choice=checked_choice(choice or "auto", tools),
            parallel_calls=self.parallel_tool_calls is not False,
            grammar=self._grammar(),
            sampling=self.sampling(service.defaults),
            max_tokens=self.max_output_tokens,
            stops=self.stops(),
            thinking=thinking_of(self.reasoning.get("effort") if isinstance(self.reasoning, dict) else None),
            client=f"{client_of(http)} {self.user or ''}"[:300],
        )

    def _grammar(self) -> str:
        form = self.text.format if self.text and self.text.format else TextFormat()
        if form.type == "text":
            return ""
        if form.type == "json_schema" and form.schema_ is None:
            raise Refused(400, "text.format: there is no schema in it", param="text")
        return schema_grammar(form.schema_ if form.type == "json_schema" else {"type": "object"}, "text")

    def _messages(self) -> list[Message]:
        messages: list[Message] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        thought = ""
        for item in self.input:
            if item.type == "reasoning":
                thought += text_of(item.content or "", "input")
            elif item.type == "function_call":
                call = one_line([internal_call(item.call_id or "", item.name or "", item.arguments or "")])
                if messages and messages[-1]["role"] == "assistant":  # said, or called, before
                    before = messages[-1].get("tool_calls", "")
                    messages[-1]["tool_calls"] = f"{before[:-1]}, {call[1:]}" if before else call
                else:
                    messages.append({"role": "assistant", "content": "", "tool_calls": call})
                    if thought:
                        messages[-1]["reasoning"], thought = thought, ""
            elif item.type == "function_call_output":
                output = result_of(item.output or "")
                messages.append({"role": "tool", "content": output, "tool_call_id": item.call_id or ""})
            else:
                role = "system" if item.role == "developer" else item.role or "user"
                message = {"role": role, "content": text_of(item.content or "", "input")}
                if role == "assistant" and thought:
                    message["reasoning"], thought = thought, ""
                messages.append(message)
        return messages


@router.post("/v1/responses")
async def responses(http: HttpRequest, body: ResponsesRequest) -> Response:
    """A response, whole or as a stream of events."""
    service: Service = http.app.state.service
    answering = await Answering.start(http, service.ask(body.internal(service, http)), streams=bool(body.stream))
    response = _Response(body, service.hosted(body.model).name)
    if body.stream:
        return EventStream(_events(answering, response), answering.headers)
    said, done = await answering.whole()
    for part in said:
        response.take(part)
    return JSONResponse(response.told(answering.begun, done), headers=answering.headers)


class _Response:
    """A response as it grows."""

    def __init__(self, body: ResponsesRequest, model: str) -> None:
        self._body, self._model = body, model
        self._id, self._created = f"resp_{secrets.token_hex(12)}", int(time.time())
        self.output: list[dict[str, Any]] = []

    def take(self, event: Piece | ToolCall) -> tuple[dict[str, Any], bool]:
        """Add what has come; returns the item that it is part of, and whether that is new."""
        if isinstance(event, ToolCall):
            self.output.append(
                {
                    "type": "function_call",
                    "id": f"fc_{event.id}",
                    "call_id": event.id,
                    "name": event.name,
                    "arguments": event.arguments,
                    "status": "completed",
                }
            )
            return self.output[-1], True
        kind = "reasoning" if event.is_reasoning else "message"
        is_new = not self.output or self.output[-1]["type"] != kind
        if is_new:
            self.output.append(_item(kind))
        self.output[-1]["content"][0]["text"] += event.text
        return self.output[-1], is_new

    def told(self, begun: Begun | None = None, done: Done | None = None) -> dict[str, Any]:
        """The response by now."""
        status = "in_progress" if done is None else "incomplete" if done.finish == "length" else "completed"
        if status == "incomplete" and self.output and self.output[-1]["type"] == "message":
            self.output[-1]["status"] = status
        usage = None
        if begun is not None and done is not None:
            usage = {
                "input_tokens": begun.prompt_tokens,
                "input_tokens_details": {"cached_tokens": begun.cached},
                "output_tokens": done.generated,
                "output_tokens_details": {"reasoning_tokens": done.reasoning},
                "total_tokens": begun.prompt_tokens + done.generated,
            }
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._model,
            "output": self.output,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "metadata": {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "max_output_tokens": body.max_output_tokens,
            "previous_response_id": None,
            "store": False,
            "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else "auto",
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or []],
            "text": {"format": {"type": "text"}},
            "usage": usage,
        }


def _item(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        content: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        return {"type": kind, "id": f"rs_{secrets.token_hex(12)}", "summary": [], "content": [content]}
    content = {"type": "output_text", "text": "", "annotations": []}
    return {
        "type": kind,
        "id": f"msg_{secrets.token_hex(12)}",
        "role": "assistant",
        "status": "completed",
        "content": [content],
    }


async def _events(answering: Answering, response: _Response) -> AsyncIterator[str]:
    n, is_open = 0, False

    def sse(kind: str, **told: Any) -> str:
        nonlocal n
        n += 1
        return f"event: {kind}\ndata: {one_line({'type': kind, 'sequence_number': n - 1, **told})}\n\n"

    def place() -> dict[str, Any]:
        return {"output_index": len(response.output) - 1, "item_id": response.output[-1]["id"]}

    def close() -> str:
        if not is_open:
            return ""
        item = response.output[-1]
        text, done = "", sse("response.output_item.done", output_index=place()["output_index"], item=item)
        if item["type"] in ("message", "reasoning"):
            part = item["content"][0]
            name = "output_text" if item["type"] == "message" else "reasoning_text"
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            text = sse(f"response.{name}.done", **place(), content_index=0, text=part["text"], **more)
            text += sse("response.content_part.done", **place(), content_index=0, part=part)
        return text + done

    async for event in answering:
        if isinstance(event, str):
            yield f": {event}\n\n"
        elif isinstance(event, Begun):
            yield sse("response.created", response=response.told())
            yield sse("response.in_progress", response=response.told())
        elif isinstance(event, (Piece, ToolCall)):
            ends = is_open and (
                isinstance(event, ToolCall)
                or response.output[-1]["type"] != ("reasoning" if event.is_reasoning else "message")
            )
            if ends:
                yield close()
                is_open = False
            item, is_new = response.take(event)
            index = place()["output_index"]
            if isinstance(event, ToolCall):
                begun_item = {**item, "arguments": "", "status": "in_progress"}
                yield sse("response.output_item.added", output_index=index, item=begun_item)
                yield sse("response.function_call_arguments.delta", **place(), delta=event.arguments)
                told = {"arguments": event.arguments, "name": event.name}
                yield sse("response.function_call_arguments.done", **place(), **told)
                yield sse("response.output_item.done", output_index=index, item=item)
                continue
            name = "reasoning_text" if event.is_reasoning else "output_text"
            if is_new:
                empty = {**item, "content": [], **({"status": "in_progress"} if name == "output_text" else {})}
                yield sse("response.output_item.added", output_index=index, item=empty)
                part = {**item["content"][0], "text": ""}
                yield sse("response.content_part.added", **place(), content_index=0, part=part)
            is_open = True
            extra: dict[str, Any] = {"logprobs": []} if name == "output_text" else {}
            yield sse(f"response.{name}.delta", **place(), content_index=0, delta=event.text, **extra)
        elif isinstance(event, Failed):
            yield sse("error", message=str(event.error), code=kind_of(event.error), param=None)
        elif isinstance(event, Done):
            yield close()
            is_open = False
            kind = "response.incomplete" if event.finish == "length" else "response.completed"
            yield sse(kind, response=response.told(answering.begun, event))
