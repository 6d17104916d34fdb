"""Turns, templates and interrupts, on the fake engine: what the cache was fed, to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from fake_engine import FakeEngine, FakeModel

from kvcompose_local.chat import Chat, Place
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.errors import ContextFull, InvalidInput, ModelError


def make(answers: list[str], *, n_cells: int = 500, n_ctx: int = 500, **options: object) -> tuple[Chat, FakeEngine]:
    model = FakeModel(**{k: bool(options.pop(k)) for k in ("template", "trims", "forgets") if k in options})
    engine = FakeEngine(n_cells, answers)
    return Chat(model, CacheMemory(engine, n_ctx, compose=n_cells < n_ctx), **options), engine  # type: ignore[arg-type]


def test_turns_are_fed_once_and_joined_by_the_template() -> None:
    chat, engine = make(["one", "two"], system="S")
    assert "".join(chat.ask("Hi", max_tokens=9)) == "one"
    assert "".join(chat.ask("More", max_tokens=9)) == "two"
    assert engine.fed == b"[s]S[/][u]Hi[/][a]one[/][u]More[/][a]two"
    assert chat.turns[1].prompt_tokens == len("[/][u]More[/][a]")
    assert chat.turns[1].stopped == "end"


def test_a_template_that_rewrites_history_is_followed_from_where_the_answer_ends() -> None:
    chat, engine = make([" one \n", "two"], trims=True)
    list(chat.ask("Hi", max_tokens=9))
    list(chat.ask("More", max_tokens=9))
    assert engine.fed == b"[u]Hi[/][a] one \n[/][u]More[/][a]two"


def test_a_character_split_over_tokens_comes_out_whole() -> None:
    chat, _ = make(["né🦦!"])
    assert list(chat.ask("Hi", max_tokens=99)) == ["n", "é", "🦦", "!"]


def test_a_document_is_read_ahead_of_the_question() -> None:
    chat, engine = make(["yes"])
    chat.read("DOC one\n")
    chat.read("DOC two")
    assert engine.fed == b"[u]DOC one\n\nDOC two\n\n"
    list(chat.ask("Q?", max_tokens=9))
    assert engine.fed == b"[u]DOC one\n\nDOC two\n\nQ?[/][a]yes"
    assert chat.messages[0]["content"] == "DOC one\n\nDOC two\n\nQ?"


def test_an_answer_cut_short_is_closed_by_the_next_turn() -> None:
    chat, engine = make(["abcdef", "x"])
    assert "".join(chat.ask("Hi", max_tokens=3)) == "abc"
    assert chat.turns[-1].stopped == "length"
    engine.answer_left = []
    list(chat.ask("Go", max_tokens=9))
    assert engine.fed == b"[u]Hi[/][a]abc[/][u]Go[/][a]x"


def test_a_consumer_that_leaves_loses_nothing() -> None:
    chat, engine = make(["abcdef", "x"])
    answer = chat.ask("Hi", max_tokens=9)
    assert [next(answer), next(answer)] == ["a", "b"]
    answer.close()  # type: ignore[attr-defined]
    assert chat.turns[-1].stopped == "interrupt"
    engine.answer_left = []
    list(chat.ask("Go", max_tokens=9))
    assert engine.fed == b"[u]Hi[/][a]ab[/][u]Go[/][a]x"


def test_stopping_while_a_prompt_is_read_keeps_the_rest_for_later() -> None:
    stop = [False]
    chat, engine = make(["x"], should_stop=lambda: stop[0], on_read=lambda n, of: stop.__setitem__(0, n >= 4))
    assert list(chat.ask("Hello", max_tokens=9)) == []
    assert engine.fed == b"[u]H"
    assert chat.unread_tokens == len("ello[/][a]")
    assert chat.turns[-1].stopped == "interrupt"
    chat.on_read = None
    stop[0] = False
    assert list(chat.ask("Go", max_tokens=9)) == ["x"]
    assert engine.fed == b"[u]Hello[/][a][/][u]Go[/][a]x"


def test_a_message_that_does_not_fit_is_taken_back() -> None:
    chat, engine = make(["ok"], n_cells=40, n_ctx=40)
    with pytest.raises(ContextFull, match="--ctx"):
        list(chat.ask("x" * 50, max_tokens=9))
    with pytest.raises(ContextFull):
        chat.read("y" * 50)
    assert engine.fed == b""
    assert "".join(chat.ask("Hi", max_tokens=9)) == "ok"
    assert engine.fed == b"[u]Hi[/][a]ok"


def test_positions_that_run_out_end_the_answer() -> None:
    chat, _ = make(["z" * 100], n_cells=40, n_ctx=40)
    assert len("".join(chat.ask("Hi", max_tokens=99))) == 40 - len("[u]Hi[/][a]") + 1
    assert chat.turns[-1].stopped == "context"


def test_another_system_prompt_reads_the_conversation_again() -> None:
    chat, engine = make(["one", "two"])
    chat.set_system("before anything was said")
    assert engine.fed == b""
    chat.set_system("")
    list(chat.ask("Hi", max_tokens=9))
    engine.fed = b""
    chat.set_system("S")
    assert engine.fed == b"s]S[/][u]Hi[/][a]one", "but for the bracket that both begin with"
    list(chat.ask("More", max_tokens=9))
    assert engine.fed == b"s]S[/][u]Hi[/][a]one[/][u]More[/][a]two"
    chat.clear()
    assert engine.position == 0
    assert chat.messages == [{"role": "system", "content": "S"}]


def test_the_system_prompt_outlasts_compactions_and_is_no_pinned_message() -> None:
    chat, engine = make(["one", "two"], n_cells=200, n_ctx=2000, system="mnp")
    system = b"[s]mnp"
    for _ in range(4):
        chat.read("az" * 60)  # what the fake layers like better
    assert engine.composed[0].shape[1]
    assert chat.memory.pins == [(0, len(system))]
    assert all(set(b"mnp") <= set(head.tolist()) for cells in engine.composed for head in cells)
    chat.set_system("qrs")
    assert chat.memory.pins == [(0, len("[s]qrs"))]
    chat.pin()
    chat.set_system("tuv")
    assert len(chat.memory.pins) == 2
    chat.set_system("x" * 500)  # more than a compaction can keep
    assert len(chat.memory.pins) == 1
    chat.set_system("")
    assert len(chat.memory.pins) == 1


def test_a_model_without_a_template_stops_at_the_next_speaker() -> None:
    chat, engine = make([" Blue.\nUser: and", " Red\nUs"], template=False)
    assert "".join(chat.ask("Colour?", max_tokens=99)) == " Blue."
    engine.answer_left = []
    assert "".join(chat.ask("Other?", max_tokens=99)) == " Red\nUs"
    assert b" Blue.[/]" in stands(chat), "of the stop text nothing stays"
    chat, engine = make([" Blue.\nUser: and"], template=False)
    list(chat.ask("Colour?", max_tokens=99))
    other, _ = make([], template=False)
    other.restore(chat.state())
    assert stands(other).endswith(b" Blue."), "nor where it is saved"


def test_a_template_that_refuses_leaves_the_chat_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _ = make(["one", "two"])
    list(chat.ask("Hi", max_tokens=9))
    before, stood = chat.conversation, stands(chat)

    def refuse(*_: object, **__: object) -> str:
        raise ModelError("the template refuses that")

    with monkeypatch.context() as patch:
        patch.setattr(chat.model, "render_chat", refuse)
        for call in (lambda: chat.set_system("Be brief."), lambda: list(chat.ask("More", max_tokens=9))):
            with pytest.raises(ModelError):
                call()
            assert (chat.conversation, stands(chat)) == (before, stood)
    assert "".join(chat.ask("More", max_tokens=9)) == "two"


def test_a_template_without_a_place_for_a_system_prompt_is_told_of_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _ = make(["one"])
    render = chat.model.render_chat

    def refuse(messages: Sequence[dict[str, str]], **options: bool) -> str:
        if messages[0]["role"] == "system":
            raise ModelError("system role not supported")
        return render(messages, **options)

    monkeypatch.setattr(chat.model, "render_chat", refuse)
    with pytest.raises(ModelError):
        chat.set_system("Be brief.")
    assert "".join(chat.ask("Hi", max_tokens=9)) == "one"


def test_a_text_that_is_cut_up_when_ctrl_c_comes_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _ = make(["one"])
    before = chat.conversation

    def interrupted(*_: object, **__: object) -> list[int]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat.model, "tokenize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            chat.read("a document")
        with pytest.raises(KeyboardInterrupt):
            list(chat.ask("Hi", max_tokens=9))
    assert chat.conversation == before
    assert "".join(chat.ask("Hi", max_tokens=9)) == "one"


def test_a_system_prompt_of_a_chat_that_dropped_nothing_is_pinned_where_it_is_loaded() -> None:
    chat, _ = make(["one"], system="mnp")
    list(chat.ask("Hi", max_tokens=9))
    other, _ = make([], n_cells=400)
    other.restore(chat.state())
    assert other.memory.pins == [(0, len("[s]mnp"))]


def test_empty_messages_are_refused() -> None:
    chat, _ = make([])
    with pytest.raises(InvalidInput):
        list(chat.ask("  ", max_tokens=1))
    with pytest.raises(InvalidInput):
        chat.read("\n")


def test_compactions_are_counted_with_their_turn() -> None:
    chat, engine = make(["a" * 30], n_cells=120, n_ctx=1000)
    list(chat.ask("h" * 100, max_tokens=30))
    assert chat.turns[0].compactions == len(chat.memory.reports) > 0
    assert engine.position == chat.memory.position


def stands(chat: Chat) -> bytes:
    """What the cache stands for: all that was read and not taken back."""
    return bytes(chat.memory.tokens)


def test_a_turn_is_taken_back_to_the_byte() -> None:
    chat, engine = make(["one", "two", "three"], system="S")
    list(chat.ask("Hi", max_tokens=9))
    after_one = chat.state()
    list(chat.ask("More", max_tokens=9))
    assert chat.undo() == "your message and its answer"
    assert stands(chat) == bytes(engine.live) == b"[s]S[/][u]Hi[/][a]one"
    assert (chat.state().messages, chat.state().fed, chat.state().steps) == (
        after_one.messages,
        after_one.fed,
        after_one.steps,
    )
    chat.read("DOC")
    assert chat.undo() == "the document"
    list(chat.ask("Else", max_tokens=9))
    assert stands(chat) == b"[s]S[/][u]Hi[/][a]one[/][u]Else[/][a]three"
    chat.undo()
    chat.undo()
    assert stands(chat) == b""
    assert chat.messages == [{"role": "system", "content": "S"}]
    with pytest.raises(InvalidInput, match="nothing to take back"):
        chat.undo()


def test_another_answer_reads_one_token_and_another_text_what_differs() -> None:
    chat, engine = make(["one", "two", "three"])
    chat.read("DOC")
    list(chat.ask("Hi", max_tokens=9))
    engine.fed = b""
    assert "".join(chat.ask_again(max_tokens=9)) == "two"
    assert engine.fed == b"]two"
    assert chat.last_message == "Hi"
    engine.fed = b""
    assert "".join(chat.ask("Ho", max_tokens=9, instead=True)) == "three"
    assert engine.fed == b"o[/][a]three"
    assert chat.messages == [{"role": "user", "content": "DOC\n\nHo"}, {"role": "assistant", "content": "three"}]
    assert stands(chat) == b"[u]DOC\n\nHo[/][a]three"


def test_another_answer_that_is_stopped_while_it_is_read_leaves_the_conversation_as_it_was() -> None:
    stop = [False]
    chat, engine = make(["one", "two"], should_stop=lambda: stop[0])
    list(chat.ask("Hello there", max_tokens=9))
    before = bytes(engine.live)
    chat.transcript.set_system("Another")  # as by another template: all is read again
    chat.on_read = lambda n, of: stop.__setitem__(0, n >= 4)
    assert list(chat.ask_again(max_tokens=9)) == []
    said = chat.state()
    assert bytes(engine.live) == bytes(chat.transcript.tokens[: len(engine.live)]), "no token of what was not kept"
    assert before.startswith(bytes(engine.live))
    assert bytes(said.memory.tokens) + bytes(said.pending) == before


def test_a_text_that_does_not_fit_leaves_the_old_one_in_place() -> None:
    chat, engine = make(["one", "two"], n_cells=60, n_ctx=60)
    list(chat.ask("Hi", max_tokens=9))
    before = chat.state()
    with pytest.raises(ContextFull):
        list(chat.ask("x" * 60, max_tokens=9, instead=True))
    assert chat.state().messages == before.messages
    assert stands(chat) == bytes(engine.live) == b"[u]Hi[/][a]one"
    with pytest.raises(ContextFull):
        chat.set_system("x" * 60)
    assert (chat.system, chat.state().messages) == (None, before.messages)
    list(chat.ask("Go", max_tokens=9))
    assert stands(chat) == b"[u]Hi[/][a]one[/][u]Go[/][a]two"


def test_an_interrupted_rebuild_loses_nothing() -> None:
    stop, rebuilt = [False], list[int]()
    two = "t" * 20
    chat, engine = make(
        ["one", two, "three", "four"], n_cells=400, n_ctx=1000, should_stop=lambda: stop[0], on_rebuild=rebuilt.append
    )
    list(chat.ask("x" * 100, max_tokens=9))
    list(chat.ask("y" * 100, max_tokens=30))
    whole = stands(chat)
    chat.memory.compact(0.5)
    engine.state_bytes, engine.max_drop = 12, 0  # as a state that nothing is kept of
    chat.on_read = lambda n, of: stop.__setitem__(0, n >= 30)
    assert list(chat.ask_again(max_tokens=9)) == []
    assert (chat.turns[-1].stopped, rebuilt) == ("interrupt", [len(whole) - len(two)])
    assert chat.messages[-1]["content"] == two, "the old answer stands"
    assert stands(chat) + bytes(chat.transcript.tokens[30:]) == whole
    assert chat.unread_tokens == len(whole) - 30
    stop[0] = False
    chat.on_read = None
    saved = chat.state()
    assert saved.pending == tuple(whole[30:])
    assert chat.undo() == "your message and its answer"
    list(chat.ask("z", max_tokens=9))
    assert stands(chat) == b"[u]" + b"x" * 100 + b"[/][a]one[/][u]z[/][a]three"
    chat.restore(saved)
    list(chat.ask("Go", max_tokens=9))
    assert stands(chat) == whole + b"[/][u]Go[/][a]four"


def test_thinking_that_the_template_drops_leaves_the_cache_before_the_next_message() -> None:
    chat, engine = make(["<think>hm</think>\n\none", "two"], forgets=True)
    list(chat.ask("Hi", max_tokens=99))
    assert stands(chat) == b"[u]Hi[/][a]<think>hm</think>\n\none", "it stays as long as it may be asked again"
    engine.fed = b""
    chat.read("DOC")
    assert engine.fed == b"one[/][u]DOC\n\n"
    list(chat.ask("More", max_tokens=9))
    assert stands(chat) == b"[u]Hi[/][a]one[/][u]DOC\n\nMore[/][a]two"
    assert chat.messages[1] == {"role": "assistant", "content": "one", "reasoning": "hm"}, "the transcript holds it"


def test_thinking_that_the_prompt_opened_is_dropped_with_its_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = FakeModel.render_chat

    def render(model: FakeModel, messages: list[dict[str, str]], *, add_generation_prompt: bool, **_: object) -> str:
        return plain(model, messages, add_generation_prompt=add_generation_prompt) + "<think>" * add_generation_prompt

    monkeypatch.setattr(FakeModel, "render_chat", render)
    chat, engine = make(["hm</think>one", "cut sho", "x"], forgets=True)
    list(chat.ask("Hi", max_tokens=99))
    engine.fed = b""
    list(chat.ask("More", max_tokens=7))
    assert engine.fed == b"one[/][u]More[/][a]<think>cut sho", "what both share is not read again"
    assert stands(chat) == b"[u]Hi[/][a]one[/][u]More[/][a]<think>cut sho"
    engine.answer_left = []
    assert chat.forget_thinking() == len("cut sho")
    assert stands(chat) == b"[u]Hi[/][a]one[/][u]More[/][a]"
    assert "".join(chat.ask_again(max_tokens=9)) == "<think>x</think>", "the prompt opens the thinking again"
    pinning, _ = make(["hm</think>one", "x"], n_cells=400, forgets=True)
    list(pinning.ask("Hi", max_tokens=99))
    pinning.pin()
    list(pinning.ask("More", max_tokens=9))
    assert pinning.memory.pins == [(0, len("[u]Hi[/][a]"))], "the message is pinned still"
    assert stands(chat) == b"[u]Hi[/][a]one[/][u]More[/][a]<think>x"


def test_thinking_is_forgotten_where_the_template_keeps_it() -> None:
    chat, _ = make([" <think>a</think>one two", "x"])
    list(chat.ask("Hi", max_tokens=99))
    chat.forget_thinking()
    assert stands(chat) == b"[u]Hi[/][a]one two"
    list(chat.ask("Go", max_tokens=9))
    assert stands(chat) == b"[u]Hi[/][a]one two[/][u]Go[/][a]x"
    with pytest.raises(InvalidInput, match="no thinking"):
        chat.forget_thinking()


def test_pins_outlast_rebuilds_and_other_system_prompts() -> None:
    rebuilt = list[int]()
    chat, engine = make(["ok"] * 9, n_cells=400, n_ctx=5000, on_rebuild=rebuilt.append)
    assert chat.read("\1\2\3", pin=True).prompt_tokens == len("[u]\1\2\3\n\n")
    list(chat.ask("x" * 100, max_tokens=9))
    list(chat.ask("\4\5\6", max_tokens=9))
    chat.memory.compact(0.5)
    assert rebuilt == []
    assert chat.pin() == len("[/][u]\4\5\6[/][a]")
    assert rebuilt == [], "composed cells behind it are dropped, and it is read again alone"
    chat.set_system("S")
    chat.undo()
    chat.read("\7")
    assert chat.memory.n_pinned == len("[s]S[/][u]\1\2\3\n\n")
    chat.undo()
    list(chat.ask("\4\5\6", max_tokens=9))
    chat.pin()
    for _ in range(3):
        list(chat.ask("x" * 300, max_tokens=9))
    assert len(chat.memory.reports) > 2
    for layer in engine.composed:
        for head in layer:
            assert {1, 2, 3, 4, 5, 6} <= set(head.tolist())


def test_a_state_with_impossible_turns_is_refused() -> None:
    chat, _ = make(["one", "two"])
    list(chat.ask("Hi", max_tokens=9))
    list(chat.ask("Go", max_tokens=9))
    good = chat.state()
    first, second = good.steps
    for steps in (
        (second, first),
        (first, replace(second, n_messages=9)),
        (first, replace(second, begin=Place(10**6, 0))),
        (first, replace(second, answer=Place(0, 0))),
    ):
        with pytest.raises(InvalidInput, match="turns"):
            chat.restore(replace(good, steps=steps))
    chat.restore(good)
    chat.undo()
    assert stands(chat) == b"[u]Hi[/][a]one"
