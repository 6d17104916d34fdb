"""``kvcompose-local run`` and ``compress``: what a chat is opened with, and what it is fed."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shlex
import stat
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from kvcompose_local.arena import CACHE_TYPES
from kvcompose_local.chat import inputs
from kvcompose_local.commands.options import Real, threads_option
from kvcompose_local.errors import InvalidInput, KVComposeError
from kvcompose_local.install.resources import state_folder
from kvcompose_local.terminal.figures import MIB, describe, greeting, result

if TYPE_CHECKING:
    from kvcompose_local.api import LocalChat
    from kvcompose_local.chat import Chat
    from kvcompose_local.interfaces import Sampling
    from kvcompose_local.interrupts import Interrupts
    from kvcompose_local.llama_ffi.loading import Loading
    from kvcompose_local.terminal.repl import Status


def complete_session(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Names of sessions, and files, for the shell."""
    from kvcompose_local.chat import sessions

    known = [CompletionItem(name) for name in sessions.names() if name.startswith(begun)]
    return [*known, CompletionItem(begun, type="file")]


@click.command("run", short_help="Chat with a model, or answer with -p or piped input.")
@click.argument("model", required=False)
@click.option(
    "--budget", type=float, default=0.5, show_default=True, help="Share of the full cache's bytes to use, in (0, 1]."
)
@click.option("--ctx", "n_ctx", type=int, help="Positions the chat may span.  [default: 8192, or what the model knows]")
@click.option("-p", "--prompt", help="Ask this, print the answer and leave.")
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
@click.option(
    "--template",
    metavar="NAME|FILE",
    help="Chat template in place of the model's own: a Jinja file, a name that llama.cpp or the GGUF knows, or plain.",
)
@click.option("--hide-thinking", is_flag=True, help="Print answers without the model's thinking.")
@click.option("--max-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Longest answer.")
@click.option("--temp", type=Real(0, 10), default=0.7, show_default=True, help="Temperature; 0 is greedy.")
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
@click.option("--gpu-layers", type=click.IntRange(0), help="Layers on the GPU.  [default: all with Metal, else 0]")
@click.option(
    "--cache-type",
    type=click.Choice(CACHE_TYPES),
    help="How K and V are stored. Keys in q8_0 and values in q4_0 fit two and a half times as many tokens into the "
    "budget; keys of fewer bits hurt small models.  [default: q8_0/q4_0 below --budget 1, q8_0 on a GPU or with --rpc; "
    "f16 at budget 1 and on the stock engine]",
)
@click.option(
    "--scoring",
    type=click.Choice(["cells", "replay"]),
    default="cells",
    show_default=True,
    help="What compression goes by: what stands in the cells, as the model's profile or a replay of the first text "
    "taught it, or a replay of all text, as KVCompose was published, which takes as long as reading it.",
)
@click.option("--rpc", metavar="HOST:PORT[,…]", help="Spread layers and their cells over these workers (rpc-server).")
@click.option(
    "--session",
    metavar="NAME|FILE",
    shell_complete=complete_session,
    help="Go on from this session, and save the chat to it at the end. What has a dot or a slash is a path.",
)
@click.option("--no-autosave", is_flag=True, help="Leave without saving.")
@click.option("--json", "as_json", is_flag=True, help="With -p or piped input: one JSON object on stdout.")
@click.pass_context
def run_command(
    context: click.Context,
    model: str | None,
    budget: float,
    n_ctx: int | None,
    prompt: str | None,
    files: tuple[Path, ...],
    pin: bool,
    system: str | None,
    template: str | None,
    hide_thinking: bool,
    max_tokens: int,
    temp: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int | None,
    threads: int | None,
    gpu_layers: int | None,
    cache_type: str | None,
    scoring: str,
    rpc: str | None,
    session: str | None,
    no_autosave: bool,
    as_json: bool,
) -> None:
    """Chat with MODEL: a GGUF file, or a name of `kvcompose-local models list`.

    With -p, or with text piped in, each line is answered in turn and the program ends. Everything but the answers goes
    to stderr. In the REPL /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.

    A session brings its own MODEL, --budget, --ctx and --cache-type, where they are not given. Without --session the
    REPL saves the chat as the session "last".
    """
    check_numbers(budget, n_ctx)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # nothing here uses them, and they spin while a model loads
    load = begin_loading(context, model, gpu_layers) if session is None and rpc is None else None
    if load is not None:  # what is needed later is imported while the model is loaded
        for name in ("kvcompose_local.chat.template", "kvcompose_local.api"):
            importlib.import_module(name)
    from kvcompose_local.chat import sessions
    from kvcompose_local.install import models
    from kvcompose_local.install.model_files import check_gguf
    from kvcompose_local.interfaces import Sampling
    from kvcompose_local.interrupts import Interrupts
    from kvcompose_local.terminal.autosave import Autosave
    from kvcompose_local.terminal.repl import COMMANDS, Repl, Status, check_room

    if prompt is not None and not prompt.strip():
        raise click.BadParameter("there is no question in it", param_hint="-p")
    if prompt is None and sys.stdin is None:
        raise click.UsageError("standard input is closed: ask with -p")
    if pin and not files:
        raise click.UsageError("--pin goes with -f: it keeps the texts read first")
    if prompt is None and Path("-") in files:
        raise click.UsageError("-f - reads standard input: ask with -p")
    interactive = prompt is None and sys.stdin.isatty()
    if as_json and interactive:
        raise click.UsageError("--json goes with -p or with piped input")
    interrupts = Interrupts()
    status = Status(sys.stderr, should_stop=interrupts)
    documents, empty = inputs.read_all(files)
    for name in empty:
        status.line(f"{name} holds no text: it is left out")
    if prompt is not None and Path("-") not in files and is_fed(sys.stdin):
        status.line("what is piped in is not read beside -p: -f - reads it as a text")
    session_path = sessions.path_of(session) if session is not None else None
    version = sessions.version_of(session_path) if session_path is not None else ()
    saved = sessions.read_manifest(session_path) if session_path is not None and session_path.exists() else None
    if saved is not None:
        chosen = {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
        budget = budget if "budget" in chosen else saved.budget
        cache_type = cache_type if "cache_type" in chosen else saved.cache_type
        n_ctx = n_ctx or saved.n_ctx
        if model is None:
            model = sessions.model_of(saved)
    if session_path is not None and not no_autosave:
        sessions.check_writable(session_path)
    elif interactive and not no_autosave:
        try:
            sessions.check_writable(sessions.path_of(sessions.LAST))
        except KVComposeError as error:
            status.line(f"this chat will not be saved: {error}")
            no_autosave = True
    model_path = models.resolve(model, pull=True, progress=status.fetching)
    check_gguf(model_path)
    if saved is not None:
        with interrupts.caught():
            sessions.check_model(
                saved, sessions.Setup(model_path, cache_type or saved.cache_type, budget), status.checking
            )
    sampling = Sampling(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temp, seed=seed)
    with open_chat(
        model_path,
        budget=budget,
        n_ctx=n_ctx,
        n_threads=threads,
        gpu_layers=gpu_layers,
        cache_type=cache_type,
        scoring=scoring,
        workers=rpc.split(",") if rpc else [],
        sampling=sampling,
        system=system,
        template=template,
        interrupts=interrupts,
        status=status,
        load=load,
    ) as local:
        chat = local.chat
        if session is not None and not no_autosave and (why := chat.memory.engine.cannot_snapshot):
            raise KVComposeError(f"{why}, which cannot be saved: leave --session out")
        if session_path is not None and saved is None and not no_autosave:
            status.line(f"a new session: {session}")
        autosave = Autosave(
            chat,
            local.setup,
            session=session,
            version=version,
            is_on=not no_autosave and (interactive or session is not None),
            status=status,
            interrupts=interrupts,
        )
        repl = Repl(
            chat,
            read_line=lambda: None,
            out=io.StringIO() if as_json else sys.stdout,
            status=status,
            interrupts=interrupts,
            max_tokens=max_tokens,
            hides_thinking=hide_thinking,
            describe=lambda: describe(chat),
            save=autosave.save,
            load=autosave.load,
            at_temperature=partial(drawn_at, chat.memory.engine, sampling),
        )
        if session is not None and saved is not None:
            loaded = autosave.resume()
            local.use_template(template)  # over the session's own
            if system is not None and (system or None) != (chat.system or None):
                raise KVComposeError("the session has a system prompt of its own: in the chat, /system sets another")
            status.line(loaded)
        with interrupts.caught():
            check_room(chat, documents)
            for name, text in documents:
                stats = chat.read(text, pin=pin and budget < 1)
                if stats.stopped and not interactive:
                    raise KVComposeError(f"stopped while reading {name}")
                if stats.stopped:
                    unread = f"the other {chat.unread_tokens} tokens of {name} are read before your next message"
                    status.line(
                        f"stopped; {unread}{', the files after it are not' if text is not documents[-1][1] else ''}"
                    )
                    break
        if interactive:
            import psutil

            from kvcompose_local.chat.scoring import Learned
            from kvcompose_local.terminal.prompt import line_reader

            free_bytes = psutil.virtual_memory().available
            status.line(greeting(chat, models.hint_beyond_toy(local.setup.model, free_bytes)))
            if chat.memory.compose and isinstance(chat.memory.scoring, Learned):
                status.line(
                    "No profile of this model is here: its first text teaches what to keep, and chats keep more after "
                    f"`kvcompose-local profile {shlex.quote(str(local.setup.model))}`, once, which takes minutes."
                )
            if not sys.stdout.isatty():
                status.line("Answers go to standard output, which is no terminal.")
            repl.edit = line_reader(COMMANDS, sessions.names)
            repl.read_line = partial(repl.edit, "")
            with interrupts.leaving_in_order():
                try:
                    repl.run()
                finally:  # a terminal that is gone ends it by an error
                    autosave.at_the_end()
            if interrupts.leaving:
                context.exit(128 + interrupts.leaving)
            return
        lines = iter([prompt]) if prompt is not None else inputs.lines()
        with interrupts.leaving_in_order():
            try:
                while (line := awaited(lines, interrupts)) is not None:
                    if line.strip():
                        with interrupts.caught():
                            stats = repl.answer(line)
                        if stats.stopped == "interrupt":
                            raise KVComposeError("stopped")
                        repl.explain_end(stats)
            except KVComposeError:
                if not interrupts.leaving:
                    if as_json and any(message["role"] == "assistant" for message in chat.messages):
                        click.echo(json.dumps(result(chat), ensure_ascii=False))
                    raise
            finally:  # one line that fails does not take the others with it
                autosave.at_the_end()
        if interrupts.leaving:
            context.exit(128 + interrupts.leaving)
        if as_json:
            click.echo(json.dumps(result(chat), ensure_ascii=False))


def check_numbers(budget: float, n_ctx: int | None) -> None:
    """Refuse impossible numbers before anything is loaded or fetched."""
    if not 0 < budget <= 1:
        raise click.BadParameter(f"{budget} is not in (0, 1]", param_hint="--budget")
    if n_ctx is not None and n_ctx <= 0:
        raise click.BadParameter(f"{n_ctx} is not a number of positions above 0", param_hint="--ctx")


def begin_loading(context: click.Context, model: str | None, gpu_layers: int | None) -> Loading | None:
    """Let a model that is there be loaded by another thread; None where what is wrong had better be told in order."""
    from kvcompose_local.install import models
    from kvcompose_local.install.model_files import check_gguf

    try:
        path = models.resolve(model, pull=False)
        check_gguf(path)
    except KVComposeError:
        return None
    from kvcompose_local.llama_ffi.library import layers_to_offload
    from kvcompose_local.llama_ffi.loading import Loading

    loading = Loading(path, gpu_layers=layers_to_offload(gpu_layers))
    context.call_on_close(loading.close)
    return loading


def is_fed(stream: Any) -> bool:
    """Whether something was piped into standard input by now; an empty pipe is what many programs start others with."""
    try:
        import fcntl  # not on Windows
        import termios

        handle = stream.fileno()
        mode = os.fstat(handle).st_mode
        is_file = stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
        return is_file and any(fcntl.ioctl(handle, termios.FIONREAD, bytes(4)))  # what is left to read
    except (ImportError, OSError, ValueError, AttributeError):
        return False


def awaited(lines: Iterator[str], interrupts: Interrupts) -> str | None:
    """The next line, None at the end. Raises KVComposeError where the program is told to end meanwhile."""
    try:
        with interrupts.waiting():
            return next(lines, None)
    except KeyboardInterrupt as error:
        raise KVComposeError("stopped") from error


@contextlib.contextmanager
def open_chat(
    path: Path,
    *,
    budget: float,
    n_ctx: int | None,
    n_threads: int | None,
    gpu_layers: int | None,
    cache_type: str | None,
    scoring: str = "cells",
    workers: list[str],
    sampling: Any,
    system: str | None,
    template: str | None = None,
    interrupts: Interrupts,
    status: Status,
    load: Loading | None = None,
) -> Iterator[LocalChat]:
    """A chat whose progress is shown, and whose conversation outlives an abort."""
    # llama.cpp is loaded only now, so that wrong usage and --help answer at once.
    from kvcompose_local.api import LocalChat
    from kvcompose_local.llama_ffi.library import found
    from kvcompose_local.llama_ffi.model import Model

    with interrupts.caught():  # an exception would be lost in native frames
        local = LocalChat(
            path,
            budget=budget,
            n_ctx=n_ctx,
            n_threads=n_threads,
            gpu_layers=gpu_layers,
            cache_type=cache_type,
            scoring=scoring,
            workers=workers,
            sampling=sampling,
            system=system,
            template=template,
            on_compaction=status.compacted,
            on_loading=lambda done, total: status.progress("loading:", done, total, "%"),
            on_reading=status.reading,
            on_compacting=lambda done, total: status.progress("compacting:", done, total),
            on_rebuild=lambda n: status.line(f"that part is compressed already: reading {n} tokens again"),
            on_note=status.line,
            should_stop=interrupts,
            load=load or Model,
        )
    with local:
        if local.memory.engine.name == "stock" and budget < 1:
            status.line(
                "stock engine: every layer keeps equally many cells, which forgets more than it must; "
                f"{found.why_stock}"
            )
        with saved_on_abort(local.chat):
            try:
                yield local
            finally:
                status.settle()


@contextlib.contextmanager
def drawn_at(engine: Any, sampling: Sampling, temperature: float) -> Iterator[None]:
    """Draw at another temperature in this block. Whatever ``--seed`` says, no random number is drawn twice."""
    engine.set_sampling(replace(sampling, temperature=temperature, seed=None))
    try:
        yield
    finally:
        engine.set_sampling(replace(sampling, seed=None))


@contextlib.contextmanager
def saved_on_abort(chat: Chat) -> Iterator[None]:
    """Write the transcript down if llama.cpp aborts meanwhile, as it does when a worker is lost."""
    from kvcompose_local.llama_ffi.library import on_abort

    def save(_reason: str) -> None:
        messages = chat.messages + ([{"role": "assistant", "content": chat.answering}] if chat.answering else [])
        if messages:
            try:
                path = state_folder() / f"lost-{os.getpid()}.json"
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                path.touch(mode=0o600)
            except OSError:
                path = Path(tempfile.mkstemp(prefix="kvcompose-lost-", suffix=".json")[1])
            path.write_text(json.dumps(messages, ensure_ascii=False, indent=1), encoding="utf-8")
            print(f"the conversation is kept in {path}", file=sys.stderr, flush=True)

    on_abort.append(save)
    try:
        yield
    finally:
        on_abort.remove(save)


@click.command("compress", short_help="Read a document once and keep its compressed cache.")
@click.argument("model")
@click.argument("file")
@click.option("-o", "--output", required=True, metavar="NAME|FILE", help="Session to write, such as notes.kvc.")
@click.option(
    "--budget", type=float, default=0.5, show_default=True, help="Share of the full cache's bytes to use, below 1."
)
@click.option("--ctx", "n_ctx", type=int, help="Positions: text and chat.  [default: 8192, or what the model knows]")
@click.option("--keep", type=Real(0, 1, min_open=True), default=0.5, show_default=True, help="Share of bytes to keep.")
@click.option("--cache-type", type=click.Choice(CACHE_TYPES), help="As in run.")
@click.option("--system", help="System prompt, which stands before the document.")
@threads_option
@click.option("--gpu-layers", type=click.IntRange(0), help="Layers on the GPU.  [default: all with Metal, else 0]")
def compress_command(
    model: str,
    file: str,
    output: str,
    budget: float,
    n_ctx: int | None,
    keep: float,
    cache_type: str | None,
    system: str | None,
    threads: int | None,
    gpu_layers: int | None,
) -> None:
    """Let MODEL read FILE (- is standard input) and write a session that answers about it at once.

    \b
    kvcompose-local compress model.gguf notes.txt -o notes.kvc
    kvcompose-local run --session notes.kvc --no-autosave -p "Who wrote this?"
    """
    from kvcompose_local.chat import sessions
    from kvcompose_local.install import models
    from kvcompose_local.install.model_files import check_gguf
    from kvcompose_local.interfaces import Sampling
    from kvcompose_local.interrupts import Interrupts
    from kvcompose_local.terminal.repl import Status

    check_numbers(budget, n_ctx)
    if budget == 1:
        raise click.BadParameter("a budget of 1 never compresses", param_hint="--budget")
    path = sessions.path_of(output)
    sessions.check_writable(path)
    if path.is_file() and path.stat().st_size:
        raise InvalidInput(f"{path} exists, and may hold a chat by now: remove it, or give another name")
    ((_, text),), _ = inputs.read_all([Path(file)])
    interrupts = Interrupts()
    status = Status(sys.stderr, should_stop=interrupts)
    model_path = models.resolve(model, pull=True, progress=status.fetching)
    check_gguf(model_path)
    with (
        open_chat(
            model_path,
            budget=budget,
            n_ctx=n_ctx,
            n_threads=threads,
            gpu_layers=gpu_layers,
            cache_type=cache_type,
            workers=[],
            sampling=Sampling(),
            system=system,
            interrupts=interrupts,
            status=status,
        ) as local,
        interrupts.caught(),
    ):
        stats = local.read(text)
        if stats.stopped:
            raise KVComposeError("stopped while reading; nothing is written")
        memory = local.memory
        least = 2 * memory.policy.n_tail / memory.position
        if least < keep:
            memory.compact(keep)
        elif least < 0.5:
            status.line(f"--keep {keep:g} leaves too little of this text to read on by: {least:.2f} of it is kept")
            memory.compact(least)
        else:
            status.line("the text is too short to compress: it is kept whole")
        n_bytes = sessions.save(path, local.chat, local.setup, status.checking)
        full = memory.position * memory.engine.shape.uncompressed_row_bytes
    click.echo(
        f"{path}: {stats.prompt_tokens} tokens in {n_bytes / MIB:.1f} MiB (uncompressed: {full / MIB:.1f} MiB)\n"
        f"ask about it: kvcompose-local run --session {shlex.quote(output)}\n"
        "the chat is saved to it at the end; with --no-autosave it stays as it is"
    )
