"""How a call scales with GPUs, on paper: `python -m dit_accel.evals.reports.scaling`.

Writes what `dit-accel plan --gpus` says of FLUX.1-dev into docs/parallel.md: at one size on 1 to 64 GPUs
(`strong`), and at as many pixels for each GPU (`weak`); with a table's name as argument, only that one. It is
a model and nothing is measured: a GPU is taken to compute `RATE` FLOP/s whatever it computes, and `LINK` GB/s
to go over a link.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dit_accel.planning.parallel import Sharing, sharings
from dit_accel.planning.plan import Plan, plan
from dit_accel.recipe.recipe import resolve

from . import marked

PAGE, MODEL, RATE, LINK = Path("docs/parallel.md"), "flux.1-dev", 400e12, 50.0
Case = tuple[tuple[int, int], int]  # (width, height), GPUs
STRONG_RECIPE, WEAK_RECIPE = "flux-clear-r16", "flux-clear-r8"
COUNTS = (1, 2, 4, 8, 16, 32, 64)
STRONG: list[Case] = [(size, gpus) for size in ((4096, 4096), (7680, 4320)) for gpus in COUNTS]
WEAK: list[Case] = [((1024 * side, 1024 * side), side**2) for side in (1, 2, 4, 8)]
HEAD = (
    "| size | GPUs | by heads: sent by one | a call | share of ideal "
    "| by rows: sent by one, of it rows | a call | share of ideal |",
    "|---|---:|---:|---:|---:|---:|---:|---:|",
)


def table(recipe: str, cases: Sequence[Case], *, weak: bool = False) -> str:
    """Rows of sizes and GPUs; the ideal is the time of one GPU divided by their number.

    Args:
        recipe: a preset of FLUX.
        cases: each with the first one's pixels for each GPU if `weak`: then its time is the ideal.
    """
    plans: dict[tuple[int, int], Plan] = {}
    rows, first = [], None
    for size, gpus in cases:
        if size not in plans:
            plans[size] = plan(recipe, family="flux", size=size, device="cuda", dtype=torch.bfloat16)
            print(f"{recipe} at {size[0]}x{size[1]}", file=sys.stderr, flush=True)
        alone = seconds(plans[size])
        first = alone if first is None else first
        ideal = first if weak else alone / gpus
        if gpus == 1:
            cells = ["–", f"{alone:.2f} s", "100%"] * 2
        else:
            found = sharings(plans[size], resolve(recipe), gpus, link=LINK, call_seconds=alone)
            cells = [cell for one in found for cell in _cells(one, ideal)]
        rows.append(f"| {' | '.join([f'{size[0]}x{size[1]}', str(gpus), *cells])} |")
    return "\n".join([*HEAD, *rows])


def seconds(found: Plan) -> float:
    """Of a sparse call on one GPU."""
    return (found.flops.attention * found.block_density + found.flops.rest) / RATE


def _cells(one: Sharing, ideal: float) -> list[str]:
    if one.sent_bytes is None or one.halo_bytes is None or one.seconds is None:
        return [f"not possible: {one.refused}", "", ""]
    sent = f"{one.sent_bytes / 1e9:.1f} GB"
    if one.way == "rows":
        sent += f", {one.halo_bytes / 1e9:.1f}"
    return [sent, f"{one.seconds:.2f} s", f"{ideal / one.seconds:.0%}"]


def main(only: Sequence[str]) -> None:
    """Writes the tables, or those that are named, into the page."""
    tables = {"strong": (STRONG_RECIPE, STRONG), "weak": (WEAK_RECIPE, WEAK)}
    chosen = only or list(tables)
    marked.write(PAGE, {name: table(*tables[name], weak=name == "weak") for name in chosen})


if __name__ == "__main__":
    main(sys.argv[1:])
