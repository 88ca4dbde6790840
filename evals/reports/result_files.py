"""Result files of `dit-accel eval`, and one table of several of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel.json_files import read_json

SCHEMA = "dit-accel/eval/1"
SWEEP = "sweep"
ARROWS = {"higher": "↑", "lower": "↓"}


def load(path: Path) -> dict[str, Any]:
    """A result file; `metrics` of a sweep are in its `rows`.

    Raises:
        ValueError: a file that is missing, no JSON, or of another schema.
    """
    result = read_json(path, "a result of `dit-accel eval`")
    schema = result.get("schema") if isinstance(result, dict) else None
    if schema == SCHEMA and result.get("kind") == SWEEP and isinstance(result.get("rows"), list):
        return result
    if schema != SCHEMA or not isinstance(result.get("metrics"), dict):
        raise ValueError(f"{path} is no result of `dit-accel eval`: its schema is {schema!r}, not {SCHEMA!r}")
    return result


def load_all(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Result files under the labels they were made with, else their file names; equal ones get their path.

    Every row of a sweep is a result of its own.
    """
    found = [(label, path, part) for path in paths for label, part in _parts(load(path), path.stem)]
    labels = [label for label, _, _ in found]
    return {
        label if labels.count(label) == 1 else f"{label} ({path})": result for label, path, result in found
    }


def _parts(result: dict[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    """A result with its label; of a sweep its rows, the first with what is to be known of all."""
    label = result.get("label") or name
    if result.get("kind") != SWEEP:
        return [(label, result)]
    parts = [
        (f"{label} {row['setting']}", {"command": result["command"], "metrics": row["metrics"]})
        for row in result["rows"]
    ]
    parts[0][1].update(warnings=result["warnings"], skipped=result["skipped"])
    return parts


def table(results: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, a row per result; a metric that a result lacks is an empty cell."""
    quantities: dict[str, str] = {}
    for result in results.values():
        for name, quantity in result["metrics"].items():
            quantities.setdefault(name, f"{name} {ARROWS[quantity['better']]}")
    rows = [
        [label, *(cell(result["metrics"].get(name)) for name in quantities)]
        for label, result in results.items()
    ]
    return ["result", *quantities.values()], rows


def cell(quantity: dict[str, Any] | None) -> str:
    """A quantity as text, with its interval where it has one."""
    if quantity is None:
        return ""
    if quantity["value"] is None:
        return "identical" if quantity.get("identical") else "none"
    if quantity.get("interval"):
        low, high = quantity["interval"]
        return f"{quantity['value']:.4g} [{low:.4g}, {high:.4g}]"
    return f"{quantity['value']:.4g}"


def notes(results: dict[str, dict[str, Any]]) -> list[str]:
    """What a reader of the table has to know: whose features, warnings, and what was skipped."""
    lines: dict[str, None] = {}  # in order, each once
    of_results: dict[str, list[str]] = {}
    for label, result in results.items():
        if any(name.endswith("-scenes") for name in result["metrics"]):
            lines["`-scenes`: features of the bundled scene encoder; not comparable with FID or KID."] = None
        if any(quantity.get("interval") for quantity in result["metrics"].values()):
            lines["In brackets: 95% bootstrap intervals of the mean over files."] = None
        said = [*result.get("warnings", ())]
        said += [f"{name} skipped: {reason}" for name, reason in result.get("skipped", {}).items()]
        for line in said:
            of_results.setdefault(line, []).append(label)
    return [*lines, *(f"{', '.join(labels)}: {line}." for line, labels in of_results.items())]


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The table and its notes, with the commands that made the results."""
    columns, rows = table(results)
    lines = [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)]), *map(_row, rows), ""]
    lines += [f"- {line}" for line in notes(results)]
    lines += [f"- {label}: `{result['command']}`" for label, result in results.items()]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
