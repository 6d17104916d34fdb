"""Downloads against a real server on the loopback address, which fails in the ways that real ones do."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import os
import random
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_server import Serving, Site

from kvcompose_local.errors import DownloadError
from kvcompose_local.install import download
from kvcompose_local.install.download import fetch, find_wheel
from kvcompose_local.install.files import cache_errors

CONTENT = random.Random(7).randbytes(1_500_000)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Serving() as site:
        site.files["/model%201.gguf"] = CONTENT
        yield site


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, noted instead of waited."""
    noted: list[float] = []
    monkeypatch.setattr(download.time, "sleep", noted.append)
    return noted


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "new" / "model.gguf"


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def leave_part(target: Path, content: bytes) -> None:
    target.parent.mkdir()
    part_of(target).write_bytes(content)


def test_a_file_arrives_with_its_progress(site: Site, target: Path) -> None:
    seen: list[tuple[int, int]] = []
    fetch(site.url("/model%201.gguf"), target, progress=lambda done, total: seen.append((done, total)))
    assert target.read_bytes() == CONTENT
    assert os.listdir(target.parent) == ["model.gguf"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert len(seen) >= 5
    assert seen == sorted(seen)


def test_a_part_is_gone_on_with(site: Site, target: Path) -> None:
    leave_part(target, CONTENT[:1_000_000])
    seen: list[tuple[int, int]] = []
    fetch(site.url("/model%201.gguf"), target, progress=lambda done, total: seen.append((done, total)))
    assert target.read_bytes() == CONTENT
    assert site.requests == [("/model%201.gguf", "bytes=1000000-")]
    assert seen[0][0] > 1_000_000
    assert {total for _, total in seen} == {len(CONTENT)}


def test_a_server_without_ranges_sends_all_again(site: Site, target: Path) -> None:
    leave_part(target, b"x" * 1_000_000)
    site.knows_ranges = False
    fetch(site.url("/model%201.gguf"), target)
    assert target.read_bytes() == CONTENT


def test_a_complete_part_is_not_fetched_again(site: Site, target: Path) -> None:
    leave_part(target, CONTENT)
    fetch(site.url("/model%201.gguf"), target)
    assert target.read_bytes() == CONTENT
    assert len(site.requests) == 1


def test_a_part_that_is_longer_than_the_file_is_dropped(site: Site, target: Path, waits: list[float]) -> None:
    leave_part(target, CONTENT + b"more")
    fetch(site.url("/model%201.gguf"), target)
    assert target.read_bytes() == CONTENT
    assert [wanted for _, wanted in site.requests] == [f"bytes={len(CONTENT) + 4}-", ""]


def test_a_range_that_was_not_asked_for_is_never_appended(site: Site, target: Path, waits: list[float]) -> None:
    leave_part(target, CONTENT[:1000])
    site.range_slip = 1
    with pytest.raises(DownloadError, match="another part of the file"):
        fetch(site.url("/model%201.gguf"), target)
    assert part_of(target).read_bytes() == CONTENT[:1000]


def test_a_lost_connection_is_taken_up_where_it_broke(site: Site, target: Path, waits: list[float]) -> None:
    # Every try brings something, so more tries than three are made.
    site.cuts = [300_000] * 4
    fetch(site.url("/model%201.gguf"), target)
    assert target.read_bytes() == CONTENT
    assert [wanted for _, wanted in site.requests] == ["", *(f"bytes={300_000 * n}-" for n in range(1, 5))]
    assert waits == [1, 1, 1, 1]


def test_a_connection_that_breaks_at_once_gives_up_and_keeps_the_part(
    site: Site, target: Path, waits: list[float]
) -> None:
    leave_part(target, CONTENT[:5])
    site.cuts = [0] * 3
    with pytest.raises(DownloadError, match=r"cannot download model 1\.gguf \(.*after 5 of 1500000.*it will resume"):
        fetch(site.url("/model%201.gguf"), target)
    assert part_of(target).read_bytes() == CONTENT[:5]
    assert not target.exists()
    assert (len(site.requests), waits) == (3, [1, 2])
    fetch(site.url("/model%201.gguf"), target)
    assert target.read_bytes() == CONTENT


def test_a_length_that_is_not_told_gives_an_unknown_total(site: Site, target: Path) -> None:
    site.sends_length = False
    totals: set[int] = set()
    fetch(site.url("/model%201.gguf"), target, progress=lambda _done, total: totals.add(total))
    assert target.read_bytes() == CONTENT
    assert totals == {0}


def test_a_missing_file_is_told_at_once(site: Site, target: Path, waits: list[float]) -> None:
    with pytest.raises(DownloadError, match=r"^the server answers 404 Not Found for zzz\.gguf$"):
        fetch(site.url("/zzz.gguf"), target)
    assert (len(site.requests), waits) == (1, [])
    assert os.listdir(target.parent) == []


@pytest.mark.parametrize("code", [500, 503, 429])
def test_a_server_in_trouble_is_asked_again(site: Site, target: Path, waits: list[float], code: int) -> None:
    site.failures = [code, code]
    fetch(site.url("/model%201.gguf"), target)
    assert target.read_bytes() == CONTENT
    assert waits == [1, 2]


def test_a_server_in_lasting_trouble(site: Site, target: Path, waits: list[float]) -> None:
    site.failures = [503] * 9
    with pytest.raises(DownloadError, match="503 Service Unavailable"):
        fetch(site.url("/model%201.gguf"), target)
    assert len(site.requests) == 3


def test_nobody_listens(target: Path, waits: list[float]) -> None:
    with Serving() as closed:
        pass
    with pytest.raises(DownloadError, match=r"cannot download x\.gguf \(.*refused.*check the network"):
        fetch(closed.url("/x.gguf"), target)
    assert waits == [1, 2]


def test_an_untrusted_certificate_is_told_at_once(tmp_path: Path, target: Path, waits: list[float]) -> None:
    ssl_server = tmp_path / "server.py"
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    openssl = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    openssl += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(openssl, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl that can make a certificate")
    (tmp_path / "model.gguf").write_bytes(b"ours")
    ssl_server.write_text(
        "import functools, http.server as h, ssl, sys\n"
        "context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\n"
        "context.load_cert_chain(sys.argv[1], sys.argv[2])\n"
        "class Quiet(h.SimpleHTTPRequestHandler):\n"
        "    log_message = lambda *_: None\n"
        "s = h.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=sys.argv[3]))\n"
        "s.socket = context.wrap_socket(s.socket, server_side=True)\n"
        "s.handle_error = lambda *_: None\n"
        "print(s.server_address[1], flush=True)\n"
        "s.serve_forever()\n"
    )
    command = [sys.executable, str(ssl_server), str(certificate), str(key), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = f"https://127.0.0.1:{process.stdout.readline().strip()}/model.gguf"
            with pytest.raises(DownloadError, match=r"cannot download model\.gguf: .*CERTIFICATE_VERIFY_FAILED"):
                fetch(url, target)
            assert waits == []
            fetch(url, target, cafile=str(certificate))
            assert target.read_bytes() == b"ours"
        finally:
            process.terminate()


def test_ctrl_c_keeps_the_part(site: Site, target: Path) -> None:
    def stop(done: int, _total: int) -> None:
        if done > 600_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(site.url("/model%201.gguf"), target, progress=stop)
    have = part_of(target).stat().st_size
    assert 600_000 < have < len(CONTENT)
    assert not target.exists()
    fetch(site.url("/model%201.gguf"), target)
    assert target.read_bytes() == CONTENT
    assert site.requests[1] == ("/model%201.gguf", f"bytes={have}-")


def test_a_file_url(tmp_path: Path, target: Path, waits: list[float]) -> None:
    source = tmp_path / "a file.gguf"
    source.write_bytes(CONTENT)
    leave_part(target, b"older")
    fetch(source.as_uri(), target)
    assert target.read_bytes() == CONTENT
    with pytest.raises(DownloadError, match=r"cannot download missing\.gguf: .*No such file"):
        fetch((tmp_path / "missing.gguf").as_uri(), target)
    assert waits == []


def test_credentials_of_a_url_are_sent_and_not_told(site: Site, target: Path) -> None:
    site.credentials = base64.b64encode(b"me:se cret").decode()
    fetch(f"http://me:se%20cret@{site.address}/model%201.gguf", target)
    assert target.read_bytes() == CONTENT
    with pytest.raises(DownloadError, match="401") as error:
        fetch(f"http://me:other@{site.address}/model%201.gguf", target)
    assert "other" not in str(error.value)


# -- disks -------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_goes_on_later(site: Site, target: Path) -> None:
    # A limit on the size of files stops the write in the middle, as a full disk does.
    code = (
        "import resource, sys; from pathlib import Path; from kvcompose_local.install.download import fetch\n"
        "from kvcompose_local.errors import DownloadError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))\n"
        "try: fetch(sys.argv[1], Path(sys.argv[2]))\n"
        "except DownloadError as error: print(error)\n"
    )
    url = site.url("/model%201.gguf")
    told = subprocess.run([sys.executable, "-c", code, url, str(target)], capture_output=True, text=True, timeout=60)
    assert (told.stdout, told.stderr) == (f"the disk is full: make room in {target.parent}, then try again\n", "")
    assert not target.exists()
    assert part_of(target).stat().st_size == 700_000
    fetch(url, target)
    assert target.read_bytes() == CONTENT
    assert site.requests[1][1] == "bytes=700000-"


def test_a_device_without_room() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full on this system")
    with (
        pytest.raises(DownloadError, match="the disk is full: make room in /dev"),
        cache_errors(Path("/dev/full")),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_a_folder_that_cannot_be_made(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match=r"cannot write .* \(Not a directory\): .*set KVCOMPOSE_CACHE"):
        fetch(site.url("/model%201.gguf"), tmp_path / "file" / "folder" / "model.gguf")
    assert site.requests == []


def test_a_folder_in_the_place_of_the_file(site: Site, target: Path) -> None:
    part_of(target).mkdir(parents=True)
    with pytest.raises(DownloadError, match=r"cannot write .*\.part \(Is a directory\)"):
        fetch(site.url("/model%201.gguf"), target)


def test_other_disk_errors_name_the_path_and_the_reason(tmp_path: Path) -> None:
    with (
        pytest.raises(DownloadError, match=rf"cannot write {tmp_path}/x \({os.strerror(errno.EROFS)}\)"),
        cache_errors(tmp_path / "x"),
    ):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


# -- pip ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pip_of(monkeypatch: pytest.MonkeyPatch, site: Site) -> Site:
    """The site as the only index that pip knows."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", site.url("/simple/"))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return site


WHEEL = "kvc_test_part1-1.0-py3-none-any.whl"


def test_pip_names_the_wheel_without_fetching_it(pip_of: Site) -> None:
    pip_of.wheel_index({WHEEL: b"not even a zip file"})
    wheel = find_wheel("kvc-test-part1", "1.0")
    assert wheel.url == pip_of.url(f"/wheels/{WHEEL}")
    assert wheel.sha256 == hashlib.sha256(b"not even a zip file").hexdigest()
    assert wheel.cafile is not None
    assert Path(wheel.cafile).is_file()
    assert [path for path, _ in pip_of.requests] == ["/simple/kvc-test-part1/"]


def test_an_index_that_needs_credentials(
    pip_of: Site, monkeypatch: pytest.MonkeyPatch, target: Path, waits: list[float]
) -> None:
    pip_of.wheel_index({WHEEL: b"content"})
    pip_of.credentials = base64.b64encode(b"me:secret").decode()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:secret@{pip_of.address}/simple/")
    wheel = find_wheel("kvc-test-part1", "1.0")
    fetch(wheel.url, target, cafile=wheel.cafile)
    assert target.read_bytes() == b"content"


def test_a_wheel_in_a_folder(pip_of: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / WHEEL).write_bytes(b"content")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    wheel = find_wheel("kvc-test-part1", "1.0")
    assert (wheel.url, wheel.sha256) == ((tmp_path / WHEEL).as_uri(), None)


def test_wheels_for_other_pythons_do_since_they_are_only_data(pip_of: Site) -> None:
    pip_of.wheel_index({WHEEL: b"content"})
    page = pip_of.files["/simple/kvc-test-part1/"]
    pip_of.files["/simple/kvc-test-part1/"] = page.replace(b"<a ", b'<a data-requires-python="&lt;3" ')
    assert find_wheel("kvc-test-part1", "1.0").url.endswith(WHEEL)


def test_a_version_that_is_not_there_is_told_at_once(pip_of: Site) -> None:
    pip_of.wheel_index({WHEEL: b"content"})
    with pytest.raises(DownloadError, match=r"^pip finds no wheel of kvc-test-part1 2\.0: check the network"):
        find_wheel("kvc-test-part1", "2.0")


def test_a_pip_with_another_inside_is_asked_through_its_command_line(
    pip_of: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_ASK_PIP", "import pip._internal.not_there")
    content = simple_wheel()
    pip_of.wheel_index({WHEEL: content})
    wheel = find_wheel("kvc-test-part1", "1.0")
    assert wheel.url == pip_of.url(f"/wheels/{WHEEL}")
    assert wheel.sha256 == hashlib.sha256(content).hexdigest()
    with pytest.raises(DownloadError, match=r"^pip cannot find kvc-test-part1 2\.0: ERROR: .*2\.0"):
        find_wheel("kvc-test-part1", "2.0")


def simple_wheel() -> bytes:
    """A wheel that pip takes for one."""
    info = "kvc_test_part1-1.0.dist-info"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: kvc-test-part1\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


def test_an_environment_without_pip(pip_of: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(download.sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(DownloadError, match=r"^pip cannot find kvc-test-part1 1\.0: .*No module named pip$"):
        find_wheel("kvc-test-part1", "1.0")
