"""Whole transcripts of the chat on the fake engine: input, answers, and what is said beside them."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, FakeModel

from kvcompose_local.chat import Chat
from kvcompose_local.compaction import CacheMemory
from kvcompose_local.errors import InvalidInput
from kvcompose_local.repl import HELP, Interrupts, Repl, Status, read_text_file


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def talk(lines: list[str | type[BaseException]], answers: list[str], *, n_cells: int = 400, n_ctx: int = 400) -> str:
    """The transcript: input lines behind ``>``, answers as they are, status lines behind ``!``."""
    transcript = io.StringIO()

    class Err(io.StringIO):
        def write(self, text: str) -> int:
            return transcript.write("".join(f"! {line}\n" for line in text.splitlines()))

    script: Iterator[str | type[BaseException]] = iter(lines)

    def read_line() -> str | None:
        line = next(script, None)
        if isinstance(line, type):
            transcript.write("> ^C\n")
            raise line
        if line is not None:
            transcript.write(f"> {line}\n")
        return line

    interrupts = Interrupts()
    status = Status(Err(), should_stop=interrupts)
    engine = FakeEngine(n_cells, answers)
    memory = CacheMemory(engine, n_ctx, compose=n_cells < n_ctx, on_compaction=lambda r: None)
    chat = Chat(FakeModel(), memory, should_stop=interrupts)
    repl = Repl(
        chat,
        read_line=read_line,
        out=transcript,
        status=status,
        interrupts=interrupts,
        max_tokens=12,
        describe=lambda: f"{memory.position} positions",
    )
    repl.run()
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
        '> """two\n> lines"""\nBoth.\n'
        f"> /read {note}\n! read 19 tokens of {note}: ask about it\n"
        "> And?\nFacts.\n"
        "> /system\n! there is no system prompt; /system TEXT sets one\n"
        "> /system Be brief.\n! the system prompt is set\n"
        "> /system\n! Be brief.\n"
        "> /compress\n! error: this chat runs at budget 1: start it with --budget below 1 to compress\n"
        "> /clear\n! forgotten: the conversation is empty\n"
        "> /stats\n! 0 positions\n"
        f"> /help\n{shown_help}"
        "> /nonsense\n! there is no /nonsense: /help lists the commands\n"
        "> /read\n! error: /read takes a file name\n"
        "> /read /no/such/file\n! error: cannot read /no/such/file: No such file or directory\n"
        "> /quit\n"
    )


def test_ends_of_answers_are_explained() -> None:
    assert talk(["Hi", "x" * 500, KeyboardInterrupt], ["a long answer that goes on"]) == (
        "> Hi\na long answe\n! (stopped after 12 tokens: --max-tokens allows more)\n"
        f"> {'x' * 500}\n! error: 512 more tokens do not fit: 23 of --ctx 400 positions are used; "
        "start again with a larger --ctx, or /clear\n"
        "> ^C\n! (Ctrl-D or /quit leaves)\n"
    )
    assert talk(["Hi"], ["abcdef"], n_cells=14, n_ctx=14) == (
        "> Hi\nabcd\n! the chat has used all 14 positions: /clear, or start again with a larger --ctx\n"
    )


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
                engine._answer = []
            return out.write(text)

    status = Status(err, should_stop=interrupts)
    Repl(
        chat,
        read_line=lambda: next(script, None),
        out=PressesCtrlC(),
        status=status,
        interrupts=interrupts,
        max_tokens=99,
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
    monkeypatch.setattr("kvcompose_local.repl.time.monotonic", lambda: clock[0])
    for stream, expected in (
        (Tty(), "\r\x1b[Kreading: 50/100 tokens, 2 s left\r\x1b[Kreading: 75/100 tokens, 5 s left\r\x1b[Kdone\n"),
        (io.StringIO(), "reading: 75/100 tokens, 5 s left\ndone\n"),
    ):
        status = Status(stream)
        for seconds, done in ((0.0, 0), (0.5, 25), (2.0, 50), (2.1, 51), (15.0, 75), (16.0, 100)):
            clock[0] = seconds
            status.progress("reading:", done, 100)
        status.line("done")
        assert stream.getvalue() == expected


def test_files_that_are_not_text_get_one_line(tmp_path: Path) -> None:
    binary, latin, bom = tmp_path / "b", tmp_path / "l", tmp_path / "u"
    binary.write_bytes(b"GGUF\x00\x01")
    latin.write_bytes("é".encode("latin-1"))
    bom.write_bytes(b"\xef\xbb\xbfhi")
    with pytest.raises(InvalidInput, match="binary"):
        read_text_file(binary)
    with pytest.raises(InvalidInput, match="not UTF-8 text"):
        read_text_file(latin)
    with pytest.raises(InvalidInput, match="cannot read"):
        read_text_file(tmp_path)
    assert read_text_file(bom) == "hi"
