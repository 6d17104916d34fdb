"""``kvcompose-local sessions``: the chats that are saved by name."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem


@click.group("sessions", invoke_without_command=True, short_help="List and delete saved chats.")
@click.pass_context
def sessions_command(context: click.Context) -> None:
    """The saved chats, the newest first: when it was saved, its messages, MiB, model and name."""
    if context.invoked_subcommand is None:
        from kvcompose_local.chat import sessions

        for name in sessions.names():
            click.echo(row(name))


def row(name: str) -> str:
    """A line of the list; a file that cannot be read says so."""
    import time

    from kvcompose_local.chat import listing, sessions
    from kvcompose_local.errors import SessionError

    status = sessions.path_of(name).stat()
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.st_mtime))
    try:
        n_messages, model = listing.told_by(sessions.path_of(name))
        told = f"{n_messages:>5} messages {status.st_size / 2**20:>8.1f} MiB  {model}"
    except SessionError as error:
        told = str(error)
    return f"{saved}  {name:<20} {told}"


def complete_name(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Names of sessions, for the shell."""
    from kvcompose_local.chat import sessions

    return [CompletionItem(name) for name in sessions.names() if name.startswith(begun)]


@sessions_command.command("rm")
@click.argument("names", nargs=-1, required=True, shell_complete=complete_name)
def sessions_rm(names: tuple[str, ...]) -> None:
    """Delete saved chats, by the names that the list tells."""
    from kvcompose_local.chat import sessions
    from kvcompose_local.errors import SessionError

    known = set(sessions.names())
    if unknown := [name for name in names if name not in known]:
        raise SessionError(f"there is no saved chat {unknown[0]}: `kvcompose-local sessions` lists them")
    for name in dict.fromkeys(names):
        sessions.path_of(name).unlink()
