"""The choice among everything: each head's option by the error that its computed pairs save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dit_accel.masks.orders import AXIS_ORDERS
from dit_accel.patterns import Dense, StaticPattern
from dit_accel.patterns.calibration import REORDERED, Calibration
from dit_accel.patterns.reordered_blocks import ReorderedBlocks, packed_blocks

from .error_pass import ErrorPass, options
from .knapsack import fill
from .mass_pass import MassPass
from .passes import Runs


def mixed(
    runs: Runs,
    found: MassPass,
    density: float,
    static: Sequence[StaticPattern],
    reordered: bool,
    tails: bool,
    about: dict[str, Any],
) -> Calibration:
    """What each head takes in each row, Dense among it, at a mean cost of `density`."""
    measured = ErrorPass(found, options(static, reordered, tails))
    runs.do(measured)
    return chosen_by(measured, density, about)


def chosen_by(measured: ErrorPass, density: float, about: dict[str, Any]) -> Calibration:
    """The calibration at a density, from errors and costs that were measured: for others it needs no run."""
    errors, costs, model = measured.mean_errors, measured.costs, measured.found.model
    rows, layers, heads, _ = errors.shape
    dense = torch.zeros(rows, layers, heads, 1, dtype=torch.float64, device="cpu")
    table = [torch.cat(pair, -1).flatten(0, 2).tolist() for pair in ((costs, dense + 1), (errors, dense))]
    shares = _row_shares(model)
    weights = [shares[row] for row in range(rows) for _ in range(layers * heads)]
    taken = fill(table[0], table[1], weights, density)
    patterns: list[StaticPattern] = [Dense()]
    shape = (rows, layers, heads)
    chosen, order, place, tail = (torch.zeros(shape, dtype=torch.int64, device="cpu") for _ in range(4))
    place -= 1
    blocks = []
    for item, option in enumerate(taken):
        at = (item // (layers * heads), item // heads % layers, item % heads)
        if option == len(measured.options):
            continue
        choice = measured.choice(measured.options[option], *at)
        tail[at] = int(choice.tail)
        if isinstance(choice.pattern, ReorderedBlocks):
            chosen[at], place[at] = REORDERED, len(blocks)
            order[at] = list(AXIS_ORDERS).index(choice.pattern.order)
            blocks.append(packed_blocks(choice.pattern.table))
        else:
            if choice.pattern not in patterns:
                patterns.append(choice.pattern)
            chosen[at] = patterns.index(choice.pattern)
    width = -(-(found_blocks(measured) ** 2) // 8)
    none = torch.zeros(0, width, dtype=torch.uint8, device="cpu")
    spent = sum(w * c[o] for w, c, o in zip(weights, table[0], taken, strict=True)) / sum(weights)
    error = sum(w * e[o] for w, e, o in zip(weights, table[1], taken, strict=True)) / sum(weights)
    return Calibration(
        **model,
        density=density,
        patterns=tuple(patterns),
        chosen=chosen.to(torch.int16),
        tail=tail.bool(),
        order=order.to(torch.uint8),
        place=place.to(torch.int32),
        blocks=torch.stack(blocks) if blocks else none,
        about={**about, "cost": spent, "error": error},
    )


def found_blocks(measured: ErrorPass) -> int:
    """Blocks along an axis of the maps."""
    return measured.found.mass.shape[-1]


def _row_shares(model: dict[str, Any]) -> list[float]:
    """The share of the steps of a run that take each row."""
    stretches, steps = model["stretches"], model["steps"]
    taken = [stretches[step * len(stretches) // steps] for step in range(steps)]
    return [taken.count(row) / steps for row in range(max(stretches) + 1)]
