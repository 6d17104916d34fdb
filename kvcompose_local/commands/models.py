"""``kvcompose-local models``: the models that are known by name."""

from __future__ import annotations

import sys

import click

from kvcompose_local.terminal.status import Status


@click.group("models", invoke_without_command=True, short_help="List, fetch and locate the models known by name.")
@click.pass_context
def models_command(context: click.Context) -> None:
    """The models that `run` knows by name."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@models_command.command("list")
def models_list() -> None:
    """What models take, which fit now, and which are here."""
    import psutil

    from kvcompose_local.install import models

    click.echo(models.table(psutil.virtual_memory().available))


@models_command.command("pull")
@click.argument("names", nargs=-1, required=True)
def models_pull(names: tuple[str, ...]) -> None:
    """Fetch models into the cache; goes on where an earlier try stopped."""
    from kvcompose_local.install import models

    entries = [models.find(name) for name in names]
    status = Status(sys.stderr)
    for entry in entries:
        untold = [models.told_source(entry)]

        def progress(done: int, total: int, untold: list[str] = untold) -> None:
            while untold:  # what is not fetched needs no explanation
                status.line(untold.pop())
            status.fetching(done, total)

        click.echo(str(models.fetch_model(entry, progress=progress)))


@models_command.command("path")
@click.argument("name")
def models_path(name: str) -> None:
    """Print where a fetched model is."""
    from kvcompose_local.install import models

    click.echo(str(models.resolve(name, pull=False)))
