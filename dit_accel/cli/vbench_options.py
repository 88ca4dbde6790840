"""Options that the subcommands of `dit-accel eval vbench` share, and what they mean."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dit_accel.evals.vbench.suite import Prompt

START = "Example: dit-accel eval vbench"

PromptsOption = Annotated[
    Path | None,
    typer.Option("--prompts", help="VBench's full-info JSON, or lines; without it, of the installed vbench."),
]
PythonOption = Annotated[
    str | None, typer.Option("--vbench-python", help="Interpreter of the environment that vbench is in.")
]
DimensionsOption = Annotated[
    str | None, typer.Option("--dimensions", help="Names with commas; of plain lines, what they are for.")
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        "-n", "--samples", min=1, max=1000, help="Videos per prompt, instead of 5 (flickering: 25)."
    ),
]


def pick_dimensions(text: str | None) -> list[str]:
    """Names out of a list with commas, each once; all for `all`, none for None.

    Raises:
        typer.BadParameter: not a dimension of VBench.
    """
    from dit_accel.evals.vbench.suite import T2V

    if text == "all":
        return list(T2V.dimensions)
    names = list(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    try:
        T2V.check(names)
    except ValueError as error:
        raise typer.BadParameter(f"`--dimensions`: {error}") from None
    if text is not None and not names:
        raise typer.BadParameter("`--dimensions` names none")
    return names


def pick_prompts(file: Path | None, python: str | None, dimensions: list[str]) -> list[Prompt]:
    """Prompts of a file, else those of the vbench that is installed."""
    from dit_accel.evals.vbench.suite import Installed, read_prompts

    return read_prompts(file or Installed.find(python or sys.executable).full_info, dimensions)
