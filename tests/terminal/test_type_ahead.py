"""What is typed while a chat works: the program behind a real pseudo-terminal whose modes are looked at."""

from __future__ import annotations

import os
import shlex
import signal
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from programs import RUN, endless

from kvcompose_local.llama_ffi.library import library_path

pexpect = pytest.importorskip("pexpect")

PROMPT, ACCEPTED = "\x1b[?2004h", "\x1b[?2004l"
TinyModel = Callable[..., Path]


@pytest.fixture
def chat(tiny_model: TinyModel, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """``chat(*options)`` starts a chat whose answers are long, by a shell that sets no modes of its own, or by bash."""
    children = []

    def start(*options: str, in_bash: bool = False) -> Any:
        env = {k: v for k, v in os.environ.items() if not k.startswith("XDG_")}
        env |= {"KVCOMPOSE_CACHE": str(tmp_path / "cache"), "LLAMA_CPP_LIB_PATH": str(library_path().parent)}
        env |= {"HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        asked = [*RUN, "run", str(endless(tiny_model)), "--threads", "1", "--temp", "0", "--ctx", "4096"]
        asked += ["--budget", "1", "--max-tokens", "3500", *options]
        line = f"{shlex.join(asked)}; echo ended by $?"
        child = pexpect.spawn(
            "bash" if in_bash else "sh",
            ["--norc", "--noprofile", "-i", "-c", f"{line}; read go_on; fg; cat"]
            if in_bash  # with job control: without, nothing is suspended
            else ["-c", f"trap : INT; {line}; cat"],
            env=env,
            encoding="utf-8",
            codec_errors="replace",
            dimensions=(50, 200),
            timeout=30,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.close(force=True)


def echoes(child: Any) -> bool:
    """Whether the terminal echoes, and lines are its own business."""
    modes = termios.tcgetattr(child.child_fd)[3]
    assert bool(modes & termios.ECHO) == bool(modes & termios.ICANON)
    return bool(modes & termios.ECHO)


def begin_an_answer(child: Any) -> None:
    child.expect_exact(PROMPT)
    child.send("Hello\r")
    child.expect_exact(ACCEPTED)
    child.expect("(?:[^\x00-\x20\x1b][^\x1b]*){5}")
    assert not echoes(child)


def program_of(child: Any) -> int:
    """The process that the shell started."""
    return psutil.Process(child.pid).children()[0].pid


def test_what_is_typed_meanwhile_is_a_draft_and_not_echoed(chat: Callable[..., Any]) -> None:
    child = chat("--max-tokens", "900")
    begin_an_answer(child)
    child.send("onX\x7fe\x1b[A\r\ttwo\r\tΩthree\r")
    child.expect_exact("(stopped after 900 tokens")
    assert "three" not in child.before
    child.expect_exact(PROMPT)
    child.expect_exact("three")
    child.send("!\r")
    child.expect_exact(ACCEPTED)
    child.expect_exact("(stopped after 900 tokens")
    child.expect_exact(PROMPT)
    child.send("/stats\r")
    n_tokens = 1 + len("[user]Hello[/][assistant][/][user]one\n\ttwo\n\tΩthree![/][assistant]".encode()) + 1800
    child.expect_exact(f"positions: {n_tokens} of 4096")
    child.expect_exact(PROMPT)
    child.send("\x04")
    child.expect_exact("ended by 0")
    assert echoes(child)


def test_ctrl_c_drops_what_was_typed(chat: Callable[..., Any]) -> None:
    child = chat()
    begin_an_answer(child)
    child.send("never mind\r")
    time.sleep(0.2)
    child.send("\x03")
    child.expect_exact("(stopped")
    child.expect_exact(PROMPT)
    child.send("\x04")
    child.expect_exact("ended by 0")
    assert "never" not in child.before
    assert echoes(child)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("reading", [False, True])
def test_a_program_that_is_ended_gives_the_terminal_back(
    chat: Callable[..., Any], tmp_path: Path, number: int, reading: bool
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Allworkandnoplay." * 220)
    child = chat(*(["-f", str(text)] if reading else []))
    if reading:
        child.expect_exact("reading:")
    else:
        begin_an_answer(child)
    os.kill(program_of(child), number)
    child.expect_exact(f"ended by {128 + number}")
    assert echoes(child)


def test_a_chat_that_is_suspended_gives_the_terminal_back_and_takes_it_again(chat: Callable[..., Any]) -> None:
    child = chat(in_bash=True)
    begin_an_answer(child)
    child.send("\x1a")
    child.expect_exact(f"ended by {128 + signal.SIGTSTP}")
    assert echoes(child)
    child.send("\r")
    deadline = time.monotonic() + 30
    while echoes(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send("\x03")
    child.expect_exact("(stopped")
    child.expect_exact(PROMPT)
    assert child.isalive()


def test_lines_that_were_there_before_the_first_prompt_are_taken(chat: Callable[..., Any]) -> None:
    """As a script types them, which looks at no prompt."""
    child = chat("--max-tokens", "5")
    child.send("What is here?\r/stats\r/quit\r")
    child.expect(r"positions: \d+ of")
    child.expect_exact("ended by 0")
