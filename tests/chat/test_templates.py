"""Real chat templates: conversations with every template that llama.cpp ships, to the byte that the cache is fed.

What a template says of the past changes from turn to turn. Whatever it does, all that was said stands in the transcript
once, the transcript says what the template says, and nothing is read again without being told.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime

import pytest
from fake_engine import FakeEngine, FakeModel
from llama_cpp_templates import templates
from template_models import TemplateModel, names

from kvcompose_local.chat import Chat
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.chat.reasoning import FORMATS, Format, Reader, format_of
from kvcompose_local.chat.template import ChatTemplate
from kvcompose_local.chat.transcript import Transcript
from kvcompose_local.errors import ModelError

#: It repeats its instructions after the last message, and takes those of the turn before back.
_MOVES_INSTRUCTIONS = {"CohereForAI-c4ai-command-r-plus-tool_use"}


def as_the_model_says_it(form: Format, prompt: str, thought: str, answer: str) -> str:
    """An answer in the format of its model, with thinking or without."""
    opened = form.opens_at_end(prompt)
    opens, closes = ((texts or ("",))[0].replace("*", "") for texts in (form.opens, form.answers))
    if form.name == "functionary":
        return "all\n" + answer
    if form.name in ("harmony", "solar", "muse"):  # each channel is a message of its own
        again = {"harmony": "<|end|><|start|>assistant", "solar": "<|end|><|begin|>assistant"}
        between = again.get(form.name, "<|eom|><|start|>assistant")
        return (opens + thought + between if thought else "") + closes + answer
    if not thought and not opened:
        return answer
    ends = {"command": "<|START_RESPONSE|>", "kimi": "<|open|>response<|sep|>"}.get(form.name, "")
    return f"{'' if opened else opens}{thought}{closes}{ends}{answer}"


class Conversation:
    """Four questions with documents between them, answered by a script."""

    said = (
        "DOCUMENT one",
        "Question a?",
        "Question b?",
        "DOCUMENT two",
        "DOCUMENT three",
        "Question c?",
        "Question d?",
    )

    def __init__(
        self, name: str, *, answer: str, thought: str = "", system: str | None = None, extra: str = ""
    ) -> None:
        self.model = TemplateModel(templates()[name])
        self.engine = FakeEngine(200_000)
        self.notes: list[str] = []
        self.chat = Chat(  # the cache takes all, so that only the template decides
            self.model,
            CacheMemory(self.engine, 200_000, compose=False),
            system=system,
            on_note=self.notes.append,
        )
        self.shown: list[str] = []
        for text in self.said:
            if text.startswith("DOCUMENT"):
                self.chat.read(f"{text} is here. {extra}")
                continue
            k = len(self.shown) + 1
            self.engine.answers = []
            asked = self.chat.ask(f"{text} {extra}", max_tokens=9999)
            self._answer_with(k, answer, thought)
            self.shown.append("".join(asked))
        self.stands = bytes(self.chat.memory.tokens).decode()

    def _answer_with(self, k: int, answer: str, thought: str) -> None:
        engine, sample = self.engine, FakeEngine.sample

        def say() -> int:
            if not engine.answer_left:
                form, fed = self.model.reasoning_format, self.chat.transcript.fed
                engine.answers = [as_the_model_says_it(form, fed, thought.format(k), answer.format(k))]
            return sample(engine)

        engine.sample = say  # type: ignore[method-assign]

    @property
    def n_extra(self) -> int:
        """Tokens that were fed and are not in the transcript."""
        return len(self.engine.fed) - len(self.chat.memory.tokens)


def squeezed(text: str) -> str:
    return "".join(text.split())


def check_said_once(c: Conversation, system: str | None = None) -> None:
    places = [c.stands.find(text) for text in c.said]
    assert places == sorted(places)
    assert [c.stands.count(text) for text in (*c.said, system or "DOCUMENT one")] == [1] * (len(c.said) + 1)
    assert [c.stands.count(f"Answer {k}.") for k in range(1, 5)] == [1] * 4


ANSWERS = {"tidy": "Answer {}.", "untidy": "\n Answer {}. \n\n", "tools": 'Answer {}. {{"name": "f"}}'}


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("system", [None, "Speak Dutch."])
@pytest.mark.parametrize("name", names())
def test_nothing_is_fed_twice(name: str, system: str | None, kind: str) -> None:
    tools = '<tool_call>{"name": "f", "arguments": {}}</tool_call> [TOOL_CALLS] <|tool|>' if kind == "tools" else ""
    c = Conversation(name, answer=ANSWERS[kind], system=system, extra=tools)
    check_said_once(c, system)
    assert c.shown == [c.shown[0].replace("1", str(k)) for k in range(1, 5)]
    assert squeezed(c.shown[0]) == squeezed(ANSWERS[kind].format(1)), "no marker is shown"
    if name not in _MOVES_INSTRUCTIONS:
        assert (c.n_extra, c.notes) == (0, [c.notes[0]] if c.model.folds_system and system else [])


@pytest.mark.parametrize("name", names())
def test_thinking_is_told_apart_and_given_back_as_the_template_wants_it(name: str) -> None:
    c = Conversation(name, answer="Answer {}.", thought="\nhm {}\n")
    if c.model.reasoning_format.name == "functionary":
        return
    check_said_once(c)
    assert [squeezed(s) for s in c.shown] == [f"<think>hm{k}</think>Answer{k}." for k in range(1, 5)]
    answers = [m for m in c.chat.messages if m["role"] == "assistant"]
    assert answers == [{"role": "assistant", "content": f"Answer {k}.", "reasoning": f"hm {k}"} for k in range(1, 5)]
    says = c.model.render_chat(c.chat.messages[:-1], add_generation_prompt=True)
    assert [f"hm {k}" in c.stands for k in (1, 2, 3)] == [f"hm {k}" in says for k in (1, 2, 3)]


# -- formats ----------------------------------------------------------------------------------------------------------


def test_every_format_is_found_in_a_template_that_llama_cpp_ships_or_known_not_to_be() -> None:
    found = {format_of(source).name for source in templates().values()}
    assert {form.name for form in FORMATS} - found == {"answer", "kimi-vl", "reasoning", "thinking", "thought"}


def read(form: Format, text: str, *, size: int, opened: str = "") -> tuple[str, str]:
    reader = Reader(form, opened=opened)
    pieces = [said for at in range(0, len(text), size) for said in reader.take(text[at : at + size])]
    pieces += reader.finish()
    return tuple("".join(p for p in pieces if p.is_reasoning is kind) for kind in (True, False))  # type: ignore[return-value]


@pytest.mark.parametrize("form", [form for form in FORMATS if form.opens], ids=lambda form: form.name)
def test_a_reader_is_the_same_however_the_answer_is_cut(form: Format) -> None:
    for opens in form.opens:
        closes = next(text for text in form.answers if form.closes(opens, text))
        said = as_the_model_says_it(form, "", "a < b <th", "x <|y [z] <").replace(form.opens[0].replace("*", ""), opens)
        said = said.replace(form.answers[0], closes).replace("*", "")
        for size in (1, 2, 3, 7, 1000):
            assert read(form, said, size=size) == ("a < b <th", "x <|y [z] <"), (opens, size)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("said", "thought", "answer"),
    [
        ("<|channel|>analysis to=none<|message|>hm{}<|channel|>commentary<|message|>yes", "hm", "yes"),
        ("<|channel|>analysis<|message|>hm{}<|channel|>final <|constrain|>json<|message|>yes", "hm", "yes"),
        ("<|channel|>final <|constrain|>json<|message|>yes", "", "yes"),
        ("<|channel|>commentary<|message|>Well. {}<|channel|>final<|message|>yes", "", "Well. yes"),
        ("<|channel|>commentary to=assistant<|channel|>analysis<|message|>hm{}<|channel|>final<|message|>a", "hm", "a"),
        ("<|channel|>analysis<|message|>hm{}<|channel|>commentary to=assistant<|channel|>final<|message|>a", "hm", "a"),
        ("<|channel|>analysis<|message|>hm{} to=python<|channel|>commentary <|constrain|>code<|message|>1", "hm", "1"),
    ],
)
def test_headers_of_channels_are_no_text(said: str, thought: str, answer: str, size: int) -> None:
    assert read(format_of("<|channel|>"), said.replace("{}", "<|end|><|start|>assistant"), size=size) == (
        thought,
        answer,
    )


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_thinking_is_the_first_part_and_ends_once(size: int) -> None:
    code = "\n<think>\nx</think>\n</think>\n"
    for form in (format_of(""), format_of("</think>"), format_of("</think></thinking>")):
        for said in ("Write `<think>` and `</think>` around it.", f"Here:{code}"):
            assert read(form, said, size=size) == ("", said)
        assert read(form, f"<think>a</think>b{code}", size=size) == ("a", f"b{code}")
        assert read(form, f"a</think>b{code}", size=size, opened="<think>") == ("a", f"b{code}")
        assert read(form, "<think>a</think>", size=size, opened="<think>") == ("a", "")
        assert read(form, "a <think> b </thinking> c</think>d", size=size, opened="<think>") == (
            "a <think> b </thinking> c",
            "d",
        )
    assert read(format_of("</think>"), "cut short", size=size, opened="<think>") == ("cut short", "")


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_tags_around_an_answer_are_none_in_it(size: int) -> None:
    granite = format_of("<response></response>")
    said = "It says <response>ok</response> and\n</response>\nmore"
    assert read(granite, said, size=size) == ("", said)
    assert read(granite, f"<think>a</think>\n<response>{said}</response>\n", size=size) == ("a", "\n" + said)
    assert read(format_of(">>>all"), "all\nThat is all\n", size=size) == ("", "That is all\n")


def test_a_template_that_knows_several_tags_speaks_its_own() -> None:
    form = format_of("{% if '</thinking>' in x %}{{ x.split('</think>') }}{% endif %}<think>")
    assert form.opens_at_end("[assistant]<think>\n") == "<think>"
    assert read(form, "hm</think>yes", size=2, opened="<think>") == ("hm", "yes")
    assert read(form, "<thinking>hm</thinking>yes", size=2) == ("hm", "yes")


# -- what templates take ----------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "What is here?"}
SYSTEM = {"role": "system", "content": "Be terse."}


def loop(content: str) -> str:
    """A template that shows each message as ``content`` does."""
    begin, end = "{% for m in messages %}[{{ m.role }}]", "{% endfor %}"
    return begin + content + end + "{% if add_generation_prompt %}[assistant]{% endif %}"


def rendered(source: str, *messages: dict[str, str]) -> str:
    return ChatTemplate(source).render(messages, add_generation_prompt=True)


def test_content_goes_in_parts_where_text_vanishes() -> None:
    typed = loop("{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}")
    assert rendered(typed, USER) == "[user]What is here?[assistant]"
    assert rendered(typed, SYSTEM, USER) == "[system]Be terse.[user]What is here?[assistant]"
    either = loop("{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}")
    assert rendered(either, USER) == "[user]What is here?[assistant]"


@pytest.mark.parametrize(
    "source",
    [
        loop("{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"),
        loop("{% if m.role != 'system' %}{{ m.content }}{% endif %}"),
        loop("{{ {'user': m.content, 'assistant': m.content}[m.role] }}"),
    ],
    ids=["refused", "dropped", "unknown"],
)
def test_a_system_prompt_that_is_not_taken_goes_before_the_first_message(source: str) -> None:
    template = ChatTemplate(source)
    assert template.folds_system
    assert template.render([SYSTEM, USER], add_generation_prompt=True).endswith(
        "[user]Be terse.\n\nWhat is here?[assistant]"
    )


@pytest.mark.parametrize(
    "said",
    [
        "system a, user b, system c",
        "system a, user b, system c, assistant d, user e",
        "user a, user b",
        "user a, assistant b, assistant c, user d",
        "system a",
    ],
)
@pytest.mark.parametrize("name", names())
def test_conversations_that_take_no_turns_are_told_by_every_template(name: str, said: str) -> None:
    """As agents send them: a later system prompt, two messages of one user."""
    words = [part.split() for part in said.split(", ")]
    messages = [{"role": role, "content": f"word-{letter}"} for role, letter in words]
    text = ChatTemplate(templates()[name], bos="<s>", eos="</s>").render(messages, add_generation_prompt=True)
    places = [text.rindex(f"word-{letter}") for role, letter in words if role != "system"]
    assert places == sorted(places)
    assert all(f"word-{letter}" in text for _, letter in words)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("chatml-ish", "your message"),
        ("<|user|>{prompt}<|assistant|>", "your message"),
        (loop("{{ m.content[:8] }}"), "your message"),
        ("{% set m = messages[-1] %}[{{ m.role }}]{{ m.content }}", "your message"),
        ("{% for m in messages[:2] %}{{ m.content }}{% endfor %}", "your message"),
    ],
)
def test_a_template_that_loses_what_was_said_is_refused_in_one_line(source: str, what: str) -> None:
    said = [USER, {"role": "assistant", "content": "Nothing."}, {"role": "user", "content": "And somewhere else?"}]
    with pytest.raises(ModelError, match=rf"^the model's chat template leaves out {what}.*--template NAME\|FILE"):
        ChatTemplate(source).render(said, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["HuggingFaceTB-SmolLM3-3B", "NVIDIA-Nemotron-Nano-v2"])
def test_words_that_a_template_takes_out_are_not_missed(name: str) -> None:
    template = ChatTemplate(templates()[name], bos="<s>", eos="</s>")
    for switch in ("/think", "/no_think"):
        system = {"role": "system", "content": f"Be terse. {switch}"}
        user = {"role": "user", "content": f"What is in src{switch}/in.py?"}
        text = template.render([system, user], add_generation_prompt=True)
        assert "Be terse." in text
        assert "/in.py?" in text
    with pytest.raises(ModelError, match="leaves out"):
        rendered(loop("{{ m.content | replace('/', '') }}"), {"role": "user", "content": "It is in /think/in.py"})


@pytest.mark.parametrize("name", names())
def test_tools_may_lack_what_is_empty(name: str) -> None:
    template = ChatTemplate(templates()[name], bos="<s>", eos="</s>")
    bare = {"type": "function", "function": {"name": "look_around"}}
    assert "look_around" in template.render([USER], add_generation_prompt=True, tools=[bare])


@pytest.mark.parametrize("name", names())
def test_thinking_talk_and_a_call_go_into_one_answer(name: str) -> None:
    """Some templates leave out what is said before a call; none may end the chat for it."""
    template = ChatTemplate(templates()[name], bos="<s>", eos="</s>")
    calling = {"role": "assistant", "content": "I look.", "reasoning": "Hm.", "tool_calls": json.dumps(CALLS[:1])}
    text = template.render([USER, calling, RESULTS[0]], add_generation_prompt=True, tools=[LOOK])
    assert "Sunny in Paris" in text
    assert "I look." in text or name.startswith(("Cohere", "MiniMax-M1", "Mistral", "mistral", "Nous", "meta-llama"))


@pytest.mark.parametrize("name", [name for name in names() if "firefunction" not in name])  # which takes no such text
def test_a_chat_may_begin_with_a_greeting(name: str) -> None:
    """As cards of characters do; templates whose users and assistants take turns get a user who said nothing."""
    greeted = [{"role": "assistant", "content": "Hello, traveller!"}, USER]
    for said in (greeted, [{"role": "system", "content": "You are Bob."}, *greeted]):
        text = ChatTemplate(templates()[name], bos="<s>", eos="</s>").render(said, add_generation_prompt=True)
        assert text.index("Hello, traveller!") < text.index(USER["content"])


def test_dates_are_of_the_chats_beginning() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    assert template.render([USER], add_generation_prompt=True, now=datetime(2026, 3, 1)) == "01 Mar 2026 What is here?"


@pytest.mark.parametrize("name", names())
def test_an_answer_that_was_stopped_at_once_leaves_a_chat_that_goes_on(name: str) -> None:
    said = [USER, {"role": "assistant", "content": ""}, {"role": "user", "content": "And now?"}]
    assert "And now?" in ChatTemplate(templates()[name], bos="<s>", eos="</s>").render(said, add_generation_prompt=True)


# -- what cannot be taken back ----------------------------------------------------------------------------------------


CALLS = [{"id": f"abcdefgh{i}", "name": "look", "arguments": {"at": city}} for i, city in enumerate(("Paris", "Oslo"))]
RESULTS = [
    {"role": "tool", "content": f"Sunny in {call['arguments']['at']}", "tool_call_id": call["id"], "name": "look"}
    for call in CALLS
]
LOOK = {"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("n_calls", [1, 2])
@pytest.mark.parametrize("name", names())
def test_results_of_tools_are_fed_where_the_cache_cannot_go_back(name: str, n_calls: int) -> None:
    said = Transcript(TemplateModel(templates()[name]), None)
    calling = {"role": "assistant", "content": "", "tool_calls": json.dumps(CALLS[:n_calls])}
    said.tell([USER], json.dumps([LOOK]))
    said.follow(said.prompt(), 0, lambda _position: True)
    said.begin_answer()
    said.say("whatever the model calls it by")
    said.messages.append(calling)
    said.tell([USER, calling, *RESULTS[:n_calls]], json.dumps([LOOK]))
    said.follow(said.prompt(), len(said.tokens), lambda _position: False)
    after = said.fed.rpartition("whatever the model calls it by")[2]
    assert all(result["content"] in after for result in RESULTS[:n_calls])


def test_a_rewritten_past_that_is_compressed_stays_and_is_told_of_once() -> None:
    """The template shouts the first answer from the second turn on, when its cells are composed."""
    notes: list[str] = []
    engine = FakeEngine(300, ["one", "two", "three", "four"])
    model = FakeModel()
    plain = model.render_chat

    def render(messages: Sequence[dict[str, str]], **options: object) -> str:
        text = plain(messages, **options)  # type: ignore[arg-type]
        return text.replace("]one[", "]ONE ONE[") if len(messages) > 3 else text

    model.render_chat = render  # type: ignore[assignment,method-assign]
    chat = Chat(model, CacheMemory(engine, 3000), on_note=notes.append)
    list(chat.ask("Hi", max_tokens=9))
    chat.read("a" * 600)
    fed = len(engine.fed)
    list(chat.ask("More?", max_tokens=9))
    list(chat.ask("And?", max_tokens=9))
    assert len(engine.fed) - fed == len("More?[/][a]two[/][u]And?[/][a]three")
    assert len(notes) == 1
    assert "stays as it was read" in notes[0]


def test_what_is_read_again_is_told_where_it_is_more_than_the_new_turn() -> None:
    notes: list[str] = []
    engine, model = FakeEngine(3000, ["one", "two", "three"]), FakeModel()
    plain = model.render_chat

    def render(messages: Sequence[dict[str, str]], **options: object) -> str:
        return f"[{len(messages) // 3}]" + plain(messages, **options)  # type: ignore[arg-type]

    model.render_chat = render  # type: ignore[assignment,method-assign]
    chat = Chat(model, CacheMemory(engine, 3000, compose=False), on_note=notes.append)
    chat.read("a" * 100)
    list(chat.ask("Hi", max_tokens=9))
    list(chat.ask("More?", max_tokens=9))
    again = chat.turns[-1].reread_tokens
    assert again > 100
    assert notes == [f"the chat template rewrites what was said: {again} tokens are read again"]
    assert bytes(chat.memory.tokens).decode() == render(chat.messages[:-1], add_generation_prompt=True) + "two"


def test_parts_go_to_the_roles_that_take_them() -> None:
    source = loop("{% if m.role == 'user' %}{{ m.content[0].text }}{% else %}{{ m.content }}{% endif %}")
    said = [SYSTEM, USER, {"role": "assistant", "content": "Nothing."}, {"role": "user", "content": "And now?"}]
    assert rendered(source, *said) == "[system]Be terse.[user]What is here?[assistant]Nothing.[user]And now?[assistant]"


@pytest.mark.parametrize("altered", ["m.content | e", "m.content | tojson", "m.content | upper", "m.content | lower"])
def test_what_a_template_escapes_or_capitalizes_is_not_lost(altered: str) -> None:
    said = {"role": "user", "content": 'It says "no" & <more>:\nO\'Hara'}
    assert rendered(loop("{{ %s }}" % altered), said)  # noqa: UP031 - braces


@pytest.mark.parametrize("tag", ["thinking", "thought", "reasoning", "think"])
@pytest.mark.parametrize("is_told", [True, False])
def test_tags_that_models_were_taught_are_told_apart(tag: str, is_told: bool) -> None:
    """Where the template says nothing of them, an answer that begins with them does."""
    source = loop(f"{{{{ m.content.split('</{tag}>')[-1] }}}}" if is_told else "{{ m.content }}")
    model = TemplateModel(source)
    engine = FakeEngine(2000, [f"<{tag}>hm</{tag}> Yes.", "No."])
    chat = Chat(model, CacheMemory(engine, 2000, compose=False))
    assert "".join(chat.ask("Hi", max_tokens=99)) == "<think>hm</think> Yes."
    list(chat.ask("And?", max_tokens=99))
    assert (b"hm" in bytes(chat.memory.tokens)) is not is_told
    assert chat.turns[-1].reread_tokens == (len("Yes.") if is_told else 0)


def test_white_space_before_bos_is_no_reason_for_two() -> None:
    model = TemplateModel("\n{{ bos_token }}" + loop("{{ m.content }}"))
    model.adds_bos = True  # type: ignore[misc]
    model.special_text = lambda which: "<s>"  # type: ignore[method-assign]
    begun: list[bool] = []

    def tokenize(text: str, *, add_bos: bool = False, special: bool = True) -> list[int]:
        begun.append(add_bos)
        return list(text.encode())

    model.tokenize = tokenize  # type: ignore[method-assign]
    chat = Chat(model, CacheMemory(FakeEngine(500, ["ok"]), 500, compose=False))
    list(chat.ask("Hi", max_tokens=9))
    assert not any(begun)
