"""Fetching one URL to one file: resumable, with progress, never half-written under the final name."""

from __future__ import annotations

import base64
import http.client
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from kvcompose_local.errors import DownloadError
from kvcompose_local.install.files import ByteProgress, cache_errors

_CHUNK = 1 << 18
_TRIES = 3
_TIMEOUT_SECONDS = 30
_WORTH_ANOTHER_TRY = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
_PERMANENT = (ssl.SSLCertVerificationError, FileNotFoundError, IsADirectoryError, PermissionError)


def fetch(url: str, target: Path, *, progress: ByteProgress | None = None, cafile: str | None = None) -> None:
    """Download ``url`` to ``target``, going on from ``target`` + ``.part`` where an earlier try stopped.

    Interrupts and lost connections keep the part file; the name ``target`` appears only when the server says that the
    file is whole. ``cafile`` names certificates to trust besides the system's. Raises DownloadError: at once where
    trying again cannot help, else after three tries that brought nothing new.
    """
    part = target.with_name(target.name + ".part")
    name = unquote(urlsplit(url).path).rpartition("/")[2] or target.name
    with cache_errors(part):
        target.parent.mkdir(parents=True, exist_ok=True)
    tries = 0
    while True:
        before = _size(part)
        try:
            _fetch_rest(url, part, progress, cafile)
            break
        except urllib.error.HTTPError as error:
            error.close()
            code = error.code
            reason = f"{code} {error.reason}"
            if code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and before:
                if error.headers.get("Content-Range") == f"bytes */{before}":
                    break  # the last try was stopped between the last byte and the new name
                with cache_errors(part):  # longer than the source: of something else
                    part.unlink()
            elif code < HTTPStatus.INTERNAL_SERVER_ERROR and code not in _WORTH_ANOTHER_TRY:
                raise DownloadError(f"the server answers {reason} for {name}") from error
        except (http.client.HTTPException, OSError) as error:  # of the network: the disk's errors are told already
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            reason = " ".join(str(cause).split()) or type(cause).__name__
            if isinstance(cause, _PERMANENT):
                raise DownloadError(f"cannot download {name}: {reason}") from error
        tries = 1 if _size(part) > before else tries + 1
        if tries >= _TRIES:
            raise DownloadError(f"cannot download {name} ({reason}): check the network and try again; it will resume")
        time.sleep(tries)
    with cache_errors(target):
        os.replace(part, target)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _fetch_rest(url: str, part: Path, progress: ByteProgress | None, cafile: str | None) -> None:
    """Append to ``part`` what it lacks, or write it anew where the server cannot go on from the middle."""
    have = _size(part)
    request = _request(url)
    if have:
        request.add_header("Range", f"bytes={have}-")
    context = ssl.create_default_context()
    if cafile:
        context.load_verify_locations(cafile)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS, context=context) as response:
        if response.status != HTTPStatus.PARTIAL_CONTENT:  # the server sends everything again
            have = 0
        elif not str(response.headers.get("Content-Range")).startswith(f"bytes {have}-"):
            raise ConnectionError("the server sent another part of the file than it was asked for")
        length = str(response.headers.get("Content-Length"))
        total = have + int(length) if length.isdecimal() else 0
        with cache_errors(part):
            file = open(part, "ab" if have else "wb")  # noqa: SIM115 - only what the disk does may be told as its error
        with file:
            while chunk := response.read(_CHUNK):
                with cache_errors(part):
                    file.write(chunk)
                    file.flush()
                have += len(chunk)
                if progress is not None:
                    progress(have, total)
            with cache_errors(part):
                os.fsync(file.fileno())
    if total and have != total:
        raise ConnectionError(f"the connection ended after {have} of {total} bytes")


def _request(url: str) -> urllib.request.Request:
    """A request whose credentials stand in a header, which urllib does not take from the URL."""
    parts = urlsplit(url)
    credentials, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)))
    if credentials:
        basic = base64.b64encode(unquote(credentials).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {basic}")
    return request


# -- wheels -----------------------------------------------------------------------------------------------------------

# pip's public `install --dry-run --report` gives the same, but only after it fetched the whole wheel: without progress,
# without going on where it stopped, and so that we fetch it a second time. pip before 22.2 has no such report at all.
_ASK_PIP = """
import json, sys
from urllib.parse import quote, urlsplit, urlunsplit
from pip._internal.commands import create_command
from pip._vendor import certifi
from pip._vendor.packaging.specifiers import SpecifierSet

name, version, *arguments = sys.argv[1:]
command = create_command("download")
options, _ = command.parse_args(arguments)
with command.main_context():
    session = command.get_default_session(options)
    finder = command._build_package_finder(options, session, ignore_requires_python=True)
    best = finder.find_best_candidate(name, SpecifierSet("==" + version)).best_candidate
    found = None
    if best:
        url = best.link.url_without_fragment
        scheme, netloc, *rest = urlsplit(url)
        if scheme in ("http", "https"):
            _, user, password = session.auth._get_url_and_credentials(url)
            credentials = quote(user, "") + ":" + quote(password or "", "") + "@" if user else ""
            url = urlunsplit((scheme, credentials + netloc.rpartition("@")[2], *rest))
        sha256 = best.link.hash if best.link.hash_name == "sha256" else None
        found = {"url": url, "sha256": sha256, "cafile": options.cert or certifi.where()}
print(json.dumps(found))
"""
_PIP_OPTIONS = ("--only-binary", ":all:", "--no-deps", "--no-input", "--disable-pip-version-check", "--retries", "2")


@dataclass(frozen=True)
class Wheel:
    """Where a wheel is.

    ``url`` holds the credentials, where pip knows some; ``sha256`` is None where the index names none; ``cafile`` has
    the certificates that pip trusts.
    """

    url: str
    sha256: str | None
    cafile: str | None


def find_wheel(package: str, version: str) -> Wheel:
    """Ask pip, which knows the user's indexes, proxies and certificates; nothing is installed.

    Raises DownloadError when there is no such wheel, or no pip.
    """
    asked = _run_python("-c", _ASK_PIP, package, version, *_PIP_OPTIONS)
    if asked.returncode == 0:
        if (found := json.loads(asked.stdout)) is None:
            raise DownloadError(
                f"pip finds no wheel of {package} {version}: check the network, and the index that pip is set to"
            )
        return Wheel(**found)
    # pip's internals have changed: take the longer way through its command line.
    command = ("install", "--quiet", "--dry-run", "--ignore-installed", "--ignore-requires-python", "--report", "-")
    asked = _run_python("-m", "pip", *command, *_PIP_OPTIONS, f"{package}=={version}")
    if asked.returncode != 0:
        lines = asked.stderr.strip().splitlines() or ["no reason given"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise DownloadError(f"pip cannot find {package} {version}: {reason[:300]}")
    info = json.loads(asked.stdout)["install"][0]["download_info"]
    return Wheel(info["url"], info.get("archive_info", {}).get("hashes", {}).get("sha256"), None)


def _run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
