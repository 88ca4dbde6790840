"""Chooses the fastest launch of each head_dim from what was measured, as entries of the kernel's table."""

from __future__ import annotations

import math
from collections.abc import Iterable

from dit_accel.kernels.block_sparse.tuned import Entry, Launch

from .cases import Case
from .job import Row

HOPELESS = 1.3  # times slower than the best on one case


def choose(rows: Iterable[Row], default: Launch) -> tuple[Launch, float] | None:
    """The fastest launch, and how many times faster than the default it is; None if that was not measured.

    Of the launches measured on every case that the default was measured on, the one with the least geometric
    mean of the times.
    """
    times: dict[Launch, dict[tuple, float]] = {}
    for row in rows:
        times.setdefault(Launch(*row["launch"]), {})[tuple(row["case"])] = row["ms"]
    own = times.get(default)
    if not own:
        return None
    gains = {
        launch: math.exp(sum(math.log(own[case] / seen[case]) for case in own) / len(own))
        for launch, seen in times.items()
        if seen.keys() >= own.keys()
    }
    best = max(gains, key=lambda launch: (gains[launch], launch == default))
    return best, gains[best]


def promising(rows: Iterable[Row], case: Case, default: Launch) -> list[Launch]:
    """The default, and the launches that are near enough to the best on a case to be tried on the next."""
    key = [case.name, case.preset]
    times = {Launch(*row["launch"]): row["ms"] for row in rows if row["case"] == key}
    least = min(times.values(), default=0.0)
    near = sorted((launch for launch in times if times[launch] <= HOPELESS * least), key=times.get)
    return list(dict.fromkeys([default, *near]))


def entries(rows: Iterable[Row], defaults: dict[int, Launch], machine: Row) -> list[Entry]:
    """An entry for each head_dim that was measured, with what it was measured on."""
    here, rows = machine["environment"], list(rows)
    gpu = here["gpus"][0]["name"] if here["gpus"] else here["cpu"]["name"]
    found = []
    for head_dim, default in defaults.items():
        measured = [row for row in rows if row["head_dim"] == head_dim]
        if (chosen := choose(measured, default)) is None:
            continue
        launch, gain = chosen
        found.append(
            Entry(
                capability=".".join(map(str, machine["capability"])),
                element_bytes=measured[0]["element_bytes"],
                head_dim=head_dim,
                **launch._asdict(),
                gain=round(gain, 4),
                gpu=gpu,
                torch=here["packages"]["torch"] or "unknown",
                triton=here["packages"]["triton"] or "unknown",
                cuda=here["cuda"] or "none",
                commit=here["commit"] or "unknown",
            )
        )
    return found
