"""Cells in memory that is not ours: the engine's tests again on one and on two RPC workers, a chat, a lost worker."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kvcompose_local.errors import EngineError, InvalidInput
from kvcompose_local.llama_ffi.cells import library_is_patched
from kvcompose_local.llama_ffi.rpc import add_workers, is_loopback, parse_endpoint

pytestmark = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")
PROGRAM = [sys.executable, "-m", "kvcompose_local"]


@contextmanager
def worker() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A running worker on a free port of this machine: (HOST:PORT, process)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*PROGRAM, "rpc-server", "--port", str(port), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(300):
            if process.poll() is not None:
                raise AssertionError(process.communicate()[1])
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"127.0.0.1:{port}", process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("n_workers", [1, 2])
def test_bytes_and_attention_on_workers(n_workers: int) -> None:
    with ExitStack() as stack:
        endpoints = [stack.enter_context(worker())[0] for _ in range(n_workers)]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/engines/test_patched_engine.py"],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "KVCOMPOSE_TEST_WORKERS": ",".join(endpoints)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        assert "failed" not in done.stdout


def test_a_chat_over_two_workers_compacts_and_answers(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("x" * 700)
    with worker() as (one, _), worker() as (two, _):
        done = subprocess.run(
            [
                *PROGRAM,
                "run",
                str(tiny_model("llama")),
                "--rpc",
                f"{one},{two}",
                "--ctx",
                "1024",
                "--budget",
                "0.5",
                "-f",
                str(text),
                "-p",
                "Well?",
                "--temp",
                "0",
                "--max-tokens",
                "5",
                "--json",
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert '"engine": "patched"' in done.stdout
    assert "compacted:" in done.stderr


def test_a_worker_killed_in_an_answer_is_told_in_one_line(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with worker() as (endpoint, server):
        chat = subprocess.Popen(
            [
                *PROGRAM,
                "run",
                str(tiny_model("llama", n_ctx=100000)),
                "--rpc",
                endpoint,
                "--ctx",
                "90000",
                "--budget",
                "1",
                "-p",
                "Hello there",
                "--temp",
                "0",
                "--max-tokens",
                "80000",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")},
        )
        assert chat.stdout is not None
        assert chat.stdout.read(20)
        server.kill()
        _, errors = chat.communicate(timeout=60)
    lines = errors.decode().strip().splitlines()
    assert chat.returncode == 1
    assert lines[0] == "error: an RPC worker was lost"
    assert lines[1].startswith("the conversation is kept in ")
    assert len(lines) == 2
    assert "Hello there" in Path(lines[1].removeprefix("the conversation is kept in ")).read_text()


def test_workers_that_are_not_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(EngineError, match=f"no RPC worker answers at {free}.*rpc-server"):
        add_workers([free])
    for wrong in ("host", "host:", ":1", "host:0", "host:99999", "host:port"):
        with pytest.raises(InvalidInput, match="HOST:PORT"):
            parse_endpoint(wrong)
    assert is_loopback("127.0.0.2")
    assert not is_loopback("0.0.0.0")


def test_the_server_says_what_is_wrong_with_its_address() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [*PROGRAM, "rpc-server", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot listen on 127.0.0.1:")
    command = [*PROGRAM, "rpc-server", "--host", "192.0.2.1"]  # an address that no machine has
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("warning: the RPC protocol has no authentication")
