"""Calls as models write them that have notations of their own, through a server: their markers are tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from llama_cpp_templates import templates
from scripted_model import write_scripted_model
from serving import serving
from tiny_models import write_tiny_model

QUESTION = [{"role": "user", "content": "What is it?"}]
TOOL: Any = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}
TEMPLATES = templates()


@pytest.mark.parametrize("kind", [gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED])
@pytest.mark.parametrize(
    ("name", "pieces", "last", "markers"),
    [
        (
            "google-gemma-4-31B-it",
            ["<|tool_call>", "call:look{at:", '<|"|>', "it}", "<tool_call|>"],
            "<channel|>",
            "<|turn> <turn|> <|channel> <channel|>",
        ),
        (
            "LFM2.5-8B-A1B",
            ["<|tool_call_start|>", "[look(at=", "'it}')]", "<|tool_call_end|>"],
            "\n",
            "<|im_start|> <|im_end|>",
        ),
        (
            "GLM-4.6",
            "<tool_call>,look\n,<arg_key>,at,</arg_key>,<arg_value>,it},</arg_value>,</tool_call>".split(","),
            "<|assistant|>",
            "<|user|> <|system|> <|assistant|>",
        ),
        (
            "ibm-granite-granite-3.3-2B-Instruct",
            ["<|tool_call|>", '[{"name": "look", ', '"arguments": {"at": "it}"}}]'],
            "<|end_of_role|>",
            "<|start_of_role|> <|end_of_role|> <|end_of_text|>",
        ),
    ],
)
def test_models_call_in_notations_of_their_own(
    tmp_path: Path, name: str, pieces: list[str], last: str, markers: str, kind: gguf.TokenType
) -> None:
    marks = {piece: kind for piece in pieces if piece.startswith("<")}
    others = dict.fromkeys(markers.split(), gguf.TokenType.CONTROL)
    if name.startswith("google"):  # a quote comes twice, and each token is followed by one
        pieces = [*pieces[:3], 'it}<|"|>}', pieces[4]]
    model = write_scripted_model(
        tmp_path / "calls.gguf", pieces, template=TEMPLATES[name], last=last, kinds={**others, **marks}
    )
    with serving(model) as server:
        choice = server.chat(QUESTION, max_tokens=30, tools=[TOOL])["choices"][0]
        assert choice["finish_reason"] == "tool_calls", choice
        assert not (choice["message"]["content"] or "").strip()
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "look", "arguments": '{"at": "it}"}'}
        history = [*QUESTION, choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "a cat"}]
        server.chat(history, max_tokens=2, tools=[TOOL])


def test_a_model_without_a_notation_is_read_as_it_was_told(tmp_path: Path) -> None:
    """Command R+ refuses the tools, so it is told Hermes's notation; its template looks like Llama's."""
    name = "CohereForAI-c4ai-command-r-plus-tool_use"
    pieces = ["<tool_call>\n", '{"name": "look", ', '"arguments": {"at": "it"}}', "\n</tool_call>"]
    others = dict.fromkeys(("<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"), gguf.TokenType.CONTROL)
    model = write_scripted_model(
        tmp_path / "told.gguf", pieces, template=TEMPLATES[name], last="<|CHATBOT_TOKEN|>", kinds=others
    )
    with serving(model, n_ctx=4096) as server:
        choice = server.chat(QUESTION, max_tokens=30, tools=[TOOL])["choices"][0]
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": "it"}'}


@pytest.mark.parametrize("name", ["google-gemma-4-31B-it", "GLM-4.6", "NVIDIA-Nemotron-Nano-v2", "LFM2.5-8B-A1B"])
def test_a_call_is_forced_in_every_notation(tmp_path: Path, name: str) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", template=TEMPLATES[name])
    here: Any = {"type": "function", "function": {"name": "here", "parameters": {"type": "object", "properties": {}}}}
    with serving(model) as server:
        for choice in ("required", {"type": "function", "function": {"name": "here"}}):
            told = server.chat(QUESTION, max_tokens=60, tools=[here], tool_choice=choice)["choices"][0]
            (call,) = told["message"]["tool_calls"]
            assert (call["function"], told["message"]["content"]) == ({"name": "here", "arguments": "{}"}, None)
