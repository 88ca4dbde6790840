"""`python -m dit_accel`: the same as the command `dit-accel`."""

from __future__ import annotations

import sys

from .errors import UnavailableError
from .optional import required


def main() -> None:
    """Entry point of the console script; exit code 3 where what only the command line needs is missing."""
    try:
        for module in ("typer", "rich"):
            required(module, "the command line", "cli")
    except UnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3)
    from .cli import main

    main()


if __name__ == "__main__":
    main()
