"""How many times faster than dense a recipe makes attention, a step and a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dit_accel.recipe.layer_patterns import LayerPatterns
from dit_accel.runtime.binding import Binding
from dit_accel.runtime.measured_speed import MeasuredSpeed

from .densities import LayerDensities
from .model_config import Flops

ASSUMED_REST = 1.0


@dataclass(frozen=True)
class Speedup:
    """How many times faster than dense: what is predicted, its range, and the ideal.

    `low`, `predicted` and `high` follow the least, median and most efficiency measured, and are None where
    none is; `ideal` is for an efficiency of 1, whatever was measured.
    """

    low: float | None
    predicted: float | None
    high: float | None
    ideal: float


class AtSteps(NamedTuple):
    """What `steps` sampler steps do alike."""

    found: LayerDensities
    layers: list[LayerPatterns]
    steps: int


def flops_beside(binding: Binding, of_steps: list[AtSteps], flops: Flops) -> float:
    """FLOPs of a mean step's call that patterns compute beside pairs of tokens."""
    found = 0.0
    for at, _, steps in of_steps:
        rows = zip(binding.layers, at.attentions or (), at.layouts, strict=at.attentions is not None)
        for layer, attention, layout in rows:
            if attention is not None:
                share = attention.pairs_beside(binding.sizes[layer.name]) / layout.pairs
                found += flops.layers[layer.name] * share * steps
    return found / sum(at.steps for at in of_steps)


def speedups(
    binding: Binding,
    of_steps: list[AtSteps],
    flops: Flops,
    rates: MeasuredSpeed,
    dense_share: float,
    lora: int = 0,
) -> dict[str, Speedup]:
    """Of attention in the sparse layers, of a sparse step, and of a run with its dense steps.

    `lora` are the FLOPs of an adapter, which the dense run that is compared with does without.
    """
    # FLOPs of a mean step; of calls those that dense attention makes in their fixed time, of `own` those of
    # layers that are sparse at other steps; `timed` is `paid` where numbers of few bits take less time
    sparse = paid = timed = calls = own = 0.0
    gains = dict(rates.gains)
    total = sum(at.steps for at in of_steps)
    for i, layer in enumerate(binding.layers):
        if not any(at.found.sparse[i] for at in of_steps):
            continue
        full = flops.layers[layer.name]
        sparse += full
        for found, _, steps in of_steps:
            share = full * steps / total
            if found.sparse[i]:
                paid += share * found.block_densities[i]
                timed += share * found.block_densities[i] / gains.get(layer.quantization or "", 1.0)
                calls += rates.fixed * share / (binding.heads * found.layouts[i].pairs)
            else:
                own += share
    rest = rates.rest or ASSUMED_REST
    kept, more = flops.attention - sparse + flops.rest / rest, lora / rest
    beside = flops_beside(binding, of_steps, flops) / rest

    def at(efficiency: float, paid: float, calls: float) -> tuple[float, float, float]:
        attention = sparse / (paid / efficiency + calls + own + beside) if paid + beside else 1.0
        dense = sparse + kept
        step = dense / (paid / efficiency + calls + own + beside + kept + more)
        return attention, step, 1 / (dense_share * (dense + more) / dense + (1 - dense_share) / step)

    measured_ones = rates.efficiency or ()
    answers = [at(efficiency, timed, calls) for efficiency in measured_ones] or [(None,) * 3] * 3
    return {
        name: Speedup(*(values[i] for values in answers), ideal=at(1.0, paid, 0.0)[i])
        for i, name in enumerate(("attention", "step", "run"))
    }
