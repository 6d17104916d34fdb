"""What of /proc/cpuinfo is compiled for, held against the compiler's own view."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvcompose_local.install.cpu import instruction_sets
from kvcompose_local.install.pin import build_key, cpu_features
from kvcompose_local.install.resources import data_file

ZEN = "fpu vme sse sse2 ht syscall nx ssse3 fma cx16 sse4_1 avx f16c hypervisor avx2 bmi1 avx512f avx512_bf16 gfni"
NEOVERSE = "fp asimd evtstrm aes pmull crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp sve ssbs i8mm bf16"


def cpuinfo(folder: Path, flags: str, name: str = "flags\t\t") -> Path:
    path = folder / "cpuinfo"
    path.write_text(f"processor\t: 0\nmodel name\t: some\n{name}: {flags}\nbugs\t\t: spectre_v1\n\nprocessor\t: 1\n")
    return path


@pytest.mark.parametrize(
    ("machine", "name", "flags", "others"),
    [
        (
            "x86_64",
            "flags\t\t",
            ZEN,
            "kaiser pti ibrs ibrs_enhanced stibp ssbd flush_l1d md_clear user_shstk ibt umip pku "
            "ospke sme sev smx srso split_lock_detect amd_lbr_v2 arch_capabilities tsc_known_freq xtopology fsrm la57",
        ),
        ("aarch64", "Features\t", NEOVERSE, "dit ssbs2 paca pacg bti mte mte3 rng ecv afp evtstrm2 uscat wfxt dcpodp"),
        ("armv7l", "Features\t", "half thumb fastmult vfp edsp neon vfpv4 idiva", "evtstrm lpae"),
    ],
)
def test_what_a_kernel_lists_beside_changes_nothing(
    tmp_path: Path, machine: str, name: str, flags: str, others: str
) -> None:
    plain = instruction_sets(machine, cpuinfo(tmp_path, flags, name))
    assert plain
    for other in others.split():
        assert instruction_sets(machine, cpuinfo(tmp_path, f"{other} {flags}", name)) == plain, other
    assert instruction_sets(machine, cpuinfo(tmp_path, " ".join(reversed(flags.split())), name)) == plain


@pytest.mark.parametrize(
    ("machine", "name", "flags", "more"),
    [
        ("x86_64", "flags\t\t", ZEN, "avx_vnni avx512_fp16 amx_int8 avx10_1 vaes apx_f fma4 popcnt movbe abm bmi2 pni"),
        ("aarch64", "Features\t", NEOVERSE, "sve2 sme sme2 sha3 asimdfhm fcma jscvt svei8mm flagm cssc"),
        ("riscv64", "isa\t\t", "rv64imafdc", "rv64imafdcv"),
    ],
)
def test_each_instruction_set_more_is_another_build(
    tmp_path: Path, machine: str, name: str, flags: str, more: str
) -> None:
    plain = instruction_sets(machine, cpuinfo(tmp_path, flags, name))
    for other in more.split():
        assert instruction_sets(machine, cpuinfo(tmp_path, f"{flags} {other}", name)) != plain, other


def test_nothing_is_known_without_cpuinfo(tmp_path: Path) -> None:
    assert instruction_sets("x86_64", tmp_path / "none") == []
    assert instruction_sets("x86_64", cpuinfo(tmp_path, "", "no line")) == []


def test_all_that_the_compiler_makes_of_this_processor_is_in_the_key() -> None:
    """Of what ``-march=native`` defines, all that llama.cpp's source asks for has a name here."""
    compiler = shutil.which("cc")
    if compiler is None or platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        pytest.skip("needs a compiler and x86")
    command = [compiler, "-march=native", "-dM", "-E", "-x", "c", "/dev/null"]
    macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    asked = "AVX AVX2 AVXVNNI AVX512F AVX512BW AVX512VBMI AVX512VNNI AVX512BF16 BMI2 F16C FMA GFNI SSE3 SSSE3 SSE4_1"
    # /proc/cpuinfo spells some of them otherwise.
    names = {name.replace("_", "") for name in instruction_sets("x86_64")} | {"sse3" * ("pni" in cpu_features())}
    for macro in asked.split():
        if re.search(rf"#define __{macro}__ ", macros):
            assert macro.lower().replace("_", "") in names, macro


def test_the_key_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_args, **_options: pytest.fail("a process was started"))
    if platform.system() == "Darwin":
        pytest.skip("macOS tells its processor through a command")
    cpu_features.cache_clear()
    assert len(build_key(data_file("patches"), [])) == 16
