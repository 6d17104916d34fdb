"""A real browser for the page, where there is one, and the server in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from programs import RUN

from kvcompose_local.install.resources import cache_folder

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_CACHE = cache_folder()  # now: tests change HOME
_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
_ON_MACS = (
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def chromium() -> str | None:
    """The path of a Chromium: KVCOMPOSE_CHROMIUM, one on the PATH, or a Mac's application."""
    found = (
        os.environ.get("KVCOMPOSE_CHROMIUM"),
        *map(shutil.which, _NAMES),
        *(p for p in _ON_MACS if Path(p).exists()),
    )
    return next((path for path in found if path), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """Chromium without a window. Raises LookupError, which says why, where none can be had."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise LookupError("playwright is not installed") from error
    path = chromium()
    if path is None:
        raise LookupError("no Chromium: apt install chromium, or name one in KVCOMPOSE_CHROMIUM")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        yield started
        started.close()


@contextmanager
def served(*arguments: object, state: Path, stop_seconds: float = 10) -> Iterator[str]:
    """Run ``serve`` with these arguments; gives its address. state: the folder where it keeps chats."""
    command = [*RUN, "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
    env = {**os.environ, "HOME": str(state), "XDG_STATE_HOME": str(state), "KVCOMPOSE_CACHE": str(_CACHE)}
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
