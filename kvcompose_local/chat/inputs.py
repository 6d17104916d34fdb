"""Reads texts: files, dropped paths and standard input become text here, or an error that says what to do.

The result has no byte order mark and no NUL, and its lines end with a newline.
"""

from __future__ import annotations

import codecs
import glob
import io
import os
import re
import shlex
import stat
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from kvcompose_local.chat.encodings import EBCDIC, guesses, seven_bit
from kvcompose_local.errors import InvalidInput
from kvcompose_local.install.paths import exists, path_in
from kvcompose_local.install.paths import paths_in as paths_in

STDIN = Path("-")
_WEB = re.compile("(https?):/+(.*)", re.IGNORECASE)
#: More than models of ten million positions read.
MOST_BYTES = 64 << 20
_BOMS = (  # UTF-32's little-endian mark begins as UTF-16's does
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_ICONV = "`iconv -f {} -t UTF-8 {{file}} > {{out}}`"
_PANDOC = "`pandoc {file} -t plain -o {out}` writes its text"
#: How files that are no plain text begin, what they are, and what makes text of them.
_KINDS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"%PDF-", "a PDF", "`pdftotext -layout {file} {out}` writes its text"),
    (0, b"%!PS", "PostScript", "`ps2ascii {file} {out}` writes its text"),
    (0, b"{\\rtf", "rich text (RTF)", _PANDOC),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", "save it as plain text"),
    (0, b"GGUF", "a GGUF model", "`kvcompose-local run {file}` chats with it"),
    (0, b"SQLite format 3\0", "an SQLite database", "`sqlite3 {file} .dump > {out}` writes its content"),
    (0, b"\x1f\x8b", "a gzip archive", "`gunzip -c {file} > {out}` unpacks it"),
    (4, b"1AY&SY", "a bzip2 archive", "`bunzip2 -c {file} > {out}` unpacks it"),
    (0, b"\xfd7zXZ\0", "an xz archive", "`xz -dc {file} > {out}` unpacks it"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", "`zstd -dc {file} > {out}` unpacks it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (0, b"Rar!\x1a\x07", "a rar archive", "unpack it first"),
    (257, b"ustar", "a tar archive", "`tar xf {file}` unpacks it"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image", ""),
    (0, b"\xff\xd8\xff", "a JPEG image", ""),
    (0, b"GIF87a", "a GIF image", ""),
    (0, b"GIF89a", "a GIF image", ""),
    (0, b"II*\0", "a TIFF image", ""),
    (0, b"MM\0*", "a TIFF image", ""),
    (8, b"WEBP", "a WebP image", ""),
    (4, b"ftypheic", "a HEIC image", ""),
    (4, b"ftypavif", "an AVIF image", ""),
    (4, b"ftyp", "a film or a sound (MP4)", ""),
    (8, b"WAVE", "a sound (WAV)", ""),
    (8, b"AVI ", "a film (AVI)", ""),
    (0, b"ID3", "a sound (MP3)", ""),
    (0, b"OggS", "a sound (Ogg)", ""),
    (0, b"fLaC", "a sound (FLAC)", ""),
    (0, b"\x1a\x45\xdf\xa3", "a film (Matroska, WebM)", ""),
    (0, b"\x7fELF", "a program", ""),
    (0, b"\xcf\xfa\xed\xfe", "a program", ""),
    (0, b"\xca\xfe\xba\xbe", "a program", ""),
    (0, b"\0asm", "a program", ""),
    (0, b"bplist00", "a binary property list", "`plutil -convert xml1 -o {out} {file}` writes it as text"),
    (0, b"PAR1", "a Parquet table", ""),
    (0, b"\x93NUMPY", "a NumPy array", ""),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", ""),
)
#: The first so many of them may hold ASCII alone; a text may begin with the letters of the others.
_N_OF_TEXT = 3
#: What a zip archive is, by a file in it.
_ZIPPED = (
    ("word/document.xml", "a Word document", _PANDOC),
    ("xl/workbook.xml", "an Excel table", "save it as CSV"),
    ("ppt/presentation.xml", "a PowerPoint presentation", "save it as plain text"),
    ("META-INF/container.xml", "an e-book (EPUB)", _PANDOC),
    ("content.xml", "an OpenDocument file", _PANDOC),
)


def read_all(paths: Sequence[Path]) -> tuple[list[tuple[str, str]], list[str]]:
    """(name, text) of files (``-``: standard input), and the names of files without any text.

    All are looked at before the first of them is fed to a model, which takes minutes. Raises InvalidInput, in one line,
    for what cannot be read as text, and where no file holds any.
    """
    paths = [found for path in paths for found in _files_of(path)]
    texts = [(_called(path), read(path)) for path in paths]
    empty = [name for name, text in texts if not text.strip()]
    if empty and len(empty) == len(texts):
        raise InvalidInput(f"there is no text to read in {', '.join(dict.fromkeys(empty))}")
    return [(name, text) for name, text in texts if text.strip()], empty


def _files_of(path: Path) -> list[Path]:
    """The files that a path stands for: itself, or what its wildcards match, in order. Raises InvalidInput."""
    if path == STDIN:
        return [path]
    path = path_in(str(path))
    if url := _WEB.fullmatch(str(path)):  # of which a path keeps one slash
        raise InvalidInput(f"{url[1]}://{url[2]} is a web page, and none is fetched: save its text, and read that file")
    if exists(path) and os.path.isdir(path):
        raise InvalidInput(f"{path} is a folder: {shlex.quote(str(path / '*.txt'))} names its text files")
    if exists(path) or not glob.has_magic(str(path)):
        return [path]
    found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)]
    if not found:
        raise InvalidInput(f"no file matches {path}")
    return found


def told_stopped(name: str, n_unread: int, *, are_more: bool) -> str:
    """What to say of a text whose reading was stopped."""
    more = "; the files after it are not read" if are_more else ""
    return f"stopped; the other {n_unread} tokens of {name} are read before your next message, /undo drops it{more}"


def read(path: Path) -> str:
    """The text of a file, or of standard input for ``-``. Raises InvalidInput, in one line, for what is not text."""
    try:
        if path == STDIN:
            raw = standard_input().read(MOST_BYTES + 1)
        else:
            mode = os.stat(path).st_mode
            if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not os.path.samefile(path, os.devnull)):
                raise InvalidInput(f"{path} is a device, not a file: -f - reads standard input")
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                raw = b"" if size > MOST_BYTES else file.read(MOST_BYTES + 1)
                if max(size, len(raw)) > MOST_BYTES:
                    raise InvalidInput(
                        f"{path} is too large: {max(size, len(raw)) >> 20} MiB, and no model reads more than "
                        f"{MOST_BYTES >> 20} MiB"
                    )
    except InvalidInput:
        raise
    except (OSError, ValueError) as error:  # ValueError: no path holds a NUL
        raise InvalidInput(f"cannot read {_called(path)}: {getattr(error, 'strerror', None) or error}") from error
    if len(raw) > MOST_BYTES:
        raise InvalidInput(f"standard input is more than {MOST_BYTES >> 20} MiB, and no model reads that much")
    return text_of(raw, path)


def lines() -> Iterator[str]:
    """The lines of standard input as they arrive. Raises InvalidInput, in one line, for what is not text."""
    stream = standard_input()
    number = 0
    while raw := stream.readline(MOST_BYTES):
        number += 1
        if number == 1 and (_encoding_of_bom(raw) not in (None, "utf-8") or not _is_text(raw)):
            raw += stream.read(MOST_BYTES)  # its lines do not end as ours do, or it takes more to say what it is
        text = text_of(raw, STDIN, line=number)
        yield from text.removesuffix("\n").split("\n")


def _is_text(raw: bytes) -> bool:
    """Whether bytes are UTF-8 without signature of something else."""
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return not _kind_of(raw) and b"\0" not in raw


def standard_input() -> BinaryIO:
    """Standard input in bytes. Raises InvalidInput where it is closed."""
    if sys.stdin is None:
        raise InvalidInput("standard input is closed")
    return sys.stdin.buffer


def text_of(raw: bytes, path: Path, *, line: int = 0) -> str:
    """Decode bytes. Raises InvalidInput, which names ``path`` and what to do, for bytes that are no text.

    line: the number of the line of standard input that the bytes are, 0 where they are all of it.
    """
    encoding = _encoding_of_bom(raw)
    bom = next((mark for mark, name in _BOMS if name == encoding), b"")
    if encoding is None:
        if kind := _kind_of(raw):
            raise InvalidInput(_told(path, f"{kind[0]}, not text", kind[1]))
        if b"\0" in raw:
            raise InvalidInput(_with_nul(raw, path))
        if name := seven_bit(raw):
            raise InvalidInput(_told(path, f"{name} text", f"{_ICONV.format(name)} converts it"))
    try:
        text = raw[len(bom) :].decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        where = f"line {line}, byte {error.start}" if line > 1 else f"byte {len(bom) + error.start}"
        if encoding not in (None, "utf-8"):
            name = str(encoding).upper().removesuffix("-LE").removesuffix("-BE")
            raise InvalidInput(f"{_called(path)} begins as {name} text does and is none ({where})") from error
        raise InvalidInput(f"{_called(path)} is not UTF-8 text ({where}): {_conversion(raw, path)}") from error
    if "\0" in text:
        raise InvalidInput(f"{_called(path)} is a binary file, not text")
    return text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")


def session_in(argument: str) -> str:
    """The name of a session, or the path of one that was dropped."""
    paths = paths_in(argument)
    return str(paths[0]) if len(paths) == 1 and is_file(paths[0]) else argument


def dropped_files(line: str) -> list[Path]:
    """The files that a line consists of, where it is nothing but paths (with a folder, a tilde or ``file://``)."""
    if "\n" in line or not line.lower().startswith(("/", "~", "./", "../", "file://", "'", '"')):
        return []
    paths = paths_in(line.strip())
    return paths if paths and all("/" in str(path) and is_file(path) for path in paths) else []


def is_file(path: Path | str) -> bool:
    """Whether a file is there; False for what cannot be a path."""
    try:
        return os.path.isfile(path)
    except ValueError:
        return False


def _called(path: Path) -> str:
    return "standard input" if path == STDIN else str(path)


def _encoding_of_bom(raw: bytes) -> str | None:
    for mark, encoding in _BOMS:
        if raw.startswith(mark) and (not encoding.startswith("utf-32") or len(raw) % 4 == 0):
            return encoding
    return None


def _kind_of(raw: bytes) -> tuple[str, str] | None:
    """The kind of file that bytes belong to, and a way to make text of it; None where they may be text."""
    if raw.startswith(b"PK\x03\x04"):
        import zipfile  # late: few files are one

        try:
            names = set(zipfile.ZipFile(io.BytesIO(raw)).namelist())
        except (zipfile.BadZipFile, ValueError, NotImplementedError):
            names = {name for name, _, _ in _ZIPPED if name.encode() in raw}
        found = ((kind, remedy) for name, kind, remedy in _ZIPPED if name in names)
        return next(found, ("a zip archive", "`unzip {file}` unpacks it"))
    is_ascii = raw[:512].isascii() and b"\0" not in raw[:512]
    for offset, magic, kind, remedy in _KINDS[: _N_OF_TEXT if is_ascii else None]:
        if raw.startswith(magic, offset):
            return kind, remedy
    if raw[8:10] == b'{"' and b"\0" in raw[:8]:
        return "a safetensors file", "where it is a saved chat, --session takes it"
    return None


def _told(path: Path, kind: str, remedy: str) -> str:
    """One line: what a file is, and a command that makes text of it."""
    return f"{_called(path)} is {kind}{f': {_command(remedy, path)}' if remedy else ''}"


def _command(remedy: str, path: Path) -> str:
    """A remedy with the names of the file and of what it makes of it."""
    file = "FILE" if path == STDIN else str(path)
    out = f"{os.path.splitext(file)[0]}.utf8.txt" if file.endswith(".txt") else f"{os.path.splitext(file)[0]}.txt"
    return remedy.format(file=shlex.quote(file), out=shlex.quote(out))


def _with_nul(raw: bytes, path: Path) -> str:
    """The message for bytes that hold a NUL and no signature."""
    if (n := raw.count(b"\0")) <= 1 + len(raw) // 100 and _reads_well(raw.replace(b"\0", b""), "utf-8"):
        remedy = "`tr -d '\\000' < {file} > {out}` leaves them out"
        return _told(path, f"text with {n} NUL bytes, the first at byte {raw.index(0)}", remedy)
    for encoding in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        if _reads_well(raw, encoding):
            return _told(path, f"{encoding} text without a byte order mark", f"{_ICONV.format(encoding)} converts it")
    return f"{_called(path)} is a binary file, not text"


def _reads_well(raw: bytes, encoding: str) -> bool:
    """Whether bytes are letters, marks, signs and white space, nearly throughout, as texts are."""
    try:
        text = raw[: 1 << 16].decode(encoding)
    except UnicodeDecodeError as error:
        if error.end < min(len(raw), 1 << 16) - 4:
            return False
        text = raw[: error.start].decode(encoding)
    odd = sum(unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") and c not in "\t\n\r\f" for c in text)
    scripts = {ord(c) >> 8 for c in text}
    return bool(text) and odd * 100 <= len(text) and len(scripts) <= 8 + len(text) // 4


def _is_cut(raw: bytes) -> bool:
    """Whether bytes are UTF-8 beyond ASCII that ends in the middle of a character."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and not raw[: error.start].isascii()
    return False


def _conversion(raw: bytes, path: Path) -> str:
    """A command that makes UTF-8 of other bytes, where they tell their encoding."""
    n_high = sum(byte > 127 for byte in raw[: 1 << 16])
    n_control = sum(byte < 32 and byte not in b"\t\n\r\f\x1b\x08" for byte in raw[: 1 << 16])
    part = raw[: 1 << 16]
    found = guesses(raw)
    if n_control * 50 > len(part) and found[:1] != [EBCDIC]:  # whose line ends are control characters
        return "it is a binary file"
    valid = part.decode("utf-8", "ignore")
    n_lost = len(part) - len(valid.encode())
    if n_lost * 20 < n_high or _is_cut(raw):
        return _command("`iconv -c -f UTF-8 -t UTF-8 {file} > {out}` leaves out what is broken", path)
    encoding, *others = found or ["WINDOWS-1252"]
    other = f" (or from {others[0]})" if others else ""
    return _command(f"{_ICONV.format(encoding)} may convert it{other}", path)
