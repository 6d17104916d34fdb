"""A real browser for the page, where there is one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

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
