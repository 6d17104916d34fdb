"""The data flow stands in the imports: pure modules know no llama.cpp, and nothing imports downstream."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kvcompose_local"
#: Upstream first: a module may import those before it.
ORDER = (
    "errors",
    "options",
    "interfaces",
    "interrupts",
    "resources",
    "terminal",
    "terminal.inputs",
    "install.files",
    "install.gguf_header",
    "install.file_kinds",
    "install.model_files",
    "install",
    "attention",
    "scores",
    "budgets",
    "selection",
    "composing.rotation",
    "composing.scorer",
    "composing.fitting",
    "composing.choice",
    "composing",
    "cell_scores",
    "profiles",
    "cells",
    "scoring",
    "compaction",
    "chat.reasoning",
    "chat.template",
    "chat.transcript",
    "chat.turns",
    "chat",
    "download",
    "models",
    "install.cpu",
    "pin",
    "install.threads",
    "install.library",
    "build",
    "llama_ffi.library",
    "llama_ffi.header",
    "llama_ffi.text_parts",
    "llama_ffi.model",
    "llama_ffi.context",
    "llama_ffi.cells",
    "llama_ffi.rpc",
    "llama_ffi",
    "engines.base",
    "engines.stock",
    "engines.patched",
    "engines",
    "sections",
    "sessions",
    "figures",
    "inspection",
    "evaluation.kinds",
    "evaluation.tasks",
    "evaluation.statistics",
    "evaluation.observing",
    "evaluation.profiling",
    "evaluation.methods",
    "evaluation.methods.baselines",
    "evaluation.methods.kvcompose",
    "evaluation.quantized",
    "evaluation.harness",
    "evaluation.report",
    "evaluation",
    "bench.measure",
    "bench",
    "api",
    "doctor",
    "memory_chart",
    "terminal.shown",
    "repl",
    "autosave",
    "prompt",
    "bench.command",
    "evaluation.command",
    "chat_commands",
    "cli",
    "__main__",
)
PURE = (
    "errors",
    "interfaces",
    "attention",
    "scores",
    "budgets",
    "selection",
    "composing.rotation",
    "composing.scorer",
    "composing.fitting",
    "composing.choice",
    "composing",
    "cell_scores",
    "profiles",
    "cells",
    "scoring",
    "compaction",
    "chat.reasoning",
    "chat.template",
    "chat.transcript",
    "chat.turns",
    "chat",
    "repl",
    "sessions",
)


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        name = name.removesuffix(".__init__")
        if name != "__init__":
            found.append((name, path))
    return found


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: str(value) if isinstance(value, str) else "")
def test_imports_point_upstream(name: str, path: Path) -> None:
    assert name in ORDER, f"{name} has no place in the data flow yet"
    upstream = ORDER[: ORDER.index(name)]
    for imported in imports_of(path):
        if imported.startswith("kvcompose_local."):
            module = imported.removeprefix("kvcompose_local.")
            known = [m for m in ORDER if module == m or module.startswith(f"{m}.")]
            if known:
                assert max(known, key=len) in upstream, f"{name} imports {module}, which is downstream"


def test_one_module_alone_touches_llama_cpp_and_ctypes() -> None:
    touching = {
        name for name, path in modules() if {i.split(".")[0] for i in imports_of(path)} & {"llama_cpp", "ctypes"}
    }
    assert {name.split(".")[0] for name in touching} == {"llama_ffi"}


def test_pure_modules_load_without_llama_cpp() -> None:
    code = (
        "import sys\n"
        + "".join(f"import kvcompose_local.{name}\n" for name in PURE)
        + "loaded = {m.split('.')[0] for m in sys.modules}\nassert not loaded & {'llama_cpp'}, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
