"""What the subcommands of `dit-accel eval` share: options, and how a result is put together and given out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.cache_folder import user_cache_folder
from dit_accel.json_files import write_json

from .output import note, print_json, print_table

if TYPE_CHECKING:
    from dit_accel.evals.metrics.folders import Store
    from dit_accel.scorers.pretrained import Sources

TestOption = Annotated[Path, typer.Option("--test", help="Folder of the images or videos to judge.")]
FramesChoice = Annotated[
    str, typer.Option("--frames", help="Of a video: all, first, middle, or so many evenly spaced.")
]
WeightsOption = Annotated[
    Path | None, typer.Option("--weights", help="Folder with weights that `eval list` asks for.")
]
DownloadOption = Annotated[bool, typer.Option("--allow-download", help="Fetch weights that are missing.")]
SkippedOption = Annotated[
    bool, typer.Option("--allow-skipped", help="Leave out metrics that cannot run here instead of failing.")
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache", help="Folder of finished parts, from which a run goes on.", envvar="DIT_ACCEL_CACHE"
    ),
]
NoCacheOption = Annotated[bool, typer.Option("--no-cache", help="Keep no parts.")]
LabelOption = Annotated[str | None, typer.Option("--label", help="What `eval report` calls this result.")]
OutOption = Annotated[Path | None, typer.Option("--out", "-o", help="JSON file to write.")]


def pick_metrics(text: str, command: str, of: Sequence[str] = ()) -> list[str]:
    """Metric names from a list with commas, each once.

    Args:
        text: the list.
        command: that it is for.
        of: the commands whose metrics `command` takes; its own if empty.

    Raises:
        typer.BadParameter: a name that is not such a metric.
    """
    from dit_accel.evals.metrics.catalogue import of_command

    known = [name for one in of or (command,) for name in of_command(one)]
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise typer.BadParameter(
            f"`--metrics` of `eval {command}` are {', '.join(known)}; got {', '.join(unknown) or 'none'}"
        )
    return names


def pick_store(cache: Path | None, disabled: bool) -> Store:
    """Where finished parts are kept: in the user's cache unless another folder is named."""
    from dit_accel.evals.metrics.folders import Store

    if disabled:
        return Store(None)
    return Store(cache or user_cache_folder() / "dit-accel" / "eval")


def pick_sources(weights: Path | None, download: bool) -> Sources:
    """Where weights may come from.

    Raises:
        ValueError: `--weights` is not a folder.
    """
    from dit_accel.scorers.pretrained import Sources

    if weights is not None and not weights.is_dir():
        raise ValueError(f"`--weights` must be a folder, and there is none at {weights}")
    return Sources(weights, download)


def track(items: Iterable, description: str) -> Iterable:
    """Passes items on with a progress bar on stderr, where someone watches."""
    from rich.console import Console
    from rich.progress import track as bar

    console = Console(stderr=True)
    return bar(items, description, console=console, transient=True, disable=not sys.stderr.isatty())


def head(kind: str, label: str | None) -> dict[str, Any]:
    """What every result begins with: its schema, and the command, versions and hardware it is from."""
    from dit_accel.environment import command_line, environment
    from dit_accel.evals.reports.result_files import SCHEMA

    return {
        "schema": SCHEMA,
        "kind": kind,
        "label": label,
        "command": command_line(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
    }


def give(answer: dict[str, Any], out: Path | None, json: bool) -> None:
    """Writes and prints a result, its warnings on stderr."""
    from dit_accel.evals.reports.result_files import notes, table

    for line in answer["warnings"]:
        note(f"warning: {line}")
    for name, reason in answer["skipped"].items():
        note(f"skipped {name}: {reason}")
    if out is not None:
        write_json(out, answer)
    if json:
        return print_json(answer)
    columns, rows = table({answer["label"] or answer["kind"]: answer})
    print_table("", ("", "value"), list(zip(columns[1:], rows[0][1:], strict=True)))
    for line in notes({answer["kind"]: {"metrics": answer["metrics"]}}):
        typer.echo(line)
    if out is not None:
        typer.echo(out)
    return None
