"""Files that are dropped on the page, as text: encodings as everywhere in the program, PDF by pypdf."""

from __future__ import annotations

import asyncio
import io
import sys
from pathlib import Path, PurePosixPath

from kvcompose_local.chat import inputs
from kvcompose_local.errors import InvalidInput

#: A page of a scientific paper takes a tenth of a second; a file that was made to hold up its reader takes for ever.
PDF_SECONDS = 120.0
#: Address space of the process that reads a PDF.
PDF_BYTES = 2 << 30
#: PDFs that are read at once; others wait.
_readers = asyncio.Semaphore(1)


async def text_of(raw: bytes, name: str) -> str:
    """The text that a file of this name holds. Raises InvalidInput, in one line, where that is none."""
    name = PurePosixPath(name).name or "the file"
    if raw.startswith(b"%PDF-"):
        return await _pdf_text(raw, name)
    return await asyncio.to_thread(inputs.text_of, raw, Path(name))


async def _pdf_text(raw: bytes, name: str) -> str:
    """A PDF's text, read in a process of its own: neither time nor memory that it wastes is the server's.

    Raises InvalidInput, in one line.
    """
    async with _readers:
        reader = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __name__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            text, problem = await asyncio.wait_for(reader.communicate(raw), PDF_SECONDS)
        except asyncio.TimeoutError as error:
            raise InvalidInput(f"{name} takes longer than {PDF_SECONDS:.0f} s to read") from error
        finally:
            if reader.returncode is None:
                reader.kill()
                await reader.wait()
    if reader.returncode:
        raise InvalidInput(f"{name} {problem.decode('utf-8', 'replace').strip() or 'could not be read'}")
    return text.decode("utf-8", "replace")


def pdf_text(raw: bytes) -> str:
    """The text of a PDF, pages parted by an empty line. Raises InvalidInput where there is none, without its name."""
    import pypdf  # late: the process that reads is the only one that needs it
    from pypdf.errors import FileNotDecryptedError, PyPdfError

    try:
        pages = [page.extract_text().strip() for page in pypdf.PdfReader(io.BytesIO(raw)).pages]
    except FileNotDecryptedError as error:
        raise InvalidInput("is locked by a password") from error
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise InvalidInput("is a damaged PDF") from error
    text = "\n\n".join(page for page in pages if page).replace("\0", "")
    if not text:
        raise InvalidInput("holds pictures of pages and no text: `ocrmypdf` adds it")
    return text


def _main() -> int:
    import logging

    logging.disable()  # pypdf tells of each oddity, and a file has thousands
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (PDF_BYTES, PDF_BYTES))
    except (ImportError, ValueError, OSError):  # macOS takes no such limit
        pass
    try:
        text = pdf_text(sys.stdin.buffer.read())
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return 1
    except MemoryError:
        print("takes too much memory to read", file=sys.stderr)
        return 1
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
