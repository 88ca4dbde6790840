"""How benchmarks write what they measured: rows of one CSV format, and Markdown tables."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path("evals/results")
COLUMNS = ("kernel", "provider", "metric", "shape", "median", "p20", "p80", "device", "versions", "commit")


def machine(here: dict, device: str = "cpu") -> str:
    """The processor or GPU of an environment, in words."""
    if device == "cpu":
        cpu = here["cpu"]
        return ", ".join(filter(None, (cpu["name"], f"{cpu['torch_threads']} threads", cpu["instructions"])))
    return here["gpus"][0]["name"]


def row(
    kernel: str,
    provider: str,
    metric: str,
    shape: str,
    values: float | tuple[float, float, float],
    here: dict,
    device: str = "cpu",
) -> dict[str, str]:
    """A row of a CSV.

    Args:
        values: the 20%, 50% and 80% quantiles, or what was measured once.
        here: the environment, from `dit_accel.environment`.
        device: device type it was measured on, `"cpu"` or `"cuda"`.
    """
    low, middle, high = values if isinstance(values, tuple) else (values,) * 3
    packages = here["packages"]
    versions = f"dit-accel {packages['dit-accel']}, torch {packages['torch']}, python {here['python']}"
    if device != "cpu":
        versions += f", triton {packages['triton']}, cuda {here['cuda']}"
    return {
        "kernel": kernel,
        "provider": provider,
        "metric": metric,
        "shape": shape,
        "median": f"{middle:.4g}",
        "p20": f"{low:.4g}",
        "p80": f"{high:.4g}",
        "device": machine(here, device),
        "versions": versions,
        "commit": here["commit"] or "",
    }


def append(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Adds rows to a CSV, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def markdown(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
