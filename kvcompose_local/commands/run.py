"""``kvcompose-local run``: chat in a terminal, or answer what is asked."""

from __future__ import annotations

import importlib
import io
import json
import os
import select
import shlex
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click
from click.shell_completion import CompletionItem

from kvcompose_local.arena import CACHE_TYPES
from kvcompose_local.chat import inputs
from kvcompose_local.chat_options import SCORINGS, ChatOptions, Sampling
from kvcompose_local.commands.opening import begin_loading, fetched, open_chat
from kvcompose_local.commands.options import (
    Positions,
    Real,
    Share,
    gathered,
    gpu_layers_option,
    model_argument,
    thinking_option,
    threads_option,
)
from kvcompose_local.commands.session import Session, found_session
from kvcompose_local.errors import KVComposeError, Stopped
from kvcompose_local.interrupts import Interrupts
from kvcompose_local.terminal.status import Status
from kvcompose_local.terminal.type_ahead import hidden

if TYPE_CHECKING:
    from kvcompose_local.api import LocalChat
    from kvcompose_local.chat import Chat
    from kvcompose_local.terminal.answers import Answers
    from kvcompose_local.terminal.autosave import Autosave

#: How long -p waits for a pipe whose writer says nothing. The model is loaded meanwhile.
PIPE_SECONDS = 1.0


@dataclass(frozen=True)
class RunRequest:
    """The options of ``run`` that say what to do with the chat."""

    prompt: tuple[str, ...]
    files: tuple[Path, ...]
    pin: bool
    hide_thinking: bool
    max_tokens: int
    session: str | None
    no_autosave: bool
    as_json: bool
    goes_on: bool = False
    system_file: Path | None = None

    @property
    def is_interactive(self) -> bool:
        """Whether somebody sits at the terminal."""
        return not self.prompt and sys.stdin.isatty()

    def check(self) -> None:
        """Raises UsageError for options that do not go together."""
        if not all(question.strip() for question in self.prompt):
            raise click.BadParameter("there is no question in it", param_hint="-p")
        if not self.prompt and sys.stdin is None:
            raise click.UsageError("standard input is closed: ask with -p")
        if self.pin and not self.files:
            raise click.UsageError("--pin goes with -f: it keeps the texts read first")
        if not self.prompt and Path("-") in self.files:
            raise click.UsageError("-f - reads standard input: ask with -p")
        if self.goes_on and self.session is not None:
            raise click.UsageError("--continue goes on from the last chat, and --session names another")
        if self.as_json and self.is_interactive:
            raise click.UsageError("--json goes with -p or with piped input")


def complete_session(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Names of sessions, and files, for the shell."""
    from kvcompose_local.chat import sessions

    known = [CompletionItem(name) for name in sessions.names() if name.startswith(begun)]
    return [*known, CompletionItem(begun, type="file")]


@click.command("run", short_help="Chat with a model, or answer with -p or piped input.")
@model_argument
@click.option(
    "--budget", type=Share(), default=0.5, show_default=True, help="Share of the full cache's bytes to use, in (0, 1]."
)
@click.option(
    "--ctx", "n_ctx", type=Positions(), help="Positions the chat may span.  [default: 8192, or what the model knows]"
)
@click.option("-p", "--prompt", multiple=True, help="Ask this, print the answer and leave; may be given again.")
@click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Read this text first; - is standard input.",
)
@click.option("--pin", is_flag=True, help="Keep every token of the -f texts when the cache is compressed.")
@click.option("--system", help="System prompt.  [default: what models.txt or the model's template says]")
@click.option("--system-file", type=click.Path(path_type=Path), help="File that holds the system prompt.")
@click.option(
    "--template",
    metavar="NAME|FILE",
    help="Chat template in place of the model's own: a Jinja file, a name that llama.cpp or the GGUF knows, or plain.",
)
@thinking_option
@click.option("--hide-thinking", is_flag=True, help="Print answers without the model's thinking.")
@click.option("--max-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Longest answer.")
@click.option(
    "--temp", "temperature", type=Real(0, 10), default=0.7, show_default=True, help="Temperature; 0 is greedy."
)
@click.option(
    "--top-k",
    type=click.IntRange(0),
    default=40,
    show_default=True,
    help="Draw from the k likeliest; 0: all.",
)
@click.option("--top-p", type=Real(0, 1), default=0.95, show_default=True, help="Nucleus sampling.")
@click.option("--min-p", type=Real(0, 1), default=0.05, show_default=True, help="Share of the best token.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Repeat a random answer.")
@threads_option
@gpu_layers_option
@click.option(
    "--cache-type",
    type=click.Choice(CACHE_TYPES),
    help="How K and V are stored. Keys in q8_0 and values in q4_0 fit two and a half times as many tokens into the "
    "budget; keys of fewer bits hurt small models.  [default: q8_0/q4_0 below --budget 1, q8_0 on a GPU or with --rpc; "
    "f16 at budget 1 and on the stock engine]",
)
@click.option(
    "--scoring",
    type=click.Choice(SCORINGS),
    default=SCORINGS[0],
    show_default=True,
    help="What compression goes by: what stands in the cells, as the model's profile or a replay of the first text "
    "taught it, or a replay of all text, as KVCompose was published, which takes as long as reading it.",
)
@click.option(
    "--rpc",
    "workers",
    metavar="HOST:PORT[,…]",
    callback=lambda _context, _option, value: () if value is None else tuple(value.split(",")),
    help="Spread layers and their cells over these workers (rpc-server).",
)
@click.option(
    "--session",
    metavar="NAME|FILE",
    shell_complete=complete_session,
    help="Go on from this session, and save the chat to it at the end. What has a dot or a slash is a path.",
)
@click.option("--continue", "goes_on", is_flag=True, help="Go on from the last chat: --session last.")
@click.option("--no-autosave", is_flag=True, help="Leave without saving.")
@click.option("--json", "as_json", is_flag=True, help="With -p or piped input: one JSON object on stdout.")
@click.pass_context
@gathered(sampling=Sampling, options=ChatOptions, request=RunRequest)
def run_command(context: click.Context, model: str | None, options: ChatOptions, request: RunRequest) -> None:
    """Chat with MODEL: a GGUF file, or a name of `kvcompose-local models list`.

    With -p, or with text piped in, each line is answered in turn and the program ends. Everything but the answers goes
    to stderr. In the REPL /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.

    A session brings its own MODEL, --budget, --ctx and --cache-type, where they are not given. Without --session the
    REPL saves the chat as the session "last", and the chat before it under the day of that.
    """
    options.check()
    request.check()
    request = replace(request, session="last") if request.goes_on else request
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # nothing here uses them, and they spin while a model loads
    is_alone = request.session is None and not options.workers
    load = begin_loading(context, model, options) if is_alone else None
    if load is not None:  # what is needed later is imported while the model is loaded
        for name in ("kvcompose_local.chat.template", "kvcompose_local.api"):
            importlib.import_module(name)
    interrupts = Interrupts()
    status = Status(sys.stderr, should_stop=interrupts)
    options = replace(options, system=read_system(request, options, status))
    documents = read_documents(request, status)
    # One that is never written must be there.
    session = found_session(request.session, status, must_exist=request.no_autosave or request.goes_on)
    model, options = session.over(context, model, options)
    autosaves = can_autosave(request, session, status)
    path = fetched(model, status)
    session.check_model(path, options, interrupts, status)
    with open_chat(path, options, interrupts=interrupts, status=status, load=load) as local:
        autosave = autosaving(local, request, session, autosaves, interrupts, status)
        if session.manifest is not None:
            resume(local, options, autosave, status, is_interactive=request.is_interactive)
        n_before = local.chat.n_answers
        with interrupts.leaving_in_order():
            with interrupts.caught(), hidden() if request.is_interactive else nullcontext():
                feed(local, documents, request, autosave, interrupts, status)
            if request.is_interactive:
                talk(local, request, autosave, interrupts, status)
            else:
                answer_lines(local, request, autosave, interrupts, status, is_fed=bool(documents))
        if interrupts.leaving:
            context.exit(128 + interrupts.leaving)
        if request.as_json:
            print_result(local.chat, since=n_before, hides_thinking=request.hide_thinking)


def read_system(request: RunRequest, options: ChatOptions, status: Status) -> str | None:
    """The system prompt that the options give, None for the model's own. Raises InvalidInput."""
    if request.system_file is None:
        if options.system and inputs.is_file(options.system.removeprefix("@")):
            name = shlex.quote(options.system.removeprefix("@"))
            status.line(f"--system takes the text itself: --system-file {name} reads the file")
        return options.system
    if options.system is not None:
        raise click.UsageError("--system and --system-file are two system prompts: give one")
    return inputs.read(request.system_file).strip()


def read_documents(request: RunRequest, status: Status) -> list[tuple[str, str]]:
    """(name, text) of the texts to read first, before a model is opened: files, and what is piped in beside -p.

    Raises InvalidInput.
    """
    documents, empty = inputs.read_all(request.files)
    for name in empty:
        status.line(f"{name} holds no text: it is left out")
    if request.prompt and Path("-") not in request.files and is_fed(sys.stdin):
        text = inputs.read(inputs.STDIN)
        if text.strip():
            status.line("what is piped in is read as a text, as by -f -")
            documents.append(("standard input", text))
    return documents


def can_autosave(request: RunRequest, session: Session, status: Status) -> bool:
    """Whether the chat is to be saved at its end, and can be. Raises SessionError where a named session cannot be."""
    from kvcompose_local.chat import sessions

    if request.no_autosave:
        return False
    if session.path is not None:
        sessions.check_writable(session.path)
    elif request.is_interactive:
        try:
            sessions.check_writable(sessions.path_of(sessions.LAST))
        except KVComposeError as error:
            status.line(f"this chat will not be saved: {error}")
            return False
    return True


def autosaving(
    local: LocalChat, request: RunRequest, session: Session, autosaves: bool, interrupts: Interrupts, status: Status
) -> Autosave:
    """Save and load this chat by what is returned. Raises KVComposeError where a wanted session cannot be saved."""
    from kvcompose_local.terminal.autosave import Autosave

    why = local.memory.engine.cannot_snapshot
    if session.name is not None and autosaves and why:
        raise KVComposeError(f"{why}, which cannot be saved: leave --session out")
    if session.name is not None and session.manifest is None and autosaves:
        status.line(f"a new session: {session.name}")
    return Autosave(
        local.chat,
        local.setup,
        session=session.name,
        version=session.version,
        is_on=autosaves and (request.is_interactive or session.name is not None),
        status=status,
        interrupts=interrupts,
    )


def resume(local: LocalChat, options: ChatOptions, autosave: Autosave, status: Status, *, is_interactive: bool) -> None:
    """Go on from the session. Raises SessionError, and KVComposeError where it has another system prompt."""
    from kvcompose_local.terminal.figures import last_exchange

    loaded = autosave.resume()
    local.use_template(options.template)  # over the session's own
    if options.system is not None and (options.system or None) != (local.chat.system or None):
        raise KVComposeError(
            "the session has a system prompt of its own: leave --system out, give a --session that is new, or set "
            "another in the chat with /system"
        )
    status.line(loaded)
    if is_interactive and (said := last_exchange(local.chat)):
        status.line(said)


def feed(
    local: LocalChat,
    documents: Sequence[tuple[str, str]],
    request: RunRequest,
    autosave: Autosave,
    interrupts: Interrupts,
    status: Status,
) -> None:
    """Let the chat read the documents. Raises PositionsFull, before the first is read, where they do not all fit."""
    from kvcompose_local.terminal.answers import check_room

    check_room(local.chat, documents)
    for i, (name, text) in enumerate(documents):
        if interrupts.leaving:
            return
        stats = local.chat.read(text, pin=request.pin and local.memory.compose)
        if not stats.stopped or interrupts.leaving:  # then the chat is saved as it is
            continue
        if not request.is_interactive:
            autosave.at_the_end()
            raise Stopped(f"stopped while reading {name}")
        status.line(inputs.told_stopped(name, local.chat.unread_tokens, are_more=i + 1 < len(documents)))
        return


def talk(local: LocalChat, request: RunRequest, autosave: Autosave, interrupts: Interrupts, status: Status) -> None:
    """The REPL, until the user or a signal ends it; the chat is saved then."""
    from kvcompose_local.chat import sessions
    from kvcompose_local.terminal.answers import Answers
    from kvcompose_local.terminal.chat_commands import COMMANDS, ChatCommands
    from kvcompose_local.terminal.figures import describe
    from kvcompose_local.terminal.prompt import LineEditor
    from kvcompose_local.terminal.repl import Repl

    greet(local, status)
    edit = LineEditor([*COMMANDS], sessions.names)
    interrupts.end_waiting = edit.interrupt
    answers = Answers(
        local.chat,
        out=sys.stdout,
        status=status,
        max_tokens=request.max_tokens,
        hides_thinking=request.hide_thinking,
        takes_commands=True,
    )
    commands = ChatCommands(
        answers,
        interrupts,
        describe=lambda: describe(local.chat),
        save=autosave.save,
        load=autosave.load,
        edit=edit,
        at_temperature=local.at_temperature,
    )

    def read_line(prompt: str) -> str | None:
        autosave.keep()
        if interrupts.leaving:
            raise KeyboardInterrupt
        return edit("", prompt)

    try:
        Repl(commands, read_line).run()
    finally:  # a terminal that is gone ends it by an error
        autosave.at_the_end()


def greet(local: LocalChat, status: Status) -> None:
    """Say which model runs, and how chats get better."""
    import psutil

    from kvcompose_local.chat.scoring import Learned
    from kvcompose_local.install import models
    from kvcompose_local.terminal.figures import greeting

    free_bytes = psutil.virtual_memory().available
    status.line(greeting(local.chat, models.hint_beyond_toy(local.setup.model, free_bytes)))
    if local.memory.compose and isinstance(local.memory.scoring, Learned):
        status.line(
            "No profile of this model is here: its first text teaches what to keep, and chats keep more after "
            f"`kvcompose-local profile {shlex.quote(str(local.setup.model))}`, once, which takes minutes."
        )
    if not sys.stdout.isatty():
        status.line("Answers go to standard output, which is no terminal.")


def answer_lines(
    local: LocalChat,
    request: RunRequest,
    autosave: Autosave,
    interrupts: Interrupts,
    status: Status,
    *,
    is_fed: bool,
) -> None:
    """Answer -p, or each line of standard input. Raises KVComposeError at the first that fails; the chat is saved.

    is_fed: whether a text was read before.
    """
    from kvcompose_local.terminal.answers import Answers

    answers = Answers(
        local.chat,
        out=io.StringIO() if request.as_json else sys.stdout,
        status=status,
        max_tokens=request.max_tokens,
        hides_thinking=request.hide_thinking,
    )
    lines = iter(request.prompt) if request.prompt else inputs.lines()
    n_answered = n_taken = 0
    n_before = local.chat.n_answers
    try:
        while (line := awaited(lines, interrupts)) is not None:
            n_taken += 1
            if line.strip():
                if n_answered == 1 and not request.prompt:
                    status.line("each line is a question of its own; -f - reads what is piped in as one text")
                answer(line, answers, interrupts)
                n_answered += 1
                autosave.keep()
        if not n_answered and not is_fed:
            status.line("nothing is asked: standard input is empty, and there is no -p")
    except KVComposeError:
        if not interrupts.leaving:
            if (n_left := len(request.prompt) - n_taken) > 0:
                status.line(f"-p: the {n_left} after this one are not asked")
            if request.as_json and local.chat.n_answers > n_before:
                print_result(local.chat, since=n_before, hides_thinking=request.hide_thinking)
            raise
    finally:  # one line that fails does not take the others with it
        autosave.at_the_end()


def answer(line: str, answers: Answers, interrupts: Interrupts) -> None:
    """Answer one line. Raises KVComposeError where it is stopped."""
    with interrupts.caught():
        stats = answers.answer(line)
    if stats.stopped == "interrupt":
        raise Stopped("stopped")
    answers.explain_end(stats)


def print_result(chat: Chat, *, since: int, hides_thinking: bool) -> None:
    """Print the JSON object of ``--json``; since: the answers that the session held before."""
    from kvcompose_local.terminal.figures import result

    click.echo(json.dumps(result(chat, since=since, hides_thinking=hides_thinking), ensure_ascii=False))


def is_fed(stream: TextIO) -> bool:
    """Whether standard input holds something, which a program before the pipe may take a moment to write.

    Many programs start others with a pipe that stays empty and open.
    """
    try:
        handle = stream.fileno()
        mode = os.fstat(handle).st_mode
        if stat.S_ISREG(mode):  # a shell's `read` may have taken some, or all
            return os.lseek(handle, 0, os.SEEK_CUR) < os.fstat(handle).st_size
        is_pipe = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
        return is_pipe and bool(select.select([handle], [], [], PIPE_SECONDS)[0])
    except (OSError, ValueError, AttributeError):  # ValueError: it is closed
        return False


def awaited(lines: Iterator[str], interrupts: Interrupts) -> str | None:
    """The next line, None at the end. Raises KVComposeError where the program is told to end meanwhile."""
    try:
        with interrupts.waiting():
            return next(lines, None)
    except KeyboardInterrupt as error:
        raise Stopped("stopped") from error
