"""Building: real pip, git, cmake, ninja and compiler, on a release of llama.cpp that is three lines long."""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcompose_local.errors import BuildError, DownloadError, InvalidInput
from kvcompose_local.install import build
from kvcompose_local.install.pin import build_dir, build_key, cmake_flags, library_dir, patch_series, read_pin
from kvcompose_local.install.resources import data_file
from kvcompose_local.llama_ffi.library import library_path

CMAKE = """\
cmake_minimum_required(VERSION 3.14)
project(tiny CXX)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_library(ggml src/ggml.cpp)
add_library(llama src/llama.cpp)
target_link_libraries(llama PRIVATE ggml)
"""
LLAMA = """\
extern "C" int tiny_ggml();
extern "C" int tiny_answer() {
    return 41;
}
"""
GGML = 'extern "C" int tiny_ggml() { return 1; }\n'
BACKEND = """\
import pathlib

def prepare_metadata_for_build_wheel(folder, settings=None):
    info = pathlib.Path(folder, "tiny_llama-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: tiny-llama\\nVersion: 1.0\\n")
    return info.name

def build_wheel(*_):
    raise SystemExit("never built")
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'

FIRST = """\
Symptom: the answer is off by one.

--- a/src/llama.cpp
+++ b/src/llama.cpp
@@ -1,4 +1,4 @@
 extern "C" int tiny_ggml();
 extern "C" int tiny_answer() {
-    return 41;
+    return 41 + tiny_ggml();
 }
"""
SECOND = """\
--- a/src/llama.cpp
+++ b/src/llama.cpp
@@ -1,4 +1,5 @@
 extern "C" int tiny_ggml();
 extern "C" int tiny_answer() {
-    return 41 + tiny_ggml();
+    // the question is not known
+    return 41 + tiny_ggml(); //
 }
--- /dev/null
+++ b/src/extra.h
@@ -0,0 +1 @@
+// new file
"""


class Release:
    """A package index of one source archive, a pin of it, a patch series, and an empty cache folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = folder / "index"
        self.patches = folder / "patches"
        self.cache = folder / "cache"
        self.index.mkdir(parents=True)
        self.patches.mkdir()
        self.archive = self.index / "tiny_llama-1.0.tar.gz"
        self.publish()

    def publish(self, llama: str = LLAMA) -> None:
        files = {
            "PKG-INFO": "Metadata-Version: 2.1\nName: tiny-llama\nVersion: 1.0\n",
            "pyproject.toml": PYPROJECT,
            "backend.py": BACKEND,
            "vendor/llama.cpp/CMakeLists.txt": CMAKE,
            "vendor/llama.cpp/src/llama.cpp": llama,
            "vendor/llama.cpp/src/ggml.cpp": GGML,
            "vendor/llama.cpp/docs/long.md": "not needed",
            "vendor/other/file": "not llama.cpp",
        }
        write_archive(self.archive, {f"tiny_llama-1.0/{name}": text for name, text in files.items()})
        self.pin(hashlib.sha256(self.archive.read_bytes()).hexdigest())

    def pin(self, sha256: str) -> None:
        (self.patches / "PIN").write_text(f"tiny-llama==1.0 --hash=sha256:{sha256}\n")

    def add_patch(self, name: str, text: str) -> Path:
        path = self.patches / name
        path.write_text(text)
        return path

    def source(self) -> Path:
        target = self.folder / "source"
        build.extract_llama_cpp(self.archive, target)
        return target

    def build(self, **options: object) -> Path:
        return build.build(patches_dir=self.patches, jobs=2, **options)  # type: ignore[arg-type]


def write_archive(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    made = Release(tmp_path / "a release")
    monkeypatch.setenv("KVCOMPOSE_CACHE", str(made.cache))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", made.index.as_uri())
    return made


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# -- the pin and the key -----------------------------------------------------------------------------------------------


def test_the_repository_pin_is_read() -> None:
    pin = read_pin(data_file("patches"))
    assert (pin.name, pin.version) == ("llama-cpp-python", "0.3.36")
    assert pin.archive_name == "llama_cpp_python-0.3.36.tar.gz"


@pytest.mark.parametrize("text", ["", "tiny-llama==1.0", "tiny-llama==1.0 --hash=sha256:12", "a\nb\n"])
def test_a_damaged_pin_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "PIN").write_text(text)
    with pytest.raises(BuildError, match="must hold one line"):
        read_pin(tmp_path)


def test_a_missing_pin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot read the pin"):
        read_pin(tmp_path)


def test_the_key_depends_on_pin_patches_their_order_and_flags(release: Release) -> None:
    def key(*flags: str, patched: bool = True) -> str:
        return build_key(release.patches, flags, patched=patched)

    empty = key()
    assert key() == empty
    assert len(empty) == 16
    assert key("-DA=1") != empty
    assert key("-DA=1", "-DB=2") != key("-DA=1-DB=2")
    first = release.add_patch("0001-one.patch", "1")
    one = key()
    assert one != empty
    assert key(patched=False) == empty
    second = release.add_patch("0002-two.patch", "2")
    both = key()
    first.write_text("2")
    second.write_text("1")
    assert key() not in (both, one, empty)
    (release.patches / "README.md").write_text("not a part of the library")
    first.write_text("1")
    second.write_text("2")
    assert key() == both
    release.pin("0" * 64)
    assert key() != both


def test_sanitizers_have_their_own_build() -> None:
    flags = cmake_flags("address,undefined")
    for part in ("LLAMA", "GGML"):
        assert {f"-D{part}_SANITIZE_ADDRESS=ON", f"-D{part}_SANITIZE_UNDEFINED=ON"} < set(flags)
    assert "-DCMAKE_BUILD_TYPE=RelWithDebInfo" in flags
    assert "-DCMAKE_BUILD_TYPE=Release" in cmake_flags()
    assert build_dir(sanitize="address") != build_dir()
    with pytest.raises(InvalidInput, match="unknown sanitizer 'memory'"):
        cmake_flags("address,memory")


def test_no_amx_code_is_built() -> None:
    library = library_path().parent / ("libggml-cpu.dylib" if sys.platform == "darwin" else "libggml-cpu.so")
    assert b"amx_mul_mat" not in library.resolve().read_bytes()


# -- the patch series --------------------------------------------------------------------------------------------------


def test_the_series_applies_in_order_and_only_once(release: Release) -> None:
    release.add_patch("0002-second.patch", SECOND)
    release.add_patch("0001-first.patch", FIRST)
    source = release.source()
    assert build.apply_series(source, release.patches) == ["0001-first.patch", "0002-second.patch"]
    text = (source / "src/llama.cpp").read_text()
    assert "not known" in text
    assert (source / "src/extra.h").is_file()
    assert build.apply_series(source, release.patches) == []
    assert (source / "src/llama.cpp").read_text() == text


def test_a_longer_series_goes_on_where_the_shorter_ended(release: Release) -> None:
    release.add_patch("0001-first.patch", FIRST)
    source = release.source()
    build.apply_series(source, release.patches)
    release.add_patch("0002-second.patch", SECOND)
    assert build.apply_series(source, release.patches) == ["0002-second.patch"]


def test_a_changed_series_asks_for_a_clean_tree(release: Release) -> None:
    patch = release.add_patch("0001-first.patch", FIRST)
    source = release.source()
    build.apply_series(source, release.patches)
    patch.write_text(FIRST.replace("off by one", "wrong"))
    with pytest.raises(BuildError, match=r"another version of the series \(0001-first.patch\).*empty folder"):
        build.apply_series(source, release.patches)
    patch.unlink()
    with pytest.raises(BuildError, match=r"another version of the series \(0001-first.patch\)"):
        build.apply_series(source, release.patches)


def test_a_patch_that_does_not_apply_changes_nothing_and_says_what_to_do(release: Release) -> None:
    release.add_patch("0001-second-too-early.patch", SECOND)
    source = release.source()
    with pytest.raises(BuildError) as error:
        build.apply_series(source, release.patches)
    text = one_line(error)
    for part in ("0001-second-too-early.patch", "tiny-llama 1.0", "src/llama.cpp", "patches/README.md"):
        assert part in text
    assert (source / "src/llama.cpp").read_text() == LLAMA
    assert not (source / "src/extra.h").exists()


def test_a_repository_around_the_tree_does_not_matter(release: Release) -> None:
    subprocess.run(["git", "init", "--quiet", release.folder], check=True)
    release.add_patch("0001-first.patch", FIRST)
    source = release.source()
    build.apply_series(source, release.patches)
    assert "tiny_ggml();\n}" in (source / "src/llama.cpp").read_text()


def test_without_git_one_line_says_how_to_get_it(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    release.add_patch("0001-first.patch", FIRST)
    source = release.source()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match=r"git is missing.*try again") as error:
        build.apply_series(source, release.patches)
    one_line(error)


def test_the_repository_series_applies_to_the_clean_pin(tmp_path: Path) -> None:
    patches = data_file("patches")
    archive = build.fetch_archive(read_pin(patches))
    source = tmp_path / "llama.cpp"
    build.extract_llama_cpp(archive, source)
    names = [patch.name for patch in patch_series(patches)]
    assert build.apply_series(source, patches) == names
    assert build.apply_series(source, patches) == []
    assert (source / "src/llama-kv-cache.cpp").is_file()


# -- the source archive ------------------------------------------------------------------------------------------------


def test_pip_fetches_the_archive_once(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = read_pin(release.patches)
    archive = build.fetch_archive(pin)
    assert archive.read_bytes() == release.archive.read_bytes()
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert build.fetch_archive(pin) == archive
    assert os.listdir(archive.parent) == [archive.name]


def test_a_damaged_archive_in_the_cache_is_fetched_anew(release: Release) -> None:
    pin = read_pin(release.patches)
    archive = build.fetch_archive(pin)
    archive.write_bytes(b"half of it")
    assert build.fetch_archive(pin).read_bytes() == release.archive.read_bytes()


def test_an_archive_with_another_hash_is_not_kept(release: Release) -> None:
    release.pin("0" * 64)
    with pytest.raises(DownloadError, match=r"not the pinned file .*000000000000… expected") as error:
        build.fetch_archive(read_pin(release.patches))
    one_line(error)
    assert os.listdir(release.cache / "archives") == []


def test_offline_one_line_says_where_to_put_the_archive(release: Release) -> None:
    release.archive.unlink()
    with pytest.raises(DownloadError, match=r"cannot fetch the source of tiny-llama 1.0 .*check the network") as error:
        build.fetch_archive(read_pin(release.patches))
    assert str(release.cache / "archives" / "tiny_llama-1.0.tar.gz") in one_line(error)


def test_only_llama_cpp_is_extracted(release: Release) -> None:
    source = release.source()
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert files == {"CMakeLists.txt", "src/llama.cpp", "src/ggml.cpp"}


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    archive = tmp_path / "bad.tar.gz"
    write_archive(archive, {"x-1/vendor/llama.cpp/../../../../stolen": "text"})
    with pytest.raises(BuildError, match="unsafe path"):
        build.extract_llama_cpp(archive, tmp_path / "deep/er/target")
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("x-1/vendor/llama.cpp/link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(link)
    with pytest.raises(BuildError, match=r"holds no vendor/llama\.cpp"):
        build.extract_llama_cpp(archive, tmp_path / "target")
    assert not (tmp_path / "stolen").exists()
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("keep", [0, 30, -20])
def test_a_truncated_archive_is_told(release: Release, keep: int) -> None:
    cut = release.folder / "cut.tar.gz"
    cut.write_bytes(release.archive.read_bytes()[:keep])
    with pytest.raises(BuildError, match=r"is damaged .*delete it"):
        build.extract_llama_cpp(cut, release.folder / "source")


# -- the build ---------------------------------------------------------------------------------------------------------


def answer(library_dir: Path) -> int:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    library = ctypes.CDLL(str(library_dir / f"libllama.{suffix}"))
    return int(library.tiny_answer())


def test_a_build_is_complete_patched_and_made_once(release: Release) -> None:
    release.add_patch("0001-first.patch", FIRST)
    assert library_dir(patches_dir=release.patches) is None
    steps: list[tuple[str, int, int]] = []
    folder = release.build(progress=lambda *step: steps.append(step))
    assert library_dir(patches_dir=release.patches) == folder
    assert answer(folder) == 42  # needs libggml, found beside it: the work tree is gone
    facts = json.loads((folder.parent / "build.json").read_text())
    assert facts["key"] == folder.parent.name
    assert facts["patches"] == ["0001-first.patch"]
    assert ("compiling llama.cpp", 4, 4) in steps
    names = {path.name.removeprefix(facts["key"]) for path in (release.cache / "llama").iterdir()}
    assert names == {"", ".lock", ".log"}

    steps.clear()
    assert release.build(progress=lambda *step: steps.append(step)) == folder
    assert steps == []


def test_the_unpatched_build_stands_beside_the_patched_one(release: Release) -> None:
    release.add_patch("0001-first.patch", FIRST)
    stock = release.build(patched=False)
    assert answer(stock) == 41
    assert library_dir(patches_dir=release.patches) is None
    assert library_dir(patched=False, patches_dir=release.patches) == stock


def test_a_failing_compiler_shows_the_end_of_its_log(release: Release, capfd: pytest.CaptureFixture[str]) -> None:
    release.publish(llama="this is not C++;\n")
    with pytest.raises(BuildError, match=r"did not build \(ninja exit 1\): the whole log is ") as error:
        release.build()
    log = Path(one_line(error).rpartition(" is ")[2])
    assert "this is not C++" in log.read_text()
    shown = capfd.readouterr().err
    assert "error" in shown
    assert len(shown.splitlines()) <= 15
    assert {path.suffix for path in (release.cache / "llama").iterdir()} == {".lock", ".log"}


def test_a_stopped_build_leaves_nothing(release: Release) -> None:
    def stop(text: str, _done: int, _total: int) -> None:
        if text.startswith("compiling"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        release.build(progress=stop)
    assert {path.suffix for path in (release.cache / "llama").iterdir()} == {".lock", ".log"}
    assert answer(release.build()) == 41


def test_of_two_builds_at_once_one_compiles(release: Release) -> None:
    build.fetch_archive(read_pin(release.patches))
    steps: list[str] = []
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(release.build(progress=lambda text, *_: steps.append(text))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(folders) == 2
    assert folders[0] == folders[1]
    assert steps.count("configuring llama.cpp") == 1


def test_left_overs_of_a_killed_build_do_no_harm(release: Release) -> None:
    target = build_dir(patches_dir=release.patches)
    (target / "lib").mkdir(parents=True)  # no build.json: not finished
    target.with_suffix(".work").mkdir()
    (target.with_suffix(".work") / "llama.cpp").write_text("in the way")
    assert library_dir(patches_dir=release.patches) is None
    assert answer(release.build()) == 41


def test_without_a_compiler_one_line_says_how_to_get_one(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found: .*, then try again") as error:
        release.build()
    one_line(error)
    assert not release.cache.exists()


def test_without_cmake_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match=r"cmake is missing: run `.*pip install cmake ninja`"):
        build.find_tool("cmake")
    (tmp_path / "cmake").touch(mode=0o755)
    assert build.find_tool("cmake") == str(tmp_path / "cmake")


@pytest.mark.parametrize(
    ("release_text", "command"),
    [
        ("ID=debian\n", "sudo apt install g++"),
        ("ID=linuxmint\nID_LIKE=ubuntu debian\n", "sudo apt install g++"),
        ("ID=fedora\n", "sudo dnf install gcc-c++"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "sudo dnf install gcc-c++"),
        ("ID=arch\n", "sudo pacman -S gcc"),
        ("ID=alpine\n", "sudo apk add g++"),
        ('ID="opensuse-leap"\nID_LIKE="suse opensuse"\n', "sudo zypper install gcc-c++"),
        ("ID=other\n", "install g++ with your package manager"),
    ],
)
def test_the_compiler_hint_fits_the_system(tmp_path: Path, release_text: str, command: str) -> None:
    path = tmp_path / "os-release"
    path.write_text(release_text)
    assert command in build.install_hint("g++", "linux", path)
    assert "git" in build.install_hint("git", "linux", path)


def test_the_compiler_hint_of_macos_and_of_an_unknown_system(tmp_path: Path) -> None:
    assert build.install_hint("g++", "darwin") == "run `xcode-select --install`"
    assert "package manager" in build.install_hint("g++", "linux", tmp_path / "missing")


def test_a_cache_folder_that_cannot_be_written_is_one_line(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    (release.folder / "file").touch()
    monkeypatch.setenv("KVCOMPOSE_CACHE", str(release.folder / "file" / "cache"))
    for attempt in (release.build, lambda: build.fetch_archive(read_pin(release.patches))):
        with pytest.raises(BuildError, match=r"cannot write .*KVCOMPOSE_CACHE") as error:
            attempt()
        one_line(error)


# -- the command line --------------------------------------------------------------------------------------------------


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvcompose_local.install.build", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        cwd=Path(build.__file__).parents[2],
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "status", "message"),
    [
        (["--check-compiler"], {"PATH": "", "CXX": ""}, 1, "error: no C++ compiler found: "),
        (["--fetch"], {"KVCOMPOSE_CACHE": "/dev/null/cache"}, 1, "error: cannot write /dev/null"),
        (["--sanitize", "memory"], {}, 2, "error: unknown sanitizer 'memory': "),
    ],
)
def test_failures_are_one_line(arguments: list[str], environment: dict[str, str], status: int, message: str) -> None:
    result = run_module(*arguments, **environment)
    assert result.returncode == status
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_the_patched_source_can_be_written_out(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    release.add_patch("0001-first.patch", FIRST)
    monkeypatch.setattr(build, "data_file", lambda _name: release.patches)
    for said in ("0001-first.patch", "nothing to apply"):
        out = capture(lambda: build.main(["--source", str(release.folder / "tree")]))
        assert said in out
    assert (release.folder / "tree/src/llama.cpp").is_file()


def capture(action: Callable[[], int]) -> str:
    from contextlib import redirect_stderr, redirect_stdout

    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(io.StringIO()):
        assert action() == 0
    return text.getvalue()


def test_progress_is_a_few_lines_off_a_terminal() -> None:
    stream = io.StringIO()
    show = build.progress_printer(stream)
    show("configuring", 0, 0)
    for step in range(1, 101):
        show("compiling", step, 100)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "configuring"
    assert lines[-1] == "compiling 100/100"
    assert len(lines) == 12


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("xterm", "\r\x1b[Kcompiling 1/2\r\x1b[Kcompiling 2/2\n"),
        ("dumb", "compiling 1/2\ncompiling 2/2\n"),
    ],
)
def test_progress_is_one_line_on_a_terminal_that_can_redraw_it(
    monkeypatch: pytest.MonkeyPatch, kind: str, shown: str
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", kind)
    stream = Terminal()
    show = build.progress_printer(stream)
    show("compiling", 1, 2)
    show("compiling", 2, 2)
    assert stream.getvalue() == shown


def test_a_missing_cublas_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = "echo links to: CUDA::cublas; exit 1"
    with open(tmp_path / "log", "w") as log, pytest.raises(BuildError, match="cuBLAS is missing beside nvcc: install"):
        build._run(["sh", "-c", script], {"PATH": os.environ["PATH"]}, log)
    assert not capfd.readouterr().err
