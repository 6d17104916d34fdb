"""The chat in a real pseudo-terminal: what a person types and sees, with a tiny model behind it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hybrid_shapes import SMALL, WINDOWS
from model_files import write_model
from programs import endless

from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.llama_ffi.library import library_path
from kvcompose_local.terminal.chat_commands import COMMANDS

pexpect = pytest.importorskip("pexpect")

TinyModel = Callable[..., Path]
Terminal = Callable[..., Any]
#: The editor asks the terminal to mark pasted text while it waits for input, and no longer when it has a line.
PROMPT, ACCEPTED = "\x1b[?2004h", "\x1b[?2004l"
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")


@pytest.fixture
def terminal(tiny_model: TinyModel, tmp_path: Path) -> Iterator[Terminal]:
    """``terminal(*options)`` starts a chat with a private home and waits for its prompt."""
    children = []

    def start(*options: str, model: Path | None = None, in_bash: bool = False) -> Any:
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        env = {k: v for k, v in os.environ.items() if not k.startswith("XDG_")}
        env |= {"KVCOMPOSE_CACHE": str(home / "cache"), "LLAMA_CPP_LIB_PATH": str(library_path().parent)}
        command = [
            "-Xfaulthandler",
            "-m",
            "kvcompose_local",
            "run",
            str(model or endless(tiny_model)),
            "--threads",
            "1",
            "--temp",
            "0",
        ]
        command += ["--budget", "0.21", "--ctx", "1024", "--max-tokens", "20", *options]
        program = sys.executable
        if in_bash:  # with job control
            line = f"{shlex.join([program, *command])}; echo ended by $?"
            program, command = "bash", ["--norc", "--noprofile", "-i", "-c", line]
        child = pexpect.spawn(
            program,
            command,
            env=env | {"HOME": str(home), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
            encoding="utf-8",
            codec_errors="replace",
            dimensions=(50, 200),
            timeout=120,  # other programs may have the processor
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup may run these tests
        )
        children.append(child)
        child.expect_exact(PROMPT)
        return child

    yield start
    for child in children:
        if child.isalive():  # where a test failed, this shows what its chat was doing
            child.kill(signal.SIGABRT)
            with contextlib.suppress(pexpect.ExceptionPexpect, OSError):
                print(child.read())
        child.close(force=True)


def say(child: Any, text: str) -> str:
    """Type a line; returns what stands on the screen below it until the next prompt."""
    child.send(text + "\r")
    child.expect_exact(ACCEPTED)
    child.expect_exact(PROMPT)
    return plain(child.before)


def begin_an_answer(child: Any, text: str) -> None:
    """Type a message and wait until some of its answer is there."""
    child.send(text + "\r")
    child.expect_exact(ACCEPTED)
    child.expect("(?:[^\x00-\x20\x1b][^\x1b]*){5}")


def plain(text: str) -> str:
    return _ESCAPES.sub("", text).replace("\r", "").strip()


def leave(child: Any) -> None:
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) == (0, None)


def test_the_default_model_says_that_it_is_a_toy(
    terminal: Terminal, tmp_path: Path, real_model: Callable[[str], Path]
) -> None:
    cache = tmp_path / "home" / "cache"
    cache.mkdir(parents=True)
    (cache / "models").symlink_to(real_model("smollm2-135m").parent)
    child = terminal(model=Path("smollm2-135m"))
    greeting, hint, *_ = plain(child.before).splitlines()
    assert "1024 positions" in greeting
    assert re.fullmatch(r"smollm2-135m is a toy, to try the program with(; the best model that fits now is .+)?", hint)
    leave(child)
    assert " is a toy" not in plain(terminal().before)


@pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")
@pytest.mark.parametrize("arch", ["falcon-h1", "gemma3"])
def test_turns_are_taken_back_where_a_part_of_the_cache_only_moves_on(
    terminal: Terminal, tmp_path: Path, arch: str
) -> None:
    shape = replace((SMALL | WINDOWS)[arch], speaks=True)
    child = terminal(model=write_model(shape, tmp_path / "model.gguf"))
    said = [say(child, f"Tell me what key number {number} is for, keeper of the light.") for number in (1, 2, 3)]
    where = re.search(r"positions: \d+ of", say(child, "/stats"))
    assert where is not None
    assert say(child, "/regen").startswith(said[2])
    say(child, "And one that is long enough to leave a window behind. " * 3)
    assert re.fullmatch(r"taken back: your message and its answer.*", say(child, "/undo"), re.DOTALL)
    assert where[0] in say(child, "/stats")
    told = re.search(
        r"beside the budget: (\d+\.\d) MiB .* (\d+\.\d) MiB of copies of them .*\((\d) of at most 8\)",
        say(child, "/memory").replace("\n", " "),
    )
    assert told is not None
    assert 3 <= int(told[3]) <= 8
    leave(child)


def test_a_chat_with_every_command(terminal: Terminal, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("Some facts. " * 10)
    child = terminal()
    assert "Tiny random: 1024 positions in 0.2 MiB of cache (uncompressed: 0.8 MiB)" in plain(child.before)
    answer = say(child, "Hello")
    assert answer.endswith("(stopped after 20 tokens: --max-tokens allows more)")
    assert not answer.startswith("(stopped")
    n_first = 1 + len("[user]Hello[/][assistant]") + 20
    assert f"positions: {n_first} of 1024 used" in say(child, "/stats")
    shown_help = say(child, "/help")
    for command in COMMANDS:
        assert command in shown_help
    assert say(child, "/compress 0.5").startswith(f"compacted: {n_first} tokens seen, ")
    read = re.fullmatch(rf"read (\d+) tokens of {note}: ask about it", say(child, f"/read {note}"))
    assert read is not None
    assert int(read[1]) > len(note.read_text())
    assert say(child, "/system") == "there is no system prompt; /system TEXT sets one"
    told = say(child, "/system Be brief.").splitlines()
    assert re.fullmatch(r"going back takes reading \d+ tokens again", told[0])
    assert told[1:] == ["the system prompt is set"]
    assert say(child, "/system") == "Be brief."
    assert say(child, "/clear") == "forgotten: the conversation is empty"
    assert "positions: 0 of 1024 used" in say(child, "/stats")
    assert say(child, "/nonsense").startswith("there is no /nonsense: /help lists the commands")
    assert say(child, "/read /no/such/file") == "error: cannot read /no/such/file: No such file or directory"
    assert say(child, "") == ""
    child.send("/quit\r")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(terminal: Terminal) -> None:
    child = terminal("--ctx", "4096", "--max-tokens", "3500", "--budget", "1")
    begin_an_answer(child, "Hello")
    child.send(CTRL_C)
    child.expect_exact("(stopped")
    child.expect_exact(PROMPT)
    positions = re.search(r"positions: (\d+) of 4096", say(child, "/stats"))
    assert positions is not None
    assert 26 < int(positions[1]) < 3500, "the answer was cut short, and what there is of it is kept"
    begin_an_answer(child, "Again")
    child.send(CTRL_C)
    child.expect_exact("(stopped")
    child.expect_exact(PROMPT)
    leave(child)


def positions_of(*messages: str) -> int:
    """Positions that these messages take, each with an answer of 20 tokens; one byte is one token."""
    turns = [f"[user]{message}[/][assistant]" for message in messages]
    return 1 + len("[/]".join(turns).encode()) + 20 * len(messages)


def test_turns_in_a_terminal(terminal: Terminal) -> None:
    child = terminal("--temp", "0")
    first = say(child, "Hello")
    assert say(child, "/regen") == first + "\n(the same answer again: /regen 1 varies it more)"
    assert say(child, "/regen 9") != first
    assert say(child, "/regen") == first, "the temperature was for one answer"
    assert f"positions: {positions_of('Hello')} of 1024" in say(child, "/stats")
    say(child, "/edit Goodbye")
    assert f"positions: {positions_of('Goodbye')} of 1024" in say(child, "/stats")
    child.send("/edit\r")
    child.expect_exact(ACCEPTED)
    child.expect_exact("Goodbye")
    say(child, ",🦦")
    assert f"positions: {positions_of('Goodbye,🦦')} of 1024" in say(child, "/stats")
    child.send("/edit\r")
    child.expect_exact(ACCEPTED)
    child.expect_exact("🦦")
    child.send(CTRL_C)
    child.expect_exact("nothing is changed")
    child.expect_exact(PROMPT)
    say(child, "More")
    assert f"positions: {positions_of('Goodbye,🦦', 'More')} of 1024" in say(child, "/stats")
    assert say(child, "/forget") == "error: the last answer holds no thinking"
    assert say(child, "/pin") == "pinned: 27 tokens are kept whenever the cache is compressed"
    assert "27 tokens pinned" in say(child, "/stats")
    say(child, "/compress 0.5")
    taken_back = say(child, "/undo").splitlines()
    assert re.fullmatch(r"going back takes reading \d+ tokens again", taken_back[0])
    assert taken_back[1:] == ["taken back: your message and its answer"]
    assert say(child, "/undo") == "taken back: your message and its answer"
    assert say(child, "/undo") == "error: there is nothing to take back"
    assert "positions: 0 of 1024" in say(child, "/stats")
    leave(child)


def test_thinking_is_forgotten_in_a_terminal(terminal: Terminal, tiny_model: TinyModel) -> None:
    """As DeepSeek-R1's template has it: the prompt opens the thinking, and of past answers what follows it is kept."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}[/]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    child = terminal(model=endless(tiny_model, template=template))

    def positions() -> int:
        found = re.search(r"positions: (\d+) of", say(child, "/stats"))
        assert found is not None
        return int(found[1])

    say(child, "Hello")
    message = 1 + len("[user]Hello[/]")
    assert positions() == message + len("[assistant]<think>") + 20
    assert re.fullmatch(r"forgotten: \d+ tokens of thinking", say(child, "/forget"))
    assert positions() == message + len("[assistant]"), "the answer was nothing but thinking"
    assert say(child, "/forget") == "error: the last answer holds no thinking"
    say(child, "More")
    assert positions() == message + len("[assistant][/][user]More[/][assistant]<think>") + 20
    assert say(child, "/undo") == "taken back: your message and its answer"
    leave(child)


def test_the_window_may_change_its_size(terminal: Terminal) -> None:
    child = terminal("--ctx", "4096", "--max-tokens", "3500", "--budget", "0.9")
    child.setwinsize(30, 60)
    begin_an_answer(child, "Hello")
    child.setwinsize(20, 40)
    child.send(CTRL_C)
    child.expect_exact("(stopped")
    child.expect_exact(PROMPT)
    say(child, "/compress")
    chart = say(child, "/memory").splitlines()
    assert "█ composed + ░ live cells of each layer," in chart[0]
    assert len([line for line in chart if re.search("█+░+ ", line)]) == 3
    assert 30 < max(map(len, chart)) <= 40
    leave(child)


def test_ctrl_c_in_a_compaction_leaves_the_chat_whole(
    terminal: Terminal, tiny_model: TinyModel, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Allworkandnoplay." * 320)
    child = terminal("--ctx", "16384", "--temp", "2", model=tiny_model(n_ctx=16384, n_layers=36))  # slow enough
    assert re.search(r"read \d+ tokens of .*: ask about it$", say(child, f"/read {text}"))
    before = say(child, "/stats").splitlines()
    child.send("/compress 0.3\r")
    child.expect_exact("compacting:")  # shown when it lasts
    child.send(CTRL_C)
    child.expect_exact("stopped")
    child.expect_exact(PROMPT)
    assert say(child, "/stats").splitlines()[:4] == before[:4], "no cell is changed"
    assert say(child, "Well?"), "the text needs no reading"
    positions = re.search(r"positions: (\d+) of", say(child, "/stats"))
    assert positions is not None
    assert 0 < int(positions[1]) - int(before[1].split()[1]) <= len("Well?[/][assistant]") + 20
    assert re.search(r"compacted: \d+ tokens seen, .* s$", say(child, "/compress 0.3"))
    leave(child)


def test_ctrl_c_at_the_prompt_says_how_to_leave(terminal: Terminal) -> None:
    child = terminal()
    child.send("half a messa")
    child.expect_exact("messa")
    child.send(CTRL_C)
    child.expect_exact("(Ctrl-D or /quit leaves)")
    child.expect_exact(PROMPT)
    assert "positions: 0 of 1024 used" in say(child, "/stats")
    leave(child)


@pytest.mark.skipif(shutil.which("bash") is None, reason="a shell with job control is needed")
def test_ctrl_z_at_the_prompt_suspends(terminal: Terminal) -> None:
    child = terminal(in_bash=True)
    child.send("\x1a")
    child.expect_exact(f"ended by {128 + signal.SIGTSTP}")


def test_pasted_lines_are_one_message(terminal: Terminal) -> None:
    child = terminal()
    pasted = '"""first line 🦦\n"""\nsecond line, 世界'
    assert "several lines" not in say(child, f"\x1b[200~{pasted}\x1b[201~")
    n_tokens = 1 + len(f"[user]{pasted}[/][assistant]".replace(" ", "▁").encode()) + 20
    assert f"positions: {n_tokens} of 1024 used" in say(child, "/stats")
    leave(child)


def test_a_fenced_message_has_several_lines(terminal: Terminal) -> None:
    child = terminal()
    assert say(child, '"""one') == '(several lines: """ or Ctrl-D ends the message, Ctrl-C drops it)'
    child.expect_exact("...")
    say(child, 'two"""')
    assert f"positions: {1 + len('[user]one.two[/][assistant]') + 20} of 1024 used" in say(child, "/stats")
    leave(child)


def test_text_beyond_ascii(terminal: Terminal) -> None:
    child = terminal()
    message = "Grüße, 世界 🦦"
    say(child, message)
    n_tokens = 1 + len(f"[user]{message}[/][assistant]".replace(" ", "▁").encode()) + 20
    assert f"positions: {n_tokens} of 1024 used" in say(child, "/stats")
    leave(child)


def test_a_long_chat_is_compacted_between_the_lines(terminal: Terminal) -> None:
    child = terminal()
    shown = say(child, "x" * 600)
    assert re.search(r"compacted: \d+ tokens seen, \d+(–\d+)? composed \+ 84 live cells a layer", shown)
    assert "positions: 641 of 1024 used" in say(child, "/stats")
    assert say(child, "y" * 600).startswith("error: 623 more tokens do not fit: 641 of --ctx 1024 positions are used")
    assert "positions: 641 of 1024 used" in say(child, "/stats"), "a refused message leaves no trace"
    leave(child)


def test_the_history_is_private_and_comes_back(terminal: Terminal, tmp_path: Path) -> None:
    child = terminal()
    say(child, "/system Remember me.")
    leave(child)
    kept = [path for path in (tmp_path / "home").rglob("history") if path.is_file()]
    assert len(kept) == 1
    assert stat.S_IMODE(kept[0].stat().st_mode) == 0o600
    child = terminal()
    child.send(UP)
    child.expect_exact("/system Remember me.")
    child.send("\r")
    child.expect_exact("the system prompt is set")
    child.expect_exact(PROMPT)
    leave(child)


def test_a_history_that_cannot_be_written_stops_nothing(terminal: Terminal, tmp_path: Path) -> None:
    child = terminal("--no-autosave")
    kept = next(path for path in (tmp_path / "home").rglob("history") if path.is_file())
    kept.unlink()
    kept.parent.rename(tmp_path / "elsewhere")
    say(child, "/system Be brief.")
    leave(child)
    assert "Traceback" not in (child.before or "")
    assert "exception" not in (child.before or "")


def test_tab_completes_commands_and_file_names(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "unmistakable.txt").write_text("text")
    child = terminal()
    child.send("/st\t")
    child.expect_exact("/stats")
    child.send("\r")
    child.expect_exact("positions: 0 of 1024 used")
    child.expect_exact(PROMPT)
    child.send(f"/read {tmp_path}/unmis\t")
    child.expect_exact("takable.txt")
    child.send("\r")
    child.expect_exact("tokens of")
    child.expect_exact("unmistakable.txt: ask about it")
    child.expect_exact(PROMPT)  # a Ctrl-D that comes earlier is the terminal's own
    leave(child)


def test_a_chat_is_saved_loaded_and_gone_on_with(terminal: Terminal, tmp_path: Path) -> None:
    child = terminal()
    assert say(child, "/save") == "error: /save takes a name"
    assert say(child, "/load") == "error: /load takes a name; nothing is saved yet"
    say(child, "Hello")
    positions = f"positions: {1 + len('[user]Hello[/][assistant]') + 20} of 1024 used"
    hint = r"saved \(0\.\d MiB\): kvcompose-local run --session (\S+) goes on from here"
    assert re.fullmatch(hint, say(child, "/save notes"))
    assert re.fullmatch(hint, say(child, f"/save {tmp_path}/elsewhere.kvc"))
    say(child, "/clear")
    assert say(child, "/load none") == "error: there is no saved chat none; saved: notes"
    assert say(child, "/load") == "error: /load takes a name; saved: notes"
    child.send("/load no\t")
    child.expect_exact("tes")
    child.send("\r")
    child.expect_exact("loaded notes: 2 messages, ")
    child.expect_exact(PROMPT)
    assert positions in say(child, "/stats")
    say(child, "More")
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    said = re.search(hint, plain(child.before))
    assert said is not None
    assert said[1] == "notes"
    child = terminal("--session", "notes", "--no-autosave")
    assert "loaded notes: 4 messages, " in plain(child.before)
    child.send("Lost\r")
    child.expect_exact("(stopped after 20 tokens")
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    assert "saved" not in child.before
    elsewhere = tmp_path / "elsewhere.kvc"
    kept = elsewhere.read_bytes()
    child = terminal("--session", str(elsewhere))
    assert positions in say(child, "/stats")
    leave(child)
    assert "saved" not in child.before, "nothing was said"
    child = terminal("--session", str(elsewhere))
    assert "loaded notes" in say(child, "/load notes")
    say(child, "And?")
    leave(child)
    assert "--session notes goes on" in plain(child.before), "not over the session that this chat began as"
    assert elsewhere.read_bytes() == kept
    child = terminal("--session", str(elsewhere))
    say(child, "/pin")
    leave(child)
    assert "saved" in child.before
    assert elsewhere.read_bytes() != kept


def test_loading_another_chat_loses_none(terminal: Terminal) -> None:
    child = terminal()
    say(child, "One")
    say(child, "/save one")
    assert "loaded one: 2" in say(child, "/load one"), "what was just saved needs no other name"
    say(child, "Two")
    assert "this chat would be lost" in say(child, "/load one")
    say(child, "/save two")
    assert "loaded one: 2" in say(child, "/load one")
    say(child, "Three")
    shown = say(child, "/load two")
    assert "--session one goes on" in shown
    assert "loaded two: 4" in shown
    say(child, "Four")
    leave(child)
    assert "--session two goes on" in plain(child.before)
    for name, n_messages in (("one", 4), ("two", 6)):
        child = terminal("--session", name, "--no-autosave")
        assert f"loaded {name}: {n_messages} messages" in plain(child.before)
        leave(child)


def test_a_session_that_was_only_compressed_is_saved(terminal: Terminal, tmp_path: Path) -> None:
    session = tmp_path / "s.kvc"
    child = terminal("--session", str(session))
    say(child, "x" * 200)
    leave(child)
    before = session.stat().st_size
    child = terminal("--session", str(session))
    assert say(child, "/compress 0.3").startswith("compacted: ")
    leave(child)
    assert "saved" in plain(child.before)
    assert session.stat().st_size < before


def test_two_chats_on_one_session_both_stay(terminal: Terminal, tmp_path: Path) -> None:
    shared = str(tmp_path / "s.kvc")
    first, second = terminal("--session", shared), terminal("--session", shared)
    assert f"a new session: {shared}" in plain(first.before)
    say(first, "One")
    say(second, "Two")
    say(second, "Three")
    leave(first)
    leave(second)
    assert f"another chat was saved as {shared} meanwhile" in plain(second.before)
    for path, n_messages in ((shared, 2), (str(tmp_path / "s-2.kvc"), 4)):
        child = terminal("--session", path)
        assert f"loaded {path}: {n_messages} messages" in plain(child.before)
        leave(child)


def test_a_chat_that_is_killed_loses_no_turn(terminal: Terminal) -> None:
    child = terminal()
    say(child, "Hello")
    say(child, "More " * 30)
    child.kill(signal.SIGKILL)
    child.expect(pexpect.EOF)
    child = terminal("--continue")
    told = plain(child.before)
    assert "a chat ended without being saved: what was said is kept as last\n" in told
    assert re.search(
        r"loaded last: 4 messages, 0 tokens; \d+ more are read before your next message\n> More[^\n]+…\n[^\n]+", told
    )
    say(child, "And?")
    leave(child)
    assert "loaded last: 6 messages" in plain(terminal("--session", "last").before)


def test_an_answer_that_is_held_up_by_a_compaction_stays_whole(terminal: Terminal) -> None:
    child = terminal("--max-tokens", "300", "--ctx", "1024")
    shown = say(child, "x" * 300)
    told = r"\ncompacted: \d+ tokens seen[^\n]*\n\(stopped after 300 tokens[^\n]*"
    assert re.search(told + "$", shown), "below the answer, all of them in a line"
    assert shown.count("compacted:") == 1
    leave(child)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("while_", ["waiting", "answering", "editing"])
def test_a_chat_that_is_ended_from_outside_is_saved(terminal: Terminal, number: int, while_: str) -> None:
    child = terminal("--max-tokens", "400")
    if while_ == "answering":
        begin_an_answer(child, "Go on and on.")
    else:
        say(child, "Hello.")
    if while_ == "editing":
        say(child, "/edit")
    child.kill(number)
    child.kill(number)  # as a closing terminal and its shell do
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 128 + number
    assert "loaded last: 2 messages" in say(terminal(), "/load last")


@pytest.mark.parametrize("answering", [False, True])
def test_a_window_that_is_closed_saves_the_chat(terminal: Terminal, answering: bool) -> None:
    """There is nothing left to write to: every write to the terminal fails."""
    child = terminal("--max-tokens", "400")
    if answering:
        begin_an_answer(child, "Go on and on.")
    else:
        say(child, "Hello.")
    child.ptyproc.fileobj.close()
    deadline = time.monotonic() + 120
    while child.isalive():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "loaded last: 2 messages" in say(terminal(), "/load last")
