"""The instruction sets that ``-march=native`` would use on this processor, by what Linux tells of it."""

from __future__ import annotations

import re
from pathlib import Path

#: Instruction sets, by the names of /proc/cpuinfo, whose instructions a compiler writes unasked or llama.cpp asks for.
#: Everything else there (mitigations, features of hypervisor and kernel, names of caches) changes with the kernel's
#: version, and compiled code does not.
_X86 = r"mmx|3dnow|sse|ssse3|pni|avx|amx|apx|fma|xop|tbm|bmi|abm|popcnt|movbe|f16c|gfni|v?aes|v?pclmulqdq|sha|sm[34]"
_ARM = (
    r"fp|vfp|asimd|neon|half|thumb|edsp|idiv|atomics|lse|i?lrcpc|fcma|jscvt|i8mm|e?bf16|sve|sme|f8|crc32|aes|pmull|sha"
    r"|sm[34]|flagm|cssc"
)
_COMPILED = {"x86": re.compile(_X86), "arm": re.compile(_ARM)}


def instruction_sets(machine: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Names of the instruction sets that a native build may use, sorted; none where nothing is known.

    machine: ``platform.machine()``. On processors other than x86 and ARM everything counts that the kernel lists.
    """
    machine = machine.lower()
    is_x86 = re.fullmatch(r"x86_64|amd64|i[3-6]86", machine)
    is_arm = machine.startswith(("aarch64", "arm"))
    compiled = _COMPILED["x86"] if is_x86 else _COMPILED["arm"] if is_arm else re.compile("")
    try:
        with cpuinfo.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.lower().startswith(("flags", "features", "isa")):
                    names = set(line.partition(":")[2].split())
                    return sorted(name for name in names if compiled.match(name))
    except OSError:
        pass
    return []
