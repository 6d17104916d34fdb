"""What Linux' loader does not tell of a library: that it is cut off, at which it dies, and for which processor it is.

The format is ELF's (elf(5)): its header and the table of the segments that are mapped.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from typing import NamedTuple

_MAGIC, _LOADED = b"\x7fELF", 1
#: By class (32 or 64 bits): where the header tells the table's place, size of an entry and number of them; the formats
#: of the place and of an entry's kind, offset and size in the file.
_LAYOUTS = {1: (28, "I", 42, "IIxxxxxxxxI"), 2: (32, "Q", 54, "IxxxxQxxxxxxxxxxxxxxxxQ")}
#: Names of processors by ELF's numbers.
_PROCESSORS = {3: "x86", 21: "POWER", 22: "IBM Z", 40: "32-bit ARM", 62: "x86-64", 183: "AArch64", 243: "RISC-V"}
_PROCESSORS[258] = "LoongArch"


class _Elf(NamedTuple):
    bits: int  # ELF's class: 1 or 2
    machine: int
    n_bytes: int  # up to which the file is loaded


def fault_of(library: Path) -> str | None:
    """What is wrong with a library, as the end of a sentence that begins with its name; None for a file of no ELF."""
    found, own = _read(library), _read(Path(sys.executable))
    if found is None:
        return None
    if own is not None and (own.bits, own.machine) != (found.bits, found.machine):
        return f"is for {_processor(found)}, and this Python is for {_processor(own)}"
    if (size := library.stat().st_size) < found.n_bytes:
        return f"is cut off after {size} of at least {found.n_bytes} bytes"
    return None


def _processor(elf: _Elf) -> str:
    return _PROCESSORS.get(elf.machine, f"another processor (ELF machine {elf.machine})")


def _read(path: Path) -> _Elf | None:
    try:
        with path.open("rb") as file:
            head = file.read(64)
            if not head.startswith(_MAGIC) or len(head) < 64 or head[4] not in _LAYOUTS:
                return None
            order = ">" if head[5] == 2 else "<"
            at_place, word, at_sizes, entry = _LAYOUTS[head[4]]
            (machine,) = struct.unpack_from(f"{order}H", head, 18)
            (place,) = struct.unpack_from(f"{order}{word}", head, at_place)
            entry_bytes, n_entries = struct.unpack_from(f"{order}HH", head, at_sizes)
            table = os.pread(file.fileno(), entry_bytes * n_entries, place)
    except (OSError, OverflowError):
        return None
    form = struct.Struct(order + entry)
    if len(table) < entry_bytes * n_entries or entry_bytes < form.size:
        return _Elf(head[4], machine, place + entry_bytes * n_entries)
    entries = (form.unpack_from(table, i * entry_bytes) for i in range(n_entries))
    return _Elf(head[4], machine, max((offset + size for kind, offset, size in entries if kind == _LOADED), default=0))
