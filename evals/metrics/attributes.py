"""Attribute accuracy of a bundled model: does the picture show what the caption says?

Captions of the bundled scenes name a colour, a shape, a position, a background and, in videos, a motion; a
rule-based checker reads them back from the pixels, so quality under a recipe is a count of hits.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_accel.recipe.recipe import Recipe


def check_bundled(model: str) -> None:
    """Refuses models whose captions cannot be checked by rule.

    Raises:
        ValueError: `model` is not bundled.
    """
    from dit_accel.pipelines import tiny

    if model not in tiny.NAMES:
        raise ValueError(
            f"attributes are checked for the bundled models only: {', '.join(tiny.NAMES)}; got {model!r}"
        )


def evaluate(pipe: DiffusionPipeline, recipe: Recipe | None = None, **options: Any) -> dict[str, Any]:
    """Accuracy of a bundled model's pipeline, dense or under `recipe`, and the density of its last batch.

    `options` go to `dit_accel.pipelines.tiny.attribute_accuracy`.
    """
    from dit_accel import accelerated
    from dit_accel.pipelines.tiny import attribute_accuracy

    with accelerated(pipe, recipe) if recipe else nullcontext() as handle:
        result = attribute_accuracy(pipe, **options)
    return {"run_density": handle.run_density if handle else 1.0, **result}
