"""The entry point of the command and of ``python -m kvcompose_local``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Start the command line. Importing it takes a tenth of a second, during which Ctrl-C ends in one line, too."""
    open_what_is_closed()
    try:
        from kvcompose_local.commands import cli
    except KeyboardInterrupt:
        sys.stderr.write("error: stopped\n")
        sys.exit(130)
    cli.main()


def open_what_is_closed() -> None:
    """Give closed standard streams the null device: otherwise the next file gets their number, and native errors."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 -- as long as the program


if __name__ == "__main__":
    main()
