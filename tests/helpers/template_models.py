"""Real chat templates in a model whose tokens are bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any

from fake_engine import FakeModel
from llama_cpp_templates import templates

from kvcompose_local.chat.reasoning import Format
from kvcompose_local.chat.template import ChatTemplate

#: It adds a list of functions to a text before it looks whether there is one.
_NEEDS_TOOLS = {"fireworks-ai-llama-3-firefunction-v2"}
#: What is a marker in one of these templates.
MARKER = re.compile(
    r"<\|[^<>\s]+\|?>|<[^<>\s]+\|>|</?s>|\[/?[A-Z_]+\]|<｜[^<>]+｜>|<(?:start|end)_of_turn>|<SPECIAL_\d+>"
)


@cache
def names() -> list[str]:
    return sorted(set(templates()) - _NEEDS_TOOLS)


class TemplateModel(FakeModel):
    """Bytes as tokens, and a real template."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = ChatTemplate(source, bos="<s>", eos="</s>")

    def use_format(self, form: Format) -> None:
        self.source.format = form

    @property
    def folds_system(self) -> bool:  # type: ignore[override]
        return self.source.folds_system

    @property
    def reasoning_format(self) -> Format:  # type: ignore[override]
        return self.source.format

    def is_marker(self, text: str) -> bool:
        return bool(MARKER.fullmatch(text))

    def render_chat(  # type: ignore[override]
        self,
        messages: Sequence[dict[str, str]],
        *,
        add_generation_prompt: bool,
        now: datetime | None = None,
        tools: Sequence[Any] = (),
    ) -> str:
        return self.source.render(messages, add_generation_prompt=add_generation_prompt, now=now, tools=tools)
