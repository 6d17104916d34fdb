"""The pinned release of llama.cpp, the patches and the flags, and the folder of the library that is built of them.

The folder is named by a hash of everything that shapes the library, so a build is made once and a stale one is never
loaded. The processor is a part of it: machines that share a cache folder have a build each, and one made for less than
a processor has runs on it, too. Every start needs it, and ``scripts/setup`` before anything is installed: only quick
parts of the standard library are imported.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcompose_local.errors import BuildError, InvalidInput
from kvcompose_local.install.cpu import instruction_sets
from kvcompose_local.install.resources import cache_folder, data_file

_PIN_LINE = re.compile(r"(?P<name>[\w.-]+)==(?P<version>[\w.]+) --hash=sha256:(?P<sha256>[0-9a-f]{64})")
SANITIZERS = ("address", "thread", "undefined")
#: What a build can have beside the CPU and, on a Mac, Metal; what there is of these is taken in this order.
DEVICES = ("cuda", "vulkan")


def output_of(command: Sequence[str]) -> str:
    """What a small command prints, stripped; empty when it fails or is not there."""
    import subprocess  # late: Linux asks no command for its key

    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


@dataclass(frozen=True)
class Pin:
    """The release of llama-cpp-python that the bindings and the source of llama.cpp come from."""

    name: str
    version: str
    sha256: str  # of the source archive

    @property
    def archive_name(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}.tar.gz"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def read_pin(patches_dir: Path) -> Pin:
    """The pin in ``patches_dir/PIN``. Raises BuildError when the file is missing or not one requirement line."""
    path = patches_dir / "PIN"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BuildError(f"cannot read the pin {path}: {error.strerror}") from error
    match = _PIN_LINE.fullmatch(text.strip())
    if match is None:
        raise BuildError(f"{path} must hold one line: NAME==VERSION --hash=sha256:64 HEX DIGITS")
    return Pin(**match.groupdict())


def patch_series(patches_dir: Path) -> list[Path]:
    """The patches in the order in which they apply."""
    return sorted(patches_dir.glob("*.patch"))


def series_digest(patches_dir: Path) -> str:
    """12 hex digits over the patches' bytes in order: the same on every machine."""
    digest = hashlib.sha256()
    for patch in patch_series(patches_dir):
        digest.update(hashlib.sha256(patch.read_bytes()).digest())
    return digest.hexdigest()[:12]


def cmake_flags(sanitize: str | None = None, device: str | None = None) -> list[str]:
    """CMake's ``-D`` options of a build. ``sanitize`` names sanitizers, as in ``address,undefined``.

    device: of :data:`DEVICES`. Raises InvalidInput for a sanitizer or a device that llama.cpp has no option for.
    """
    origin = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
    flags = {
        "CMAKE_BUILD_TYPE": "RelWithDebInfo" if sanitize else "Release",
        "BUILD_SHARED_LIBS": "ON",
        # The libraries find each other where they end up, not in the work tree.
        "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
        "CMAKE_INSTALL_RPATH": origin,
        **{f"LLAMA_BUILD_{part}": "OFF" for part in ("APP", "COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER")},
        "GGML_CCACHE": "OFF",
        "GGML_NATIVE": "ON",  # otherwise off wherever SOURCE_DATE_EPOCH is set
        "GGML_RPC": "ON",
    }
    if platform.machine().lower() in ("x86_64", "amd64"):
        # AMX code crashes on machines that promise AMX and do not deliver it (ggml-org/llama.cpp#20824), and it
        # repacks the weights into memory of its own, where a mapped file costs none. No laptop has it.
        flags["CMAKE_C_FLAGS"] = flags["CMAKE_CXX_FLAGS"] = "-U__AMX_INT8__"
    if sys.platform == "darwin":
        flags["CMAKE_OSX_ARCHITECTURES"] = platform.machine()
        flags["GGML_METAL"] = flags["GGML_METAL_EMBED_LIBRARY"] = "ON"
    if device is not None:
        if device not in DEVICES:
            raise InvalidInput(f"unknown device {device!r}: choose from {', '.join(DEVICES)}")
        flags[f"GGML_{device.upper()}"] = "ON"
        flags["CMAKE_INSTALL_RPATH_USE_LINK_PATH"] = "ON"  # CUDA's libraries are where the loader may not look
    for name in (sanitize or "").split(",") if sanitize else ():
        if name not in SANITIZERS:
            raise InvalidInput(f"unknown sanitizer {name!r}: choose from {', '.join(SANITIZERS)}")
        flags[f"LLAMA_SANITIZE_{name.upper()}"] = flags[f"GGML_SANITIZE_{name.upper()}"] = "ON"  # each has its own
    return [f"-D{name}={value}" for name, value in flags.items()]


@functools.cache
def cpu_features() -> str:
    """The processor features that ``-march=native`` uses: machines that share a cache folder may differ in them."""
    if sys.platform == "darwin":
        return output_of(["sysctl", "-n", "machdep.cpu.brand_string"])
    return " ".join(instruction_sets(platform.machine()))


def build_key(patches_dir: Path, flags: Sequence[str], *, patched: bool = True, cpu: str | None = None) -> str:
    """16 hex digits over the pin, the patches' bytes in order, CMake's flags, the platform and the CPU's features.

    cpu: the features of another processor than this one.
    """
    pin = read_pin(patches_dir)
    parts = [
        str(pin),
        pin.sha256,
        "\0".join(flags),
        platform.system(),
        platform.machine(),
        cpu_features() if cpu is None else cpu,
    ]
    digest = hashlib.sha256(json.dumps(parts).encode())
    for patch in patch_series(patches_dir) if patched else ():
        digest.update(hashlib.sha256(patch.read_bytes()).digest())
    return digest.hexdigest()[:16]


def build_dir(
    *, patched: bool = True, sanitize: str | None = None, device: str | None = None, patches_dir: Path | None = None
) -> Path:
    """The folder for the build of the current pin, series and flags, whether it exists or not."""
    patches = patches_dir or data_file("patches")
    return cache_folder() / "llama" / build_key(patches, cmake_flags(sanitize, device), patched=patched)


def library_dir(
    patched: bool = True,
    *,
    sanitize: str | None = None,
    device: str | None = None,
    patches_dir: Path | None = None,
) -> Path | None:
    """The folder with the finished libraries (for ``LLAMA_CPP_LIB_PATH``), None when this build was not made yet.

    Where the build for this very processor is missing, the one for most of its features is taken: a newer kernel may
    list more of them than at the time of the build. Where no features are known, as in a sandbox, the least demanding
    build is tried.
    """
    patches = patches_dir or data_file("patches")
    folder = build_dir(patched=patched, sanitize=sanitize, device=device, patches_dir=patches)
    if is_finished(folder):
        return folder / "lib"
    flags, here = cmake_flags(sanitize, device), set(cpu_features().split())
    fitting: list[tuple[int, Path]] = []
    for record in sorted(folder.parent.glob("*/build.json")):
        facts = build_facts(record.parent)
        cpu = str(facts.get("cpu", ""))
        features = set(cpu.split())
        if facts.get("flags") != flags or (here and not features <= here):
            continue
        # What the record says is in the folder's name as well, together with the pin and the patches.
        if build_key(patches, flags, patched=patched, cpu=cpu) == record.parent.name:
            fitting.append((len(features), record.parent / "lib"))
    best = max if here else min
    return best(fitting)[1] if fitting else None


def is_finished(folder: Path) -> bool:
    """Whether a build stands in its folder: build.json is written last, and the folder renamed into place with it."""
    return (folder / "build.json").is_file()


def build_facts(folder: Path) -> dict[str, Any]:
    """The content of a build's ``build.json``, empty for a folder that is no build of ours."""
    try:
        facts = json.loads((folder / "build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) and "key" in facts else {}


def preferred_library_dir() -> Path | None:
    """The same of the build that is taken: one for a device goes before one for the CPU alone."""
    return next((found for device in (*DEVICES, None) if (found := library_dir(device=device))), None)
