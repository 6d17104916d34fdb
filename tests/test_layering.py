"""The data flow stands in the tree: a folder imports folders above it in ROOMS, and no module imports in a circle.

Nothing is too long, and tests know each other by :mod:`helpers` alone.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kvcompose_local"
#: From what knows nothing to what knows everything.
ROOMS = (
    "errors arena chat_options interfaces interrupts install composing scores budgets selection profiles chat "
    "llama_ffi engines architectures evaluation profiling bench api __init__ server terminal commands __main__"
).split()
#: Beyond these, a module or a function is two things.
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 500, 80
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported_by(path: Path) -> Iterator[str]:
    """The names of modules that a file imports anywhere, our own without the package's name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                own = name.removeprefix("kvcompose_local.")
                yield own if own in MODULES else node.module.removeprefix("kvcompose_local.")


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_to_folders_above(name: str) -> None:
    room = name.split(".")[0]
    for imported in imported_by(MODULES[name]):
        other = imported.split(".")[0]
        if other in ROOMS and imported in MODULES:
            assert ROOMS.index(other) <= ROOMS.index(room), f"{name} imports {imported}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: {i for i in imported_by(path) if i in MODULES and i != name} for name, path in MODULES.items()}
    for name in graph:
        graph[name] -= {parent for parent in graph if name.startswith(f"{parent}.")}  # a folder's own door
    TopologicalSorter(graph).prepare()


def test_one_folder_alone_touches_llama_cpp_and_ctypes() -> None:
    touching = {
        name for name, path in MODULES.items() if {i.split(".")[0] for i in imported_by(path)} & {"llama_cpp", "ctypes"}
    }
    assert {name.split(".")[0] for name in touching} == {"llama_ffi"}


def test_what_stands_above_llama_ffi_loads_without_llama_cpp() -> None:
    above = [name for name in MODULES if name.split(".")[0] in ROOMS[: ROOMS.index("llama_ffi")]]
    code = (
        "import sys\n"
        + "".join(f"import kvcompose_local.{name}\n" for name in above)
        + "loaded = {m.split('.')[0] for m in sys.modules}\nassert not loaded & {'llama_cpp'}, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_too_long(name: str) -> None:
    assert MODULES[name].read_text().count("\n") <= MOST_LINES


TESTS = sorted(Path(__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", [*MODULES.values(), *TESTS], ids=lambda path: path.stem)
def test_no_function_is_too_long(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MOST_LINES_OF_A_FUNCTION, node.name


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_no_test_imports_another(path: Path) -> None:
    assert not [name for name in imported_by(path) if name.split(".")[0].startswith("test_")]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_no_test_writes_a_private_field(path: Path) -> None:
    written = [
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr.startswith("_")
        if not (isinstance(node.value, ast.Name) and node.value.id == "self")
    ]
    assert not written
