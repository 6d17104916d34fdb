"""What goes to which stream, and what of it a terminal obeys: the program behind real pseudo-terminals."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from programs import endless, program, refused
from scripted_model import write_scripted_model

from kvcompose_local.llama_ffi.library import library_path
from kvcompose_local.terminal.shown import Shown, control, shown

pexpect = pytest.importorskip("pexpect")

TinyModel = Callable[..., Path]
FAST = "--threads 1 --ctx 1024 --temp 0 --no-autosave"
#: An answer that would write the clipboard, clear the screen (by ESC and by C1), hide what it says and overwrite it.
HOSTILE = (
    "ok",
    "\x1b",
    "]52;c;aGk=\x07",
    "\x1b[2J",
    "\x9b31m",
    "\u202edrow",
    "over\rwritten",
    "lines\r",
    "\n\tdone\x7f",
)
HOSTILE_SHOWN = "ok^[]52;c;aGk=^G^[[2J<U+009B>31m<U+202E>drowover^Mwrittenlines\n\tdone^?"
HOSTILE_NAME = "Nice\x1b]0;title\x07\rname"
#: What the program itself and its line editor tell a terminal.
_OWN = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scripted")
    return {
        "hostile": write_scripted_model(folder / "hostile.gguf", HOSTILE, name=HOSTILE_NAME),
        "polite": write_scripted_model(folder / "polite.gguf", ["Hello", " there."]),
        "mute": write_scripted_model(folder / "mute.gguf", []),
        "blank": write_scripted_model(folder / "blank.gguf", ["  \n", "\n \n"]),
    }


def terminal(tmp_path: Path, arguments: str, **env: str) -> Any:
    """The program with all streams on a terminal but for those that the shell text ``arguments`` redirects."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("XDG_")}
    clean |= {"KVCOMPOSE_CACHE": str(home / "cache"), "LLAMA_CPP_LIB_PATH": str(library_path().parent)}
    clean |= {"HOME": str(home), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"} | env
    return pexpect.spawn(
        "sh",
        ["-c", f"{sys.executable} -m kvcompose_local {arguments}; echo exit code $?"],
        env=clean,
        cwd=str(tmp_path),
        encoding="utf-8",
        dimensions=(50, 300),
        timeout=30,
    )


def output(tmp_path: Path, arguments: str, *typed: str, **env: str) -> str:
    """All that the terminal gets, with ``typed`` given one after another once a prompt is there; CRLF as a newline."""
    child = terminal(tmp_path, arguments, **env)
    prompt, accepted = ("> ", "\r\n") if env.get("TERM") == "dumb" else ("\x1b[?2004h", "\x1b[?2004l")
    got = ""
    for text in typed:
        child.expect_exact(prompt)
        got += child.before + child.after
        child.send(text)
        child.expect_exact(accepted)
        got += child.before + child.after
    child.expect(pexpect.EOF)
    child.close()
    return (got + child.before).replace("\r\n", "\n")


def test_signs_stand_for_what_a_terminal_obeys() -> None:
    assert shown("".join(HOSTILE).replace("\r\n", "\n")) == HOSTILE_SHOWN
    assert shown("a\tb\n") == "a\tb\n"
    assert shown("naïve 港 😀 e\u0301 עברית\u200f") == "naïve 港 😀 e\u0301 עברית\u200f"
    assert shown(shown("\x1b\x9b")) == shown("\x1b\x9b")


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_pieces_are_shown_as_the_whole_is(n: int) -> None:
    raw = io.BytesIO()
    stream = Shown(io.TextIOWrapper(raw, encoding="utf-8"))
    text = "".join(HOSTILE) + "\r\r\n\rx\r"
    for begin in range(0, len(text), n):
        stream.write(text[begin : begin + n])
        stream.flush()
    control(stream, "\x1b[2m")
    stream.write("\n")
    stream.flush()
    assert raw.getvalue().decode() == HOSTILE_SHOWN + "^M\n^Mx\x1b[2m\n"


def test_an_answer_is_shown_on_a_terminal_and_whole_elsewhere(models: dict[str, Path], tmp_path: Path) -> None:
    arguments = f"run {models['hostile']} {FAST} -p hi"
    assert output(tmp_path, arguments) == f"{HOSTILE_SHOWN}\nexit code 0\n"
    assert output(tmp_path, f"{arguments} > out") == "exit code 0\n"
    assert (tmp_path / "out").read_bytes().decode() == "".join(HOSTILE) + "\n"
    assert output(tmp_path, f"{arguments} --json | cat > out") == "exit code 0\n"
    assert json.loads((tmp_path / "out").read_text())["text"] == "".join(HOSTILE)


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_chat_obeys_nobody(models: dict[str, Path], tmp_path: Path, term: str) -> None:
    note = tmp_path / "no\x1b[2Jte\u202e.txt"
    note.touch()
    other = tmp_path / "other.txt"
    other.write_text("text")
    got = output(
        tmp_path,
        f"run {models['hostile']} {FAST} --system 'Be\x9b2J brief' -f {other} -f '{note}'",
        "hi\r",
        "/stats\r",
        "/system\r",
        "/load a/b\r",
        "/quit\r",
        TERM=term,
    )
    left = _OWN.sub("", got)
    # The line editor goes back by backspaces.
    assert not re.search("[\x00-\x07\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", left), left
    assert "no^[[2Jte<U+202E>.txt holds no text" in left
    assert "\x1b[2J" not in got
    assert "Nice^[]0;title^G name: 1024 positions" in left
    assert "Nice^[]0;title^G name (llama), engine" in left
    assert "Be<U+009B>2J brief" in left
    assert HOSTILE_SHOWN in left.replace("\r", "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("inspect {hostile}", "Nice^[]0;title^G name (llama): 1 layers"),
        ("inspect 'no\x1b[2Jne.gguf'", "no^[[2Jne.gguf"),
        ("run {hostile} --session 'a\x1b[2Jb.kvc' " + FAST.removesuffix(" --no-autosave") + " -p hi", "a^[[2Jb.kvc"),
        ("run {hostile} " + FAST + " -p hi -f 'no\u202ene\x07'", "cannot read no<U+202E>ne^G"),
        ("'comm\x1b[2Jand'", "\\x1b[2Jand"),
        ("--debug models path 'x\x1b[2J'", "\\x1b[2J"),
    ],
)
def test_names_are_shown_in_tables_and_errors(
    models: dict[str, Path], tmp_path: Path, arguments: str, told: str
) -> None:
    got = output(tmp_path, arguments.replace("{hostile}", str(models["hostile"])))
    assert told in got
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", got)


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_file_gets_the_answers_alone(models: dict[str, Path], tmp_path: Path, term: str) -> None:
    got = output(tmp_path, f"run {models['polite']} {FAST} > out", "hi\r", "again\r", "\x04", TERM=term)
    assert term == "xterm" or "\x1b" not in got
    assert (tmp_path / "out").read_text() == "Hello there.\n" * 2
    assert "Answers go to standard output, which is no terminal." in got
    assert "hi" in _OWN.sub("", got), "what is typed is seen"
    assert "Hello" not in got
    assert got.endswith("exit code 0\n")


def test_answers_through_tee(models: dict[str, Path], tmp_path: Path) -> None:
    got = output(tmp_path, f"run {models['polite']} {FAST} | tee out", "hi\r", "/quit\r")
    assert got.index("Hello") < got.index(" there.\n")  # tee may write the rest behind the next prompt
    assert (tmp_path / "out").read_text() == "Hello there.\n"


def test_notes_to_a_file(models: dict[str, Path], tmp_path: Path) -> None:
    got = output(tmp_path, f"run {models['polite']} {FAST} 2> err", "hi\r", "/stats\r", "\x04")
    assert "Hello there." in got
    assert "positions: " not in got
    assert "positions: " in (tmp_path / "err").read_text()
    assert "\x1b" not in (tmp_path / "err").read_text()


def test_answers_and_notes_to_files(models: dict[str, Path], tmp_path: Path) -> None:
    """The prompt is drawn on the terminal that the program runs in."""
    got = output(tmp_path, f"run {models['polite']} {FAST} > out 2> err", "hi\r", "\x04")
    assert "> " in _OWN.sub("", got)
    assert (tmp_path / "out").read_text() == "Hello there.\n"
    assert "\x1b" not in (tmp_path / "err").read_text()


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_terminal_without_colours(models: dict[str, Path], tmp_path: Path, term: str) -> None:
    got = output(tmp_path, f"run {models['polite']} {FAST}", "hi\r", "\x04", TERM=term, NO_COLOR="1")
    assert "Hello there." in got
    assert not re.search(r"\x1b\[[0-9;]*[1-9][0-9;]*m", got), "no colour is set"


def test_a_reader_that_has_enough(tiny_model: TinyModel, tmp_path: Path) -> None:
    arguments = f"run {endless(tiny_model)} --threads 1 --ctx 4096 --max-tokens 3900 -p x"
    for redirection in ("| head -c 3", "2>&1 | head -c 3"):
        done = subprocess.run(
            ["bash", "-c", f"{sys.executable} -m kvcompose_local {arguments} {redirection}; echo ${{PIPESTATUS[0]}}"],
            capture_output=True,
            timeout=60,
            check=True,
        )
        assert done.stdout[3:].decode().endswith(f"{128 + signal.SIGPIPE}\n")
        assert b"error" not in done.stderr
        assert b"Traceback" not in done.stderr
        assert b"Exception" not in done.stderr


def test_closed_streams(models: dict[str, Path], tmp_path: Path) -> None:
    ask = ["run", models["polite"], *FAST.split(), "-p", "hi"]
    assert program(*ask, redirection="2>&-").stdout == "Hello there.\n"
    assert program(*ask, redirection="<&-").stdout == "Hello there.\n"
    assert program(*ask, redirection="<&- 2>&-").stdout == "Hello there.\n"
    refused(program(*ask, redirection=">&-"), 1, "standard output is closed")
    session = tmp_path / "s.kvc"  # opened next, it must not get the number of standard error
    done = program(*ask[:-3], "-p", "hi", "--session", session, redirection="2>&-")
    assert (done.returncode, done.stdout) == (0, "Hello there.\n")
    again = program("run", "--session", session, "--threads", "1", "--temp", "0", "-p", "hi")
    assert again.returncode == 0, again.stderr


def test_questions_are_answered_in_turn(models: dict[str, Path]) -> None:
    done = program("run", models["polite"], *FAST.split(), "--json", "-p", "hi", "-p", "and?")
    assert len(json.loads(done.stdout)["answers"]) == 2
    assert "each line is a question" not in done.stderr


@pytest.mark.parametrize("name", ["mute", "blank"])
def test_an_empty_answer_is_told(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    ask = ["run", models[name], *FAST.split(), "-p", "hi"]
    done = program(*ask)
    assert done.returncode == 0
    assert done.stdout.strip() == ""
    assert done.stderr == "(the model said nothing: ask in other words, or with another --seed)\n"
    assert json.loads(program(*ask, "--json").stdout)["stopped"] == "end"
    got = output(tmp_path, f"run {models[name]} {FAST}", "hi\r", "/quit\r")
    assert "(the model said nothing: /regen tries again)" in got


def test_files_are_dropped_on_a_chat(models: dict[str, Path], tmp_path: Path) -> None:
    one, two = tmp_path / "my notes.txt", tmp_path / "it's.txt"
    one.write_bytes("\ufeffThe code is 42.\r\n".encode("utf-16-le"))
    two.write_text("Another text.")
    (tmp_path / "empty.txt").touch()
    dropped = f"{tmp_path}/my\\ notes.txt '{tmp_path}/it'\\''s.txt' "
    got = output(
        tmp_path,
        f"run {models['polite']} {FAST}",
        f"{dropped}\r",
        f"/read {dropped}\r",
        f"/read file://{tmp_path}/my%20notes.txt {tmp_path}/empty.txt\r",
        f"/read {tmp_path}/none.txt '{one}'\r",
        "/quit\r",
    )
    got = _OWN.sub("", got)
    assert f"that is a file: /read {dropped.strip()} reads it" in got
    assert len(re.findall(rf"read \d+ tokens of {re.escape(str(one))}: ask about it", got)) == 2
    assert re.search(rf"read \d+ tokens of {re.escape(str(two))}: ask about it", got)
    assert f"{tmp_path}/empty.txt holds no text: it is left out" in got
    assert f"error: cannot read {tmp_path}/none.txt: No such file" in got


def test_files_are_looked_at_before_the_first_is_read(models: dict[str, Path], tmp_path: Path) -> None:
    long, empty, pdf = tmp_path / "long.txt", tmp_path / "empty.txt", tmp_path / "a.pdf"
    long.write_text("The harbour office opens at nine. " * 20)
    empty.write_text(" \n")
    pdf.write_bytes(b"%PDF-1.4\n")
    ask = ["run", models["polite"], *FAST.split(), "-p", "hi", "-f", long, "-f"]
    done = program(*ask, empty)
    assert (done.returncode, done.stdout) == (0, "Hello there.\n")
    assert done.stderr.startswith(f"{empty} holds no text: it is left out\n")
    refused(program(*ask, pdf), 2, f"{pdf} is a PDF, not text")
    refused(program(*ask, tmp_path / "none"), 2, "No such file")
    long.write_text("The harbour office opens at nine. " * 200_000)
    refused(program(*ask, long), 1, " more tokens do not fit: 0 of --ctx 1024 positions are used")


def test_notes_and_errors_are_wrapped_at_words_on_a_terminal_alone(models: dict[str, Path], tmp_path: Path) -> None:
    for arguments, typed in ((f"run {models['polite']} {FAST}", ("/nonsense\r", "/quit\r")), ("run --top-p 7", ())):
        child = terminal(tmp_path, arguments)
        child.setwinsize(24, 40)
        for text in typed:
            child.expect_exact("\x1b[?2004h")
            child.send(text)
        child.expect(pexpect.EOF)
        lines = _OWN.sub("", child.before).replace("\r", "").split("\n")
        assert max(map(len, lines)) <= 40, lines
        child.close()
    done = program("run", "--top-p", "7")
    assert len(done.stderr.splitlines()) == 1
