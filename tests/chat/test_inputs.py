"""One reader of texts: what it takes, and what it says of everything else."""

from __future__ import annotations

import gzip
import io
import os
import re
import sqlite3
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from kvcompose_local.api import template_of
from kvcompose_local.chat import inputs, sessions
from kvcompose_local.chat.inputs import dropped_files, paths_in, read, read_all, text_of
from kvcompose_local.errors import InvalidInput
from kvcompose_local.install import models

TEXT = "The code is 42, in the café.\nIt is 港 and 😀.\n"
CHINESE = "港口办公室九点开门。请带上您的文件，谢谢！\n" * 3


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le bom", "utf-16-be bom", "utf-32", "utf-32-be bom"]
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_every_unicode_text_is_read(encoding: str, newline: str) -> None:
    name, _, bom = encoding.partition(" ")
    text = TEXT.replace("\n", newline)
    assert text_of((("\ufeff" if bom else "") + text).encode(name), Path("x")) == TEXT


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return file.getvalue()


def database() -> bytes:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("create table t (x)")
        return connection.serialize() if sys.version_info >= (3, 11) else b"SQLite format 3\0" + bytes(84)


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


NOT_TEXT = {
    "a.pdf": (b"%PDF-1.7\nall of it ASCII", "a PDF, not text: `pdftotext -layout a.pdf a.txt`"),
    "a.rtf": (rb"{\rtf1\ansi hello}", "rich text (RTF), not text: `pandoc a.rtf -t plain -o a.txt`"),
    "my a.docx": (
        zipped("word/document.xml"),
        "a Word document, not text: `pandoc 'my a.docx' -t plain -o 'my a.txt'`",
    ),
    "a.xlsx": (zipped("xl/workbook.xml"), "an Excel table"),
    "a.epub": (zipped("mimetype", "META-INF/container.xml"), "an e-book"),
    "a.odt": (zipped("mimetype", "content.xml"), "an OpenDocument file"),
    "a.zip": (zipped("a.txt"), "a zip archive, not text: `unzip a.zip`"),
    "cut.docx": (zipped("word/document.xml")[:40], "a zip archive"),
    "a.gz": (gzip.compress(TEXT.encode()), "a gzip archive, not text: `gunzip -c a.gz > a.txt`"),
    "a.tar": (tar(), "a tar archive"),
    "a.png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a PNG image, not text"),
    "a.jpg": (b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG image"),
    "a.webp": (b"RIFF\x10\0\0\0WEBPVP8 ", "a WebP image"),
    "a.mp4": (b"\0\0\0\x20ftypisom", "a film"),
    "a.gguf": (b"GGUF\x03\0\0\0", "a GGUF model, not text: `kvcompose-local run a.gguf`"),
    "a.db": (database(), "an SQLite database"),
    "a.kvc": (b"\x10\0\0\0\0\0\0\0" + b'{"a":{}}', "a safetensors file"),
    "a.so": (b"\x7fELF\x02\x01\x01\0", "a program"),
    "bytes": (bytes(range(256)), "a binary file, not text"),
    "noise": (bytes(hash((i, 7)) % 251 for i in range(3000)), "binary file"),
    "le.txt": (TEXT.encode("utf-16-le"), "UTF-16LE text without a byte order mark: `iconv -f UTF-16LE -t UTF-8 le.txt"),
    "be.txt": (TEXT.encode("utf-16-be"), "UTF-16BE text without a byte order mark"),
    "chinese.txt": (CHINESE.encode("utf-16-le"), "UTF-16LE text without a byte order mark"),
    "wide.txt": (TEXT.encode("utf-32-le"), "UTF-32LE text without a byte order mark"),
    "odd.txt": (b"\xff\xfe" + "hi".encode("utf-16-le") + b"x", "begins as UTF-16 text does and is none (byte 6)"),
    "nul.log": (b"one\0two\n", "text with 1 NUL bytes, the first at byte 3: `tr -d '\\000' < nul.log > nul.txt`"),
    "nul16.txt": ("\ufeffa\0b".encode("utf-16-le"), "a binary file"),
    "latin.txt": ("Käse".encode("latin-1"), "not UTF-8 text (byte 1): `iconv -f WINDOWS-1252 -t UTF-8 latin.txt >"),
    "half.txt": ("Grüße und Käse".encode()[:-3], "not UTF-8 text (byte 13): `iconv -c -f UTF-8 -t UTF-8 half.txt >"),
    "cp1252.txt": ("“Grüße” to all of you".encode("cp1252"), "not UTF-8 text (byte 0): `iconv -f WINDOWS-1252"),
    "gbk.txt": (CHINESE.encode("gbk"), "`iconv -f GB18030"),
    "cyrillic.txt": ("Привет, как дела?\n".encode("cp1251") * 3, "WINDOWS-1251"),
    "cut.txt": (CHINESE.encode()[:-2], "`iconv -c -f UTF-8 -t UTF-8 cut.txt >"),
}


@pytest.mark.parametrize("name", NOT_TEXT)
def test_what_is_no_text_is_told_by_name(name: str) -> None:
    raw, told = NOT_TEXT[name]
    with pytest.raises(InvalidInput, match=re.escape(told)) as error:
        text_of(raw, Path(name))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["latin.txt", "le.txt", "gbk.txt", "cut.txt", "nul.log", "a.gz"])
def test_the_command_that_is_told_makes_text_of_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(NOT_TEXT[name][0])
    with pytest.raises(InvalidInput) as error:
        text_of(NOT_TEXT[name][0], Path(name))
    (command,) = re.findall("`(.*?)`", str(error.value))
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=name != "cut.txt", timeout=20)
    (made,) = {*tmp_path.iterdir()} - {tmp_path / name}
    assert len(read(made)) >= 4


@pytest.mark.parametrize(
    "text",
    [
        "GGUF is a format",
        "ID3 tags",
        "the ftyp box",
        "PAR1",
        "PK and others",
        "BZh",
        "Rar!",
        "II*",
        "%P",
        "12345678WAVE",
    ],
)
def test_a_text_may_begin_with_such_letters(text: str) -> None:
    assert text_of(text.encode(), Path("x")) == text


def test_all_files_are_read_before_any_counts(tmp_path: Path) -> None:
    good, white, none = tmp_path / "good", tmp_path / "white", tmp_path / "none"
    good.write_text("text")
    white.write_text(" \n\t\n")
    assert read_all([good, white, good]) == ([(str(good), "text")] * 2, [str(white)])
    with pytest.raises(InvalidInput, match=f"no text to read in {white}, /dev/null$"):
        read_all([white, Path("/dev/null"), white])
    with pytest.raises(InvalidInput, match=f"cannot read {none}: No such file"):
        read_all([good, none])


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match=r"^\S+ is a folder: '?\S+/\*.txt'? names its text files$"):
        inputs.read_all([tmp_path])
    with pytest.raises(InvalidInput, match="Is a directory"):
        read(tmp_path)
    with pytest.raises(InvalidInput, match=r"^/dev/zero is a device"):
        read(Path("/dev/zero"))
    with pytest.raises(InvalidInput, match="cannot read"):
        read(Path("a\0b"))
    with pytest.raises(InvalidInput, match="File name too long"):
        read(tmp_path / ("x" * 5000))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=("\ufeffpiped\r\n".encode("utf-16-le"),))
    writer.start()
    assert read(pipe) == "piped\n"
    writer.join()
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(InvalidInput, match="3072 MiB, and no model reads more than 64 MiB"):
        read(large)


def test_wildcards_name_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.txt").mkdir()
    for name in ("b.txt", "a.txt", "c.md", "d[1].csv", "folder.txt/e.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)

    def called(*words: str) -> list[str]:
        return [name for name, _ in inputs.read_all([Path(word) for word in words])[0]]

    assert called("*.txt", "d[1].csv") == ["a.txt", "b.txt", "d[1].csv"]
    assert called("**/*.txt") == ["a.txt", "b.txt", "folder.txt/e.txt"]
    assert called(*map(str, inputs.paths_in("*.md *.csv"))) == ["c.md", "d[1].csv"]
    with pytest.raises(InvalidInput, match=r"^no file matches \*.rst$"):
        called("*.rst")


def test_a_web_page_is_not_fetched() -> None:
    with pytest.raises(InvalidInput, match=r"^https://example\.com/a is a web page, and none is fetched: "):
        inputs.read_all([Path("https://example.com/a")])


def typed(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


@pytest.mark.parametrize(
    "raw",
    [
        b"one\ntwo\n",
        b"one\r\ntwo",
        b"one\rtwo\r",
        b"\xef\xbb\xbfone\ntwo\n",
        "one\r\ntwo\r\n".encode("utf-16"),
        "one\ntwo".encode("utf-32"),
    ],
)
def test_lines_of_standard_input(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    typed(monkeypatch, raw)
    assert list(inputs.lines()) == ["one", "two"]


def test_lines_are_given_as_they_come() -> None:
    program = "from kvcompose_local.chat import inputs\nfor line in inputs.lines(): print(line, flush=True)"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in (b"first\n", b"second\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline() == line


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0", "standard input is a PNG image, not text"),
        (b"fine\nK\xe4se\n", "standard input is not UTF-8 text (line 2, byte 1): `iconv -f WINDOWS-1252"),
        (zipped("word/document.xml", "b"), "standard input is a Word document, not text: `pandoc FILE"),
        ("hi\nthere\n".encode("utf-16-le"), "standard input is UTF-16LE text without a byte order mark"),
        (b"%PDF-1.4\n", "standard input is a PDF"),
    ],
)
def test_standard_input_that_is_no_text(monkeypatch: pytest.MonkeyPatch, raw: bytes, told: str) -> None:
    typed(monkeypatch, raw)
    with pytest.raises(InvalidInput, match=re.escape(told)):
        list(inputs.lines())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("my notes.txt", "it's (1).txt", "a.txt", "100%.txt", "é b.txt", "don't"):
        (tmp_path / name).write_text("text")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("{}/my notes.txt", ["my notes.txt"]),
        ("{}/my\\ notes.txt", ["my notes.txt"]),
        ("'{}/my notes.txt'", ["my notes.txt"]),
        ('"{}/my notes.txt"', ["my notes.txt"]),
        ("{}/it\\'s\\ \\(1\\).txt", ["it's (1).txt"]),
        ("'{}/it'\\''s (1).txt'", ["it's (1).txt"]),
        ("{}/don't", ["don't"]),
        ("file://{}/my%20notes.txt", ["my notes.txt"]),
        ("file://localhost{}/100%25.txt", ["100%.txt"]),
        ("FILE://{}/%C3%A9%20b.txt", ["é b.txt"]),
        ("~/a.txt", ["a.txt"]),
        ("{}/my\\ notes.txt {}/a.txt", ["my notes.txt", "a.txt"]),
        ("'{}/my notes.txt' '{}/a.txt' file://{}/100%25.txt", ["my notes.txt", "a.txt", "100%.txt"]),
    ],
)
def test_dropped_paths(folder: Path, line: str, names: list[str]) -> None:
    line = line.replace("{}", str(folder))
    assert paths_in(line) == [folder / name for name in names]
    assert dropped_files(line) == [folder / name for name in names]
    assert dropped_files(f"{line} ") == [folder / name for name in names]


def test_paths_that_no_shell_has_read(folder: Path) -> None:
    for given in (f"file://{folder}/my%20notes.txt", "~/my notes.txt"):
        assert read_all([Path(given)]) == ([(f"{folder}/my notes.txt", "text")], [])


def test_models_sessions_and_templates_are_dropped_as_well(folder: Path) -> None:
    name = f"{folder}/my notes.txt"
    for given in (f"file://{folder}/my%20notes.txt", f"'{name}'", f'"{name}"', "~/my notes.txt", name):
        assert str(models.resolve(given, pull=False)) == name
        assert str(sessions.path_of(given)) == name
        assert template_of(given, []) == "text"
        assert read_all([Path(given)]) == ([(name, "text")], [])


def test_dropped_sessions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for given in (f"{folder}/my\\ notes.txt", f"'{folder}/my notes.txt'", f"file://{folder}/my%20notes.txt"):
        assert inputs.session_in(given) == f"{folder}/my notes.txt"
    for name in ("last", "a b", "", "none.kvc", "a.txt", "it's"):
        assert inputs.session_in(name) == name


def test_what_is_no_dropped_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for line in (
        "a.txt",
        f" {folder}/a.txt",
        f"{folder}",
        f"{folder}/none",
        "/help",
        "'a' or 'b'",
        f"read {folder}/a.txt",
    ):
        assert dropped_files(line) == []
    assert dropped_files(f"{folder}/a.txt\nand more") == []
    assert dropped_files(f"{folder}/a.txt\0") == []
    assert paths_in("no such file.txt") == [Path("no such file.txt")]
    assert paths_in("a.txt none.txt") == [Path("a.txt"), Path("none.txt")], "which one is missing is told"
    assert paths_in("C:\\Users\\x\\notes.txt") == [Path("C:\\Users\\x\\notes.txt")], "no shell's backslashes"
    assert paths_in("file://elsewhere/a.txt") == [Path("file://elsewhere/a.txt")]
