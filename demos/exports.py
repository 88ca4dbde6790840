"""The recipe, Python and command line that make again what a tab shows."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from dit_accel.generation import Request
from dit_accel.recipe.recipe import Recipe, presets

from .settings import Settings

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Export:
    """Three texts, in the order of `tab.export_area`."""

    recipe: str
    python: str
    command: str

    @property
    def values(self) -> list[str]:
        return [self.recipe, self.python, self.command]


@dataclass(frozen=True)
class Above:
    """How a result above the native size was made: a method of `dit_accel.highres.METHODS`."""

    method: str
    strength: float


def of_run(
    settings: Settings,
    model: str,
    request: Request,
    recipe: Recipe | None,
    fps: int | None,
    above: Above | None = None,
) -> Export:
    """Of a picture, or of a video where it has `fps` frames per second.

    The Python writes the same file as the command. A model that is a folder is written with its whole path.
    """
    out = "picture.png" if fps is None else "video.mp4"
    name = str(Path(model).resolve()) if Path(model).is_dir() else model
    values = {
        "--model": name,
        "--prompt": request.prompt,
        "--size": f"{request.width}x{request.height}" if request.width and request.height else None,
        "--frames": request.frames,
        "--steps": request.steps,
        "--guidance": request.guidance,
        "--seed": request.seed,
        "--device": settings.device,
        "--dtype": settings.dtype_name,
        "--fps": fps,
        "--highres": None if above is None else above.method,
        "--strength": None if above is None else f"{above.strength:g}",
        "--out": out,
    }
    parts = [_option(option, value) for option, value in values.items() if value is not None]
    if recipe is not None:
        parts.insert(2, f"--recipe {_recipe_argument(recipe)}")
    command = " \\\n  ".join(["dit-accel generate", *parts])
    yaml = "# dense: no recipe\n" if recipe is None else recipe.to_yaml()
    python = _python(settings, name, request, recipe, fps, out, above)
    return Export(yaml, python, _with_file(recipe, command))


def _option(option: str, value: object) -> str:
    """With `=`, so that no value is taken for an option."""
    return f"{option}={shlex.quote(str(value))}"


def _is_preset(recipe: Recipe) -> bool:
    return presets().get(recipe.name) == recipe


def _recipe_argument(recipe: Recipe) -> str:
    return recipe.name if _is_preset(recipe) else RECIPE_FILE


def _with_file(recipe: Recipe | None, command: str) -> str:
    """A command after what writes its recipe, if that is none of the presets."""
    if recipe is None or _is_preset(recipe):
        return command + "\n"
    return f"cat > {RECIPE_FILE} <<'END_OF_RECIPE'\n{recipe.to_yaml()}END_OF_RECIPE\n{command}\n"


def recipe_in_python(recipe: Recipe) -> str:
    """An expression for a recipe."""
    if _is_preset(recipe):
        return f"dit_accel.presets()[{recipe.name!r}]"
    lines = "".join(f"    {line!r}\n" for line in recipe.to_yaml().splitlines(keepends=True))
    return f"dit_accel.Recipe.from_yaml(\n{lines})"


def _python(
    settings: Settings,
    name: str,
    request: Request,
    recipe: Recipe | None,
    fps: int | None,
    out: str,
    above: Above | None,
) -> str:
    rate = "" if fps is None else f", fps={fps}"
    enabled = "" if recipe is None else f"dit_accel.enable(pipe, {recipe_in_python(recipe)})\n"
    fields = [f"    {request.prompt!r},\n"]
    for field in ("width", "height", "frames", "steps", "guidance", "seed", "max_sequence_length"):
        if getattr(request, field) is not None:
            fields.append(f"    {field}={getattr(request, field)!r},\n")
    standard, module, way, how = "", "", "", ""
    if above is not None:
        standard, module, how = "from functools import partial\n\n", "highres, ", ", call=way"
        options = f"method={above.method!r}, strength={above.strength:g}"
        way = f"way = partial(highres.generate, pipe, {options})\n"
    return (
        f"{standard}import torch\n\nimport dit_accel\nfrom dit_accel import {module}media\n"
        "from dit_accel.generation import Request, execute, load\n\n"
        f"pipe = load({name!r}, torch.{settings.dtype_name}, torch.device({str(settings.device)!r}))\n"
        f"{enabled}{way}request = Request(\n{''.join(fields)})\n"
        f"media.save({out!r}, execute(pipe, request, None{how}).frames{rate})\n"
    )
