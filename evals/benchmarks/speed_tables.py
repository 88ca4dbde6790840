"""Makes the library's speed table of results: `python -m dit_accel.evals.benchmarks.speed_tables`.

`dit-accel plan`, `min_tokens="auto"` and `summary()` predict from these tables
(`dit_accel.runtime.speed_table`); run this after benchmarks that were measured anew.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from dit_accel.runtime.speed_table import (
    SHIPPED,
    AttentionCase,
    BreakEven,
    Machine,
    RestOfStep,
    SpeedTable,
)

from .table import RESULTS

_CASE = re.compile(r"B1-H(\d+)-N(\d+)-D(\d+)-(\w+)( |$)")
_BREAK_EVEN = re.compile(r"D(\d+)-(\w+) density (\S+)")
_REST = re.compile(r"(.+)-(\w+)")
_DEVICE = re.compile(r"(.*?)(?:, (\d+) threads)?(?:, (AVX2|AVX-512|AMX))?")


def table_of_results(folder: Path, device: str = "cpu") -> SpeedTable:
    """What `bench_<device>.csv`, `plan_<device>.csv` and `overhead_<device>.csv` of a folder say.

    What was measured several times counts as it was last.

    Args:
        folder: where the files are, or are in its subfolder `gpu`.
        device: device type.

    Raises:
        ValueError: no such results, or results of several machines.
    """
    rows = _last_of_each(folder, device)
    block_density = {row["shape"]: float(row["median"]) for row in rows if row["metric"] == "block_density"}
    attention, break_even, rest, machines = [], [], [], {}
    for row in rows:
        value, shape = row["median"], row["shape"]
        if row["metric"] == "efficiency" and (found := _CASE.match(shape)):
            heads, tokens, head_dim = (int(number) for number in found.groups()[:3])
            attention.append(
                AttentionCase(found[4], head_dim, heads, tokens, block_density[shape], float(value))
            )
        elif row["metric"] == "tokens" and (found := _BREAK_EVEN.fullmatch(shape)):
            break_even.append(BreakEven(found[2], int(found[1]), float(found[3]), float(value)))
        elif row["metric"] == "rest_rate" and (found := _REST.fullmatch(shape)):
            rest.append(RestOfStep(found[1], found[2], float(value)))
        else:
            continue
        machines[_machine(row, device)] = None
    if len(machines) != 1:
        found = "; ".join(map(str, machines)) or "none"
        raise ValueError(f"{folder} must hold results of one machine for {device}, found {found}")
    return SpeedTable(*machines, tuple(attention), tuple(break_even), tuple(rest))


def _machine(row: dict[str, str], device: str) -> Machine:
    name, threads, instructions = _DEVICE.fullmatch(row["device"]).groups()
    torch = re.search(r"torch ([^,]+)", row["versions"])
    return Machine(device, name, int(threads or 0), torch[1] if torch else "", instructions or "")


def _last_of_each(folder: Path, device: str) -> Iterable[dict[str, str]]:
    """The rows of all files, of each thing measured the last."""
    rows = {}
    names = [f"{name}_{device}.csv" for name in ("bench", "plan", "overhead")]
    for path in (place / name for place in (folder, folder / "gpu") for name in names):
        if path.is_file():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    rows[tuple(row[key] for key in ("kernel", "provider", "metric", "shape"))] = row
    return list(rows.values())


def main(arguments: list[str] | None = None) -> int:
    """Makes the speed tables of the library out of the results of benchmarks."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.benchmarks.speed_tables", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder (default {RESULTS})")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder for the table")
    options = parser.parse_args(arguments)
    table = table_of_results(options.results, options.device)
    table.write(options.out / f"{options.device}.json")
    print(f"{options.out / options.device}.json: {table.machine}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
