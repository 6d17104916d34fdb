"""Tokens that end an answer: llama.cpp's list, what it does not read, and what the chat template says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from kvcompose_local.errors import ModelError

if TYPE_CHECKING:
    from kvcompose_local.chat.template import ChatTemplate

#: Texts of tokens that do end an answer, among the tokens that llama.cpp takes for EOS by default.
_ENDS = frozenset(
    """</s> <eos> <EOS> [EOS] <|eos|> <|plamo:eos|> <|endoftext|> <|end_of_text|> <|im_end|> <|eot_id|> <|eom_id|>
    <|end|> <|return|> <end_of_turn> <turn|> <EOT> [EOT] <｜end▁of▁sentence｜> <end_of_utterance>""".split()
)
#: An answer and the message behind it, which a template gives back as they are.
_ANSWER, _NEXT = "Answered0", "Asked1"


class _Model(Protocol):
    """What is asked of a :class:`kvcompose_local.llama_ffi.model.Model`."""

    @property
    def template(self) -> ChatTemplate: ...

    @property
    def eos_by_type(self) -> int: ...

    def metadata(self, key: str) -> str | None: ...

    def numbers(self, key: str) -> list[int]: ...

    def special_token(self, which: str) -> int | None: ...

    def special_text(self, which: str) -> str: ...

    def token_text(self, token: int) -> str: ...

    def tokenize(self, text: str) -> list[int]: ...

    def is_marker(self, text: str) -> bool: ...

    def is_listed_end(self, token: int) -> bool: ...


class Endings:
    """The ends of a model's answers, with one chat template."""

    def __init__(self, model: _Model) -> None:
        self._model = model
        self._not_ends = _default_end(model)
        # Ollama's converter lists these, and llama.cpp does not read them.
        self._further = frozenset(model.numbers("tokenizer.ggml.eos_token_ids")) | self._of_template()

    def holds(self, token: int) -> bool:
        """Whether ``token`` ends an answer."""
        return token in self._further or (self._model.is_listed_end(token) and token not in self._not_ends)

    def _of_template(self) -> frozenset[int]:
        """What the template writes behind an answer, or begins the next message with, where llama.cpp knows no end.

        Where the template has a place for the header's EOS, that ends answers, and a marker behind messages may stand
        within one: gpt-oss's ``<|end|>`` ends its thinking, too.
        """
        model = self._model
        try:
            template = model.template
            behind = _behind_answer(template)
        except ModelError:
            return frozenset()
        eos = model.special_text("eos")
        tokens = model.tokenize(behind)
        if (eos and eos in template.source) or any(model.is_listed_end(token) for token in {*tokens} - self._not_ends):
            return frozenset()
        return frozenset([token for token in tokens if model.is_marker(model.token_text(token))][:1])


def _behind_answer(template: ChatTemplate) -> str:
    """What stands between an answer and the message behind it. Raises ModelError where the template fails."""
    messages = [
        {"role": role, "content": content}
        for role, content in (("user", "Asked0"), ("assistant", _ANSWER), ("user", _NEXT))
    ]
    _, _, rest = template.render(messages, add_generation_prompt=False).partition(_ANSWER)
    behind, found, _ = rest.partition(_NEXT)
    return behind if found else ""


def _default_end(model: _Model) -> frozenset[int]:
    """The token that llama.cpp takes for EOS for no other reason than the vocabulary's type."""
    token = model.eos_by_type
    if token < 0 or model.special_token("eos") is not None or model.token_text(token) in _ENDS:
        return frozenset()
    named = (model.metadata(f"tokenizer.ggml.{which}_token_id") for which in ("eot", "eom"))
    return frozenset() if str(token) in named else frozenset([token])
