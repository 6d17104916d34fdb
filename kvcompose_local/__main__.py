"""What the command and ``python -m kvcompose_local`` start."""

from __future__ import annotations

import sys


def main() -> None:
    """The command line, of which importing alone takes a tenth of a second: Ctrl-C ends that in one line, too."""
    try:
        from kvcompose_local import cli
    except KeyboardInterrupt:
        sys.stderr.write("error: stopped\n")
        sys.exit(1)
    cli.main()


if __name__ == "__main__":
    main()
