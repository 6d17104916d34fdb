"""``kvcompose-local --version``: the facts that a bug report should name."""

from __future__ import annotations

import click

from kvcompose_local import __version__


def told() -> str:
    """Version, pin, patch series and engine, a line each; the library is not loaded for it."""
    from kvcompose_local.errors import KVComposeError
    from kvcompose_local.install.library_choice import find_library
    from kvcompose_local.install.pin import library_dir, patch_series, read_pin, series_digest
    from kvcompose_local.install.resources import data_file

    lines, built = [f"kvcompose-local, version {__version__}"], None
    try:
        patches = data_file("patches")
        lines += [
            f"pin: {read_pin(patches)}",
            f"series: {len(patch_series(patches))} patches, {series_digest(patches)}",
        ]
        built = library_dir()
    except KVComposeError as error:  # a damaged pin, no home folder
        lines.append(f"error: {error}")
    library = find_library()
    if library.problem is not None:
        engine = f"none, {library.problem}"
    elif library.folder == built:
        engine = f"patched, {library.folder}"
    elif library.is_named:
        engine = f"on the library in {library.folder}, which was named"
    else:
        engine = f"stock, {library.why_stock}"
    return "\n".join([*lines, f"engine: {engine}"])


def _print(context: click.Context, _option: click.Parameter, is_given: bool) -> None:
    if is_given and not context.resilient_parsing:
        click.echo(told())
        context.exit()


version_option = click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print, help="Tell what is installed."
)
