"""llama.cpp from its pinned source: fetch, verify, patch, compile, keep in the cache folder.

::

    patches/PIN ─► archive (pip, sha256) ─► vendor/llama.cpp ─► patches/*.patch ─► cmake, ninja ─► llama/<key>/lib

The key is pin.py's. Only the standard library is imported at the top: ``scripts/setup`` looks for the compiler before
anything is installed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import TextIO

from kvcompose_local.errors import BuildError, DownloadError, KVComposeError
from kvcompose_local.install.device_tools import device_environment
from kvcompose_local.install.files import cache_errors, sha256_at
from kvcompose_local.install.pin import (
    DEVICES,
    SANITIZERS,
    Pin,
    build_dir,
    build_key,
    cmake_flags,
    cpu_features,
    is_finished,
    output_of,
    patch_series,
    read_pin,
)
from kvcompose_local.install.resources import cache_folder, data_file
from kvcompose_local.install.threads import cpu_quota

#: Gets (what is going on, steps done, steps in all); ``(text, 0, 0)`` where steps cannot be counted. May raise to stop.
Progress = Callable[[str, int, int], None]

_LLAMA_CPP = "vendor/llama.cpp"
#: Folders that are left out: two thirds of the source tree, of which nothing is compiled, and a dangling `.git`.
_NOT_NEEDED = frozenset({".git", "benches", "docs", "media", "models"})
_APPLIED = ".kvcompose-applied"
_FREE_BYTES_NEEDED = 400 * 10**6
_NINJA_STEP = re.compile(r"\[(\d+)/(\d+)\] ")


# -- tools ------------------------------------------------------------------------------------------------------------


def install_hint(tool: str, system: str = sys.platform, os_release: Path = Path("/etc/os-release")) -> str:
    """The command that installs ``tool`` ("g++" or "git") on this kind of machine."""
    if system == "darwin":
        return "run `xcode-select --install`"
    release = os_release.read_text(encoding="utf-8") if os_release.is_file() else ""
    families = {
        "debian|ubuntu": "apt install {}",
        "fedora|rhel|centos": "dnf install {}",
        "suse": "zypper install {}",
        "arch": "pacman -S {}",
        "alpine": "apk add {}",
    }
    for family, command in families.items():
        if re.search(rf"^ID(_LIKE)?=.*\b({family})\b", release, re.MULTILINE):
            rpm = command.startswith(("dnf", "zypper"))
            name = {"g++": "gcc-c++" if rpm else "gcc" if family == "arch" else "g++"}.get(tool, tool)
            return f"run `sudo {command.format(name)}`"
    return f"install {tool} with your package manager"


def runs_under_rosetta() -> bool:
    """Whether this Python is an Intel one that an Apple-silicon Mac translates."""
    return sys.platform == "darwin" and output_of(["sysctl", "-n", "sysctl.proc_translated"]) == "1"


def find_compiler() -> str:
    """The C++ compiler that CMake will take. Raises BuildError, with the command that installs one."""
    if sys.platform == "darwin" and not output_of(["xcode-select", "-p"]):
        compiler = None  # /usr/bin/c++ exists even so, and only asks for the command line tools
    else:
        wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        compiler = next((path for name in wanted if (path := shutil.which(shlex.split(name)[0]))), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler found: {install_hint('g++')}, then try again")
    return compiler


def find_tool(name: str) -> str:
    """``cmake`` or ``ninja``: the wheel's program beside this Python, else one on PATH. Raises BuildError."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if found is None:
        raise BuildError(f"{name} is missing: run `{sys.executable} -m pip install cmake ninja`")
    return found


# -- source -----------------------------------------------------------------------------------------------------------


def fetch_archive(pin: Pin, progress: Progress | None = None) -> Path:
    """The pinned source archive in the cache folder, verified; pip fetches it when it is not there.

    Raises DownloadError when pip cannot get it or its sha256 is not the pinned one (nothing is kept then),
    BuildError when the cache folder cannot be written.
    """
    report = progress or _silent
    folder = cache_folder() / "archives"
    archive = folder / pin.archive_name
    with cache_errors(cache_folder(), BuildError):
        if archive.is_file() and sha256_at(archive) == pin.sha256:
            return archive
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
            report(f"fetching the source of {pin} (77 MB)", 0, 0)
            fetched = _pip_download(pin, Path(temporary), archive)
            if (actual := sha256_at(fetched)) != pin.sha256:
                raise DownloadError(
                    f"{pin.archive_name} is not the pinned file (sha256 {actual[:12]}…, "
                    f"{pin.sha256[:12]}… expected): check the package index that pip uses, then try again"
                )
            fetched.replace(archive)
    return archive


def _pip_download(pin: Pin, folder: Path, archive: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", pin.name, "--dest", str(folder), f"{pin.name}=={pin.version}"]
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    fetched = folder / pin.archive_name
    if result.returncode == 0 and fetched.is_file():
        return fetched
    if "No module named pip" in result.stdout:
        raise DownloadError(f"pip is missing: run `{sys.executable} -m ensurepip`, then try again")
    complaints = [line for line in result.stdout.splitlines() if line.startswith("ERROR:")]
    reason = complaints[0].removeprefix("ERROR:").strip() if complaints else f"pip exit {result.returncode}"
    raise DownloadError(
        f"cannot fetch the source of {pin} ({reason}): check the network, or save {pin.archive_name} as {archive}"
    )


def extract_llama_cpp(archive: Path, target: Path) -> None:
    """Write ``vendor/llama.cpp`` of the archive to ``target``, leaving out folders that no build needs.

    Only regular files at plain relative paths are written, so a hostile archive cannot reach outside ``target``.
    Raises BuildError when the archive is damaged or holds no llama.cpp.
    """
    found = False
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                parts = path.parts[3:]
                if "/".join(path.parts[1:3]) != _LLAMA_CPP or not parts or not member.isreg():
                    continue
                if ".." in parts:
                    raise BuildError(f"{archive} holds the unsafe path {member.name}: delete it and try again")
                if parts[0] in _NOT_NEEDED:
                    continue
                source = tar.extractfile(member)
                if source is None:
                    continue
                destination = target.joinpath(*parts)
                destination.parent.mkdir(parents=True, exist_ok=True)
                with destination.open("wb") as file:
                    shutil.copyfileobj(source, file)
                found = True
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise BuildError(f"{archive} is damaged ({error}): delete it and try again") from error
    if not found:
        raise BuildError(f"{archive} holds no {_LLAMA_CPP}: it is not the pinned source archive")


def apply_series(source_dir: Path, patches_dir: Path) -> list[str]:
    """Apply ``patches_dir/*.patch`` to a llama.cpp tree in order; returns the names applied by this call.

    A list of what was applied is kept in the tree, so a second call does nothing and a longer series goes on where the
    shorter one ended. ``git apply`` changes either all files of a patch or none.

    Raises BuildError, naming pin, patch and remedy, when a patch does not apply or the tree holds another series.
    """
    pin = read_pin(patches_dir)
    series = patch_series(patches_dir)
    wanted = [f"{hashlib.sha256(patch.read_bytes()).hexdigest()}  {patch.name}" for patch in series]
    record = source_dir / _APPLIED
    present = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
    if present != wanted[: len(present)]:
        name = next((line.split()[1] for line, new in zip(present, wanted, strict=False) if line != new), "")
        raise BuildError(
            f"{source_dir} already holds another version of the series ({name or present[-1].split()[1]}): "
            f"extract {pin} into an empty folder and apply the series there"
        )
    if len(present) == len(series):
        return []
    git = shutil.which("git")
    if git is None:
        raise BuildError(f"git is missing, and applies the patches: {install_hint('git')}, then try again")
    # A repository around the tree would make git resolve the paths against its root and skip every file.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_CEILING_DIRECTORIES": os.path.realpath(source_dir.parent), "LC_ALL": "C"}
    for count, patch in enumerate(series[len(present) :], start=len(present) + 1):
        result = subprocess.run(
            [git, "-c", "core.autocrlf=false", "apply", "--whitespace=nowarn", str(patch.absolute())],
            cwd=source_dir,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or [f"git exit {result.returncode}"])[0]
            raise BuildError(
                f"{patch.name} does not apply to {pin} ({reason.removeprefix('error: ')}): "
                "refresh it as patches/README.md says, or restore patches/PIN"
            )
        record.write_text("\n".join(wanted[:count]) + "\n", encoding="utf-8")
    return [patch.name for patch in series[len(present) :]]


# -- build ------------------------------------------------------------------------------------------------------------


def _silent(_text: str, _done: int, _total: int) -> None:
    pass


def default_jobs() -> int:
    """One compiler for each CPU that we may use, and no more than one for each GB of RAM."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    cores = math.ceil(min(cores, cpu_quota()))
    ram_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cores, ram_bytes // 10**9))


def build(
    *,
    patched: bool = True,
    jobs: int | None = None,
    progress: Progress | None = None,
    sanitize: str | None = None,
    device: str | None = None,
    patches_dir: Path | None = None,
) -> Path:
    """Build llama.cpp unless the cache has it; returns the folder with its libraries.

    The libraries appear in the cache in one rename, complete; the work tree is deleted. Of concurrent builds of one key
    the first compiles and the others wait; device: of :data:`~kvcompose_local.install.pin.DEVICES`. When CMake or the
    compiler fails, the end of their log goes to stderr.

    Raises BuildError (compiler, tools, patches, cache folder), DownloadError (archive), InvalidInput (sanitizer).
    """
    patches = patches_dir or data_file("patches")
    target = build_dir(patched=patched, sanitize=sanitize, device=device, patches_dir=patches)
    finished = target / "lib"
    if is_finished(target):
        return finished
    if sys.platform == "win32":
        raise BuildError("llama.cpp is built on Linux and macOS: use WSL, or a llama-cpp-python with its own library")
    if runs_under_rosetta():
        raise BuildError("this Python is an Intel one under Rosetta: make the environment with an arm64 Python")
    report = progress or _silent
    find_compiler()
    find_tool("cmake")
    find_tool("ninja")
    environment = os.environ | {"LC_ALL": "C", "NINJA_STATUS": "[%f/%t] "} | device_environment(device)
    with cache_errors(cache_folder(), BuildError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock"), report):
            if is_finished(target):
                return finished
            if (free := shutil.disk_usage(target.parent).free) < _FREE_BYTES_NEEDED:
                raise BuildError(
                    f"{cache_folder()} has {free / 1e6:.0f} MB free, a build takes {_FREE_BYTES_NEEDED / 1e6:.0f} MB: "
                    "free some or set KVCOMPOSE_CACHE"
                )
            work = target.with_suffix(".work")
            shutil.rmtree(work, ignore_errors=True)  # of a build that was killed
            try:
                flags = cmake_flags(sanitize, device)
                product = _build_in(work, patches, patched, flags, environment, jobs or default_jobs(), report)
                shutil.rmtree(target, ignore_errors=True)
                product.replace(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return finished


def _build_in(
    work: Path,
    patches: Path,
    patched: bool,
    flags: Sequence[str],
    environment: Mapping[str, str],
    jobs: int,
    report: Progress,
) -> Path:
    """Source, patches, compilation in ``work``; returns the folder to be moved into place."""
    pin = read_pin(patches)
    archive = fetch_archive(pin, report)
    source, tree, product = work / "llama.cpp", work / "build", work / "product"
    report("extracting llama.cpp", 0, 0)
    extract_llama_cpp(archive, source)
    applied: list[str] = []
    if patched and patch_series(patches):
        report("applying the patch series", 0, 0)
        applied = apply_series(source, patches)

    def compiling(line: str) -> None:
        if match := _NINJA_STEP.match(line):
            report("compiling llama.cpp", int(match[1]), int(match[2]))

    configure = [find_tool("cmake"), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"]
    with work.with_suffix(".log").open("w", encoding="utf-8") as log:
        report("configuring llama.cpp", 0, 0)
        _run([*configure, "-S", str(source), "-B", str(tree), *flags], environment, log)
        _run([find_tool("ninja"), "-C", str(tree), "-j", str(jobs), "llama"], environment, log, compiling)
    (product / "lib").mkdir(parents=True)
    for library in (tree / "bin").glob("lib*"):
        shutil.copy2(library, product / "lib", follow_symlinks=False)
    facts = {
        "key": build_key(patches, flags, patched=patched),
        "pin": str(pin),
        "archive_sha256": pin.sha256,
        "patched": patched,
        "patches": applied,
        "flags": list(flags),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_features(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    (product / "build.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return product


@contextmanager
def _locked(path: Path, report: Progress) -> Iterator[None]:
    """Hold ``path`` exclusively; the system lets go of it however this process ends."""
    import fcntl  # not on Windows, where this module is imported but never builds

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another build of llama.cpp to end", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


#: What CMake says where the library is not found.
_NO_CUBLAS = "CUDA::cublas"


def _run(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: TextIO,
    on_line: Callable[[str], None] = lambda _line: None,
) -> None:
    """Run a build step with its output in the log. Raises BuildError, after showing the end of the log."""
    log.write(f"$ {shlex.join(command)}\n")
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            for line in process.stdout or ():
                log.write(line)
                on_line(line)
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        log.flush()
        told = Path(log.name).read_text(encoding="utf-8")
        if _NO_CUBLAS in told:
            raise BuildError(
                "NVIDIA's cuBLAS is missing beside nvcc: install the whole CUDA toolkit, or libcublas with its headers "
                f"(the log is {log.name})"
            )
        print("\n".join(told.splitlines()[-15:]), file=sys.stderr)
        name = Path(command[0]).name
        raise BuildError(f"llama.cpp did not build ({name} exit {process.returncode}): the whole log is {log.name}")


# -- command line -----------------------------------------------------------------------------------------------------


def progress_printer(stream: TextIO) -> Progress:
    """Steps as lines on ``stream``: one that is redrawn on a terminal, about ten for the whole build elsewhere."""
    redrawn = stream.isatty() and os.environ.get("TERM") != "dumb"
    last_tenth = -1

    def show(text: str, done: int, total: int) -> None:
        nonlocal last_tenth
        line = f"{text} {done}/{total}" if total else text
        if total and redrawn:
            print(f"\r\x1b[K{line}", end="\n" if done == total else "", file=stream, flush=True)
        elif not total or done * 10 // total != last_tenth:
            print(line, file=stream, flush=True)
        last_tenth = done * 10 // total if total else -1

    return show


def main(arguments: Sequence[str] | None = None) -> int:
    """Build llama.cpp for kvcompose-local and print the folder with its libraries."""
    parser = argparse.ArgumentParser(prog="python -m kvcompose_local.install.build", description=main.__doc__)
    parser.add_argument("--jobs", type=int, help="compilers at once (default: cores, bounded by RAM)")
    parser.add_argument("--unpatched", action="store_true", help="leave the patch series out")
    devices = parser.add_mutually_exclusive_group()
    for device in DEVICES:
        devices.add_argument(f"--{device}", dest="device", action="store_const", const=device, help="build for it, too")
    parser.add_argument("--sanitize", metavar="NAMES", help=f"any of {','.join(SANITIZERS)}")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check-compiler", action="store_true", help="only look for a C++ compiler")
    only.add_argument("--fetch", action="store_true", help="only fetch the source archive and print its path")
    only.add_argument("--source", metavar="DIR", type=Path, help="only write the source to DIR, and apply the series")
    options = parser.parse_args(arguments)
    report = progress_printer(sys.stderr)
    try:
        if options.check_compiler:
            print(find_compiler())
        elif options.fetch:
            print(fetch_archive(read_pin(data_file("patches")), report))
        elif options.source:
            _write_source(options.source, report, patched=not options.unpatched)
        else:
            patched, wanted = not options.unpatched, {"sanitize": options.sanitize, "device": options.device}
            print(build(patched=patched, jobs=options.jobs, progress=report, **wanted))
    except KVComposeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


def _write_source(target: Path, report: Progress, *, patched: bool) -> None:
    patches = data_file("patches")
    with cache_errors(target, BuildError):
        if not (target / "CMakeLists.txt").is_file():
            extract_llama_cpp(fetch_archive(read_pin(patches), report), target)
        applied = apply_series(target, patches) if patched else []
    print(f"{target}: {', '.join(applied) or 'nothing to apply'}")


if __name__ == "__main__":
    sys.exit(main())
