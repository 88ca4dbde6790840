"""Chooses the fastest launch of each kernel and head_dim from what was measured, as entries of the table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product

from dit_accel.kernels.block_sparse.tuned import KERNELS, RANGES, Entry, Launch

from .cases import Case
from .job import Row

HOPELESS = 1.3  # times slower than the best on one case


def choose(
    rows: Iterable[Row], default: Launch, kind: tuple[str, int, str, str] | None = None
) -> tuple[Launch, float] | None:
    """The fastest launch of a kind (`Launch.kind`, the default's), if it and the default were measured.

    With how many times as many pairs per second it computes as the default, which may be of another kind.
    Of the launches measured on every case that the default was measured on, the one with the largest
    geometric mean.
    """
    rates: dict[Launch, dict[tuple, float]] = {}
    for row in rows:
        rates.setdefault(Launch(*row["launch"]), {})[tuple(row["case"])] = row["tflops"]
    own = rates.get(default)
    if not own:
        return None
    gains = {
        launch: math.exp(sum(math.log(seen[case] / own[case]) for case in own) / len(own))
        for launch, seen in rates.items()
        if seen.keys() >= own.keys() and launch.kind == (kind or default.kind)
    }
    if not gains:
        return None
    best = max(gains, key=lambda launch: (gains[launch], launch == default))
    return best, gains[best]


def promising(rows: Iterable[Row], case: Case, default: Launch) -> list[Launch]:
    """The default, and the launches that are near enough to the best on a case to be tried on the next.

    The best of the same kind, of the kinds that compute the same part.
    """
    key = [case.name, case.preset]
    rates = {Launch(*row["launch"]): row["tflops"] for row in rows if row["case"] == key}
    rates = {launch: rate for launch, rate in rates.items() if launch.part == default.part}
    most: dict[tuple, float] = {}
    for launch, rate in rates.items():
        most[launch.kind] = max(rate, most.get(launch.kind, rate))
    near = [launch for launch, rate in rates.items() if rate * HOPELESS >= most[launch.kind]]
    return list(dict.fromkeys([default, *sorted(near, key=rates.get, reverse=True)]))


def entries(rows: Iterable[Row], defaults: dict[int, tuple[Launch, ...]], machine: Row) -> list[Entry]:
    """An entry for each head_dim and kind of launch that was measured, with the machine.

    Against the default of the same part.
    """
    here, rows = machine["environment"], list(rows)
    gpu = here["gpus"][0]["name"] if here["gpus"] else here["cpu"]["name"]
    found = []
    for head_dim, default in ((dim, launch) for dim, own in defaults.items() for launch in own):
        measured = [row for row in rows if row["head_dim"] == head_dim]
        for kind in product(KERNELS, RANGES["block_keys"], RANGES["format"], (default.part,)):
            if (chosen := choose(measured, default, kind)) is None:
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
