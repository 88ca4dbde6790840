"""Options that several commands share, and the checks that need no model."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dit_accel.errors import UnavailableError
from dit_accel.seeds import LARGEST_OPTION

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from dit_accel.recipe.recipe import Recipe

MOST_SAMPLES = 1_000_000
DTYPES = ("auto", "float32", "bfloat16", "float16")

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="A bundled model, a pipeline folder, or a Hugging Face hub id.")
]
PromptOption = Annotated[str, typer.Option("--prompt", "-p", help="What to draw.")]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", "-r", help="A preset's name or a recipe file; dense without.")
]
SizeOption = Annotated[
    str | None, typer.Option("--size", help="WIDTHxHEIGHT in pixels, for example 512x512.")
]
FramesOption = Annotated[int | None, typer.Option("--frames", min=1, max=100_000, help="Frames of a video.")]
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, max=10_000, help="Denoising steps.")]
STRENGTH = 0.7  # of `dit_accel.highres.generate`
StrengthOption = Annotated[
    float | None,
    typer.Option(
        "--strength",
        help=f"With --highres: share of the steps above the trained size; {STRENGTH}, or the preset's.",
    ),
]
GuidanceOption = Annotated[float | None, typer.Option("--guidance", help="Guidance scale.")]


QuantizationOption = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        help="Numeric format of attention in place of the recipe's: int8, int8-fp8, int8-int8, int8-int4 or "
        "none; without a recipe of all layers, dense.",
    ),
]


def with_quantization(recipe: Recipe | None, format: str | None) -> Recipe | None:
    """The recipe in the format that `--quantization` names; of no recipe, one that is dense.

    Raises:
        ValueError: no such format.
    """
    from dit_accel.kernels import quantizations
    from dit_accel.patterns import Dense
    from dit_accel.recipe.recipe import Recipe

    if format is None:
        return recipe
    if format not in ("none", *quantizations()):
        raise ValueError(
            f"`--quantization` must be one of {', '.join(quantizations())} or none, got {format!r}"
        )
    asked = None if format == "none" else format
    if recipe is None:
        return None if asked is None else Recipe(Dense(), quantization=asked)
    name = f"{recipe.name}+{asked or 'unquantized'}" if recipe.name else ""
    return dataclasses.replace(recipe, quantization=asked, name=name)


def seed_option(help: str) -> typer.models.OptionInfo:
    """`--seed`, within the range that commands take."""
    return typer.Option("--seed", min=0, max=LARGEST_OPTION, help=help)


SeedOption = Annotated[int, seed_option("Seed of the initial noise.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help=f"{', '.join(DTYPES)}; auto: bfloat16 on a GPU, else float32.")
]


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`"640x384"` as (width, height)."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)[xX×]([1-9]\d*)", text.strip())
    if not match:
        raise ValueError(f"`--size` must be WIDTHxHEIGHT in pixels, for example 512x512, got {text!r}")
    return int(match[1]), int(match[2])


def check_strength(strength: float | None) -> None:
    """Refuses a strength that leaves nothing, or more than all.

    Raises:
        ValueError: such a strength.
    """
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"`--strength` must be above 0 and at most 1, got {strength}")


def check_guidance(guidance: float | None, option: str = "--guidance") -> None:
    """Refuses a guidance scale that is negative or not finite.

    Raises:
        ValueError: such a scale.
    """
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
        raise ValueError(f"`{option}` must be a number of at least 0, got {guidance}")


def pick_device(text: str) -> torch.device:
    """The device meant by `--device`.

    Raises:
        UnavailableError: a device that this machine does not have.
    """
    import torch

    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"`--device` must be auto, cpu, cuda or cuda:N, got {text!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnavailableError(f"`--device {text}`: torch sees {torch.cuda.device_count()} CUDA devices here")
    if device.type not in ("cpu", "cuda"):
        raise UnavailableError(f"`--device {text}`: only cpu and cuda are supported")
    return device


def pick_shared_device(device: str) -> tuple[torch.device, PartialState]:
    """The device of this process among those that `accelerate launch` started, and their state."""
    from accelerate import PartialState

    target = pick_device(device)
    state = PartialState(cpu=target.type == "cpu")
    shared = target.type == "cuda" and target.index is None and state.num_processes > 1
    if shared and state.device is not None:
        target = state.device
    return target, state


def pick_dtype(text: str, device: torch.device) -> torch.dtype:
    """The number format meant by `--dtype`."""
    import torch

    if text not in DTYPES:
        raise ValueError(f"`--dtype` must be one of {', '.join(DTYPES)}, got {text!r}")
    if text == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, text)


def check_output(path: Path) -> Path:
    """Refuses, before any work, an output path that cannot be written."""
    if path.is_dir():
        raise ValueError(f"`--out` must name a file, got the folder {path}")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"`--out {path}`: {folder} is not a folder")
    return path
