"""What a visitor or client sends, checked on the server: whatever the page itself would have allowed."""

from __future__ import annotations

from typing import Any

from dit_accel.arguments import is_integer, is_number, shown
from dit_accel.generation import Request
from dit_accel.pipelines import tiny
from dit_accel.recipe import files
from dit_accel.recipe.recipe import Recipe, presets
from dit_accel.seeds import LARGEST_OPTION

from .knobs import NUMBERS
from .settings import Caps, Settings

DENSE = "dense"
# no backend, no adapter: nothing that names a file or compiles something on a visitor's word
_RECIPE_KEYS = (
    *("name", "family", "source", "attention", "dense_layers", "dense_steps", "guidance", "guard"),
    *("block_size", "order", "min_tokens", "tail", "quantization"),
)
_PATTERN_FILES = ("calibration", "adapter", "path")


def model(settings: Settings, name: Any) -> str:
    """A model of the list that the demo was started with; nothing else is loaded."""
    if name not in settings.models:
        raise ValueError(f"Model must be one of {', '.join(settings.models)}, got {shown(name)}.")
    return name


def whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number within bounds."""
    if is_number(value) and float(value).is_integer():
        value = int(value)
    if not is_integer(value) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {shown(value)}.")
    return value


def whole_or_none(name: str, value: Any, least: int, most: int) -> int | None:
    """A whole number within bounds; None for what is empty or 0."""
    return None if value in (None, "", 0) else whole(name, value, least, most)


def number(name: str, value: Any, least: float, most: float, optional: bool = False) -> float | None:
    """A number within bounds; empty is None where that is allowed."""
    if optional and value in (None, ""):
        return None
    if not is_number(value) or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {shown(value)}.")
    return float(value)


def numbers(value: Any) -> str:
    """A choice of numbers that attention multiplies."""
    if value not in NUMBERS:
        raise ValueError(f"Numbers must be one of {', '.join(NUMBERS)}, got {shown(value)}.")
    return value


def text(name: str, value: Any, most: int) -> str:
    """Text of a length."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {shown(value)}.")
    if len(value) > most:
        raise ValueError(f"{name} must have at most {most} characters, got {len(value)}.")
    return value


def request(
    settings: Settings,
    name: str,
    prompt: Any,
    width: Any = None,
    height: Any = None,
    frames: Any = None,
    steps: Any = None,
    guidance: Any = None,
    seed: Any = 0,
) -> Request:
    """What to generate, within the caps; what is empty is left to the model."""
    caps = settings.caps
    prompt = text("Prompt", prompt, caps.prompt)
    if not prompt.strip():
        raise ValueError("Write a prompt, or take one of the examples.")
    asked = Request(
        prompt,
        whole_or_none("Width", width, 16, caps.side),
        whole_or_none("Height", height, 16, caps.side),
        whole_or_none("Frames", frames, 1, caps.frames),
        whole_or_none("Steps", steps, 1, caps.steps),
        number("Guidance", guidance, 0, 100, optional=True),
        whole("Seed", seed, 0, LARGEST_OPTION),
    ).with_defaults(name, "native")
    pixels = (asked.width or 1) * (asked.height or 1) * (asked.frames or 1)
    if pixels > caps.pixels:
        raise ValueError(
            f"{asked.width} x {asked.height} pixels in {asked.frames or 1} frames are more than this demo "
            "makes; take a smaller size or fewer frames."
        )
    if name in tiny.NAMES and not tiny.INFO[name].video and asked.frames is not None:
        raise ValueError(f"{name} makes images; leave Frames empty.")
    return asked


def recipe(value: Any, caps: Caps) -> Recipe | None:
    """A preset's name or a recipe's text in YAML; None for dense. Nothing in it may name a file."""
    value = text("Recipe", value, caps.recipe).strip()
    if value in ("", DENSE):
        return None
    if value in presets():
        return presets()[value]
    data = files.parse(value)
    if not isinstance(data, dict):
        raise ValueError(f"A recipe is a mapping with `attention`, or a preset's name, got {shown(value)}.")
    for key in data:
        if key not in _RECIPE_KEYS:
            raise ValueError(
                f"Recipes of this demo have the keys {', '.join(_RECIPE_KEYS)}, got {shown(key)}."
            )
    if isinstance(data.get("guidance"), str):
        raise ValueError("Write the guidance out: this demo opens no files.")
    _refuse_files(data.get("attention", {}))
    return Recipe.from_dict(data)


def _refuse_files(value: Any) -> None:
    """Refuses parameters of patterns that name a file."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in _PATTERN_FILES or (value.get("pattern") == "Calibrated" and key != "pattern"):
                raise ValueError(f"{shown(key)} names a file, and this demo opens none.")
            _refuse_files(item)
    elif isinstance(value, list):
        for item in value:
            _refuse_files(item)
