"""A table of the loaded llama.cpp's architectures: their memory, whether it is composed, and how a trial went.

Trials run in processes of their own: llama.cpp may abort one without ending the others.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvcompose_local.architectures.fixtures import NOT_MADE
from kvcompose_local.errors import EngineError
from kvcompose_local.interfaces import Progress
from kvcompose_local.llama_ffi.memory import architectures

#: Seconds that the trials of one process may take.
_TIME_LIMIT = 600
#: Architectures of one process, which takes half a second to start.
_AT_A_TIME = 8


#: Marks of the table's part of docs/models.md.
HEADING = "# Architectures"


@dataclass(frozen=True)
class Row:
    """An architecture: the class of its memory, empty where no model was made; why it is not composed, empty where it
    is; and what was tried.
    """

    architecture: str
    memory: str
    why: str
    tried: str

    @property
    def failed(self) -> bool:
        """Whether a trial went wrong, which is not for the architecture to explain."""
        return self.why.startswith("FAILED")


#: The command that tries the architectures that it is given, and prints its findings.
_TRIAL = (sys.executable, "-m", "kvcompose_local.architectures.trial")


def trials(names: Sequence[str], command: Sequence[str] = _TRIAL) -> Iterator[Row]:
    """Try architectures in a process, and the rest in another where llama.cpp ended it."""
    left = list(names)
    while left:
        done = subprocess.run([*command, *left], capture_output=True, text=True, timeout=_TIME_LIMIT, check=False)
        begun = ""
        for told in map(json.loads, done.stdout.splitlines()):
            begun = told.get("begun", begun)
            if "architecture" in told:
                yield Row(**told)
                left.remove(begun)
        if left:
            if left[0] != begun:
                raise EngineError(f"trials of {left[0]} end with code {done.returncode}: {done.stderr.strip()[-300:]}")
            reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            yield Row(left.pop(0), "", f"FAILED: {reason[0]}", "")


def rows(n_workers: int, progress: Progress, command: Sequence[str] = _TRIAL) -> list[Row]:
    """All architectures, in llama.cpp's order; progress gets (architectures done, in all).

    command: tries the architectures that it is given, as :mod:`kvcompose_local.architectures.trial` does. Raises
    EngineError where the library does not tell them.
    """
    names = list(architectures())
    if not names:
        raise EngineError("this llama.cpp does not tell its architectures: `kvcompose-local build` makes one that does")
    found = {name: Row(name, "", f"not made: {why}", "") for name, why in NOT_MADE.items()}
    wanted = [name for name in names if name not in found]
    progress(0, len(names))
    parts = [wanted[i : i + _AT_A_TIME] for i in range(0, len(wanted), _AT_A_TIME)]
    with ThreadPoolExecutor(n_workers) as pool:
        for part in pool.map(lambda names: list(trials(names, command)), parts):
            found |= {row.architecture: row for row in part}
            progress(sum(name in found for name in names), len(names))
    return [found[name] for name in names]


def text(found: Sequence[Row]) -> str:
    """The table for people: a line each, and the numbers of composed ones by class."""
    width = max(len(row.architecture) for row in found) + 2
    memory = max(len(row.memory) for row in found) + 2
    lines = [f"{'architecture':<{width}}{'memory':<{memory}}below budget 1"]
    lines += [f"{row.architecture:<{width}}{row.memory or '?':<{memory}}{_verdict(row)}" for row in found]
    return "\n".join([*lines, "", summary(found)])


def _verdict(row: Row) -> str:
    return f"no: {row.why}" if row.why else f"composed: {row.tried}"


def summary(found: Sequence[Row]) -> str:
    """The number of composed architectures, and the classes of the others."""
    others = Counter(row.memory or "no model made" for row in found if row.why)
    told = "; ".join(f"{memory} ({n})" for memory, n in others.most_common())
    n_composed = sum(not row.why for row in found)
    return f"{n_composed} of {len(found)} architectures are composed. Memory of the others: {told}"


def page(found: Sequence[Row]) -> str:
    """The table as a part of docs/models.md."""
    lines = [
        HEADING,
        "",
        "This table has every architecture that the pinned llama.cpp knows. A tiny random model is made of each, and",
        "llama.cpp is asked what memory the model has. Where that can be composed, a chat is tried under a budget: it",
        "reads, goes back, and goes on from a saved state. The tests (`tests/architectures`) also compare the bytes of",
        "rewritten cells with a gather, and logits under uneven budgets with a whole cache whose attention is masked.",
        "`kvcompose-local doctor --models` tries them with the library of a machine; `scripts/shapes architectures`",
        "makes this part of the page.",
        "",
        f"{summary(found)}.",
        "",
        "| architecture | memory | below budget 1 | tried |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row.architecture} | {row.memory or '?'} | {f'no: {row.why}' if row.why else 'composed'} | {row.tried} |"
        for row in found
    ]
    return "\n".join(lines) + "\n"
