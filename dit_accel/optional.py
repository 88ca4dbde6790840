"""Packages that not every installation has: importing one, or the error that says how to get it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from .errors import UnavailableError


def required(module: str, what: str, extra: str) -> ModuleType:
    """Imports a module of an optional package.

    Args:
        module: its dotted name.
        what: is done with it, as the beginning of the message.
        extra: of dit-accel, with which the package is installed.

    Raises:
        UnavailableError: the package is not installed; the message has the command that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0]
        raise UnavailableError(
            f"{what} needs {package}, which is not installed: pip install 'dit-accel[{extra}]'"
        ) from None
