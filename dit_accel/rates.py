"""How fast attention and the rest of a step run: measured results, read from `evals/results`."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from . import evals, kernels

RESULTS = Path(evals.__file__).parent / "results"
_SHAPE = re.compile(r"B1-H(\d+)-N(\d+)-D(\d+)-(\w+)( |$)")
_BREAK_EVEN = re.compile(r"D(\d+)-(\w+) density (\S+)")


@dataclass(frozen=True)
class Rates:
    """Rates relative to dense attention on one device in one dtype.

    Attributes:
        efficiency: speed-up x block density of block-sparse attention without its fixed cost, (least, median,
            most) of the measured cases; 1 if a computed block costs what it costs in dense attention; None
            where not measured.
        fixed: what a call of block-sparse attention takes whatever it computes, as the number of pairs (heads
            x queries x keys) that dense attention computes in that time.
        rest: FLOP/s of everything but attention, relative to that of dense attention, for one model; None
            where not measured.
        source: what the numbers were measured on, or that they were not.
        break_even: pairs of a pattern's density and the number of tokens from which block-sparse attention is
            faster than dense, by density; empty where not measured.
        shortest: tokens of the shortest case that `efficiency` and `fixed` are from.
    """

    efficiency: tuple[float, float, float] | None = None
    rest: float | None = None
    source: str = "not measured"
    break_even: tuple[tuple[float, float], ...] = ()
    fixed: float = 0.0
    shortest: int = 0

    def of_backend(self, backend: str, device: str) -> Rates:
        """What holds for a backend: all of this for the device's fastest, which is what is measured."""
        if backend == kernels.fastest_backend(device):
            return self
        return Rates(None, self.rest, f"backend {backend!r} is not measured")

    def least_tokens(self, density: float) -> float:
        """The break-even length at the next measured density from `density` up; infinite where none is."""
        return next((tokens for measured, tokens in self.break_even if measured >= density), math.inf)

    def describe_break_even(self) -> str:
        """One line about the lengths from which sparse attention pays."""
        if not self.break_even:
            return "break-even length: not measured"
        lengths = ", ".join(f"{tokens:.0f} at density {density:g}" for density, tokens in self.break_even)
        return f"sparse attention is faster from these numbers of tokens on: {lengths}, as measured"


def measured(device: str, dtype: str, head_dim: int, model: str = "", folder: Path | None = None) -> Rates:
    """The rates in `bench_<device>.csv`, `plan_<device>.csv` and `overhead_<device>.csv` of a folder.

    What was measured several times counts as it was last.

    Args:
        device: a device type, `"cpu"` or `"cuda"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        head_dim: of the model; the measured head_dim nearest to it is taken.
        model: the name under which its rest of a step may have been measured.
        folder: where the files are, `evals/results` unless given.
    """
    found: dict[int, list[tuple[int, float, float]]] = {}  # by head_dim: tokens, computed pairs, efficiency
    lengths: dict[int, dict[float, float]] = {}
    rest, devices, block_density = [], set(), {}
    for row in _rows(folder or RESULTS, device):
        if row["metric"] == "block_density":
            block_density[row["shape"]] = float(row["median"])
        if row["metric"] == "efficiency" and (shape := _SHAPE.match(row["shape"])) and shape[4] == dtype:
            heads, tokens, dim = (int(number) for number in shape.groups()[:3])
            pairs = block_density[row["shape"]] * heads * tokens**2
            found.setdefault(dim, []).append((tokens, pairs, float(row["median"])))
            devices.add(row["device"])
        if row["metric"] == "tokens" and (shape := _BREAK_EVEN.fullmatch(row["shape"])) and shape[2] == dtype:
            lengths.setdefault(int(shape[1]), {})[float(shape[3])] = float(row["median"])
        if row["metric"] == "rest_rate" and row["shape"] == f"{model}-{dtype}":
            rest.append(float(row["median"]))
    rest = median(rest) if rest else None
    break_even = tuple(sorted(_nearest(lengths, head_dim)[1].items())) if lengths else ()
    if not found:
        source = f"block-sparse attention is not measured on {device} in {dtype}"
        return Rates(None, rest, source, break_even)
    nearest, cases = _nearest(found, head_dim)
    fixed, values = _without_fixed([case[1:] for case in cases])
    shortest = min(tokens for tokens, *_ in cases)
    source = f"{len(values)} cases with head_dim {nearest} on {', '.join(sorted(devices))}"
    return Rates((min(values), median(values), max(values)), rest, source, break_even, fixed, shortest)


def _without_fixed(cases: list[tuple[float, float]]) -> tuple[float, list[float]]:
    """The fixed cost of a call and each case's efficiency without it, from (pairs, efficiency) of cases.

    The time of a case in pairs of dense attention is pairs / efficiency; a line through it, by the median of
    the slopes between all cases (Theil and Sen), gives both.
    """
    points = [(1 / pairs, 1 / efficiency) for pairs, efficiency in cases]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if a[0] != b[0]]
    fixed = max(0.0, median(slopes)) if slopes else 0.0
    return fixed, [1 / (y - fixed * x) for x, y in points]


def _nearest(found: dict[int, Any], head_dim: int) -> tuple[int, Any]:
    """The measured head_dim nearest to the model's, and what was measured with it."""
    nearest = min(found, key=lambda dim: abs(math.log(dim / head_dim)))
    return nearest, found[nearest]


def _rows(folder: Path, device: str) -> Iterable[dict[str, str]]:
    """The rows of all files, of each thing measured the last."""
    rows = {}
    for name in ("bench", "plan", "overhead"):
        path = folder / f"{name}_{device}.csv"
        if path.is_file():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    rows[tuple(row[key] for key in ("kernel", "provider", "metric", "shape"))] = row
    return rows.values()
