"""One clear line on stderr and an exit code for everything that can go wrong in a command."""

from __future__ import annotations

import functools
import os
import re
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


def _message(error: Exception) -> str:
    """What an error says, without the C++ frames that PyTorch adds; memory in words."""
    text = re.split(r"\n(?:Exception raised from|frame #)", str(error))[0]
    refused = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", text)
    if refused is None:
        return text
    return (
        f"not enough memory: {int(refused[1]) / 2**30:.1f} GiB were asked for at once; take a smaller size, "
        "fewer frames or a smaller batch"
    )


def reported(command: Callable) -> Callable:
    """Decorates a command: exceptions become a line on stderr and an exit code, unless debugging."""

    @functools.wraps(command)
    def wrapper(*args, **kwargs):
        from dit_accel.errors import NonFiniteError, UnavailableError

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
            expected = isinstance(error, ValueError | TypeError | OSError | NonFiniteError)
            hint = "" if expected else f" ({type(error).__name__}; dit-accel --debug shows where)"
            _fail(f"{_message(error)}{hint}", BAD_INPUT)

    return wrapper
