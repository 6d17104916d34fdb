"""What a build for a GPU needs is looked for before anything is fetched, and missing tools are told in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvcompose_local.errors import BuildError, InvalidInput
from kvcompose_local.install import device_tools
from kvcompose_local.install.device_tools import device_environment, find_glslc, find_nvcc
from kvcompose_local.install.pin import DEVICES, build_key, cmake_flags
from kvcompose_local.install.resources import data_file


def program(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without any of it: an empty folder is its PATH and where headers would be."""
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "VULKAN_SDK", "CMAKE_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(device_tools, "_CUDA_HOME", tmp_path / "cuda")
    monkeypatch.setattr(device_tools, "_INCLUDES", (str(tmp_path / "include"),))
    return tmp_path


def vulkan(folder: Path, patch: int) -> None:
    for name, text in (
        (
            "vulkan/vulkan_core.h",
            f"#define VK_HEADER_VERSION {patch}\n"
            "#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION(0, 1, 3, VK_HEADER_VERSION)\n",
        ),
        ("spirv/unified1/spirv.hpp", ""),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.skipif(sys.platform == "darwin", reason="there is no CUDA there")
def test_nvcc_is_where_the_user_says_on_path_or_where_cuda_is(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match=r"no CUDA compiler .nvcc. found: install"):
        device_environment("cuda")
    installed = program(bare / "cuda" / "bin", "nvcc")
    assert find_nvcc() == str(installed)
    on_path = program(bare / "bin", "nvcc")
    assert device_environment("cuda") == {"CUDACXX": str(on_path)}
    monkeypatch.setenv("CUDACXX", str(installed))
    assert find_nvcc() == str(installed)


def test_vulkan_needs_glslc_and_headers_that_are_new_enough(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match="glslc"):
        device_environment("vulkan")
    program(bare / "bin", "glslc")
    assert find_glslc() == str(bare / "bin" / "glslc")
    with pytest.raises(BuildError, match="Vulkan's headers are missing: install"):
        device_environment("vulkan")
    vulkan(bare / "include", 239)
    with pytest.raises(BuildError, match=r"are of 1\.3\.239, and 1\.3\.272 is needed"):
        device_environment("vulkan")
    vulkan(bare / "include", 272)
    assert device_environment("vulkan") == {"CMAKE_INCLUDE_PATH": str(bare / "include")}
    (bare / "include" / "spirv/unified1/spirv.hpp").unlink()
    with pytest.raises(BuildError, match="SPIR-V's headers are missing"):
        device_environment("vulkan")
    vulkan(bare / "sdk" / "include", 300)
    monkeypatch.setenv("VULKAN_SDK", str(bare / "sdk"))
    assert device_environment("vulkan") == {"CMAKE_INCLUDE_PATH": str(bare / "sdk" / "include")}


def test_each_device_has_a_build_of_its_own() -> None:
    keys = {build_key(data_file("patches"), cmake_flags(device=device)) for device in (None, *DEVICES)}
    assert len(keys) == 3
    with pytest.raises(InvalidInput, match="unknown device 'tpu': choose from cuda, vulkan"):
        cmake_flags(device="tpu")


@pytest.mark.skipif(sys.platform == "darwin", reason="there is no CUDA there")
def test_the_command_tells_it_in_one_line(bare: Path) -> None:
    compiler = program(bare / "bin", "c++")
    env = {"PATH": str(bare / "bin"), "KVCOMPOSE_CACHE": str(bare / "cache"), "CXX": str(compiler)}
    command = [sys.executable, "-m", "kvcompose_local", "build", "--vulkan"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1].startswith("error: no compiler of Vulkan shaders (glslc) found: install")
    )
    assert not any((bare / "cache").rglob("*.json"))
