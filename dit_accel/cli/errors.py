"""One clear line on stderr and an exit code for everything that can go wrong in a command."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NoReturn

import typer

BAD_INPUT, UNAVAILABLE, INTERRUPTED = 1, 3, 130
DEBUG_VARIABLE = "DIT_ACCEL_DEBUG"


def set_debug(debug: bool) -> None:
    """Lets errors of this process show their traceback."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(code) from None


def reported(command: Callable) -> Callable:
    """Decorates a command: exceptions become a line on stderr and an exit code, unless debugging."""

    @functools.wraps(command)
    def wrapper(*args, **kwargs):
        from ..errors import UnavailableError

        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            _fail("interrupted", INTERRUPTED)
        except Exception as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            if isinstance(error, UnavailableError):
                _fail(str(error), UNAVAILABLE)
            expected = isinstance(error, ValueError | TypeError | OSError)
            hint = "" if expected else f" ({type(error).__name__}; dit-accel --debug shows where)"
            _fail(f"{error}{hint}", BAD_INPUT)

    return wrapper
