"""What the documentation names is there: commands, options, files, links, messages; and the README stays short."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from kvcompose_local.commands.cli import cli
from kvcompose_local.evaluation.tasks import TASKS
from kvcompose_local.terminal.chat_commands import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "patches/README.md"]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
#: What an ellipsis or a word in capitals stands for in an example.
_ENDS = re.compile(r"\s[|>]\s|\s#|\)$|;|&&")


def code_of(page: Path) -> Iterator[str]:
    """All code of a page: lines of blocks, joined where a backslash ends them, and what stands between backticks."""
    text = page.read_text(encoding="utf-8")
    block = re.compile(r"^```.*?^```|(?:^    \S.*\n)+", re.MULTILINE | re.DOTALL)
    for found in block.findall(text):
        yield from (" ".join(line.split()) for line in found.replace("\\\n", " ").splitlines())
    for found in re.findall(r"`([^`]+)`", block.sub("", text)):
        yield " ".join(found.split())


def calls(line: str, program: str) -> Iterator[list[str]]:
    """The arguments of each call of a program in a line of code."""
    for match in re.finditer(
        rf"(?<![\w./=_-])(?<!import )(?<!inject )(?:\.venv/bin/)?{re.escape(program)}(?=\s|$)", line
    ):
        words = _ENDS.split(line[match.end() :])[0].split()
        yield [word.strip("\"'") for word in words]


def options_of(command: click.Command) -> dict[str, click.Option]:
    """By name; --help is everybody's."""
    known = {o: p for p in command.params if isinstance(p, click.Option) for o in (*p.opts, *p.secondary_opts)}
    return known | {name: click.Option(["--help"], is_flag=True) for name in ("--help", "-h")}


def wrong_in(arguments: list[str]) -> str:
    """What is wrong with the arguments of kvcompose-local, empty where all are known."""
    command: click.Command = cli
    words = iter(arguments)
    for word in words:
        if word.startswith("-") and word != "-" and word[1:2] not in "0123456789":
            name = word.split("=")[0].rstrip(",")
            option = options_of(command).get(name)
            if option is None:
                return f"{command.name} has no option {name}"
            if not option.is_flag:
                value = next(words, None)
                if isinstance(option.type, click.Choice) and value not in (None, "T", *option.type.choices):
                    return f"{name} takes no {value}"
        elif isinstance(command, click.Group) and not word.startswith(("…", "COMMAND")):
            if word not in command.commands:
                return f"there is no command {word}"
            command = command.commands[word]
    return ""


def test_the_check_of_commands_finds_what_is_wrong() -> None:
    assert not wrong_in("run m.gguf --budget 0.5 -p Hello".split())
    assert "option --budgets" in wrong_in("run m.gguf --budgets 0.5".split())
    assert "command runs" in wrong_in(["runs"])
    assert "takes no q3" in wrong_in("run --cache-type q3".split())
    line = 'cat q | kvcompose-local run M --json   # and "kvcompose-local doctor"'
    assert list(calls(line, "kvcompose-local")) == [["run", "M", "--json"], ["doctor"]]


@every_page
def test_commands_and_options_exist(page: Path) -> None:
    wrong = [
        f"{line}: {e}" for line in code_of(page) for words in calls(line, "kvcompose-local") if (e := wrong_in(words))
    ]
    assert not wrong


def test_there_are_commands_to_check() -> None:
    assert sum(len([*calls(line, "kvcompose-local")]) for page in PAGES for line in code_of(page)) > 60


@cache
def method_names() -> frozenset[str]:
    """As the registry has them, which needs llama.cpp to be looked at."""
    modules = (ROOT / "kvcompose_local/evaluation/methods").glob("*.py")
    named = frozenset(name for path in modules for name in re.findall(r'^@method\("([^"]+)"\)', path.read_text(), re.M))
    assert "kvcompose-local" in named
    return named


@every_page
def test_methods_and_tasks_exist(page: Path) -> None:
    """Of `eval … --methods A,B --tasks C`; a method may name a cache type, or be of the example that adds one."""
    for line in code_of(page):
        for kind, given in re.findall(r"--(methods|tasks) ([\w+,/.-]+)", line):
            known = (
                {*method_names(), "left-out", "full", "streaming", "all", "every-other"}
                if kind == "methods"
                else {*TASKS, "help"}
            )
            assert {name.split("+q")[0] for name in given.split(",")} <= known, line


@every_page
def test_scripts_exist_and_know_their_options(page: Path) -> None:
    for line in code_of(page):
        for name in re.findall(r"(?<![\w/-])scripts/([\w-]+)", line):
            script = ROOT / "scripts" / name
            assert script.is_file(), line
            for words in calls(line, f"scripts/{name}"):
                options = [word for word in words if word.startswith("--")]
                source = script.read_text(encoding="utf-8")
                passed_on = "kvcompose-local" if name == "chat" else ""
                unknown = [
                    o for o in options if o not in source and not (passed_on and o in options_of(cli.commands["run"]))
                ]
                assert not unknown, line


@cache
def tracked() -> frozenset[str]:
    """The files of the repository, and their names without folders."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    files = done.stdout.splitlines() if done.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    files = [name for name in files if (ROOT / name).exists()]
    return frozenset(files) | {Path(name).name for name in files}


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w./{<-])((?:kvcompose_local|docs|scripts|tests|patches)/[\w./*-]*[\w/])", text))
    named |= set(re.findall(r"(?<![\w./-])((?:[\w-]+/)*[\w-]+\.(?:py|md|toml|jsonl|png|svg|patch))(?![\w-])", text))
    named |= set(re.findall(r"`(\d{4}-[\w.-]+)`", text))
    named -= {
        "docs/runs/NAME",
        "docs/runs/NAME.jsonl",
        "NAME.jsonl",
        "speed.png",
        "llama_cpp.py",
        "docs/trials.md",
        "NNNN-what-it-does.patch",
    }
    missing = []
    for name in named:
        places = [ROOT, page.parent, ROOT / "kvcompose_local", ROOT / "docs"]
        patches = list((ROOT / "patches").glob(f"{name}*")) if re.match(r"\d{4}-", name) else []
        if not (name in tracked() or patches or any((place / name).exists() for place in places)):
            missing.append(name)
    assert not missing


def test_sources_name_pages_that_exist() -> None:
    sources = [path for folder in ("kvcompose_local", "scripts", "tests") for path in (ROOT / folder).rglob("*")]
    named = {
        name
        for path in sources
        if path.name != Path(__file__).name
        and (path.suffix == ".py" or (path.parent.name == "scripts" and path.is_file()))
        for name in re.findall(r"(?<![\w/])docs/[\w/-]+\.\w+", path.read_text(encoding="utf-8"))
    }
    named -= {"docs/long.md", "docs/gguf.md"}  # a test's own, ggml's
    assert not [name for name in named if not (ROOT / name).exists()]


def anchors(page: Path) -> set[str]:
    """The fragments by which headings are reached."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("https://arxiv.org/", "http://127.0.0.1")):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert ROOT.resolve() in file.resolve().parents, target
        assert not fragment or fragment in anchors(file), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 800


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [name for name in cli.commands if f"kvcompose-local {name}" not in readme]


def test_the_guide_tells_of_every_chat_command() -> None:
    guide = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`/.*?) \|", guide, re.MULTILINE)
    told = {usage for row in rows for usage in re.findall(r"`([^`]+)`", row)}
    assert told == {command.usage for command in COMMANDS.values()}


def test_the_design_tells_of_every_folder() -> None:
    design = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    folders = [path.parent.name for path in (ROOT / "kvcompose_local").glob("*/__init__.py")]
    assert not [name for name in folders if f"{name}/`" not in design]


def test_every_patch_has_its_row() -> None:
    told = (ROOT / "patches/README.md").read_text(encoding="utf-8")
    assert not [path.stem for path in (ROOT / "patches").glob("*.patch") if f"`{path.stem}`" not in told]


def test_every_page_is_linked_from_another() -> None:
    linked = set()
    for page in PAGES:
        targets = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
        linked |= {(page.parent / target).resolve() for target in targets if "//" not in target}
    assert {page.resolve() for page in PAGES} - linked == {(ROOT / "README.md").resolve()}


@every_page
def test_lines_and_machines(page: Path) -> None:
    """Lines fit an editor, but for tables; no path or host is of one machine."""
    text = page.read_text(encoding="utf-8")
    is_made = page.name == "models.md"  # by a script
    assert is_made or not [line for line in text.splitlines() if len(line) > 160 and not line.startswith("|")]
    assert not re.findall(r"/(?:home|root|Users|work|tmp)/\S+|\b(?:pypi|npmjs|debian)\.org|localhost:\d+/simple", text)


# -- messages ---------------------------------------------------------------------------------------------------------


@cache
def spoken() -> str:
    """Every string of the package, with an ellipsis for what varies, one a line."""
    return "\n".join(
        said for path in (ROOT / "kvcompose_local").rglob("*.py") for said in _strings(ast.parse(path.read_text()))
    )


def _strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield " ".join(node.value.split())
        elif isinstance(node, ast.JoinedStr):
            parts = [str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values]
            yield " ".join("".join(parts).split())


def messages() -> list[str]:
    """What the guide's tables say that the program says."""
    section = (ROOT / "docs/guide.md").read_text(encoding="utf-8").partition("## Messages, and what to do")[2]
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


@pytest.mark.parametrize("message", messages())
def test_messages_of_the_guide_are_the_programs(message: str) -> None:
    parts = [re.escape(part) for part in message.split("…") if part.strip()]
    assert parts
    assert re.search(r"[^\n]*?".join(parts), spoken()), message


def test_there_are_messages_to_look_up() -> None:
    assert len(messages()) > 40
