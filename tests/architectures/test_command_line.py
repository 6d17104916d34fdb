"""What the command line says of a model of each class of memory: ``inspect`` and ``run`` agree, and chats go on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from model_files import write_architecture
from programs import program

from kvcompose_local.llama_ffi.cells import library_is_patched

pytestmark = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")
TEXT = "The keeper of the light has seven keys, and the blue one is for the boat. " * 8
RUN = ("--threads", 1, "--ctx", 1024, "--temp", 0, "--max-tokens", 4)


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("mistral4", r"1 query heads, 1 KV heads"),
        ("qwen2vl", r"2 query heads, 2 KV heads"),
        ("gemma4", r"Sliding-window layers hold at most 32 tokens .*\n2 layers read the cells of another"),
        ("gpt2", r"2 query heads, 2 KV heads"),
        ("jamba", r"beside MiB"),
    ],
)
def test_a_chat_of_each_class_goes_on(tmp_path: Path, arch: str, said: str) -> None:
    path = write_architecture(arch, tmp_path / "model.gguf")
    text, session = tmp_path / "text.txt", tmp_path / "chat.kvc"
    text.write_text(TEXT)
    told = program("inspect", path)
    assert told.returncode == 0, told.stderr
    assert re.search(said, told.stdout)
    assert "Only --budget 1" not in told.stdout

    def asked(*more: object) -> dict[str, object]:
        done = program("run", path, *RUN, "--budget", 0.3, "--json", "--session", session, "-p", "Which key?", *more)
        assert done.returncode == 0, done.stderr
        result: dict[str, object] = json.loads(done.stdout)
        return result

    first = asked("-f", text)
    assert first["compactions"] > 1
    assert first["kv_bytes"] <= 0.3 * first["kv_bytes_full"]
    second = asked()
    assert second["positions"] > first["positions"] > len(TEXT)
    assert second["prompt_tokens"] < 100, "the text was read again"


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("bloom", "attention biased by distance needs true positions and cannot be composed"),
        ("mamba", "it is recurrent: one state holds all that it read"),
        ("deepseek4", "an index of its own chooses what its attention sees"),
    ],
)
def test_what_is_not_composed_is_refused_in_one_line(tmp_path: Path, arch: str, reason: str) -> None:
    path = write_architecture(arch, tmp_path / "model.gguf")
    told = program("inspect", path)
    assert told.returncode == 0, told.stderr
    assert told.stdout.endswith(f"\nOnly --budget 1: {reason}.\n")
    done = program("run", path, *RUN, "--budget", 0.3, "-p", "Which key?")
    assert (done.returncode, done.stderr) == (1, f"error: {arch} runs with --budget 1 only: {reason}\n")
    whole = program("run", path, *RUN, "--budget", 1, "--json", "-p", "Which key?")
    assert whole.returncode == 0, whole.stderr


@pytest.mark.parametrize(
    ("arch", "line"),
    [
        ("modern-bert", r"error: .* is an embedding model, which writes no text"),
        ("dream", r"error: .* is a diffusion language model"),
    ],
)
def test_what_writes_no_text_is_refused_alike(tmp_path: Path, arch: str, line: str) -> None:
    path = write_architecture(arch, tmp_path / "model.gguf")
    for command in (("inspect", path), ("run", path, *RUN, "--budget", 0.3, "-p", "Which key?")):
        done = program(*command)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.match(line, done.stderr), done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("sections", [[0, 0, 0, 0], [100, 100, 100, 0]])
def test_sections_at_which_ggml_would_abort_are_one_line(tmp_path: Path, sections: list[int]) -> None:
    import gguf

    path = write_architecture("qwen2vl", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(path, "r+")
    field = reader.fields["qwen2vl.rope.dimension_sections"]
    for i, n in zip(field.data, sections, strict=True):
        field.parts[i][0] = n
    reader.data.flush()
    for command in (("inspect", path), ("run", path, *RUN, "--budget", 0.3, "-p", "Which key?")):
        done = program(*command)
        assert done.returncode == 1
        told = re.escape(str(sections))
        assert re.fullmatch(rf"error: model\.gguf says that M-RoPE turns {told} pairs of a head: .*\n", done.stderr)
