"""Chat templates: llama-cpp-python's renderer is the oracle, on every template that llama.cpp is tested with."""

from __future__ import annotations

import ctypes
import time
from datetime import datetime
from typing import Any

import pytest
from llama_cpp_templates import templates

from kvcompose_local.chat import rendering
from kvcompose_local.chat.rendering import jinja_renderer
from kvcompose_local.chat.template import ChatTemplate
from kvcompose_local.errors import ModelError
from kvcompose_local.llama_ffi import library

_CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hi & <welcome> – “you”"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTwo."},
        {"role": "user", "content": "Three?"},
    ],
    [{"role": "assistant", "content": "first"}, {"role": "tool", "content": "second"}],  # many refuse it
)


@pytest.fixture
def formatter() -> Any:
    """llama-cpp-python's class, whose package takes llama.cpp's log for itself."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    library.lib.llama_log_set(library._on_log, ctypes.c_void_p(0))
    return Jinja2ChatFormatter


@pytest.mark.parametrize("add", [False, True])
def test_renders_what_llama_cpp_python_does(add: bool, formatter: Any) -> None:
    n_texts = n_refused = 0
    for name, source in templates().items():
        ours, theirs = jinja_renderer(source, bos="<s>", eos="</s>"), formatter(source, "</s>", "<s>", add)
        for messages in _CONVERSATIONS:
            try:
                expected = theirs(messages=messages).prompt
            except TypeError:
                continue  # it goes over tools, and there are none: ours is given an empty list
            except Exception:
                n_refused += 1
                with pytest.raises(ModelError, match="chat template failed"):
                    ours(messages, add, datetime.now())
            else:
                n_texts += 1
                assert ours(messages, add, datetime.now()) == expected, name
    assert n_texts > 100
    assert n_refused > 10


def test_what_templates_expect() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}{% endfor %}"
        "{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ strftime_now('%Y') | length }}"
    )
    messages = [{"role": "user", "content": "<é>"}] * 2
    rendered = ChatTemplate(source, bos="<s>", eos="</s>").render(messages, add_generation_prompt=False)
    assert rendered == '"<é>"<s></s>True4'


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('no systems here') }}", "no systems here"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "do not end|too much|takes more than"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
            "do not end|takes more than",
        ),
        (
            "{% for a in 'x' * 9999 %}{% for b in messages[0].content * 9999 %}{{ a }}{% endfor %}{% endfor %}",
            "more than",
        ),
        ("{{ 'x' * 999999999 }}", "makes too much"),
        ("{{ ('x' * 9999) * 9999 }}", "makes too much"),
        ("{{ 9 ** 999999999 }}", "makes too much"),
        ("{% if %}", "Expected an expression"),
        ("{{ " + "(" * 100_000, ""),
    ],
)
def test_a_template_that_fails_is_one_line(source: str, said: str) -> None:
    with pytest.raises(ModelError, match=rf"^the model's chat template failed: .*{said}"):
        ChatTemplate(source, bos="", eos="").render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)


@pytest.mark.parametrize(
    "source",
    [
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{% set s = 'x' * 9999 %}{% for a in s %}{% for b in s %}{% for c in s %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for a in [[]] recursive %}{{ loop([a]) if loop.depth < 99 }}{{ loop([a]) if loop.depth < 99 }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_LONGEST_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(ModelError, match="takes more than"):
        ChatTemplate(source).render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert time.monotonic() - began < 2


def test_a_long_conversation_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some templates look at all messages for each of them."""
    monkeypatch.setattr(rendering, "_LONGEST_SECONDS", 0.01)
    source = "{% for m in messages %}{% for n in messages %}{% endfor %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi."}] * 500
    chat = ChatTemplate(source)
    assert chat.render([*messages, messages[0]], add_generation_prompt=True).count("[user]") == 501


def test_a_text_that_is_asked_for_again_is_not_rendered_again() -> None:
    rendered = []

    def render(messages: list[dict[str, Any]], *_: Any) -> str:
        rendered.append(messages)
        return "".join(str(message["content"]) for message in messages)

    chat, hi = ChatTemplate("", renderer=render), {"role": "user", "content": "Hi"}
    assert chat.render([hi], add_generation_prompt=True) == "Hi"
    n_rendered = len(rendered)
    assert chat.render([dict(hi)], add_generation_prompt=True) == "Hi"
    assert len(rendered) == n_rendered
    hi["content"] = "Ho"
    assert chat.render([hi], add_generation_prompt=True) == "Ho"


# -- thinking ---------------------------------------------------------------------------------------------------------

#: What the prompts of these end with: (off, on).
SWITCHED = {
    "Qwen3.5-4B": ("<think>\n\n</think>\n\n", "<|im_start|>assistant\n<think>\n"),
    "Qwen-Qwen3-0.6B": ("<think>\n\n</think>\n\n", "<|im_start|>assistant\n"),
    "GLM-4.7-Flash": ("</think>", "<think>"),
    "deepseek-ai-DeepSeek-V3.1": ("<think></think>", "<think>"),
    "google-gemma-4-31B-it": ("<|channel>thought\n<channel|>", "<|turn>model\n"),
}


def prompt_of(name: str, thinking: str | None) -> str:
    template = ChatTemplate(templates()[name], bos="<s>", eos="</s>", thinking=thinking)
    return template.render([{"role": "user", "content": "hi"}], add_generation_prompt=True)


@pytest.mark.parametrize("name", SWITCHED)
def test_thinking_is_turned_off_and_on(name: str) -> None:
    off, on = (prompt_of(name, thinking) for thinking in ("off", "on"))
    assert (off.endswith(SWITCHED[name][0]), on.endswith(SWITCHED[name][1])) == (True, True)
    assert prompt_of(name, "high") == on


def test_thinking_has_a_measure_where_the_template_has_one() -> None:
    for thinking, told in (("low", "low"), ("high", "high"), ("off", "low"), ("on", "medium"), (None, "medium")):
        assert f"Reasoning: {told}" in prompt_of("openai-gpt-oss-120b", thinking)
    assert "budget" in prompt_of("ByteDance-Seed-OSS", "off")
    assert prompt_of("ByteDance-Seed-OSS", "on") == prompt_of("ByteDance-Seed-OSS", None)


def test_a_template_may_have_no_switch() -> None:
    assert not ChatTemplate("{{ messages[0].content }}{% set thinking = true %}{{ thinking }}").has_switch
    assert not ChatTemplate("chatml", renderer=lambda *_: "").has_switch
    for name in SWITCHED:
        assert ChatTemplate(templates()[name]).has_switch
