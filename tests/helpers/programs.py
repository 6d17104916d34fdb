"""The program in a process of its own, models whose answers never end, and what a refusal looks like."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf

from kvcompose_local import evaluation

#: 60,000 characters of prose: the beginning of the text that evaluations are made of.
PROSE = Path(evaluation.__file__).with_name("prose.txt").read_text(encoding="utf-8")[:60_000]
TinyModel = Callable[..., Path]
RUN = [sys.executable, "-m", "kvcompose_local"]
#: Greedy, so that an endless model is one; one thread: two crawl on a machine whose cores are busy.
FAST = ["--ctx", "1024", "--max-tokens", "8", "--temp", "0", "--threads", "1"]


def endless(tiny_model: TinyModel, **options: str) -> Path:
    """A model whose greedy answers never end: the end token's logit is 0, and others are above that."""
    path = tiny_model(seed=7, **options)
    reader = gguf.GGUFReader(path, "r+")
    next(t for t in reader.tensors if t.name == "output.weight").data[2] = 0
    reader.data.flush()
    return path


def program(
    *arguments: object, stdin: str | bytes = "", env: dict[str, str] | None = None, redirection: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the program; ``redirection`` is shell text such as ``>&-``."""
    command = RUN + [str(a) for a in arguments]
    if redirection:
        command = ["sh", "-c", f'exec "$0" "$@" {redirection}', *command]
    raw = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run(
        command, input=raw, capture_output=True, timeout=60, check=False, env={**os.environ, **(env or {})}
    )
    return subprocess.CompletedProcess(
        command, done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    )


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str, stdout: str | None = "") -> None:
    """One line that starts with ``error: `` and holds ``words``, the exit code, nothing on stdout."""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in done.stderr
    assert done.returncode == code
    if stdout is not None:
        assert done.stdout == stdout
