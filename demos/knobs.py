"""The numbers of a pattern that matter most, as sliders: how far it reaches, how much it keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dit_accel.arguments import is_integer, is_number
from dit_accel.kernels import quantizations
from dit_accel.patterns import Dense, Pattern
from dit_accel.recipe.recipe import Recipe

KNOBS = 3  # sliders that a tab has for this
_REACH = ("window", "half_window", "radius")
_AXES = ("frames", "rows", "columns")
Grid = tuple[int, int, int]
AS_GIVEN = "as the model has them"
NUMBERS = (AS_GIVEN, *quantizations())  # in which attention is multiplied


@dataclass(frozen=True)
class Knob:
    """A slider for one number: a field of a pattern, or one axis of it."""

    label: str
    field: str
    axis: int | None
    least: float
    most: float
    step: float
    value: float


def knobs(pattern: Pattern, grid: Grid) -> list[Knob]:
    """At most `KNOBS`, on a grid of (frames, rows, columns) tokens; none where there is no such number."""
    found = [knob for f in dataclasses.fields(pattern) for knob in _of_field(pattern, f.name, grid)]
    return found[:KNOBS]


def _of_field(pattern: Pattern, name: str, grid: Grid) -> list[Knob]:
    value = getattr(pattern, name)
    label = name.replace("_", " ")
    if name in _REACH and isinstance(value, tuple) and all(map(is_integer, value)):
        axes = range(3 - len(value), 3)
        return [
            Knob(f"{label}, {_AXES[axis]}", name, i, 1, max(grid[axis], n), 1, n)
            for i, (axis, n) in enumerate(zip(axes, value, strict=True))
            if grid[axis] > 1 or n > 1
        ]
    if name in _REACH and is_number(value):
        return [Knob(label, name, None, 1, max(*grid, value), 1, value)]
    if isinstance(value, float) and 0 < value <= 1:
        return [Knob(label, name, None, 0.02, 1, 0.01, value)]
    return []


def sliders(pattern: Pattern | None, grid: Grid) -> list[dict[str, Any]]:
    """Options of a tab's `KNOBS` sliders for a pattern; those without a knob are hidden."""
    found = [] if pattern is None else knobs(pattern, grid)
    shown = [
        {
            "minimum": k.least,
            "maximum": k.most,
            "value": k.value,
            "step": k.step,
            "label": k.label.capitalize(),
        }
        for k in found
    ]
    hidden = [{}] * (KNOBS - len(found))
    return [{**look, "visible": bool(look)} for look in (*shown, *hidden)]


def turned(pattern: Pattern, grid: Grid, values: Sequence[Any]) -> Pattern:
    """The pattern with its knobs at these values, None leaving one where it is.

    Raises:
        ValueError: what the pattern refuses.
    """
    changes: dict[str, Any] = {}
    for knob, value in zip(knobs(pattern, grid), values, strict=False):
        if not is_number(value) or value == knob.value:
            continue
        value = int(value) if float(value).is_integer() and knob.step == 1 else float(value)
        if knob.axis is None:
            changes[knob.field] = value
        else:
            whole = list(changes.get(knob.field, getattr(pattern, knob.field)))
            whole[knob.axis] = value
            changes[knob.field] = tuple(whole)
    return dataclasses.replace(pattern, **changes) if changes else pattern


def numbers_of(recipe: Recipe) -> str:
    """The choice of `NUMBERS` that a recipe stands at; of several formats none."""
    return recipe.quantization if isinstance(recipe.quantization, str) else AS_GIVEN


def with_numbers(recipe: Recipe | None, numbers: str) -> Recipe | None:
    """The recipe, or dense attention, with one of `NUMBERS`; the same object if nothing changes."""
    format = None if numbers == AS_GIVEN else numbers
    if recipe is None:
        return None if format is None else Recipe(Dense(), quantization=format)
    answer = dataclasses.replace(recipe, quantization=format)
    return recipe if answer == recipe else dataclasses.replace(answer, name="", source="")


def first_pattern(recipe: Recipe) -> Pattern:
    """The pattern that the knobs turn: of several, that of the first selector."""
    attention = recipe.attention
    return next(iter(attention.values())) if isinstance(attention, Mapping) else attention


def with_pattern(recipe: Recipe, pattern: Pattern, dense_steps: int) -> Recipe:
    """The recipe with its first pattern and its dense steps replaced; the same object if nothing changes."""
    attention = recipe.attention
    if isinstance(attention, dict):
        first = next(iter(attention))
        changed = {**attention, first: pattern}
    else:
        changed = pattern
    answer = dataclasses.replace(recipe, attention=changed, dense_steps=dense_steps)
    return recipe if answer == recipe else dataclasses.replace(answer, name="", source="")
