"""What a build for a GPU needs beside a C++ compiler: NVIDIA's nvcc, or glslc and the headers of Vulkan and SPIR-V.

CMake would tell less, and later. Only the standard library is imported, as in :mod:`build`.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from kvcompose_local.errors import BuildError

#: Where CUDA's installers put it.
_CUDA_HOME = Path("/usr/local/cuda")
_INCLUDES = ("/usr/include", "/usr/local/include", "/opt/homebrew/include")
#: The first headers that have what ggml-vulkan asks for (``VK_EXT_layer_settings``).
_VULKAN = (1, 3, 272)
_HEADER_VERSION = re.compile(
    r"^#define VK_HEADER_VERSION (\d+)$|^#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION\(0, (\d+), (\d+),", re.M
)


def device_environment(device: str | None) -> dict[str, str]:
    """Variables by which CMake finds what a build for ``device`` needs. Raises BuildError for what is missing."""
    if device == "cuda":
        return {"CUDACXX": find_nvcc()}
    if device == "vulkan":
        find_glslc()
        return {"CMAKE_INCLUDE_PATH": str(_vulkan_headers())}
    return {}


def find_nvcc() -> str:
    """NVIDIA's CUDA compiler: ``CUDACXX``, else on PATH, else where CUDA is installed. Raises BuildError."""
    if sys.platform == "darwin":
        raise BuildError("there is no CUDA for macOS: leave --cuda out, a build for a Mac has Metal")
    places = [os.environ.get("CUDACXX"), "nvcc"]
    places += [str(Path(os.environ[name]) / "bin/nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places.append(str(_CUDA_HOME / "bin/nvcc"))
    found = next((path for name in places if name and (path := shutil.which(name))), None)
    if found is None:
        raise BuildError("no CUDA compiler (nvcc) found: install NVIDIA's CUDA toolkit, or name its nvcc in CUDACXX")
    return found


def find_glslc() -> str:
    """The compiler of Vulkan's shaders. Raises BuildError."""
    found = shutil.which("glslc", path=os.pathsep.join([*_sdk("bin"), os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise BuildError("no compiler of Vulkan shaders (glslc) found: install glslc or the Vulkan SDK, then try again")
    return found


def _sdk(folder: str) -> list[str]:
    """A folder of the Vulkan SDK, where the environment names one."""
    return [str(Path(os.environ["VULKAN_SDK"]) / folder)] if os.environ.get("VULKAN_SDK") else []


def _vulkan_headers() -> Path:
    """The include folder with Vulkan's headers; SPIR-V's may be in another."""
    included = os.environ.get("CMAKE_INCLUDE_PATH", "").split(os.pathsep)
    folders = [Path(name) for name in (*_sdk("include"), *included, *_INCLUDES) if name]
    found = next((folder for folder in folders if (folder / "vulkan/vulkan_core.h").is_file()), None)
    if found is None:
        raise BuildError("Vulkan's headers are missing: install libvulkan-dev or the Vulkan SDK, then try again")
    version = _version_of(found / "vulkan/vulkan_core.h")
    if version < _VULKAN:
        told, wanted = (".".join(map(str, x)) for x in (version, _VULKAN))
        raise BuildError(
            f"Vulkan's headers in {found} are of {told}, and {wanted} is needed: name a newer Vulkan SDK in VULKAN_SDK"
        )
    if not any((folder / "spirv/unified1/spirv.hpp").is_file() for folder in folders):
        raise BuildError("SPIR-V's headers are missing: install spirv-headers or the Vulkan SDK, then try again")
    return found


def _version_of(header: Path) -> tuple[int, int, int]:
    """Of ``vulkan_core.h``, zeros where it tells none."""
    patch, major, minor = 0, 0, 0
    for match in _HEADER_VERSION.finditer(header.read_text(encoding="utf-8", errors="replace")):
        if match[1]:
            patch = int(match[1])
        else:
            major, minor = int(match[2]), int(match[3])
    return major, minor, patch
