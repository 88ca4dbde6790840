"""The plan of a high-resolution run, which `plan --highres` and `generate --highres ... --plan` print."""

from __future__ import annotations

from typing import Any

import typer

from . import options as opt
from .output import print_json, print_table

SCHEMA = "dit-accel/plan-highres/1"


def give(
    json: bool,
    method: str,
    size: tuple[int, int] | None,
    strength: float | None,
    steps: int | None,
    **options: Any,
) -> None:
    """Plans and prints what a method or preset takes.

    Args:
        options: of `dit_accel.planning.highres.plan_highres`.

    Raises:
        ValueError: no size, or what cannot be.
    """
    from rich.console import Console

    from dit_accel.highres.presets import preset_of
    from dit_accel.planning.highres import plan_highres
    from dit_accel.planning.plan import chosen_model

    preset = preset_of(method)
    if preset is not None:
        model = chosen_model(*(options.get(name) for name in ("model", "family", "variant")))
        preset.check_family(model.family)
        method, strength, steps = preset.method, strength or preset.strength, steps or preset.steps
    if size is None:
        raise ValueError("`--highres` needs `--size`, that of the result")
    options |= {"strength": opt.STRENGTH if strength is None else strength, "steps": steps}
    with Console(stderr=True).status("counting memory and FLOPs, timing attention"):
        answer = plan_highres(method, size=size, **options)
    if json:
        return print_json({"schema": SCHEMA, **answer.to_dict()})
    rows = [
        (
            stage.name,
            pixels(stage.size),
            stage.steps or "",
            stage.calls or "",
            time(stage.seconds),
            memory(stage.peak),
        )
        for stage in answer.stages
    ]
    rows.append(("all", "", "", "", time(answer.seconds), memory(answer.peak)))
    title = f"{answer.method} on {answer.model}, {answer.device}, {answer.dtype}"
    print_table(title, ("stage", "size", "steps", "calls", "time", "peak memory"), rows)
    typer.echo(f"- weights, in every peak: {memory(answer.weights)}")
    for line in answer.notes:
        typer.echo(f"- {line}")
    return None


def pixels(size: tuple[int, int, int]) -> str:
    """A size (frames, height, width) in words."""
    frames, height, width = size
    return f"{width}x{height}" + (f", {frames} frames" if frames > 1 else "")


def time(seconds: float | None) -> str:
    """Seconds in words."""
    if seconds is None:
        return "not known"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def memory(count: int | None) -> str:
    """Bytes in words."""
    if count is None:
        return "not known"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
