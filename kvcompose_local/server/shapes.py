"""What clients of OpenAI's protocol send, checked, and as conversations have it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from kvcompose_local.chat import Message
from kvcompose_local.chat_options import Sampling
from kvcompose_local.errors import InvalidInput
from kvcompose_local.server.requests import Refused, Request, one_line
from kvcompose_local.server.schemas import grammar_of
from kvcompose_local.server.service import Service, client_of

#: Most stop texts of a request, and characters of one.
_STOPS, _LONGEST_STOP = 16, 200
#: Most messages of a conversation: more than fit the longest that models know.
MOST_MESSAGES = 20_000
#: What protocols call a part that is text.
_TEXTS = ("text", "input_text", "output_text", "reasoning_text", "summary_text")
#: Fields that would change the answer, and what serves instead.
_NOT_TO_BE_HAD = {
    "logit_bias": "",
    "functions": ": tools are, as newer clients send them",
    "audio": ": this server writes text alone",
    "web_search_options": ": give a tool that searches",
    "echo": "",
    "suffix": "",
}
Unit = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
_LONGEST = 2**31 - 1


def _length(n: int) -> int:
    if n == 0:
        raise ValueError("an answer has a token at least")
    return _LONGEST if n < 0 else n


#: Tokens of an answer; -1, as clients of local servers send it, is for as many as fit.
Length = Annotated[int, Field(ge=-1, le=_LONGEST), AfterValidator(_length)]


class JsonRoute(APIRoute):
    """A route whose bodies hold whole characters: halves of surrogate pairs, which JSON can name, cannot be sent on."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(http: HttpRequest) -> Response:
            return await handle(_JsonRequest(http.scope, http.receive))

        return handle_json


class _JsonRequest(HttpRequest):
    async def json(self) -> Any:
        body = await self.body()
        told = json.loads(body, parse_constant=_refused_number, parse_float=_finite)
        if b"\\ud" in body or b"\\uD" in body:
            raw = json.dumps(told, ensure_ascii=False).encode("utf-16", "surrogatepass")
            told = json.loads(raw.decode("utf-16", "replace"))
        return told


def _refused_number(text: str) -> float:
    """NaN and infinities, which Python reads and JSON does not know: nobody could be told them."""
    raise json.JSONDecodeError(f"{text[:20]} is no number", text, 0)


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refused_number(text)


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
    top_k: Annotated[int, Field(ge=-1, le=_LONGEST)] | None = None  # nothing below 1 bounds
    min_p: Unit | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    stop: str | list[str] | None = None
    max_tokens: Length | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: Usage | None = None
    user: str | None = None
    logit_bias: dict[str, float] | None = None

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

    def check_known(self) -> None:
        """Raises Refused for what would change the answer, and cannot be had."""
        if self.n not in (None, 1):
            raise Refused(400, f"n: one answer at a time, not {self.n}", param="n")
        for name, instead in _NOT_TO_BE_HAD.items():
            if getattr(self, name, None):
                raise Refused(400, f"{name} is not to be had{instead}", param=name)


#: Efforts of OpenAI's protocol.
_EFFORTS = {"none": "off", "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high"}


def thinking_of(effort: Any, switches: Any = None) -> str | None:
    """How much is thought, by OpenAI's word and by what llama.cpp's and vLLM's servers hand to the template."""
    told = switches if isinstance(switches, dict) else {}
    is_on = next((told[name] for name in ("enable_thinking", "thinking") if isinstance(told.get(name), bool)), None)
    measure = _EFFORTS.get(str(told.get("reasoning_effort", effort)))
    if is_on is None:
        return measure
    return (measure if measure != "off" else None) or "on" if is_on else "off"


class ToolFunction(Loose):
    """A function that the model may call; parameters: the JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Loose):
    """A tool: functions are all there are."""

    type: Literal["function"]
    function: ToolFunction


class ChosenFunction(Loose):
    """The function that must be called."""

    name: str


class ToolChoice(Loose):
    """A call that is forced."""

    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Loose):
    """A schema that the answer must follow."""

    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class ResponseFormat(Loose):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> str:
        """Raises Refused."""
        if self.type == "text":
            return ""
        schema: Any = {"type": "object"}
        if self.type == "json_schema":
            if self.json_schema is None or self.json_schema.schema_ is None:
                raise Refused(400, "response_format: there is no schema in it", param="response_format")
            schema = self.json_schema.schema_
        return schema_grammar(schema, "response_format")


class ChatRequest(Sampled):
    """A chat completion that is asked for."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    max_completion_tokens: Length | None = None
    functions: list[Any] | None = None
    audio: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_id: str | None = None
    reasoning_effort: Any = None
    chat_template_kwargs: Any = None

    def internal(self, service: Service, http: HttpRequest) -> Request:
        """What the engine's thread is asked. Raises Refused."""
        self.check_known()
        longest = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or []]
        choice = self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else self.tool_choice
        return Request(
            model=self.model or "",
            messages=tuple(internal(message) for message in self.messages),
            tools=one_line(tools) if tools else "",
            tool_choice=checked_choice(choice or "auto", tools),
            parallel_calls=self.parallel_tool_calls is not False,
            grammar=self.response_format.grammar() if self.response_format else "",
            sampling=self.sampling(service.defaults),
            max_tokens=longest,
            stops=self.stops(),
            thinking=thinking_of(self.reasoning_effort, self.chat_template_kwargs),
            n_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            chat_id=self.chat_id,
            client=f"{client_of(http)} {self.user or ''}"[:300],
        )


def checked_choice(choice: str, tools: list[dict[str, Any]]) -> str:
    """The same. Raises Refused where no such tool is there."""
    names = [tool["function"]["name"] for tool in tools]
    if choice == "required" and not names:
        raise Refused(400, "tool_choice: there are no tools to call", param="tool_choice")
    if choice not in ("auto", "none", "required", *names):
        raise Refused(400, f"tool_choice: there is no function {choice[:50]!r}", param="tool_choice")
    return choice


def schema_grammar(schema: Any, param: str) -> str:
    """The grammar of a schema. Raises Refused."""
    try:
        return grammar_of(schema)
    except InvalidInput as error:
        raise Refused(400, f"{param}: {error}", param=param) from error


def text_of(content: str | list[TextPart], param: str) -> str:
    """The text of a content. Raises Refused for what is none."""
    if isinstance(content, str):
        return content
    if any(part.type not in _TEXTS or part.text is None for part in content):
        raise Refused(400, "this server reads text alone: a message has a part that is none", param=param)
    return "".join(part.text or "" for part in content)


def result_of(content: str | list[TextPart]) -> str:
    """The text of what came of a tool, without what is none."""
    if isinstance(content, str):
        return content
    return "".join((part.text or "") if part.type in _TEXTS else left_out(part.type) for part in content)


def left_out(kind: str) -> str:
    """What stands for a part of a tool's result that is no text: without it an agent could not go on."""
    return f"[{kind[:50]}: left out, since this model reads text alone]"


def internal(message: ChatMessage) -> Message:
    """A message as conversations have it. Raises Refused for what is no text."""
    if message.role == "user" and message.content is None:
        raise Refused(400, "a message of the user has content", param="messages")
    content = result_of(message.content or "") if message.role == "tool" else text_of(message.content or "", "messages")
    result = {"role": "system" if message.role == "developer" else message.role, "content": content}
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
    """A tool call as conversations have it.

    Arguments that are no JSON object are none: the model may have written them, and the conversation must go on.
    """
    try:
        told = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        told = {}
    return {"id": call_id, "name": name, "arguments": told if isinstance(told, dict) else {}}
