"""A user without a home folder, as in a container: what needs none works, and nothing is kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import endless

from kvcompose_local import profiles
from kvcompose_local.chat import sessions
from kvcompose_local.errors import NoHome
from kvcompose_local.install import resources
from kvcompose_local.install.model_files import model_digest
from kvcompose_local.install.models import find, system_prompt
from kvcompose_local.llama_ffi.library import library_path
from kvcompose_local.terminal import autosave

TinyModel = Callable[..., Path]
_FOLDERS = ("HOME", "KVCOMPOSE_CACHE", "XDG_CACHE_HOME", "XDG_STATE_HOME")
#: A number that no user has, with root's right to read everything: Python and the models may be root's own.
STRANGER = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
STRANGER += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
as_stranger = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="becoming a user without an entry takes root",
)


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable names a folder, and the system knows no such user."""
    import pwd

    def unknown(uid: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in _FOLDERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_folders_that_cannot_be_named(homeless: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in (resources.cache_folder, resources.state_folder, sessions.sessions_folder):
        with pytest.raises(NoHome, match=r"this user has no home folder: set HOME"):
            folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # counts as none
    with pytest.raises(NoHome, match="set HOME or KVCOMPOSE_CACHE to a folder"):
        resources.cache_folder()
    monkeypatch.setenv("HOME", "")
    with pytest.raises(NoHome):
        resources.state_folder()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path in resources.cache_folder().parents
    assert tmp_path in resources.state_folder().parents


def test_what_is_only_kept_is_not_kept(homeless: None, tmp_path: Path) -> None:
    assert sessions.names() == []
    assert not find("smollm2-135m").is_present
    assert system_prompt(tmp_path / "some.gguf") is None
    shipped = profiles.read(next(profiles._files()))  # what came with the program needs no home
    assert profiles.find(shipped.model_bytes, lambda: shipped.model_sha256) is not None
    model = tmp_path / "some.gguf"
    model.write_bytes(b"GGUF of nothing")
    assert len(model_digest(model)) == 64
    with pytest.raises(NoHome):
        sessions.path_of("plain")
    path = sessions.path_of(str(tmp_path / "chat.kvc"))
    sessions.check_writable(path)
    assert autosave._version_of(sessions.LAST) == ()
    assert not autosave._is_same(str(path), sessions.LAST)


@pytest.fixture
def environments(tmp_path: Path) -> dict[str, str]:
    """Of a process whose user finds the library and has no folder."""
    kept = {name: value for name, value in os.environ.items() if name not in _FOLDERS}
    return kept | {"LLAMA_CPP_LIB_PATH": str(library_path().parent)}


def as_user(environment: dict[str, str], *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [*STRANGER, sys.executable, "-m", "kvcompose_local", *arguments]
    done = subprocess.run(
        command, env=environment, input=stdin, capture_output=True, text=True, timeout=120, check=False
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip("this root may not become another user")
    return done


@as_stranger
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"HOME": "/"},  # what Docker sets
        {"HOME": ""},
        {"HOME": "/nonexistent"},
        {"XDG_STATE_HOME": "relative", "XDG_CACHE_HOME": "relative"},
        {"XDG_STATE_HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none", "HOME": "/proc"},
        {"KVCOMPOSE_CACHE": "~/cache"},
        {"KVCOMPOSE_CACHE": "/proc/none"},
    ],
)
def test_a_question_needs_no_home(
    tiny_model: TinyModel, environments: dict[str, str], variables: dict[str, str]
) -> None:
    options = ["--threads", "1", "--ctx", "1024", "--max-tokens", "4", "--temp", "0"]
    model = str(endless(tiny_model))
    asked = as_user(environments | variables, "run", model, *options, "-p", "hi")
    assert (asked.returncode, asked.stderr) == (0, "(stopped after 4 tokens: --max-tokens allows more)\n")
    piped = as_user(environments | variables, "run", model, *options, stdin="hi\n")
    assert (piped.returncode, piped.stdout) == (0, asked.stdout)
    examined = as_user(environments | variables, "doctor")
    assert examined.returncode == 0, examined.stdout + examined.stderr
    assert " warn  cache folder: " in examined.stdout
    assert " warn  sessions: no chat is saved: " in examined.stdout


@as_stranger
def test_what_needs_a_folder_says_so_in_one_line(tiny_model: TinyModel, environments: dict[str, str]) -> None:
    nowhere = "error: this user has no home folder: set HOME"
    for command in (
        ["models", "pull", "smollm2-135m"],
        ["run", "-p", "hi"],
        ["run", str(endless(tiny_model)), "--session", "plain", "-p", "hi"],
        ["build"],
    ):
        environment = {k: v for k, v in environments.items() if command != ["build"] or k != "LLAMA_CPP_LIB_PATH"}
        done = as_user(environment, *command)
        assert done.stderr.startswith(nowhere), (command, done.stderr)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)


@as_stranger
def test_a_chat_says_once_that_nothing_is_saved(tiny_model: TinyModel, environments: dict[str, str]) -> None:
    pexpect = pytest.importorskip("pexpect")
    options = ["--threads", "1", "--ctx", "1024", "--max-tokens", "4", "--temp", "0"]
    command = [*STRANGER, sys.executable, "-m", "kvcompose_local", "run", str(endless(tiny_model)), *options]
    environment = environments | {"TERM": "dumb"}
    child = pexpect.spawn(command[0], command[1:], env=environment, encoding="utf-8", timeout=120, dimensions=(50, 200))
    child.expect_exact("this chat will not be saved: this user has no home folder: set HOME")
    child.expect_exact("> ")
    child.send("hello\r")
    child.expect_exact("--max-tokens allows more")
    child.expect_exact("> ")
    child.send("/save plain\r")
    child.expect_exact("error: this user has no home folder")
    child.expect_exact("> ")
    child.send("\x04")
    child.expect(pexpect.EOF)
    child.close()
    assert "saved" not in child.before
    assert child.exitstatus == 0
