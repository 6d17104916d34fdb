"""Chat templates as Transformers renders them: Jinja in a sandbox, with the few names that GGUF templates expect.

llama-cpp-python has the same, in a module that imports all of its high-level classes; a start need not wait for them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, nodes, parser, sandbox

from kvcompose_local.errors import ModelError


class _Generation(ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks what training looks at; rendered, it is what stands in it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


class ChatTemplate:
    """One compiled template. Raises ModelError, when it is made or rendered, with what Jinja or the template says."""

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        """bos, eos: texts of these tokens, ``""`` where the vocabulary has none."""
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes HTML
        environment.globals.update(raise_exception=_refuse, strftime_now=_now, bos_token=bos, eos_token=eos)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise _failed(error) from error

    def render(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """The text of ``messages``, with what begins an answer if that is asked for."""
        # Templates ask whether tools "is none" as well as "is defined".
        unused: dict[str, Any] = dict.fromkeys(("functions", "function_call", "tools", "tool_choice"))
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **unused)
        except Exception as error:  # a template is a program: it may divide by zero, or call itself for ever
            raise _failed(error) from error


def _failed(error: Exception) -> ModelError:
    return ModelError(f"the model's chat template failed: {' '.join(str(error).split())}")
