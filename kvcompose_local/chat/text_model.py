"""What a chat needs of a model beside the engine."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Protocol

from kvcompose_local.chat.reasoning import Format

#: A message of the conversation: role, content, and as "reasoning" what the model thought before an answer.
Message = dict[str, str]


class TextModel(Protocol):
    """The part of a model that a chat needs beside the engine (:class:`kvcompose_local.llama_ffi.model.Model`)."""

    @property
    def adds_bos(self) -> bool: ...

    @property
    def has_template(self) -> bool: ...

    @property
    def template_name(self) -> str: ...

    @property
    def folds_system(self) -> bool: ...

    @property
    def reasoning_format(self) -> Format: ...

    def use_template(self, name: str) -> None: ...

    def use_thinking(self, thinking: str | None) -> bool: ...

    def use_format(self, form: Format) -> None: ...

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        now: datetime | None = None,
        tools: Sequence[Any] = (),
    ) -> str: ...

    def special_text(self, which: str) -> str: ...

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = True) -> list[int]: ...

    def token_bytes(self, token: int) -> bytes: ...

    def control_text(self, token: int) -> str: ...

    def is_marker(self, text: str) -> bool: ...

    def is_end(self, token: int) -> bool: ...
