"""What the tab Masks offers: patterns with parameters to begin with, as text, and published geometries."""

from __future__ import annotations

import dataclasses
from typing import Any

from dit_accel import patterns
from dit_accel.patterns import Pattern
from dit_accel.patterns.base import StaticPattern
from dit_accel.recipe import files
from dit_accel.recipe.recipe import Recipe

from . import inputs, knobs
from .settings import Caps

START = {  # of parameters that have no default
    "Clear": {"radius": 16},
    "Neighborhood": {"window": (24, 24), "stride": (4, 4)},
    "SlidingTile": {"window": (1, 3, 3), "tile": (1, 8, 8)},
    "InwardWindow": {"half_window": (12, 12)},
    "SpatialHead": {"keep": 0.5},  # of a picture: text alone takes a quarter
    "TemporalHead": {"keep": 0.5},
    "ByNoise": {"levels": {0.8: patterns.Clear(24), 0: patterns.Clear(8)}},
}
START_OF_VIDEO = {
    "ByNoise": {"levels": {0.9: patterns.Dense(), 0.6: patterns.Radial(0.95), 0: patterns.Radial(0.2)}},
    "Neighborhood": {"window": (5, 20, 20), "stride": (1, 4, 4)},
    "SlidingTile": {"window": (3, 3, 3), "tile": (6, 8, 8)},
    "SpatialHead": {},
    "TemporalHead": {},
}


def pattern_names() -> list[str]:
    """Patterns of the library with a mask that is known from the grid alone, and something to begin with."""
    found = (getattr(patterns, name) for name in patterns.__all__)
    static = [cls for cls in found if dataclasses.is_dataclass(cls) and issubclass(cls, StaticPattern)]
    names = [cls.__name__ for cls in static if cls.__name__ in START or not _needs_values(cls)]
    return [*(name for name in names if name != "Dense"), "Dense"]


def _needs_values(cls: type[Pattern]) -> bool:
    """Whether a pattern has parameters without a default."""
    none = dataclasses.MISSING
    return any(f.default is none and f.default_factory is none for f in dataclasses.fields(cls))


def geometries() -> dict[str, tuple[str, knobs.Grid, int]]:
    """Name, grid and text tokens of published models at their usual size, by what the page calls them."""
    from dit_accel.planning.model_config import all_published

    from .examples import grid_of

    found = {}
    for name, config in all_published().items():
        grid, (frames, height, width) = grid_of(config, config.size), config.size
        label = f"{name}  {width}×{height}" + (f"×{frames}" if frames > 1 else "")
        found[label] = (name, grid, config.layout(grid).text_len)
    return found


def starting_pattern(name: str, grid: knobs.Grid) -> Pattern:
    """A pattern with parameters to begin with, on a grid."""
    given = {**START, **(START_OF_VIDEO if grid[0] > 1 else {})}.get(name, {})
    fitted = {
        key: tuple(min(n, side) for n, side in zip(value, grid[-len(value) :], strict=True))
        if isinstance(value, tuple)
        else value
        for key, value in given.items()
    }
    return getattr(patterns, name)(**fitted)


def written(pattern: Pattern) -> str:
    """Its parameters as the text that `read` takes."""
    data = Recipe(pattern).to_dict()["attention"]
    return ", ".join(f"{key}: {value}" for key, value in data.items() if key != "pattern").replace("'", "")


def read(name: Any, parameters: Any, caps: Caps) -> Any:
    """The pattern of a name and its parameters, `radius: 16, downsample: 2`."""
    if name not in pattern_names():
        raise ValueError(f"Pattern must be one of {', '.join(pattern_names())}.")
    text = inputs.text("Parameters", parameters, caps.recipe).strip().removeprefix("{").removesuffix("}")
    values = files.parse("{" + text + "}") if text else {}
    return knobs.first_pattern(Recipe.from_dict({"attention": {**values, "pattern": name}}))


def checked_grid(frames: Any, rows: Any, columns: Any, caps: Caps) -> knobs.Grid:
    """Frames, rows and columns of tokens that a visitor gave; ValueError beyond what the page takes."""
    sides = (("Frames", frames), ("Rows", rows), ("Columns", columns))
    frames, rows, columns = (inputs.whole(name, value, 1, 4096) for name, value in sides)
    if frames * rows * columns > caps.tokens:
        raise ValueError(f"This page takes up to {caps.tokens} tokens; take a smaller grid.")
    return frames, rows, columns
