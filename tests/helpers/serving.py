"""The server in a process of its own, and small files to drop on its page."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from programs import RUN

from kvcompose_local.install.resources import cache_folder


@contextmanager
def served(*arguments: object, state: Path, stop_seconds: float = 10) -> Iterator[str]:
    """Run ``serve`` with these arguments; gives its address. state: the folder where it keeps chats."""
    command = [*RUN, "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
    env = {**os.environ, "HOME": str(state), "XDG_STATE_HOME": str(state), "KVCOMPOSE_CACHE": str(cache_folder())}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env)
    assert process.stderr is not None
    said: list[str] = []
    rest = threading.Thread(target=said.extend, args=(process.stderr,))
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.match(r"http://\S+", line):
                rest.start()  # a full pipe would hold the server up
                yield found[0]
                break
        else:
            raise AssertionError("".join(said))
    finally:
        process.terminate()
        try:
            process.wait(stop_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if rest.ident:
            rest.join()
        process.stderr.close()


def pdf(*lines: str) -> bytes:
    """A PDF of one page with these lines."""
    escaped = (line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)") for line in lines)
    drawn = "BT /F1 12 Tf 72 740 Td 14 TL\n" + "\n".join(f"({line}) Tj T*" for line in escaped) + "\nET"
    objects = (
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 5 0 R "
        "/Resources << /Font << /F1 4 0 R >> >> >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream",
    )
    raw, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(raw))
        raw += f"{number} 0 obj\n{content}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    trailer = f"trailer << /Size {size} /Root 1 0 R >>\nstartxref\n{len(raw)}\n%%EOF\n"
    end = f"xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}"
    return raw + end.encode()
