"""The program as a library: the documented example, run as a user would."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import kvcompose_local
from kvcompose_local import LocalChat, Sampling
from kvcompose_local.errors import InvalidInput, SessionError

EXAMPLE = Path(__file__).parent.parent / "docs" / "library.py"


def test_the_example_of_the_docs(real_model: Callable[[str], Path]) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(real_model("smollm2-135m"))],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compacted, first, again, last = done.stdout.strip().splitlines()
    assert compacted.startswith("compacted: ")
    assert first == again  # from the file as from memory
    assert "harbour office" in first
    assert last.endswith("18.3 MiB of cells allocated")


def test_a_chat_of_its_own(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    greedy = Sampling(temperature=0)
    stopped: list[int] = []
    with LocalChat(
        tiny_model(), budget=0.5, n_ctx=1024, n_threads=1, sampling=greedy, on_reading=lambda n, _: stopped.append(n)
    ) as chat:
        assert chat.read("some words " * 60).prompt_tokens > 100
        assert stopped
        answer = chat.ask("what?", max_tokens=8)
        assert answer == "".join(message["content"] for message in chat.chat.messages[-1:])
        chat.save(tmp_path / "x.kvc")
        position = chat.layout.position
    with LocalChat(tiny_model(), budget=0.5, n_ctx=1024, n_threads=1, sampling=greedy) as other:
        other.load(tmp_path / "x.kvc")
        assert other.layout.position == position
        with pytest.raises(SessionError):
            other.load(tmp_path / "none.kvc")
    with pytest.raises(InvalidInput, match="q8_0"):
        LocalChat(tiny_model(), cache_type="q9")


def test_names_are_imported_on_first_use() -> None:
    code = (
        "import sys, kvcompose_local; assert 'llama_cpp' not in sys.modules; print(kvcompose_local.LocalChat.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "LocalChat\n"
    with pytest.raises(AttributeError):
        kvcompose_local.nothing  # noqa: B018
