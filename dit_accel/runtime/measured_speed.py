"""How fast attention and the rest of a step were measured to be, relative to dense attention."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any

from dit_accel import kernels

from .speed_table import AttentionCase, SpeedTable, speed_tables, this_machine


@dataclass(frozen=True)
class MeasuredSpeed:
    """Speeds relative to dense attention on one device in one dtype.

    Attributes:
        efficiency: speed-up x block density of block-sparse attention without its fixed cost, (least, median,
            most) of the measured cases; 1 if a computed block costs what it costs in dense attention; None
            where not measured.
        rest: FLOP/s of everything but attention, relative to that of dense attention, for one model; None
            where not measured.
        source: what the numbers were measured on, or that they were not.
        break_even: pairs of a pattern's density and the number of tokens from which block-sparse attention is
            faster than dense, by density; empty where not measured.
        fixed: what a call of block-sparse attention takes whatever it computes, as the number of pairs (heads
            x queries x keys) that dense attention computes in that time.
        shortest: tokens of the shortest case that `efficiency` and `fixed` are from.
        where: that it was on this machine, one like it or another, which, and then how to measure this one.
        another_machine: whether it was measured on one that is not like this one.
        gains: pairs of a numeric format and how many times as fast as without one attention in it is, the
            median of the measured cases; what is not measured is not there.
    """

    efficiency: tuple[float, float, float] | None = None
    rest: float | None = None
    source: str = "not measured"
    break_even: tuple[tuple[float, float], ...] = ()
    fixed: float = 0.0
    shortest: int = 0
    where: str = ""
    another_machine: bool = False
    gains: tuple[tuple[str, float], ...] = ()

    def of_backend(self, backend: str, device: str) -> MeasuredSpeed:
        """What holds for a backend: all of this for the device's fastest, which is what is measured."""
        if backend == kernels.fastest_backend(device):
            return self
        return MeasuredSpeed(None, self.rest, f"backend {backend!r} is not measured")

    def least_tokens(self, density: float) -> float:
        """The break-even length at the next measured density from `density` up; infinite where none is."""
        return next((tokens for measured, tokens in self.break_even if measured >= density), math.inf)

    def describe_break_even(self) -> str:
        """One line about the lengths from which sparse attention pays, and where that was measured."""
        if not self.break_even:
            return "break-even length: not measured"
        lengths = ", ".join(f"{tokens:.0f} at density {density:g}" for density, tokens in self.break_even)
        said = (
            f"sparse attention is faster from these numbers of tokens on: {lengths}, as measured {self.where}"
        )
        return said.rstrip()


def measured_speed(
    device: str,
    dtype: str,
    head_dim: int,
    model: str = "",
    tables: Sequence[SpeedTable] | None = None,
) -> MeasuredSpeed:
    """What is known of a device: as calibrated here, or as it comes with the library where it was not.

    Args:
        device: a device type, `"cpu"` or `"cuda"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        head_dim: of the model; the measured head_dim nearest to it is taken.
        model: the name under which its rest of a step may have been measured.
        tables: instead of those, the first that has the dtype counts.

    Raises:
        ValueError: a file of the user's that is no speed table.
    """
    tables = speed_tables(device) if tables is None else tables
    table = next((one for one in tables if any(case.dtype == dtype for case in one.attention)), None)
    table = table or next((one for one in tables if any(x.dtype == dtype for x in one.break_even)), None)
    if table is None:
        return MeasuredSpeed(source=f"block-sparse attention is not measured on {device} in {dtype}")
    of_model = [one.rate for one in table.rest_of_step if (one.model, one.dtype) == (model, dtype)]
    where, another = _where(table)
    lengths = _nearest([one for one in table.break_even if one.dtype == dtype], head_dim)
    speed = MeasuredSpeed(
        rest=median(of_model) if of_model else None,
        source=f"block-sparse attention is not measured on {device} in {dtype}",
        break_even=tuple(sorted((one.density, one.tokens) for one in lengths)),
        where=where,
        another_machine=another,
        gains=_gains(table, dtype, head_dim),
    )
    cases = _nearest([case for case in table.attention if case.dtype == dtype], head_dim)
    if not cases:
        return speed
    fixed, values = _without_fixed(cases)
    return dataclasses.replace(
        speed,
        efficiency=(min(values), median(values), max(values)),
        source=f"{len(values)} cases with head_dim {cases[0].head_dim} on {table.machine}",
        fixed=fixed,
        shortest=min(case.tokens for case in cases),
    )


def _gains(table: SpeedTable, dtype: str, head_dim: int) -> tuple[tuple[str, float], ...]:
    """Of each format that was measured in a dtype."""
    cases = _nearest([case for case in table.quantized if case.dtype == dtype], head_dim)
    formats = dict.fromkeys(case.quantization for case in cases)
    return tuple((name, median(one.gain for one in cases if one.quantization == name)) for name in formats)


def _where(table: SpeedTable) -> tuple[str, bool]:
    """Where a table was measured, in words, and whether that is another kind of machine than this one."""
    here = this_machine(table.machine.device)
    if here is None:  # planned for what is not here
        return f"on {table.machine}", False
    if not table.machine.is_like(here):
        remedy = "`dit-accel bench --calibrate` measures this one"
        return f"on another machine ({table.machine}), not like this one ({here}): {remedy}", True
    if table.calibrated:
        return f"on this machine ({table.machine})", False
    return f"on a machine like this one ({table.machine})", False


def _nearest(rows: list[Any], head_dim: int) -> list[Any]:
    """Of what was measured, that with the head_dim nearest to the model's."""
    nearest = min((row.head_dim for row in rows), key=lambda dim: abs(math.log(dim / head_dim)), default=None)
    return [row for row in rows if row.head_dim == nearest]


def _without_fixed(cases: Sequence[AttentionCase]) -> tuple[float, list[float]]:
    """The fixed cost of a call, in pairs of dense attention, and each case's efficiency without it.

    The time of a case in pairs of dense attention is pairs / efficiency; a line through it, by the median of
    the slopes between all cases (Theil and Sen), gives both.
    """
    points = [(1 / case.pairs, 1 / case.efficiency) for case in cases]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if a[0] != b[0]]
    fixed = max(0.0, median(slopes)) if slopes else 0.0
    fixed = min(
        fixed, 0.5 * min(y / x for x, y in points)
    )  # no more of any case, however disturbed they were
    return fixed, [1 / (y - fixed * x) for x, y in points]
