"""``serve`` as a process: what it refuses, how it ends, and what survives a kill."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from programs import PROSE, RUN, TinyModel, endless, program, refused
from tiny_models import write_tiny_model

HELLO = [{"role": "user", "content": "hello " * 40}]


@contextmanager
def served(model: Path, state: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The server's URL and its process, once the model is loaded."""
    command = [*RUN, "serve", str(model), "--port", "0", "--threads", "1", "--temp", "0", *options]
    env = {**os.environ, "XDG_STATE_HOME": str(state)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stderr is not None
    try:
        url = ""
        for line in process.stderr:
            if found := re.match(r"http://\S+", line):
                url = found.group()
            if "loaded in" in line:
                break
        yield url, process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def ask(url: str, messages: list[dict[str, str]], max_tokens: int = 4) -> httpx.Response:
    body = {"messages": messages, "max_tokens": max_tokens}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "--no-auth to mean it"),
        (["--api-key", " "], "empty"),
        (["--keep", "much"], "no size"),
        (["--cors", "example"], "no origin"),
        (["--budget", "2"], "in (0, 1]"),
    ],
)
def test_what_nobody_can_mean_is_refused(tiny_model: TinyModel, options: list[str], said: str) -> None:
    done = program("serve", tiny_model(), *options)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_one_line(tiny_model: TinyModel, tmp_path: Path) -> None:
    with served(tiny_model(), tmp_path) as (url, _):
        port = url.rpartition(":")[2]
        refused(program("serve", tiny_model(), "--port", port), 1, f"127.0.0.1:{port}", "in use")


def test_a_model_that_cannot_run_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused(program("serve", tmp_path / "x.gguf", "--port", "0"), 1, "x.gguf")


def test_after_a_kill_no_acknowledged_chat_is_lost(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = endless(tiny_model)
    with served(model, tmp_path) as (url, process):
        first = ask(url, HELLO).json()
        process.kill()
        process.wait()
    with served(model, tmp_path) as (url, _):
        chat = first["kvc"]["chat"]
        kept = httpx.get(f"{url}/kvc/chats/{chat}").json()
        said = first["choices"][0]["message"]
        assert [m["content"] for m in kept["messages"]] == [HELLO[0]["content"], said["content"]]
        assert kept["where"] in ("text only", "disk")
        again = ask(url, [*HELLO, said, {"role": "user", "content": "and?"}]).json()
        assert again["kvc"]["chat"] == chat


def test_sigterm_ends_a_running_answer_within_a_second_and_keeps_it(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = endless(tiny_model)
    with served(model, tmp_path, "--budget", "1", "--ctx", "4096") as (url, process):
        body = {"messages": HELLO, "max_tokens": 3900, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            chat = response.headers["X-KVCompose-Chat"]
            lines = response.iter_lines()
            for _ in range(12):
                next(lines)
            process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            rest = [line for line in lines if line]
            process.wait(10)
            assert time.monotonic() - started < 3  # a second, beside other tests
        told = [json.loads(line.removeprefix("data: ")) for line in rest if line.startswith("data: {")]
        assert "stopped before its end" in told[-1]["error"]["message"]  # half an answer is not told as a whole one
        assert not any(choice["finish_reason"] for chunk in told[:-1] for choice in chunk["choices"])
        assert process.returncode in (0, -signal.SIGTERM)
    with served(model, tmp_path, "--budget", "1", "--ctx", "4096") as (url, _):
        kept = httpx.get(f"{url}/kvc/chats/{chat}").json()
        assert kept["where"] == "disk"
        assert kept["messages"][1]["content"]
        again = ask(url, [*HELLO, kept["messages"][1], {"role": "user", "content": "and?"}]).json()
        assert again["kvc"]["chat"] == chat
        assert again["kvc"]["read"] < 40


def test_sigterm_while_a_long_prompt_is_read_keeps_what_was_read(tmp_path: Path) -> None:
    model, options = write_tiny_model(tmp_path / "tiny.gguf", n_ctx=32768), ("--budget", "1", "--ctx", "32768")
    system = [{"role": "system", "content": PROSE[:12_000]}]
    with served(model, tmp_path, *options) as (url, process):
        body = {"messages": [*system, *HELLO], "max_tokens": 4}
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=60)
            while not httpx.get(f"{url}/props", timeout=60).json()["queue"]["running"]:
                assert not asked.done(), asked.result().text
                time.sleep(0.01)
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            process.wait(10)
            assert time.monotonic() - started < 3  # a second, beside other tests
            with contextlib.suppress(httpx.HTTPError):
                asked.result()
    with served(model, tmp_path, *options) as (url, _):
        again = ask(url, [*system, {"role": "user", "content": "and?"}]).json()
        assert again["timings"]["prompt_n"] < again["usage"]["prompt_tokens"] - 200


def test_a_beginning_of_20_000_tokens_is_read_once_also_across_a_restart(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", n_ctx=32768, seed=7)
    system = [{"role": "system", "content": PROSE[:20_000]}]
    options = ("--budget", "0.25", "--ctx", "32768")

    def n_read(url: str, question: str) -> int:
        told = ask(url, [*system, {"role": "user", "content": question}]).json()
        assert told["usage"]["prompt_tokens"] > 20_000
        return int(told["timings"]["prompt_n"])

    with served(model, tmp_path, *options) as (url, process):
        assert n_read(url, "one") > 20_000
        assert n_read(url, "two") < 100
        process.terminate()
        process.wait(10)
    with served(model, tmp_path, *options) as (url, _):
        assert n_read(url, "three") < 100


def test_where_others_reach_it_that_is_said(tiny_model: TinyModel, tmp_path: Path) -> None:
    with served(tiny_model(), tmp_path, "--host", "0.0.0.0", "--no-auth") as (url, process):
        assert httpx.get(url.replace("0.0.0.0", "127.0.0.1") + "/health").status_code == 200
        process.kill()
    with served(tiny_model(), tmp_path, "--host", "0.0.0.0", "--api-key", "k") as (url, _):
        assert httpx.get(url.replace("0.0.0.0", "127.0.0.1") + "/v1/models").status_code == 401
