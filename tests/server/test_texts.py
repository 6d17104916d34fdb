"""Files that are dropped on the page become text, or one line that says why not."""

from __future__ import annotations

import asyncio
import io

import pytest
from pdf_files import pdf

pypdf = pytest.importorskip("pypdf")

from kvcompose_local.errors import InvalidInput  # noqa: E402
from kvcompose_local.server import texts  # noqa: E402


def text_of(raw: bytes, name: str = "notes") -> str:
    return asyncio.run(texts.text_of(raw, name))


def refusal(raw: bytes, name: str = "notes") -> str:
    with pytest.raises(InvalidInput) as error:
        text_of(raw, name)
    assert "\n" not in str(error.value)
    return str(error.value)


def locked(raw: bytes) -> bytes:
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(raw))
    writer.encrypt("secret", algorithm="RC4-128")
    return written(writer)


def blank() -> bytes:
    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    return written(writer)


def written(writer: pypdf.PdfWriter) -> bytes:
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_is_told_by_its_mark(encoding: str) -> None:
    assert text_of("Grüße,\r\n世界".encode(encoding)) == "Grüße,\n世界"


def test_a_pdf_is_read() -> None:
    assert text_of(pdf("The keeper is Mara.", "Her boat (the old one) is blue."), "x.pdf") == (
        "The keeper is Mara.\nHer boat (the old one) is blue."
    )


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0", "notes is a PNG image, not text"),
        (b"caf\xe9", "notes is not UTF-8 text (byte 3)"),
        (pdf("Mara")[:200], "notes is a damaged PDF"),
        (b"%PDF-1.7\n" + bytes(range(256)) * 40, "notes is a damaged PDF"),
        (locked(pdf("Mara")), "notes is locked by a password"),
        (blank(), "notes holds pictures of pages and no text"),
    ],
    ids=["image", "latin-1", "cut", "noise", "locked", "blank"],
)
def test_what_is_no_text_is_refused_in_a_line(raw: bytes, told: str) -> None:
    assert refusal(raw).startswith(told)


def test_the_name_is_no_path() -> None:
    assert refusal(b"\x89PNG\r\n\x1a\n", "../../etc/passwd").startswith("passwd is")
    assert refusal(b"\x89PNG\r\n\x1a\n", "").startswith("the file is")


def test_a_pdf_that_holds_up_its_reader_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PDF_SECONDS", 0.01)  # less than Python takes to start
    assert refusal(pdf("Mara")) == "notes takes longer than 0 s to read"
