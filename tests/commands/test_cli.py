"""The real entry point in real processes: every bad input, the exit codes, one line on stderr, the JSON object."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import gguf
import numpy as np
import pytest
from programs import FAST, PROSE, RUN, endless, program, refused
from scripted_model import write_scripted_model

from kvcompose_local import __version__
from kvcompose_local.commands.cli import cli
from kvcompose_local.commands.run import is_fed
from kvcompose_local.install import models
from kvcompose_local.llama_ffi.library import library_path

TinyModel = Callable[..., Path]
# Models


def test_a_missing_empty_foreign_or_cut_off_model_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    whole = tiny_model().read_bytes()
    empty, text, head, half = (tmp_path / f"{n}.gguf" for n in ("empty", "text", "head", "half"))
    empty.touch()
    text.write_text("This is not a model.\n" * 100)
    head.write_bytes(whole[:12])
    half.write_bytes(whole[: len(whole) // 2])
    refused(program("run", tmp_path / "none.gguf", "-p", "x"), 1, "cannot read", "none.gguf", "No such file")
    refused(program("run", tmp_path, "-p", "x"), 1, "is a folder")
    refused(program("run", empty, "-p", "x"), 1, "empty.gguf is empty")
    refused(program("run", text, "-p", "x"), 1, "text.gguf is not a GGUF file")
    refused(program("run", head, "-p", "x"), 1, "head.gguf is cut off")
    refused(program("run", half, "-p", "x"), 1, "cannot load half.gguf", "not within the file bounds")


@pytest.mark.parametrize("fraction", [0.001, 0.004, 0.99])
def test_a_model_cut_off_in_its_header_or_weights(tiny_model: TinyModel, tmp_path: Path, fraction: float) -> None:
    whole = tiny_model().read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(len(whole) * fraction)])
    for command in (["run", cut, "-p", "x"], ["inspect", cut]):
        refused(program(*command), 1, "cut.gguf", "damaged", "fetch it again")


def test_gguf_files_that_are_no_language_model(tmp_path: Path) -> None:
    def write(name: str, architecture: str, *, tensors: bool) -> Path:
        path = tmp_path / f"{name}.gguf"
        writer = gguf.GGUFWriter(str(path), architecture)
        writer.add_name(name)
        writer.add_context_length(512)
        writer.add_block_count(1)
        if tensors:
            writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    refused(
        program("run", write("bare", "llama", tensors=False), "-p", "x"),
        1,
        "bare.gguf holds a vocabulary or metadata and no weights",
    )
    refused(program("run", write("new", "frobnicator", tensors=True), "-p", "x"), 1, "unknown", "frobnicator")
    refused(program("run", write("lacking", "llama", tensors=True), "-p", "x"), 1, "cannot load lacking.gguf")


def write_bert(path: Path) -> Path:
    """A complete embedding model of one layer: it loads, and cannot chat."""
    n, ff, words = 32, 64, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
    writer = gguf.GGUFWriter(str(path), "bert")
    writer.add_context_length(1024)
    writer.add_embedding_length(n)
    writer.add_block_count(1)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.CLS)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL] * 5 + [gguf.TokenType.NORMAL] * 3)
    writer.add_token_type_count(2)
    writer.add_unk_token_id(1)
    writer.add_sep_token_id(3)
    writer.add_pad_token_id(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(words), n),
        "token_types.weight": (2, n),
        "position_embd.weight": (1024, n),
        "blk.0.ffn_up.weight": (ff, n),
        "blk.0.ffn_up.bias": (ff,),
        "blk.0.ffn_down.weight": (n, ff),
        "blk.0.ffn_down.bias": (n,),
    }
    for norm in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        shapes |= {f"{norm}.weight": (n,), f"{norm}.bias": (n,)}
    for part in ("q", "k", "v", "output"):
        shapes |= {f"blk.0.attn_{part}.weight": (n, n), f"blk.0.attn_{part}.bias": (n,)}
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_embedding_model_cannot_chat(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert.gguf")
    for budget in ("0.5", "1"):
        done = program("run", bert, "-p", "x", "--budget", budget)
        refused(done, 1, "bert.gguf is an embedding model, which writes no text")


def test_unknown_names_are_told_with_a_hint() -> None:
    refused(program("run", "smollm2-135"), 1, "no model 'smollm2-135'", "did you mean smollm2-135m?")
    refused(program("models", "path", "zzz"), 1, "no model 'zzz'", "models list")
    refused(program("models", "pull", "smollm2-135m", "zzz"), 1, "no model 'zzz'")
    refused(program("frobnicate"), 2, "frobnicate")
    refused(program("run", "--frobnicate"), 2, "--frobnicate")


# Numbers and texts


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--budget", "0", "(0, 1]"),
        ("--budget", "-0.5", "(0, 1]"),
        ("--budget", "1.5", "(0, 1]"),
        ("--budget", "nan", "(0, 1]"),
        ("--budget", "inf", "(0, 1]"),
        ("--budget", "half", "half"),
        ("--ctx", "0", "above 0"),
        ("--ctx", "-4", "above 0"),
        ("--ctx", "1e3", "1e3"),
        ("--ctx", "5000", "4096 positions"),
        ("--ctx", "200", "--budget 0.5 of --ctx 200"),
        ("--max-tokens", "0", "--max-tokens"),
        ("--temp", "-1", "--temp"),
        ("--temp", "nan", "--temp"),
        ("--top-p", "2", "--top-p"),
        ("--top-p", "nan", "--top-p"),
        ("--min-p", "nan", "--min-p"),
        ("--seed", "-1", "--seed"),
        ("--threads", "0", "--threads"),
        ("--threads", "1000000", f"1<=x<={os.cpu_count()}"),
        ("--gpu-layers", "-1", "--gpu-layers"),
        ("-p", "", "-p"),
    ],
)
def test_impossible_values_are_wrong_usage(tiny_model: TinyModel, option: str, value: str, word: str) -> None:
    refused(program("run", tiny_model(), *FAST, "-p", "x", option, value), 2, word)


def test_wrong_numbers_are_refused_before_a_model_is_looked_for(private_cache: Path) -> None:
    refused(program("run", "--budget", "7"), 2, "--budget")
    assert not private_cache.exists()


def test_a_prompt_longer_than_the_context(tiny_model: TinyModel) -> None:
    refused(
        program("run", tiny_model(), *FAST, "-p", "x" * 3000), 1, "of --ctx 1024 positions are used", "--ctx up to 4096"
    )
    refused(program("run", tiny_model(), *FAST, "--budget", "1", "-p", "x" * 3000), 1, "--ctx up to 4096")


def test_a_prompt_longer_than_the_allocation_is_compacted(tiny_model: TinyModel) -> None:
    done = program("run", tiny_model(), *FAST, "--budget", "0.25", "-p", "x" * 900, "--json")
    assert done.returncode == 0
    assert "\ncompacted: " in done.stderr
    assert json.loads(done.stdout)["compactions"] >= 1


def test_files_that_cannot_be_read_as_text(tiny_model: TinyModel, tmp_path: Path) -> None:
    binary, latin, empty = tmp_path / "binary", tmp_path / "latin", tmp_path / "empty"
    binary.write_bytes(bytes(range(256)))
    latin.write_bytes("Käse".encode("latin-1"))
    empty.touch()
    ask = ["run", tiny_model(), *FAST, "-p", "x", "-f"]
    refused(program(*ask, tmp_path / "none"), 2, "cannot read", "No such file")
    refused(program(*ask, tmp_path), 2, f"{tmp_path} is a folder: ")
    refused(program(*ask, binary), 2, "binary is a binary file")
    refused(program(*ask, latin), 2, "latin is not UTF-8 text (byte 1)")
    refused(program(*ask, empty), 2, f"there is no text to read in {empty}")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="there is no /proc on this system")
def test_a_file_whose_reading_fails(tiny_model: TinyModel) -> None:
    # Root may read files without permission, but nobody address 0.
    refused(program("run", tiny_model(), *FAST, "-p", "x", "-f", "/proc/self/mem"), 2, "cannot read /proc/self/mem")


def test_piped_input_that_is_not_text(tiny_model: TinyModel) -> None:
    refused(program("run", tiny_model(), *FAST, stdin=b"\xff\xfe\x00"), 2, "standard input begins as UTF-16 text does")
    refused(program("run", tiny_model(), *FAST, stdin=b"K\xe4se\n"), 2, "standard input is not UTF-8 text (byte 1)")


# Streams


def test_closed_and_full_standard_output(tiny_model: TinyModel) -> None:
    answer = ["run", endless(tiny_model), *FAST, "-p", "x", "--max-tokens", "2000", "--ctx", "4096"]
    short = ["run", endless(tiny_model), *FAST, "-p", "x", "--json"]
    for command in (answer, short, ["models", "list"], ["run", "--help"]):
        refused(program(*command, redirection=">&-"), 1, "standard output is closed")
        if command is not short:
            refused(program(*command, redirection=">/dev/full"), 1, "No space left on device")
    full = program(*short, redirection=">/dev/full")  # notes on the answer come before its JSON
    assert full.returncode == 1
    assert full.stderr.splitlines()[1:] == ["error: No space left on device"]
    silent = program(*short, redirection="2>&-")
    assert (silent.returncode, silent.stderr) == (0, "")
    assert json.loads(silent.stdout)["stopped"] == "length"
    nowhere = program(*short, redirection=">&- 2>&-")
    assert (nowhere.returncode, nowhere.stdout, nowhere.stderr) == (1, "", "")


def test_a_reader_that_goes_away(tiny_model: TinyModel) -> None:
    long_answer = [*RUN, "run", str(endless(tiny_model)), "-p", "x", *FAST]
    long_answer += ["--ctx", "4096", "--max-tokens", "3900"]
    with subprocess.Popen(long_answer, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        lines = process.stderr.read().decode().splitlines()
        assert process.wait(30) == 128 + signal.SIGPIPE
    # The long answer may have been compacted before the pipe broke; of the pipe nothing is said.
    assert all(line.startswith("compacted: ") for line in lines)


def test_closed_and_empty_standard_input(tiny_model: TinyModel) -> None:
    refused(program("run", tiny_model(), *FAST, redirection="<&-"), 2, "standard input is closed: ask with -p")
    with_prompt = program("run", tiny_model(), *FAST, "-p", "x", redirection="<&-")
    assert with_prompt.returncode == 0
    assert with_prompt.stdout


def test_a_terminal_that_is_not_utf8_gets_question_marks(tiny_model: TinyModel) -> None:
    done = program(
        "run",
        tiny_model(),
        *FAST,
        "-p",
        "x",
        "--temp",
        "5",
        "--seed",
        "1",
        "--max-tokens",
        "40",
        env={"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0
    assert "?" in done.stdout


def test_ctrl_c_during_a_long_answer(tiny_model: TinyModel) -> None:
    command = [
        *RUN,
        "run",
        str(endless(tiny_model)),
        "-p",
        "x",
        *FAST,
        "--ctx",
        "4096",
        "--max-tokens",
        "4000",
        "--budget",
        "1",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.stderr.read().decode() == "error: stopped\n"
        assert process.wait(30) == 128 + signal.SIGINT
    assert rest.endswith(b"\n"), "the shell's prompt must begin on a line of its own"


@pytest.mark.parametrize("waits", [False, True])
def test_kill_saves_the_session_of_piped_questions(tiny_model: TinyModel, tmp_path: Path, waits: bool) -> None:
    session = tmp_path / "s.kvc"
    n_tokens = "4" if waits else "4000"
    command = [*RUN, "run", str(endless(tiny_model)), *FAST, "--ctx", "4096", "--max-tokens", n_tokens, "--budget", "1"]
    with subprocess.Popen(
        [*command, "--session", str(session)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Hello\n")
        process.stdin.flush()
        assert process.stdout.readline() if waits else process.stdout.read(1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 128 + signal.SIGTERM
    done = program("run", "--session", str(session), "--no-autosave", "--max-tokens", "4", "-p", "And?")
    assert done.returncode == 0, done.stderr
    assert "loaded" in done.stderr


def test_documents_that_cannot_fit_are_refused_before_they_are_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 80)
    model = tiny_model()
    options = ("run", model, *FAST, "--ctx", "512", "--budget", "1", "-p", "x")
    refused(program(*options, "-f", text, "-f", text), 1, "do not fit: 0 of --ctx 512 positions")
    done = program(*options, "-f", "-", "--max-tokens", "4", stdin="Some text.\n")
    assert done.returncode == 0, done.stderr
    assert "piped in" not in done.stderr
    refused(program("run", model, "-f", "-", stdin="x"), 2, "ask with -p")


def test_what_is_piped_in_beside_a_question_is_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some text.\n")
    ask = ("run", endless(tiny_model), *FAST, "--ctx", "512", "--budget", "1", "--max-tokens", "4", "--json", "-p", "x")

    def n_read(**options: str) -> int:
        done = program(*ask, **options)
        assert done.returncode == 0
        told = "what is piped in is read as a text, as by -f -\n"
        n_tokens = int(json.loads(done.stdout)["prompt_tokens"])
        assert done.stderr.startswith(told) is (n_tokens != alone)
        return n_tokens

    alone = int(json.loads(program(*ask).stdout)["prompt_tokens"])
    both = int(json.loads(program(*ask, "-f", text).stdout)["prompt_tokens"])
    assert both > alone
    assert n_read(stdin="Some text.\n") == n_read(redirection=f"<{text}") == both
    assert n_read(stdin=" \n") == n_read(redirection="</dev/null") == n_read(redirection="<&-") == alone
    slow = program(*ask, stdin="", redirection=f"< {shlex.quote(str(fed_late(tmp_path)))}")
    assert json.loads(slow.stdout)["prompt_tokens"] == both


def fed_late(folder: Path) -> Path:
    """A pipe into which a program writes after a while, as most do."""
    fifo = folder / "late"
    os.mkfifo(fifo)
    subprocess.run(["sh", "-c", '(exec >"$0"; sleep 0.5; echo Some text.) 2>/dev/null &', str(fifo)], check=True)
    return fifo


def test_a_pipe_that_stays_empty_holds_up_no_question(tiny_model: TinyModel) -> None:
    command = [*RUN, "run", str(tiny_model()), *FAST, "-p", "x"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.wait(60) == 0


def test_nothing_that_is_piped_in_is_told(tiny_model: TinyModel) -> None:
    for options in ({"stdin": ""}, {"stdin": "\n"}, {"redirection": "</dev/null"}):
        done = program("run", tiny_model(), *FAST, **options)
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr == "nothing is asked: standard input is empty, and there is no -p\n"


def test_what_is_left_to_read_is_fed(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some text.\n")
    with open(text, encoding="utf-8") as stream:
        assert is_fed(stream)
        stream.seek(0, os.SEEK_END)
        assert not is_fed(stream), "at its end, as after `{ read line; kvcompose-local run -p …; } <file`"
    end, other = os.pipe()
    with open(end, encoding="utf-8") as stream:
        assert not is_fed(stream)
        os.write(other, b"x")
        assert is_fed(stream)
        os.close(other)
        assert is_fed(stream), "its end is there"
    assert not is_fed(stream), "closed"
    assert not is_fed(None)


def test_the_end_of_a_chat_that_takes_no_commands_names_none(tiny_model: TinyModel) -> None:
    done = program(
        "run", endless(tiny_model), *FAST, "--ctx", "256", "--budget", "1", "--max-tokens", 999, "-p", "Hello"
    )
    assert "the chat has used all 256 positions: start again with --ctx up to " in done.stderr
    assert "/" not in done.stderr.split("positions: ")[1]


def test_ctrl_c_while_a_file_is_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    fifo = tmp_path / "slow"
    os.mkfifo(fifo)
    command = [*RUN, "run", str(tiny_model()), *FAST, "-f", str(fifo), "-p", "x"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
        open(fifo, "wb"),  # opens when the program has opened its end: it is inside the read now
    ):
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert err.decode() == "error: stopped\n"
    assert process.returncode == 128 + signal.SIGINT


# The set-up


def test_an_empty_cache_has_no_library(
    tiny_model: TinyModel, private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    # The bindings' own folder holds a library where they were installed with one: then this cannot be provoked.
    bindings = importlib.util.find_spec("llama_cpp")
    assert bindings is not None
    assert bindings.origin is not None
    if list((Path(bindings.origin).parent / "lib").glob("*llama*")):
        pytest.skip("the bindings bring a library")
    refused(program("run", tiny_model(), "-p", "x"), 1, "llama.cpp is not built", "`kvcompose-local build`")


def test_a_library_path_without_a_library(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "libllama.so").write_text("not a library")
    done = program("run", tiny_model(), "-p", "x", env={"LLAMA_CPP_LIB_PATH": str(tmp_path)})
    refused(done, 1, "no usable llama.cpp library", "LLAMA_CPP_LIB_PATH")


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    # A file stands where a folder is needed: this stops root too, which permissions do not.
    blocked = tmp_path / "cache"
    blocked.write_text("in the way")
    for command in (["run", "-p", "x"], ["models", "pull", "smollm2-135m"], ["build"]):
        done = program(*command, env={"KVCOMPOSE_CACHE": str(blocked)})
        refused(done, 1, str(blocked))
    assert blocked.read_text() == "in the way"


def test_a_read_only_cache_folder() -> None:
    read_only = Path("/proc/self/cache")  # no user may write there
    if not Path("/proc/self").exists():
        pytest.skip("there is no /proc on this system")
    refused(program("run", "-p", "x", env={"KVCOMPOSE_CACHE": str(read_only)}), 1, "/proc/self/cache")


# What works


def test_one_answer_with_all_numbers(tiny_model: TinyModel) -> None:
    done = program("run", endless(tiny_model), *FAST, "-p", "Hello", "--json")
    assert (done.returncode, done.stderr) == (0, "(stopped after 8 tokens: --max-tokens allows more)\n")
    assert done.stdout.count("\n") == 1
    told = json.loads(done.stdout)
    assert set(told) >= {
        "text",
        "prompt_tokens",
        "generated_tokens",
        "positions",
        "kv_bytes",
        "kv_bytes_full",
        "compute_bytes",
        "layer_cells",
        "compactions",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "compaction_seconds",
        "peak_rss_bytes",
        "engine",
    }
    prompt = "[user]Hello[/][assistant]"
    assert told["prompt_tokens"] == 1 + len(prompt)  # the vocabulary is bytes, after a BOS
    assert told["generated_tokens"] == 8
    assert told["positions"] == told["prompt_tokens"] + told["generated_tokens"]
    row_bytes = 2 * 2 * 2 * 32 * 3  # K and V, two bytes, two heads of 32, three layers
    assert told["kv_bytes_full"] == 1024 * row_bytes
    assert told["kv_bytes"] == told["kv_bytes_full"] * 13 / 32, (
        "K in q8_0, V in q4_0: half of the bytes buys more cells"
    )
    assert told["layer_cells"] == [told["positions"]] * 3
    assert (told["compactions"], told["compaction_seconds"]) == (0, 0)
    parts = [(part["kind"], part["text"], part["n_tokens"], part["kept"]) for part in told["remembered"]]
    assert parts == [("message", "Hello", told["prompt_tokens"], 1), ("answer", " ".join(told["answer"].split()), 8, 1)]
    assert told["prefill_tokens_per_second"] > 0
    assert told["decode_tokens_per_second"] > 0
    assert told["peak_rss_bytes"] > 10 * 2**20
    assert told["text"] == told["answers"][-1]


def test_a_seed_repeats_and_greedy_ignores_it(tiny_model: TinyModel) -> None:
    def answer(*options: str) -> str:
        done = program("run", tiny_model(), *FAST, "-p", "Hi", *options)
        assert done.returncode == 0
        return done.stdout

    assert answer("--seed", "1", "--temp", "2") == answer("--seed", "1", "--temp", "2")
    assert answer("--seed", "1", "--temp", "2") != answer("--seed", "2", "--temp", "2")
    assert answer("--seed", "1", "--temp", "0") == answer("--seed", "2", "--temp", "0")


def test_every_piped_line_is_a_turn_of_one_chat(tiny_model: TinyModel) -> None:
    done = program("run", tiny_model(), *FAST, "--json", stdin="One\n\n  \nTwo\nThree")
    told = json.loads(done.stdout)
    assert done.returncode == 0
    assert len(told["answers"]) == 3
    spelled = "".join(f"[user]{line}[/][assistant]" for line in ("One", "Two", "Three"))
    assert told["prompt_tokens"] >= 1 + len(spelled)  # one BOS: the later turns go on where the earlier ended


def test_answers_before_a_line_that_fails_are_told(tiny_model: TinyModel) -> None:
    options = ("--budget", "1", "--ctx", "512", "--json")
    done = program("run", tiny_model(), *FAST, *options, stdin="One\n" + "word " * 200 + "\nThree\n")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert len(json.loads(done.stdout)["answers"]) == 1


def test_a_piped_line_is_answered_before_the_next_arrives(tiny_model: TinyModel) -> None:
    command = [*RUN, "run", str(tiny_model()), *FAST]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"One\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.communicate(b"Two\n", timeout=30)
    assert process.returncode == 0


def test_several_files_are_read_before_the_question(tiny_model: TinyModel, tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("First.\n")
    two.write_text("Second.\n")
    done = program("run", tiny_model(), *FAST, "-f", one, "-f", two, "--system", "Be.", "-p", "Well?", "--json")
    assert done.returncode == 0
    spelled = "[system]Be.[/][user]First.\n\nSecond.\n\nWell?[/][assistant]"
    tokens = 1 + len(spelled)
    assert json.loads(done.stdout)["prompt_tokens"] == tokens


def test_pinned_files_stay_in_every_layer_or_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Facts." * 67)
    options = ("run", tiny_model(), *FAST, "-f", text, "--cache-type", "f16", "-p", "x" * 500, "--json")
    spread = []
    for pin in ([], ["--pin"]):
        done = program(*options, *pin)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["compactions"] > 0
        spread.append(max(told["layer_cells"]) - min(told["layer_cells"]))
    assert spread[1] < spread[0], "most of the room is taken in each layer alike"
    text.write_text("Facts." * 100)
    refused(program(*options, "--pin"), 1, "pinned tokens are more than the", "raise --ctx or --budget")
    refused(program("run", tiny_model(), "--pin", "-p", "Well?"), 2, "--pin goes with -f")


def test_budget_1_never_compacts(tiny_model: TinyModel) -> None:
    done = program("run", tiny_model(), *FAST, "--budget", "1", "-p", "x" * 900, "--json")
    told = json.loads(done.stdout)
    assert told["kv_bytes"] == told["kv_bytes_full"]
    assert told["compactions"] == 0


def test_json_goes_to_scripts_only(tiny_model: TinyModel) -> None:
    pexpect = pytest.importorskip("pexpect")
    child = pexpect.spawn(RUN[0], [*RUN[1:], "run", str(tiny_model()), "--json"], timeout=30, encoding="utf-8")
    child.expect_exact("error: --json goes with -p or with piped input")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 2


def test_the_catalogue_is_listed_and_located(private_cache: Path) -> None:
    listed = program("models", "list")
    assert listed.returncode == 0
    head, *rows = listed.stdout.split("\n\n")[0].splitlines()
    assert head.split() == ["model", "weights", "cache", "fits", "here", "licence"]
    assert [row.split()[0] for row in rows] == list(models.load_catalogue())
    refused(program("models", "path", "smollm2-135m"), 1, "models pull smollm2-135m")
    entry = models.find("smollm2-135m")
    entry.path.parent.mkdir(parents=True)
    with open(entry.path, "wb") as file:
        file.truncate(entry.size)  # a file with holes: the size is what counts
    assert program("models", "path", "smollm2-135m").stdout == f"{entry.path}\n"


# Help and failures of ours


def commands(command: click.Command, name: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    found = [(name, command)]
    if isinstance(command, click.Group):
        for child, sub in command.commands.items():
            found += commands(sub, (*name, child))
    return found


COMMANDS = {" ".join(name): command for name, command in commands(cli)}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_documents_every_option(name: str) -> None:
    command = COMMANDS[name]
    done = program(*name.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert command.help
    assert command.help.splitlines()[0].split(".")[0] in " ".join(done.stdout.split())
    for parameter in command.params:
        for spelled in parameter.opts:
            shown = spelled if isinstance(parameter, click.Option) else parameter.metavar or spelled.upper()
            assert shown in done.stdout
        if isinstance(parameter, click.Option):
            assert parameter.help
    if isinstance(command, click.Group):
        for child in command.commands.values():
            assert child.get_short_help_str(200) in done.stdout, "a summary is cut off"
        if command.no_args_is_help:
            bare = program(*name.split())
            assert (bare.returncode, bare.stdout) == (0, done.stdout)


def test_debug_shows_the_traceback_of_a_failure() -> None:
    done = program("--debug", "run", "zzz")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: there is no file and no model 'zzz'")


def test_a_failure_nobody_foresaw_is_one_line(tmp_path: Path) -> None:
    # A module that fails on import stands for a bug: the user gets a line, --debug the rest.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['kvcompose_local.install.models'] = object()\n")
    env = {"PYTHONPATH": str(tmp_path)}
    refused(program("run", "x", "-p", "x", env=env), 1, "unexpected", "--debug")
    assert "Traceback" in program("--debug", "run", "x", "-p", "x", env=env).stderr


def test_version() -> None:
    done = program("--version")
    assert done.returncode == 0
    version, pin, series, engine = done.stdout.splitlines()
    assert version == f"kvcompose-local, version {__version__}"
    assert pin == "pin: llama-cpp-python 0.3.36"
    assert re.fullmatch(r"series: \d+ patches, [0-9a-f]{12}", series)
    assert engine.startswith("engine: patched, /")
    unbuilt = program("--version", env={"KVCOMPOSE_CACHE": "/nowhere", "LLAMA_CPP_LIB_PATH": ""}).stdout
    assert unbuilt.endswith("\nengine: none, llama.cpp is not built: run `kvcompose-local build`\n")


@pytest.mark.parametrize(
    ("begun", "words"),
    [
        ("ru", {"run"}),
        ("run --bud", {"--budget"}),
        ("run smol", {"smollm2-135m"}),
        ("run --cache-type q8", {"q8_0", "q8_0/q4_0"}),
        ("run --session la", {"last"}),
        ("models p", {"path", "pull"}),
    ],
)
def test_a_shell_completes(begun: str, words: set[str], tmp_path: Path) -> None:
    folder = tmp_path / "state" / "kvcompose-local" / "sessions"
    folder.mkdir(parents=True)
    (folder / "last.kvc").touch()
    line = f"kvcompose-local {begun}"
    env = {"_KVCOMPOSE_LOCAL_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    done = program(env=env | {"XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)})
    kinds_and_words = [found.split(",", 1) for found in done.stdout.splitlines()]
    assert {word for kind, word in kinds_and_words if kind == "plain"} >= words
    assert all(word.startswith(begun.split()[-1]) for _, word in kinds_and_words)
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_script(shell: str) -> None:
    script = program(env={"_KVCOMPOSE_LOCAL_COMPLETE": f"{shell}_source"}).stdout
    assert "_KVCOMPOSE_LOCAL_COMPLETE" in script
    assert "kvcompose-local" in script
    if which := shutil.which(shell):
        subprocess.run([which, "-n"], input=script, text=True, check=True, timeout=60)  # it parses


def test_what_cannot_be_written_is_told_before_work(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    env = {"KVCOMPOSE_CACHE": str(tmp_path / "file"), "LLAMA_CPP_LIB_PATH": str(library_path().parent)}
    done = program("profile", tiny_model(), env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: cannot write {tmp_path / 'file' / 'profiles'} (Not a directory): make ")
    assert done.stderr.count("\n") == 1
    done = program("compress", tiny_model(), tmp_path / "file", "-o", "-")
    assert done.returncode in (1, 2)
    assert "a session cannot be written to standard output" in done.stderr


def test_a_model_without_attention_runs_uncompressed(tiny_model: TinyModel, tmp_path: Path) -> None:
    mamba = tiny_model("mamba")
    done = program("run", mamba, "--budget", "1", "--ctx", "512", "--max-tokens", "8", stdin="Hello\nMore\n")
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    refused(program("run", mamba, *FAST, "-p", "x"), 1, "mamba runs with --budget 1 only")
    session = ("--session", str(tmp_path / "s.kvc"))
    refused(program("run", mamba, "--budget", "1", *session, "-p", "x"), 1, "mamba has a recurrent cache", "--session")


def test_a_line_that_fails_leaves_the_session_the_others(tiny_model: TinyModel, tmp_path: Path) -> None:
    session = ("--session", str(tmp_path / "s.kvc"))
    done = program("run", tiny_model(), *FAST, *session, stdin=f"Hello\n{'x' * 3000}\nNever\n")
    assert done.returncode == 1
    assert "of --ctx 1024 positions are used" in done.stderr
    again = program("run", *session, "-p", "More", "--json")
    assert "loaded" in again.stderr
    assert "2 messages" in again.stderr
    assert len(json.loads(again.stdout)["answers"]) == 1


def test_questions_behind_one_that_fails_are_counted(tiny_model: TinyModel) -> None:
    questions = [part for text in ("Hello", "x" * 3000, "one", "two") for part in ("-p", text)]
    done = program("run", tiny_model(), *FAST, *questions)
    assert done.returncode == 1
    assert "-p: the 2 after this one are not asked\n" in done.stderr


def test_chats_that_end_together_are_all_saved(tiny_model: TinyModel, tmp_path: Path) -> None:
    command = [*RUN, "run", str(tiny_model()), *FAST, "--session", str(tmp_path / "s.kvc")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    chats = [subprocess.Popen(command, text=True, **pipes) for _ in "abc"]  # type: ignore[call-overload]
    for chat in chats:  # all have begun before one ends
        assert chat.stderr.readline().startswith("a new session")
    for chat, text in zip(chats, "abc", strict=True):
        chat.stdin.write(f"{text}\n")
    for chat in chats:
        chat.stdin.close()
    assert [chat.wait(60) for chat in chats] == [0, 0, 0]
    told = [chat.stderr.read() for chat in chats]
    for chat in chats:
        chat.stderr.close()
    said = [
        program("run", "--session", path, "-p", "x", "--no-autosave").stderr.count(": 2 messages, ")
        for path in tmp_path.glob("s*.kvc")
    ]
    assert said == [1, 1, 1], told


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_what_was_read_before_a_signal_is_saved(
    tiny_model: TinyModel, tmp_path: Path, number: signal.Signals, asks: bool
) -> None:
    """Ctrl-C, a closed window and ``kill``, while the first text is read."""
    if number == signal.SIGINT and not asks:
        pytest.skip("the REPL goes on")
    (tmp_path / "long.txt").write_text(PROSE[:3000])
    arguments = [
        "--ctx",
        "4096",
        "--threads",
        "1",
        "--session",
        str(tmp_path / "s.kvc"),
        "-f",
        str(tmp_path / "long.txt"),
    ]
    code = f"""if True:
        import os, signal, sys
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may run these tests
        from kvcompose_local.engines.base import LlamaEngine
        decode, n = LlamaEngine.decode, [0]

        def stopped(self, tokens, progress=None, **options):
            def told(done, total):
                progress(done, total)
                if done > 500 and not n[0]:
                    n[0] = 1
                    os.kill(os.getpid(), {int(number)})
            decode(self, tokens, told, **options)

        LlamaEngine.decode = stopped
        from kvcompose_local.__main__ import main
        main()
    """
    command = [sys.executable, "-c", code, "run", str(tiny_model()), *arguments, *(["-p", "hi"] if asks else [])]
    end, terminal = os.openpty()
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL if asks else terminal, capture_output=True, text=True, timeout=60, check=False
    )
    os.close(end)
    os.close(terminal)
    assert done.returncode == 128 + number
    assert "goes on from here" in done.stderr
    told = json.loads(program("run", "--session", tmp_path / "s.kvc", "-p", "x", "--json").stdout)
    assert told["positions"] > 500


def test_a_session_that_is_never_written_must_be_there(tiny_model: TinyModel, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
    home |= {"LLAMA_CPP_LIB_PATH": str(library_path().parent)}
    ask = ("run", endless(tiny_model), *FAST, "--max-tokens", "4", "-p", "x")
    typo = tmp_path / "TYPO.kvc"
    none = f"there is no saved chat {typo}; nothing is saved yet"
    refused(program(*ask, "--session", typo, "--no-autosave", env=home), 1, none)
    refused(program(*ask, "--continue", env=home), 1, "there is no saved chat last; nothing is saved yet")
    assert program(*ask, "--session", "last", env=home).returncode == 0
    done = program(*ask, "--continue", "--json", env=home)
    assert "loaded last: 2 messages" in done.stderr
    assert len(json.loads(done.stdout)["answers"]) == 1, "of this run alone"
    refused(program(*ask, "--continue", "--session", "other", env=home), 2, "--session names another")
    refused(program(*ask, "--continue", "--system", "Be brief.", env=home), 1, "leave --system out")


def test_saved_chats_are_listed_and_deleted(tiny_model: TinyModel, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path), "LLAMA_CPP_LIB_PATH": str(library_path().parent)}
    assert program("sessions", env=home).stdout == ""
    model = endless(tiny_model)
    for i, name in enumerate(("older", "a b")):
        asked = ("-p", "x") * (i + 1)
        assert program("run", model, *FAST, "--session", name, *asked, env=home).returncode == 0
    folder = next(tmp_path.rglob("older.kvc")).parent
    os.utime(folder / "older.kvc", (0, 86400 * 365))
    (folder / "broken.kvc").write_text("none")
    os.utime(folder / "broken.kvc", (0, 0))
    newest, older, broken = program("sessions", env=home).stdout.splitlines()
    assert re.search(rf"  a b +4 messages +\d\.\d MiB  {model.name}$", newest)
    assert re.match(r"1971-01-01 \d\d:\d\d  older +2 messages ", older)
    assert "damaged or no session" in broken
    refused(program("sessions", "rm", "older", "../older", env=home), 1, "there is no saved chat ../older: ")
    assert program("sessions", "rm", "a b", "broken", env=home).returncode == 0
    assert len(program("sessions", env=home).stdout.splitlines()) == 1


def test_the_system_prompt_may_be_a_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    text = tmp_path / "be brief.txt"
    text.write_text("Be brief.\n")
    ask = ("run", endless(tiny_model), *FAST, "--max-tokens", "4", "--json", "-p", "x")
    n_tokens = [
        json.loads(program(*ask, *options).stdout)["prompt_tokens"]
        for options in (("--system", "Be brief."), ("--system-file", text))
    ]
    assert n_tokens[0] == n_tokens[1]
    hint = f"--system takes the text itself: --system-file '{text}' reads the file\n"
    for name in (str(text), f"@{text}"):
        assert program(*ask, "--system", name).stderr.startswith(hint)
    refused(program(*ask, "--system-file", text, "--system", "x"), 2, "give one")
    refused(program(*ask, "--system-file", tmp_path / "none"), 2, "cannot read")


def test_thinking_is_hidden_in_json_too(tmp_path: Path) -> None:
    model = write_scripted_model(tmp_path / "thinks.gguf", ["<think>", "Let me", " see.", "</think>", "It is", " so."])
    shown = json.loads(program("run", model, *FAST, "--json", "-p", "a", "-p", "b").stdout)
    assert shown["answers"] == ["<think>Let me see.</think>It is so."] * 2
    hidden = json.loads(program("run", model, *FAST, "--json", "--hide-thinking", "-p", "a", "-p", "b").stdout)
    assert (hidden["answers"], hidden["text"], hidden["reasoning"]) == (["It is so."] * 2, "It is so.", "")


def test_a_model_that_computes_no_numbers(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = Path(shutil.copy(tiny_model(), tmp_path / "nan.gguf"))  # others use the original
    reader = gguf.GGUFReader(model, "r+")
    next(t for t in reader.tensors if t.name == "token_embd.weight").data[:] = np.nan
    reader.data.flush()
    refused(program("run", model, *FAST, "-p", "hi"), 1, "NaN", "fetch it again")
    (tmp_path / "long.txt").write_text(PROSE[:3000])
    done = program(
        "run", model, "--ctx", "4096", "--budget", "0.1", "--threads", "1", "-f", tmp_path / "long.txt", "-p", "hi"
    )
    assert done.returncode == 1
    assert "the model's file is damaged" in done.stderr.splitlines()[-1]


def test_a_vocabulary_without_bytes(tmp_path: Path) -> None:
    model = write_scripted_model(tmp_path / "bytes.gguf", ["one", "two"])
    raw = model.read_bytes()
    for byte in range(128, 256):  # tokens of another name
        raw = raw.replace(f"<0x{byte:02X}>".encode(), f"<0y{byte:02X}>".encode())
    model.write_bytes(raw)
    program("run", model, *FAST, "-p", "naive").check_returncode()
    refused(program("run", model, *FAST, "-p", "na\u00efve"), 1, "no token for '\u00ef', nor for all of its bytes")


def test_ctrl_c_while_the_program_is_imported_ends_in_one_line() -> None:
    code = """if True:
        import sys

        class Interrupted:
            def find_spec(self, name, *_):
                if name == "kvcompose_local.commands.cli":
                    raise KeyboardInterrupt

        sys.meta_path.insert(0, Interrupted())
        from kvcompose_local.__main__ import main
        main()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "error: stopped\n")


def test_positions_may_be_told_in_units_of_1024_and_shares_in_percent(tiny_model: TinyModel) -> None:
    def takes(ctx: str, budget: str) -> tuple[int, int]:
        done = program("run", tiny_model(), "--ctx", ctx, "--budget", budget, "-p", "hi", "--max-tokens", "2", "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        return found["kv_bytes_full"], found["kv_bytes"]

    assert takes("1k", "50%") == takes("1024", "0.5")
    assert takes("2K", "25 %") == takes("2048", "0.25")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--ctx", "k"), ("--ctx", "1.5k"), ("--ctx", "8m"), ("--ctx", "-1k"), ("--budget", "%"), ("--budget", "200%")],
)
def test_positions_and_shares_that_are_none(tiny_model: TinyModel, option: str, value: str) -> None:
    refused(program("run", tiny_model(), option, value, "-p", "hi"), 2, option)
