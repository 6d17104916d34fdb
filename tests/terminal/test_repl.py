"""Whole transcripts of the chat on the fake engine: input, answers, and what is said beside them."""

from __future__ import annotations

import io
import re
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_engine import FakeEngine, FakeModel
from hypothesis import given
from hypothesis import strategies as st

from kvcompose_local.chat import Chat, Said
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.chat.report import CompactionReport
from kvcompose_local.interfaces import CacheLayout, LayerShape, ModelShape
from kvcompose_local.interrupts import Interrupts, uninterrupted
from kvcompose_local.terminal.answers import Answers
from kvcompose_local.terminal.chat_commands import HELP, ChatCommands
from kvcompose_local.terminal.memory_chart import UNICODE_MARKS, can_show, draw
from kvcompose_local.terminal.repl import Repl
from kvcompose_local.terminal.status import Status

pyte = pytest.importorskip("pyte")


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs the tests may have a dumb one."""
    monkeypatch.setenv("TERM", "xterm")


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def talk(
    lines: list[str | type[BaseException]],
    answers: list[str],
    *,
    n_cells: int = 400,
    n_ctx: int = 400,
    edit: Callable[[str], str | None] | None = None,
    forgets: bool = False,
    max_tokens: int = 12,
) -> str:
    """The transcript: input lines behind ``>``, answers as they are, status lines behind ``!``."""
    transcript = io.StringIO()

    class Err(io.StringIO):
        def write(self, text: str) -> int:
            return transcript.write("".join(f"! {line}\n" for line in text.splitlines()))

    script: Iterator[str | type[BaseException]] = iter(lines)

    def read_line(prompt: str) -> str | None:
        line = next(script, None)
        if isinstance(line, type):
            transcript.write(f"{prompt}^C\n")
            raise line
        if line is not None:
            transcript.write(f"{prompt}{line}\n")
        return line

    interrupts = Interrupts()
    status = Status(Err(), should_stop=interrupts)
    engine = FakeEngine(n_cells, answers)
    memory = CacheMemory(engine, n_ctx, compose=n_cells < n_ctx, on_compaction=lambda r: None)
    chat = Chat(
        FakeModel(forgets=forgets),
        memory,
        should_stop=interrupts,
        on_rebuild=lambda n: status.line(f"reading {n} tokens again"),
    )
    answers = Answers(chat, out=transcript, status=status, max_tokens=max_tokens, takes_commands=True)
    commands = ChatCommands(answers, interrupts, edit=edit, describe=lambda: f"{memory.position} positions")
    Repl(commands, read_line).run()
    return transcript.getvalue()


def test_a_conversation_with_every_command(tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("Some facts.\n")
    shown_help = "".join(f"! {line}\n" for line in HELP.splitlines())
    assert talk(
        [
            "Hi",
            "",
            "/stats",
            '"""two',
            'lines"""',
            f"/read {note}",
            "And?",
            "/system",
            "/system Be brief.",
            "/system",
            "/compress",
            "/clear",
            "/stats",
            "/help",
            "/nonsense",
            "/read",
            "/read /no/such/file",
            "/quit",
            "never read",
        ],
        ["Hello.", "Both.", "Facts."],
    ) == (
        "> Hi\nHello.\n> \n> /stats\n! 17 positions\n"
        '> """two\n... lines"""\nBoth.\n'
        f"> /read {note}\n! read 19 tokens of {note}: ask about it\n"
        "> And?\nFacts.\n"
        "> /system\n! there is no system prompt; /system TEXT sets one\n"
        "> /system Be brief.\n! the system prompt is set\n"
        "> /system\n! Be brief.\n"
        "> /compress\n! error: this chat runs at budget 1: start it with --budget below 1 to compress\n"
        "> /clear\n! forgotten: the conversation is empty\n"
        "> /stats\n! 0 positions\n"
        f"> /help\n{shown_help}"
        "> /nonsense\n! there is no /nonsense: /help lists the commands, /quit leaves, and a space before it sends "
        "the line as a message\n"
        "> /read\n! error: /read takes a file name\n"
        "> /read /no/such/file\n! error: cannot read /no/such/file: No such file or directory\n"
        "> /quit\n"
    )


def test_ends_of_answers_are_explained() -> None:
    assert talk(["Hi", "x" * 500, KeyboardInterrupt], ["a long answer that goes on"]) == (
        "> Hi\na long answe\n! (stopped after 12 tokens: --max-tokens allows more)\n"
        f"> {'x' * 500}\n! error: 512 more tokens do not fit: 23 of --ctx 400 positions are used; "
        "start again with --ctx up to 1000000, or /clear\n"
        "> ^C\n! (Ctrl-D or /quit leaves)\n"
    )
    assert talk(["Hi"], ["abcdef"], n_cells=14, n_ctx=14) == (
        "> Hi\n! 3 of 14 positions are left: /undo or /clear make room, or "
        "/save NAME, then `kvcompose-local run --session NAME --ctx N` goes on with up to 1000000\n"
        "abcd\n! the chat has used all 14 positions: /undo or /clear make room, or "
        "/save NAME, then `kvcompose-local run --session NAME --ctx N` goes on with up to 1000000\n"
    )


def test_turns_are_taken_back_repeated_and_edited() -> None:
    def edit(text: str) -> str | None:
        if text == "Yo":
            raise KeyboardInterrupt
        return text.replace("Hi", "Yo")

    assert talk(
        ["/undo", "/regen", "/edit x", "Hi", "/regen", "/regen", "/edit Hi there", "/edit", "/undo", "/stats"],
        ["one", "two", "two", "three", "four"],
        edit=edit,
    ) == (
        "> /undo\n! error: there is nothing to take back\n"
        "> /regen\n! error: there is no message yet\n"
        "> /edit x\n! error: there is no message yet\n"
        "> Hi\none\n> /regen\ntwo\n"
        "> /regen\ntwo\n! (the same answer again: /regen 1 varies it more)\n"
        "> /edit Hi there\nthree\n> /edit\nfour\n"
        "> /undo\n! taken back: your message and its answer\n> /stats\n! 0 positions\n"
    )
    assert talk(["Yo", "/edit", "/edit Hi", "/regen hot", "/stats"], ["one", "two"], edit=edit) == (
        "> Yo\none\n> /edit\n! nothing is changed\n> /edit Hi\ntwo\n"
        "> /regen hot\n! error: /regen takes a temperature from 0 to 10, not 'hot'\n> /stats\n! 14 positions\n"
    )
    assert talk(["Hi", "/edit"], ["one"]).endswith("! error: /edit takes the new text\n")


def test_what_is_compressed_is_read_again_and_said(tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("n" * 20)
    long = "y" * 200
    assert talk(
        [long, "/compress", "/undo", long, "/compress", "/pin", "/undo", f"/read {note}", "/regen", "/undo", "/stats"],
        ["ok", "fine"],
        n_ctx=1000,
    ) == (
        f"> {long}\nok\n> /compress\n> /undo\n! taken back: your message and its answer\n"
        f"> {long}\nfine\n> /compress\n"
        "> /pin\n! reading 213 tokens again\n! pinned: 209 tokens are kept whenever the cache is compressed\n"
        "> /undo\n! taken back: your message and its answer\n"
        f"> /read {note}\n! read 25 tokens of {note}: ask about it\n"
        "> /regen\n! error: there is no message yet\n"
        "> /undo\n! taken back: the document\n> /stats\n! 0 positions\n"
    )
    assert talk(["/pin", "Hi", "/pin"], ["ok"]) == (
        "> /pin\n! error: there is nothing to pin yet\n> Hi\nok\n"
        "> /pin\n! error: this chat runs at budget 1: nothing is ever dropped\n"
    )
    assert talk(["x" * 340, "/pin"], ["ok"], n_ctx=1000).endswith(
        "! error: 349 pinned tokens are more than the 342 that a compaction can keep: raise --ctx or --budget\n"
    )


def test_thinking_is_forgotten_at_once_or_with_the_next_message() -> None:
    assert talk(["Hi", "/forget", "/forget", "/stats", "/regen"], ["<think>t", "-"]) == (
        "> Hi\n<think>t</think>\n! (the model thought and said nothing: /regen tries again)\n"
        "> /forget\n! forgotten: 1 tokens of thinking\n"
        "> /forget\n! error: the last answer holds no thinking\n> /stats\n! 11 positions\n> /regen\n-\n"
    )
    assert talk(
        ["Hi", "/stats", "More", "/stats", "/undo", "/stats"], ["<think>h</think> x", "y"], forgets=True, max_tokens=20
    ) == (
        "> Hi\n<think>h</think> x\n> /stats\n! 29 positions\n"
        f"> More\ny\n> /stats\n! {len('[u]Hi[/][a]x[/][u]More[/][a]y')} positions\n"
        f"> /undo\n! taken back: your message and its answer\n> /stats\n! {len('[u]Hi[/][a]x')} positions\n"
    )


def test_the_end_of_the_positions_is_told_before_it_comes() -> None:
    x, y, z = "x" * 180, "y" * 170, "z" * 181
    taken_back = "> /undo\n! taken back: your message and its answer\n"
    can_do = (
        "of 400 positions are left: /undo or /clear make room, or "
        "/save NAME, then `kvcompose-local run --session NAME --ctx N` goes on with up to 1000000\n"
    )
    assert talk([x, y, "/undo", "/undo", z, "Hi", "y" * 163], ["one", "two", "a\n" + "b" * 9, "ok", "c\nd"]) == (
        f"> {x}\none\n> {y}\n! 26 {can_do}two\n{taken_back}{taken_back}"
        f"> {z}\na\nbbbbbbbbb\n! 199 {can_do}> Hi\nok\n> {'y' * 163}\nc\n! 6 {can_do}d\n"
    )


def test_the_cache_as_a_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    long = "y" * 200
    legend = "! # composed + . live cells of each layer, MiB\n"
    assert talk(["/memory", long, "/compress", "/memory"], ["ok"], n_ctx=1000) == (
        "> /memory\n! 0 live cells in each of 2 layers\n"
        "! in all 0.00 of 0.01 MiB, room for 400 more live cells;\n! uncompressed, these 0 tokens would take 0.00 MiB\n"
        f"> {long}\nok\n> /compress\n> /memory\n{legend}"
        "! 0 ###########.                                  97 + 8  0.00\n"
        "! 1 ###########.                                  97 + 8  0.00\n"
        "! in all 0.00 of 0.01 MiB, room for 295 more live cells;\n"
        "! uncompressed, these 211 tokens would take 0.00 MiB\n"
        "! what is left of what was read, its tokens, and how it begins:\n"
        f"!  49%     209 message  {'y' * 36}\n"
        "! 100%       2 answer   ok\n"
    )
    assert can_show(UNICODE_MARKS, "utf-8")
    assert not can_show(UNICODE_MARKS, "latin-1")
    assert not can_show(UNICODE_MARKS, None)


@given(
    composed=st.lists(st.integers(0, 9000), min_size=1, max_size=40),
    n_live=st.integers(0, 9000),
    width=st.integers(1, 150),
)
def test_a_chart_is_no_wider_than_the_terminal_and_hides_no_cells(composed: list[int], n_live: int, width: int) -> None:
    layers = tuple(LayerShape(i, 4, 2, 5000) for i in range(len(composed)))
    shape = ModelShape("M", "m", 1, 1, layers)
    lines = draw(CacheLayout((*composed,), n_live, 0, 9), shape, cap_bytes=1, width=width).split("\n")
    assert max(map(len, lines)) <= width
    if width >= 60:
        rows = [line for line in lines if re.match(r" *\d+ [ #.]*  *\d+ \+ ", line)]
        assert len(rows) == (len(composed) if any(composed) else 0)
        for row, k in zip(rows, composed, strict=False):
            bar = row[: row.index("+")]
            assert (bool(k), bool(n_live)) == ("#" in bar, "." in bar)
            assert f" {k} + {n_live} " in row


def test_compress_on_demand_and_its_bad_arguments() -> None:
    text = talk(["/compress", "y" * 200, "/compress 0.5", "/compress 7", "/compress much"], ["ok"], n_ctx=1000)
    assert text == (
        "> /compress\n! there is nothing to compress yet\n"
        f"> {'y' * 200}\nok\n> /compress 0.5\n"
        "> /compress 7\n! error: keep a share in (0, 1], not 7.0\n"
        "> /compress much\n! error: /compress takes a share in (0, 1], not 'much'\n"
    )


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on() -> None:
    interrupts = Interrupts()
    out, err = io.StringIO(), io.StringIO()
    engine = FakeEngine(400, ["abcdefgh", "fine"])
    chat = Chat(FakeModel(), CacheMemory(engine, 400, compose=False), should_stop=interrupts)
    script = iter(["Hi", "Go"])

    class PressesCtrlC(io.StringIO):
        def write(self, text: str) -> int:
            if text == "c":
                signal.raise_signal(signal.SIGINT)
                engine.answer_left = []
            return out.write(text)

    status = Status(err, should_stop=interrupts)
    Repl(
        ChatCommands(Answers(chat, out=PressesCtrlC(), status=status, max_tokens=99), interrupts),
        lambda _prompt: next(script, None),
    ).run()
    assert out.getvalue() == "abc\nfine\n"
    assert err.getvalue() == "(stopped)\n"
    assert engine.fed == b"[u]Hi[/][a]abc[/][u]Go[/][a]fine"


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    interrupts = Interrupts()
    with interrupts.caught():
        signal.raise_signal(signal.SIGINT)
        assert interrupts()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_progress_is_drawn_for_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("kvcompose_local.terminal.status.time.monotonic", lambda: clock[0])
    for stream, expected in (
        (
            Tty(),
            f"\r\x1b[Kreading: 50/100 tokens, 2 s left [{'#' * 10}{'.' * 10}]"
            f"\r\x1b[Kreading: 75/100 tokens, 5 s left [{'#' * 15}{'.' * 5}]\r\x1b[Kdone\n",
        ),
        (io.StringIO(), "reading: 75/100 tokens, 5 s left\ndone\n"),
    ):
        status = Status(stream)
        for seconds, done in ((0.0, 0), (0.5, 25), (2.0, 50), (2.1, 51), (15.0, 75), (16.0, 100)):
            clock[0] = seconds
            status.progress("reading:", done, 100)
        status.line("done")
        assert stream.getvalue() == expected


def test_work_that_is_held_up_by_other_work_knows_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("kvcompose_local.terminal.status.time.monotonic", lambda: clock[0])
    monkeypatch.setenv("COLUMNS", "40")  # too few for a bar
    status = Status(Tty())
    for seconds, what, done in (
        (0.0, "reading:", 0),
        (8.0, "reading:", 40),
        (8.0, "compacting:", 0),
        (11.0, "compacting:", 50),
        (12.0, "compacting:", 100),
        (15.0, "reading:", 50),
        (30.0, "reading:", 100),
        (40.0, "reading:", 10),  # another text, of which a part was read earlier
        (45.0, "reading:", 50),
    ):
        clock[0] = seconds
        status.progress(what, done, 100)
    assert [line.partition("\x1b[K")[2] for line in status.stream.getvalue().split("\r")] == [
        "",
        "reading: 40/100 tokens, 12 s left",
        "compacting: 50/100 tokens, 3 s left",
        "",
        "reading: 50/100 tokens, 15 s left",
        "",
        "reading: 50/100 tokens, 6 s left",
    ]


def test_compactions_of_a_text_are_one_line_and_none_is_kept_back() -> None:
    pressed = False
    out = io.StringIO()
    status = Status(out, should_stop=lambda: pressed)
    report = CompactionReport(900, 800, (10, 300), 8, 3 << 20, 1 << 20, 1.0, 0.0, 0.0)

    def told() -> list[str]:
        lines = [line.rpartition(" MiB in ")[2] for line in out.getvalue().splitlines()]
        out.seek(0)
        out.truncate()
        return lines

    status.compacted(report)  # /compress
    assert told() == ["1.0 s"]
    status.reading(0, 100)
    for done in (30, 60, 90):
        status.compacted(report)
        status.reading(done, 100)
    assert told() == []
    status.reading(100, 100)
    assert told() == ["3.0 s, 3 times"]
    status.reading(0, 100)
    status.compacted(report)
    pressed = True
    with pytest.raises(KeyboardInterrupt):
        status.reading(50, 100)
    assert told() == ["1.0 s"]
    pressed = False
    status.compacted(report)  # /compress
    assert told() == ["1.0 s"]
    status.reading(0, 100)
    status.compacted(report)
    status.line("error: it failed")
    assert told() == ["1.0 s", "error: it failed"]
    status.settle()
    assert told() == []


def test_ctrl_c_waits_for_what_must_not_be_cut_short() -> None:
    ended = []

    def presses_twice() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        presses_twice()
    assert len(ended) == 1


def test_slashes_that_are_no_commands() -> None:
    n_read = len("[u]/clear it[/][a]a[/][u]/etc/fstab is this[/][a]b[/][u] /clear[/][a]c")
    assert talk(
        ['"""/clear', 'it"""', "/etc/fstab\nis this", "/clear the table", " /clear", "/stats"], ["a", "b", "c"]
    ) == (
        '> """/clear\n... it"""\na\n> /etc/fstab\nis this\nb\n'
        "> /clear the table\n! error: /clear takes nothing after it; a space before it sends the line as a message\n"
        f">  /clear\nc\n> /stats\n! {n_read} positions\n"
    )


def test_words_and_paths_that_are_no_commands_and_names_that_are() -> None:
    leaves = "! /quit is the command; a space before the word sends it as a message\n"
    assert talk(["exit", "Bye", "help", " quit", "/usr/bin is what?", "// no", "/STATS", "/exit", "-"], [*"abc"]) == (
        f"> exit\n{leaves}> Bye\n{leaves}> help\n{leaves.replace('/quit', '/help')}"
        ">  quit\na\n> /usr/bin is what?\nb\n> // no\nc\n"
        f"> /STATS\n! {len('[u] quit[/][a]a[/][u]/usr/bin is what?[/][a]b[/][u]// no[/][a]c')} positions\n> /exit\n"
    )
    assert talk(["/bye", "-"], []) == "> /bye\n"
    assert talk(["/?"], []) == talk(["/help"], []).replace("> /help", "> /?")


def test_pasted_lines_are_one_message_whatever_they_begin_with() -> None:
    program = '"""Module docs.\n\nMore.\n"""\nimport os\n'
    n_read = len(f"[u]{program}[/][a]a[/][u]b\nc[/][a]d")
    assert talk([program, '"""\n', "b", 'c"""', "/stats"], ["a", "d"]) == (
        f'> {program}\na\n> """\n\n... b\n... c"""\nd\n> /stats\n! {n_read} positions\n'
    )


def test_what_was_answered_counts_where_it_cannot_be_written() -> None:
    """A window that is gone: the first pieces fit, and the chat that is saved then has them."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            if len(self.getvalue()) > 3:
                raise OSError("Input/output error")
            return super().write(text)

    interrupts = Interrupts()
    chat = Chat(FakeModel(), CacheMemory(FakeEngine(400, ["A long answer."]), 400, compose=False))
    status = Status(io.StringIO(), should_stop=interrupts)
    answers = Answers(chat, out=Gone(), status=status, max_tokens=40)
    with pytest.raises(OSError, match="Input/output") as raised:
        answers.answer("Hello?")
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[-1]["content"].startswith("A lo")
    assert raised.value.__traceback__ is not None  # which keeps the frames alive that hold the generator


def test_an_answer_is_whole_whatever_happens_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress stands below it and goes, compactions are told after it, another line gets one of its own."""
    monkeypatch.setenv("COLUMNS", "110")
    terminal = Tty()
    status = Status(terminal)
    screen = pyte.Screen(110, 4)
    stream = pyte.Stream(screen)
    report = CompactionReport(900, 800, (10, 300), 8, 3 << 20, 1 << 20, 1.0, 0.0, 0.0)

    def seen() -> list[str]:
        stream.feed(terminal.getvalue().replace("\n", "\r\n"))
        terminal.seek(0)
        terminal.truncate()
        return [line.rstrip() for line in screen.display]

    def pieces() -> Generator[Said]:
        yield Said("One.\nTwo.\nThree.\n")
        yield Said("She dec")
        status.progress("compacting:", 0, 300)
        assert seen() == ["Two.", "Three.", "She dec", f"compacting: 0/300 tokens [{'.' * 20}]"]
        status.compacted(report)
        status.progress("compacting:", 300, 300)
        status.compacted(report)
        yield Said("ided")
        assert seen() == ["Two.", "Three.", "She decided", ""]
        status.line("note")
        yield Said("to go.")

    chat = SimpleNamespace(turns=["last"], memory=SimpleNamespace(n_ctx=10**6, position=0))
    answers = Answers(chat, out=terminal, status=status, max_tokens=9)
    assert answers.stream(pieces()) == "last"
    told = "compacted: 900 tokens seen, 10–300 composed + 8 live cells a layer, 3.0 → 1.0 MiB in 2.0 s, 2 times"
    assert seen() == ["note", "to go.", told, ""]


def test_progress_stays_on_one_line_of_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "16")
    screen = Tty()
    Status(screen).progress("reading:", 0, 300)
    assert screen.getvalue() == "\r\x1b[Kreading: 0/300 "


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("kvcompose_local.terminal.status.time.monotonic", lambda: clock[0])
    monkeypatch.setenv("TERM", "dumb")
    screen = Tty()
    status = Status(screen)
    for clock[0], done in ((0.0, 0), (5.0, 50), (15.0, 75), (16.0, 100)):
        status.progress("reading:", done, 100)
    assert screen.getvalue() == "reading: 75/100 tokens, 5 s left\n"


def test_long_work_is_shown_before_its_first_part_is_done() -> None:
    for total, shown in ((300, True), (200, False)):
        screen = Tty()
        Status(screen).progress("reading:", 0, total)
        assert bool(screen.getvalue()) == shown
