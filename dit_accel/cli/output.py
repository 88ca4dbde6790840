"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from dit_accel.json_files import to_json

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def print_json(value: Any) -> None:
    """Prints a value as strict JSON on stdout."""
    typer.echo(to_json(value))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table as wide as the terminal; redirected output is never cut."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    table = Table(*columns, title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console.print(table)


def note(message: str) -> None:
    """Progress for people, on stderr."""
    typer.echo(message, err=True)
