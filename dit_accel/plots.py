"""What pictures drawn by matplotlib have in common."""

from __future__ import annotations

from pathlib import Path

from .errors import UnavailableError

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path, otherwise: str = "") -> None:
    """Refuses a picture that cannot be drawn, before the work whose result it shows.

    Args:
        path: of the picture.
        otherwise: how to do without it, as the end of the message.

    Raises:
        ValueError: a suffix that is not one of `SUFFIXES`.
        UnavailableError: matplotlib, which draws it, is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a plot is written as {', '.join(SUFFIXES)}, got the file name {path.name!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnavailableError(
            f'{path.name} needs matplotlib: pip install "dit-accel[eval]"{otherwise}'
        ) from None
