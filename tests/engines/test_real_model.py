"""The program with the models people run: slow enough to be few, and about what a user would notice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from programs import PROSE

NEEDLE = "The special magic number for silver-otter is: 7391845."
QUESTION = "What is the special magic number for silver-otter?"


def run(model: Path, *options: str, stdin: str = "") -> tuple[dict[str, Any], str]:
    """(the JSON object, stderr) of a greedy run that must succeed."""
    command = [sys.executable, "-m", "kvcompose_local", "run", str(model), "--temp", "0", "--json"]
    # Two threads that wait for each other crawl where the cores are busy, and one is fast enough here.
    command += ["--threads", "1", *options]
    done = subprocess.run(
        command, input=stdin, capture_output=True, encoding="utf-8", timeout=300, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def haystack(n_characters: int, depth: float) -> str:
    """The beginning of the prose with the needle at the first paragraph's end beyond ``depth``."""
    text = PROSE.partition("\n\n")[2][:n_characters]
    end = text.index("\n\n", int(len(text) * depth))
    return f"{text[:end]}\n\n{NEEDLE}{text[end:]}"


def test_the_default_model_chats_and_remembers(real_model: Callable[[str], Path]) -> None:
    told, _ = run(
        real_model("smollm2-135m"),
        # Under the system prompt of its own template this model answers in broken French, in other programs too:
        # models.txt has another.
        *("--ctx", "1024", "--max-tokens", "48"),
        stdin="What is the capital of France?\nAnd of Italy?\n",
    )
    first, second = told["answers"]
    assert "Paris" in first
    assert "Rome" in second, "only the first turn tells what is asked about"
    assert told["kv_bytes"] == told["kv_bytes_full"] * 13 / 32  # all positions: half of the bytes buys more than that
    assert told["compactions"] == 0, "nothing is compressed before it must be"


def test_a_needle_survives_half_of_the_cells(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(haystack(3000, 0.5), encoding="utf-8")
    told, said = run(
        real_model("qwen2.5-coder-0.5b"),
        *("--ctx", "1024", "--budget", "0.21", "--max-tokens", "32", "-f", str(text), "-p", QUESTION),
    )
    assert told["kv_bytes"] <= 0.21 * told["kv_bytes_full"]
    assert told["kv_bytes_used"] <= told["kv_bytes"]
    cells = told["layer_cells"]
    assert told["positions"] * len(cells) > sum(cells), "there are fewer cells than tokens that were read"
    assert told["compactions"] >= 1
    lines = re.findall(r"^compacted: .* s(?:, (\d+) times)?$", said, re.MULTILINE)
    assert sum(int(times or 1) for times in lines) == told["compactions"]
    assert "7391845" in told["text"]
