"""Renders chat templates as Transformers does: Jinja in a sandbox, with the few names that GGUF templates expect.

llama-cpp-python has a renderer, too, in a module that imports all of its high-level classes, which delays the start.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, meta, nodes, parser, runtime, sandbox

from kvcompose_local.errors import TemplateError

#: Renders messages, with the beginning of an answer where that is wanted, for a date, with tools.
Renderer = Callable[..., str]

#: Names by which templates let thinking be turned on and off, or measured.
SWITCHES = ("enable_thinking", "thinking", "reasoning", "thinking_budget", "reasoning_effort")
ANOTHER = "--template NAME|FILE gives another"
#: Numbers that a template may multiply, and characters that it may add to what was said.
_LARGEST_FACTOR, _LARGEST_FRAME = 1 << 16, 4 << 20
#: Methods of strings whose results can be of any length.
_WIDENERS = {"center", "expandtabs", "ljust", "rjust", "zfill"}
#: Seconds that rendering may take, and more for each message: models' templates take milliseconds, but some look at all
#: messages for each of them.
_LONGEST_SECONDS, _MESSAGE_SECONDS = 4, 0.1
_TOOL_NAMES = ("functions", "function_call", "tools", "tool_choice")


class _TooLong(jinja2.TemplateError):
    """A template does not end, or takes nearly for ever."""


class EndlessTemplate(TemplateError):
    """The same while a template is being tried: one try is enough."""


class _Generation(ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks the text that is trained on; it is rendered as that text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which bounds ranges. This one bounds products, too: a template must not take all memory.

    It bounds time as well: a template may never end, and notices no Ctrl-C. Whatever takes long goes through loops and
    calls, which look at the clock.
    """

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._seconds = self._until = 0.0
        self.filters["kvc_timed"] = self._timed

    def allow(self, seconds: float) -> None:
        """Let what is rendered from now on take this long; then it raises TemplateError."""
        self._seconds, self._until = seconds, time.monotonic() + seconds

    def _look(self) -> None:
        if time.monotonic() > self._until:
            raise _TooLong(f"it takes more than {self._seconds:.0f} s")

    def _timed(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._look()
            yield item

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "kvc_timed", [], [], None, None, lineno=loop.lineno)
        return tree

    def call(self, context: runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._look()
        return super().call(context, obj, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _WIDENERS and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: runtime.Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(x) if isinstance(x, (str, list, tuple)) else abs(x) for x in (left, right)]
        most = _LARGEST_FACTOR if isinstance(left, (int, float)) and isinstance(right, (int, float)) else 1
        if max(sizes) > _LARGEST_FACTOR or sizes[0] * sizes[1] > most * _LARGEST_FACTOR:
            raise jinja2.TemplateError(f"{operator} makes too much of what it is given")
        return super().call_binop(context, operator, left, right)


def _environment() -> _Sandbox:
    return _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols])


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def jinja_renderer(source: str, *, bos: str, eos: str, thinking: str | None = None) -> Renderer:
    """The renderer of a Jinja template; bos, eos: texts of these tokens, ``""`` where the vocabulary has none.

    thinking: see :class:`kvcompose_local.chat_options.ChatOptions`. Raises TemplateError, when it is made or used, with
    what Jinja or the template says.
    """
    environment = _environment()
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes HTML
    del environment.filters["center"]
    environment.globals.update(raise_exception=_refuse, bos_token=bos, eos_token=eos)
    environment.globals.update(_switches(source, thinking) if thinking else {})
    try:
        template = environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise _failed(error) from error

    def render(
        messages: list[dict[str, Any]], add_generation_prompt: bool, now: datetime, tools: Sequence[Any] = ()
    ) -> str:
        left = _LARGEST_FRAME

        def bounded_range(*bounds: int) -> range:
            nonlocal left
            found = range(*bounds)
            if (left := left - len(found)) < 0:
                raise _TooLong("its loops do not end")
            return found

        known = {"messages": messages, "add_generation_prompt": add_generation_prompt, "strftime_now": now.strftime}
        known["range"] = bounded_range
        failure: Exception | None = None
        nothing: tuple[Any, ...] = (None, [], "")
        for without in nothing:  # templates ask whether tools "is none", or go over them
            try:
                environment.allow(_LONGEST_SECONDS + _MESSAGE_SECONDS * len(messages))
                names = dict.fromkeys(_TOOL_NAMES, without) | ({"tools": tools} if tools else {})
                pieces = template.generate(**known, **names)
                return _bounded(pieces, sum(len(str(told)) for told in (*messages, *tools)))
            except TypeError as error:
                failure = failure or error
            except _TooLong as error:
                raise EndlessTemplate(f"the model's chat template failed: {error}; {ANOTHER}") from error
            except Exception as error:  # a template is a program: it may divide by zero, or call itself for ever
                raise _failed(failure or error) from error
        raise _failed(failure or TypeError())

    return render


def names_in(source: str) -> set[str]:
    """The names that a template asks for. Raises TemplateError."""
    try:
        return meta.find_undeclared_variables(_environment().parse(source))
    except (jinja2.TemplateError, RecursionError) as error:
        raise _failed(error) from error


def _switches(source: str, thinking: str) -> dict[str, Any]:
    """What turns thinking on or off, under the names that a template asks for."""
    switches: dict[str, Any] = dict.fromkeys(("enable_thinking", "thinking", "reasoning"), thinking != "off")
    if thinking == "off":
        switches["thinking_budget"] = 0
        switches["reasoning_effort"] = "none" if re.search("""['"]none['"]""", source) else "low"
    elif thinking != "on":
        switches["reasoning_effort"] = thinking
    asked = names_in(source)
    return {name: value for name, value in switches.items() if name in asked}


def _bounded(pieces: Iterator[str], n_said: int) -> str:
    """The text of these pieces, unless it is out of proportion to the ``n_said`` characters of what was said."""
    text, left = [], _LARGEST_FRAME + 4 * n_said
    for piece in pieces:
        text.append(piece)
        left -= len(piece)
        if left < 0:
            raise _TooLong(f"it makes more than {_LARGEST_FRAME} characters of a conversation of {n_said}")
    return "".join(text)


def _failed(error: Exception) -> TemplateError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return TemplateError(f"the model's chat template failed: {reason}; {ANOTHER}")
