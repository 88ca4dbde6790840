"""Defaults and example prompts of the models: of bundled ones from what they were trained on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING

from dit_accel.pipelines import tiny
from dit_accel.pipelines.tiny.evaluate import held_out_scenes
from dit_accel.recipe.recipe import Recipe, presets

from .knobs import Grid

if TYPE_CHECKING:
    from dit_accel.planning.model_config import ModelConfig

EXAMPLES = 3


@dataclass(frozen=True)
class Defaults:
    """What the page starts with for a model; None is left to its pipeline."""

    family: str | None
    video: bool
    width: int | None
    height: int | None
    frames: int | None
    steps: int | None
    guidance: float | None
    grid: Grid  # in tokens, which the knobs' ranges follow


def defaults(model: str) -> Defaults:
    """Of a bundled model its demo size; of a folder what its configuration says; of a hub id nothing."""
    from dit_accel.planning.model_config import of_model

    if model in tiny.NAMES:
        info = tiny.INFO[model]
        frames, height, width = info.demo
        grid = grid_of(of_model(model), info.demo)
        shown = frames if info.video else None
        return Defaults(info.family, info.video, width, height, shown, info.steps, info.guidance, grid)
    try:
        config = of_model(model)
    except ValueError:  # a hub id, whose family is known once it is loaded
        return Defaults(None, False, None, None, None, None, None, (21, 64, 64))
    frames, height, width = config.size
    video = config.video
    grid = grid_of(config, config.size)
    return Defaults(config.family, video, width, height, frames if video else None, config.steps, None, grid)


@cache
def grid_of(config: ModelConfig, size: Grid) -> Grid:
    """The token grid of a size, from the configuration alone: a transformer takes seconds to import."""
    return config.grid(SimpleNamespace(config=SimpleNamespace(**config.config)), size)


def prompts(model: str) -> list[str]:
    """Held-out captions of a bundled model's scenes; for other models something to begin with."""
    if model not in tiny.NAMES:
        return ["A lighthouse on a cliff at dusk, waves below", "A fox walking through fresh snow"]
    info = tiny.INFO[model]
    return [tiny.caption(scene) for scene in held_out_scenes(EXAMPLES, video=info.video)]


def recipes(model: str, family: str | None) -> dict[str, Recipe]:
    """Presets for a model: those made for it by name, else those of its family for published models."""
    of_family = presets(family) if family else presets()
    own = {name: recipe for name, recipe in of_family.items() if name.startswith(f"{model}-")}
    return own or {name: recipe for name, recipe in of_family.items() if not name.startswith("tiny-")}
