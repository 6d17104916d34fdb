"""Each cause that keeps llama.cpp from being loaded: ``run`` says in one line what ``doctor`` finds."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcompose_local.commands import doctor
from kvcompose_local.install import pin
from kvcompose_local.install.library_choice import Problem, find_library, why_not_loaded
from kvcompose_local.install.pin import DEVICES, build_dir, build_key, cmake_flags, cpu_features
from kvcompose_local.install.resources import data_file
from kvcompose_local.llama_ffi.library import library_path

TinyModel = Callable[..., Path]
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux' mounts, users and messages")
is_root = hasattr(os, "geteuid") and os.geteuid() == 0
LIBRARIES = library_path().parent


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCOMPOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def told(tiny_model: TinyModel) -> Callable[..., str]:
    """``told(*before)`` is the one line of ``run``, which is the same as what doctor finds of ``name``."""

    def both(*before: str, name: str = "library") -> str:
        command = [*before, sys.executable, "-m", "kvcompose_local"]
        ask = ["run", str(tiny_model()), "--threads", "1", "--ctx", "512", "-p", "x"]
        run = subprocess.run([*command, *ask], capture_output=True, text=True, timeout=120, check=False)
        assert (run.returncode, run.stdout) == (1, "")
        assert run.stderr.startswith("error: ")
        assert run.stderr.count("\n") == 1
        found = subprocess.run([*command, "doctor"], capture_output=True, text=True, timeout=120, check=False)
        assert found.returncode == 1
        lines = found.stdout.splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith(f" fail  {name}: "))
        text, remedy = lines[at].partition(": ")[2], lines[at + 1].partition("→ ")[2]
        assert run.stderr == f"error: {text}: {remedy}\n"
        return f"{text}: {remedy}"

    return both


def link_libraries(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for file in LIBRARIES.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def put_build(folder: Path, **facts: object) -> Path:
    """A build of our own in the cache, as its ``build.json`` says."""
    (folder / "lib").parent.mkdir(parents=True)
    known = {"key": folder.name, "pin": "llama-cpp-python 0.3.36", "date": "2026-01-01T00:00:00+00:00"}
    (folder / "build.json").write_text(json.dumps({**known, "cpu": cpu_features(), **facts}))
    return folder


def build_for(cpu: str, cache: Path) -> Path:
    """The folder of a build for another processor, with the libraries in it."""
    flags = cmake_flags()
    key = build_key(data_file("patches"), flags, cpu=cpu)
    folder = put_build(cache / "llama" / key, cpu=cpu, flags=flags)
    link_libraries(folder / "lib")
    return folder / "lib"


def bindings_have_none() -> bool:
    return find_library().folder is None


def compiled(folder: Path, source: str, *flags: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "source.c").write_text(source)
    command = [
        shutil.which("cc") or "c++",
        "-shared",
        "-fPIC",
        "-x",
        "c",
        "source.c",
        "-o",
        library_path().name,
        *flags,
    ]
    subprocess.run(command, cwd=folder, check=True)
    return folder


# -- what LLAMA_CPP_LIB_PATH names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nothing", "a dangling link", "a file", "the library", "an empty folder"])
def test_what_the_variable_names_is_told_with_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str], kind: str
) -> None:
    named = tmp_path / "named"
    if kind == "a dangling link":
        named.symlink_to(tmp_path / "gone")
    elif kind == "a file":
        named.write_text("no folder")
    elif kind == "the library":
        named = library_path()
    elif kind == "an empty folder":
        named.mkdir()
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(named))
    line = told()
    assert line.startswith(f"LLAMA_CPP_LIB_PATH names {named}, ")
    assert "unset it, or name the folder" in line
    assert "kvcompose-local build" not in line  # would not help while the variable is set


def test_a_damaged_library_that_the_user_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]
) -> None:
    (tmp_path / library_path().name).write_text("no library")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    line = told()
    assert line.startswith(f"no usable llama.cpp library in {tmp_path} (")
    assert line.endswith("unset LLAMA_CPP_LIB_PATH, or name another folder")


def test_another_version_of_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]
) -> None:
    folder = compiled(tmp_path / "old", "void llama_backend_init(void) {}")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(folder))
    assert told().startswith(f"{folder} holds another version of llama.cpp, without llama_")


@linux
def test_a_library_that_needs_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]
) -> None:
    shutil.copy(library_path().resolve(), tmp_path / "libllama.so")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    line = told()
    assert line.startswith(f"{tmp_path} needs libggml")
    assert "which is missing here: install it, or unset LLAMA_CPP_LIB_PATH" in line


@linux
@pytest.mark.parametrize("name", ["libllama.so", "libggml-base.so"])
def test_a_library_that_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str], name: str
) -> None:
    """The loader maps it, and the process dies where a page behind the end is read."""
    shutil.copytree(LIBRARIES, tmp_path / "lib", symlinks=True)
    os.truncate((tmp_path / "lib" / name).resolve(), 100_000)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path / "lib"))
    line = told()
    assert line.startswith(f"{tmp_path / 'lib' / name} is cut off after 100000 of at least ")
    assert line.endswith("unset LLAMA_CPP_LIB_PATH, or name another folder")


@linux
@pytest.mark.skipif(platform.machine() != "x86_64", reason="another processor than x86-64 is wanted")
def test_a_library_for_another_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]
) -> None:
    content = bytearray((LIBRARIES / "libllama.so").read_bytes())
    content[18:20] = (183).to_bytes(2, "little")
    (tmp_path / "libllama.so").write_bytes(content)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    assert told().startswith(f"{tmp_path}/libllama.so is for AArch64, and this Python is for x86-64: unset LLAMA_CPP_")


@linux
def test_the_librarys_own_ggml_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]
) -> None:
    """Another program's ggml in LD_LIBRARY_PATH has the same names."""
    foreign = tmp_path / "foreign"
    for name in ("libggml-base.so.0", "libggml-cpu.so.0", "libggml.so.0"):
        compiled(foreign, "void foreign(void) {}", f"-Wl,-soname,{name}")
        (foreign / library_path().name).rename(foreign / name)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(foreign))
    link_libraries(put_build(build_dir()) / "lib")
    code = "import kvcompose_local.llama_ffi.library as library; print(library.library_path())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (f"{build_dir() / 'lib/libllama.so'}\n", "")

    shutil.copy(LIBRARIES / "libllama.so", tmp_path / "libllama.so")  # without a ggml of its own
    shutil.copy(LIBRARIES / "libggml-base.so", tmp_path / "libggml-base.so.0")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    line = told()
    assert line.startswith(f"{tmp_path} and what LD_LIBRARY_PATH brings may not fit each other (")
    assert ": unset LD_LIBRARY_PATH, or unset LLAMA_CPP_LIB_PATH, or name another folder" in line


def test_an_empty_variable_names_nothing(private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = put_build(build_dir())
    link_libraries(build / "lib")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", "")
    library = find_library()
    assert (library.folder, library.problem, library.is_named) == (build / "lib", None, False)


def test_why_the_stock_engine_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(link_libraries(tmp_path / "own")))
    assert str(find_library().why_stock) == "LLAMA_CPP_LIB_PATH names a llama.cpp without the patches: unset it"
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH")
    assert str(find_library().why_stock) == "llama.cpp is not built: run `kvcompose-local build`"


def test_a_library_without_the_patches_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel
) -> None:
    """One whose interface has another name is the same as none."""
    folder = tmp_path / "stock"
    shutil.copytree(LIBRARIES, folder, symlinks=True)
    file = (folder / library_path().name).resolve()
    content = file.read_bytes()
    for name in (b"version", b"rewrite"):
        content = content.replace(b"\0llama_kvc_" + name + b"\0", b"\0llama_kvx_" + name + b"\0")
    file.write_bytes(content)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(folder))
    why = "LLAMA_CPP_LIB_PATH names a llama.cpp without the patches: unset it"
    command = [sys.executable, "-m", "kvcompose_local"]
    ask = ["run", str(tiny_model()), "--threads", "1", "--ctx", "1024", "--max-tokens", "1", "-p", "x"]
    done = subprocess.run([*command, *ask], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first = done.stderr.splitlines()[0]
    assert first.startswith("stock engine: every layer keeps equally many cells")
    assert first.endswith(f"; {why}")
    engine = {check.name: check for check in doctor.report()}["engine"]
    assert (engine.state, engine.text) == ("warn", "stock: all layers keep the same number of cells")
    assert engine.remedy == why


# -- our own builds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"cpu": "avx512f made_up"}, "llama.cpp was built for another machine, whose processor has other instructions"),
        ({}, "llama.cpp was built for another pin, patch series or machine (0123456789abcdef)"),
    ],
)
def test_a_build_that_is_no_longer_looked_for(
    private_cache: Path, told: Callable[..., str], facts: dict[str, str], words: str
) -> None:
    if not bindings_have_none():
        pytest.skip("the bindings bring a library")
    assert told() == "llama.cpp is not built: run `kvcompose-local build`"
    put_build(private_cache / "llama/0123456789abcdef", **facts)
    assert told() == f"{words}: run `kvcompose-local build`"


def test_a_build_for_less_than_the_processor_has_runs(
    private_cache: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel
) -> None:
    """A newer kernel lists instruction sets that were there all the time."""
    less, more = cpu_features(), f"{cpu_features()} amx_fp16 avx10_1"
    lib = build_for(less, private_cache)
    build_for("sse made_up", private_cache)  # another machine's, in a home folder that both use
    monkeypatch.setattr(pin, "cpu_features", lambda: more)
    assert find_library().folder == lib
    richer = build_for(more, private_cache)
    assert find_library().folder == richer
    monkeypatch.setattr(pin, "cpu_features", lambda: less)
    assert find_library().folder == lib
    monkeypatch.setattr(pin, "cpu_features", lambda: f"{less} zzz")
    assert find_library().folder == lib
    monkeypatch.setattr(pin, "cpu_features", lambda: "sse")
    assert find_library().folder != lib


def test_where_nothing_is_known_of_the_processor_the_least_demanding_build_is_tried(
    private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_for(f"{cpu_features()} amx_fp16", private_cache)
    lib = build_for(cpu_features(), private_cache)
    monkeypatch.setattr(pin, "cpu_features", lambda: "")
    assert find_library().folder == lib


def test_a_build_of_other_patches_is_not_taken_for_its_processor(
    private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_build(private_cache / "llama/0123456789abcdef", cpu="sse", flags=cmake_flags())
    (private_cache / "llama/0123456789abcdef/lib").mkdir()
    monkeypatch.setattr(pin, "cpu_features", lambda: "sse sse2")
    assert find_library().folder is None or "0123456789abcdef" not in str(find_library().folder)


@linux
@pytest.mark.skipif(not is_root, reason="mounting takes root")
@pytest.mark.parametrize("cpuinfo", ["more", "empty"])
def test_what_the_kernel_lists_is_not_needed_to_run(tmp_path: Path, private_cache: Path, cpuinfo: str) -> None:
    build_for(cpu_features(), private_cache)
    told = re.sub(r"(?m)^((?:flags|Features)\s*:.*)$", r"\1 amx_fp16 sha512 apx", Path("/proc/cpuinfo").read_text())
    (tmp_path / "cpuinfo").write_text(told if cpuinfo == "more" else "")
    script = f'mount --bind {tmp_path / "cpuinfo"} /proc/cpuinfo && exec "$@"'
    mounted = ["unshare", "-m", "sh", "-c", script, "sh"]
    if subprocess.run([*mounted, "true"], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    command = [*mounted, sys.executable, "-m", "kvcompose_local", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
    assert "   ok  engine: patched" in done.stdout
    assert ("built for a processor without amx_fp16" in done.stdout) == (cpuinfo == "more")


def test_a_damaged_build(private_cache: Path, told: Callable[..., str]) -> None:
    build = put_build(build_dir())
    (build / "lib").mkdir()
    assert (
        told() == f"{build / 'lib'} was built, and holds no libllama: delete {build}, then run `kvcompose-local build`"
    )
    (build / "lib" / library_path().name).write_bytes(b"")
    line = told()
    assert line.startswith(f"no usable llama.cpp library in {build / 'lib'} (")
    assert line.endswith(f"delete {build}, then run `kvcompose-local build`")


@linux
@pytest.mark.skipif(not is_root, reason="mounting takes root")
@pytest.mark.parametrize("is_named", [False, True])
def test_a_mount_from_which_nothing_is_loaded(
    private_cache: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str], is_named: bool
) -> None:
    build = put_build(build_dir())
    shutil.copytree(LIBRARIES, build / "lib", symlinks=True)
    if is_named:
        monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(build / "lib"))
    script = (
        f'mount --bind {private_cache} {private_cache} && mount -o remount,bind,noexec {private_cache} && exec "$@"'
    )
    mounted = ["unshare", "-m", "sh", "-c", script, "sh"]
    if subprocess.run([*mounted, "true"], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    line = told(*mounted)
    assert line.startswith(f"{build / 'lib'} is on a file system mounted noexec")
    assert ("unset LLAMA_CPP_LIB_PATH" in line) == is_named
    assert ("set KVCOMPOSE_CACHE to a folder on another file system" in line) != is_named


def test_a_system_that_lets_nothing_be_loaded_from_there_for_another_reason(tmp_path: Path) -> None:
    library = find_library()
    error = OSError("/x/libllama.so: failed to map segment from shared object")
    assert "lets no library be loaded" not in str(why_not_loaded(error, library))  # there is none at all
    link_libraries(put_build(build_dir()) / "lib")
    assert why_not_loaded(error, find_library()) == Problem(
        f"the system lets no library be loaded from {build_dir() / 'lib'} (mounted noexec?)",
        "set KVCOMPOSE_CACHE to a folder on another file system",
    )


@linux
@pytest.mark.skipif(not is_root, reason="becoming another user takes root")
def test_files_of_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", sys.executable, "-c"]
    code = "from kvcompose_local.install.library_choice import find_library; print(find_library().problem)"
    if subprocess.run([*nobody, code], check=False, capture_output=True).returncode:
        pytest.skip("other users may not run this program")
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("KVCOMPOSE_CACHE", folder)
        build = put_build(build_dir())
        library = link_libraries(build / "lib") / library_path().name
        library.unlink()
        library.write_bytes(b"")
        library.chmod(0o600)

        def problem() -> str:
            return subprocess.run([*nobody, code], check=True, capture_output=True, text=True).stdout

        first = build_dir(device=DEVICES[0]) / "build.json"  # looked for before all others
        assert problem().startswith(f"cannot read {first} (Permission denied): set KVCOMPOSE_CACHE")
        Path(folder).chmod(0o755)
        assert problem() == f"cannot read {library} (Permission denied): set KVCOMPOSE_CACHE to a folder of yours\n"


def test_a_build_for_a_device_goes_before_one_for_the_cpu() -> None:
    for device in (None, *reversed(DEVICES)):
        folder = put_build(build_dir(device=device)) / "lib"
        link_libraries(folder)
        assert find_library().folder == folder


# -- the bindings ------------------------------------------------------------------------------------------------------


def test_bindings_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]) -> None:
    link_libraries(put_build(build_dir()) / "lib")
    installed = importlib.util.find_spec("llama_cpp")  # the package itself would take llama.cpp's log over
    assert installed is not None
    assert installed.origin is not None
    site = tmp_path / "site"
    shutil.copytree(Path(installed.origin).parent, site / "llama_cpp", ignore=shutil.ignore_patterns("lib"))
    metadata = site / "llama_cpp_python-0.2.90.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 0.2.90\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    assert told(name="bindings") == (
        "llama-cpp-python 0.2.90, but 0.3.36 is needed: pip install llama-cpp-python==0.3.36"
    )


# -- doctor alone ------------------------------------------------------------------------------------------------------


def test_a_library_that_ends_the_process_that_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "#include <stdlib.h>\n__attribute__((constructor)) static void start(void) { abort(); }"
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(compiled(tmp_path / "crashes", source)))
    found = {check.name: check for check in doctor.report()}["library"]
    assert found.state == "fail"
    assert "ends a process with code -6" in found.text


# -- threads that wait -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_the_users_own_wait_policy_wins(monkeypatch: pytest.MonkeyPatch, own: dict[str, str], expected: str) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    code = "import os, kvcompose_local.llama_ffi.library; print(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {**os.environ, **own, "LLAMA_CPP_LIB_PATH": str(LIBRARIES)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected}\n"
