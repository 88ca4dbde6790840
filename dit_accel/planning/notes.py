"""What the predictions of a plan rest on, in words."""

from __future__ import annotations

from dit_accel.runtime.binding import Binding
from dit_accel.runtime.measured_speed import MeasuredSpeed

from .densities import EXACT_UP_TO
from .model_config import ModelConfig


def notes_of(
    model_config: ModelConfig,
    binding: Binding,
    rates: MeasuredSpeed,
    tokens: int,
    sampled: str,
    device: str,
) -> tuple[str, ...]:
    """What is measured, estimated, assumed and not counted, a sentence each."""
    notes = []
    if model_config.description.planned_call:
        notes.append(f"of {model_config.description.planned_call}")
    if sampled:
        notes.append(
            f"block densities are estimated from {sampled} query blocks: masks of more than {EXACT_UP_TO} "
            "tokens are not built for a plan"
        )
    if rates.efficiency is None:
        notes.append(
            f"{rates.source}: only ideal speed-ups are given, with blocks at the cost of dense attention's"
        )
    else:
        least, middle, most = rates.efficiency
        notes.append(
            f"attention from a measured speed-up x block density of {middle:.2f} ({least:.2f} to {most:.2f}; "
            f"{rates.source}): it pays below a block density of {middle:.2f}"
        )
        if tokens < rates.shortest:
            notes.append(
                f"{tokens} tokens are fewer than were measured for this (at least {rates.shortest}): what is "
                "predicted for attention may be far off"
            )
    if rates.rest is None:
        notes.append(
            f"the rest of a step is not measured for {model_config.name}: "
            "it is assumed to run at dense attention's FLOP/s"
        )
    else:
        notes.append(f"the rest of a step runs at {rates.rest:.2f} of dense attention's FLOP/s, as measured")
    if rates.another_machine:
        notes.append(f"speeds were measured {rates.where}")
    notes.append(rates.describe_break_even())
    formats = dict.fromkeys(layer.quantization for layer in binding.layers if layer.quantization)
    gains = dict(rates.gains)
    for name in formats:
        if name in gains:
            how = f"{gains[name]:.2f} times as fast as none, as measured {rates.where}"
        else:
            measure = "; `dit-accel bench --calibrate` measures what this CPU computes"
            how = "if it took as long as none: not measured" + (measure if device == "cpu" else "")
        notes.append(f"quantization in {name!r} is counted as {how}".rstrip())
    notes += [note for pattern in binding.recipe.patterns for note in pattern.notes]
    used = (variant for layer in binding.layers for p in layer.patterns for variant in p.variants)
    if any(variant.online and variant.blocks for variant in used):
        notes.append("what it takes to choose by content in each call is not counted")
    if model_config.transformers > 1:
        notes.append(
            f"{model_config.transformers} transformers of this size, one at each step; memory is of one"
        )
    return tuple(notes)
