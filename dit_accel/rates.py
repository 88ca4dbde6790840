"""How fast attention and the rest of a step run: measured results, read from `evals/results`."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from . import evals

RESULTS = Path(evals.__file__).parent / "results"
_SHAPE = re.compile(r"-D(\d+)-(\w+)( |$)")


@dataclass(frozen=True)
class Rates:
    """Rates relative to dense attention on one device in one dtype.

    Attributes:
        efficiency: speed-up x block density of block-sparse attention, (least, median, most) of the measured
            cases; 1 if a computed block costs what it costs in dense attention; None where not measured.
        rest: FLOP/s of everything but attention, relative to that of dense attention, for one model; None
            where not measured.
        source: what the numbers were measured on, or that they were not.
    """

    efficiency: tuple[float, float, float] | None = None
    rest: float | None = None
    source: str = "not measured"


def measured(device: str, dtype: str, head_dim: int, model: str = "", folder: Path | None = None) -> Rates:
    """The rates in `bench_<device>.csv` and `plan_<device>.csv` of a folder.

    Args:
        device: a device type, `"cpu"` or `"cuda"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        head_dim: of the model; the measured head_dim nearest to it is taken.
        model: the name under which its rest of a step may have been measured.
        folder: where the files are, `evals/results` unless given.
    """
    found: dict[int, list[float]] = {}
    rest, devices = None, set()
    for row in _rows(folder or RESULTS, device):
        if row["metric"] == "efficiency" and (shape := _SHAPE.search(row["shape"])) and shape[2] == dtype:
            found.setdefault(int(shape[1]), []).append(float(row["median"]))
            devices.add(row["device"])
        if row["metric"] == "rest_rate" and row["shape"] == f"{model}-{dtype}":
            rest = float(row["median"])
    if not found:
        return Rates(None, rest, f"block-sparse attention is not measured on {device} in {dtype}")
    nearest = min(found, key=lambda dim: abs(math.log(dim / head_dim)))
    values = found[nearest]
    source = f"{len(values)} cases with head_dim {nearest} on {', '.join(sorted(devices))}"
    return Rates((min(values), median(values), max(values)), rest, source)


def _rows(folder: Path, device: str) -> Iterator[dict[str, str]]:
    for name in ("bench", "plan"):
        path = folder / f"{name}_{device}.csv"
        if path.is_file():
            with path.open(newline="") as file:
                yield from csv.DictReader(file)
