"""One generation: what was asked against what a pipeline can do, the run, and the time of its steps."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import TYPE_CHECKING, Any, Literal

from . import seeds
from .masks.layout import TokenLayout

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline

    from .recipe.recipe import Recipe

DENSE = "dense"  # what runs without a recipe are called


@dataclass(frozen=True)
class Request:
    """What to generate; None leaves the choice to the pipeline."""

    prompt: str
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    max_sequence_length: int | None = None

    def __post_init__(self):
        seeds.check_seed(self.seed)

    def with_defaults(self, model: str, size: Literal["native", "demo"]) -> Request:
        """Fills what is None for a bundled model; other models keep their pipelines' defaults."""
        from .pipelines import tiny

        if model not in tiny.NAMES:
            return self
        info = tiny.INFO[model]
        frames, height, width = getattr(info, size)
        defaults = {
            "width": width,
            "height": height,
            "frames": frames if frames > 1 else None,
            "steps": info.steps,
            "guidance": info.guidance,
            "max_sequence_length": info.max_sequence_length,
        }
        return replace(
            self, **{name: value for name, value in defaults.items() if getattr(self, name) is None}
        )

    def with_steps(self, pipe: DiffusionPipeline) -> Request:
        """Makes the pipeline's own default number of steps explicit."""
        default = inspect.signature(pipe.__call__).parameters["num_inference_steps"].default
        return self if self.steps else replace(self, steps=default)

    def arguments(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """Keyword arguments of a call of `pipe`.

        Guidance of a FLUX or Qwen-Image transformer that does not take a scale itself is a second,
        unconditional call.
        """
        distilled = getattr(transformers(pipe)[0].config, "guidance_embeds", True)
        distilled |= "true_cfg_scale" not in inspect.signature(pipe.__call__).parameters
        scale = "guidance_scale" if distilled else "true_cfg_scale"
        unconditional = {"negative_prompt": ""} if not distilled and (self.guidance or 0) > 1 else {}
        named = {
            "width": self.width,
            "height": self.height,
            "num_frames": self.frames,
            "num_inference_steps": self.steps,
            scale: self.guidance,
            "max_sequence_length": self.max_sequence_length,
        }
        given = {name: value for name, value in named.items() if value is not None}
        return (
            {"prompt": self.prompt, "generator": seeds.generator(self.seed), "output_type": "np"}
            | given
            | unconditional
        )


def load(model: str, dtype: torch.dtype, device: torch.device) -> DiffusionPipeline:
    """`pipelines.load` in a number format and on a device; progress bars only where someone watches."""
    import diffusers
    from transformers.utils import logging

    from . import pipelines

    logging.set_verbosity_error()  # it warns of torchvision, which nothing here needs
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        diffusers.utils.logging.disable_progress_bar()
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    option = "dtype" if version >= (0, 42) else "torch_dtype"
    return pipelines.load(model, **{option: dtype}).to(device)


def is_video(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline makes videos: its call takes a number of frames."""
    return "num_frames" in inspect.signature(pipe.__call__).parameters


def transformers(pipe: DiffusionPipeline) -> list:
    """The denoisers of a pipeline: one, or two in Wan 2.2."""
    return [part for part in (pipe.transformer, getattr(pipe, "transformer_2", None)) if part is not None]


def size_multiple(pipe: DiffusionPipeline) -> tuple[int, int]:
    """What height and width must be multiples of: pixels per token."""
    from .pipelines.families import families

    scale = getattr(pipe, "vae_scale_factor_spatial", None) or pipe.vae_scale_factor
    transformer = transformers(pipe)[0]
    family = next((family for family in families() if family.matches(transformer)), None)
    if family is not None:
        _, rows, columns = family.patch(transformer.config)
        return scale * rows, scale * columns
    patch = getattr(transformer.config, "patch_size", 1)
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
    packed = 2 if hasattr(pipe, "_pack_latents") else 1  # 2 x 2 latents outside its transformer
    return scale * patch[0] * packed, scale * patch[1] * packed


def check_request(pipe: DiffusionPipeline, request: Request) -> None:
    """Refuses sizes that the pipeline would round, too many tokens, and frames for an image model.

    Raises:
        ValueError: naming the nearest sizes that would do, or the limit (`masks.layout.MOST_TOKENS`).
    """
    multiples = size_multiple(pipe)
    for name, value, multiple in zip(
        ("height", "width"), (request.height, request.width), multiples, strict=True
    ):
        if value is not None and value % multiple:
            lower = max(multiple, value // multiple * multiple)
            raise ValueError(
                f"`--size`: {name} must be a multiple of {multiple} for this model, got {value}; "
                f"try {lower} or {(value // multiple + 1) * multiple}"
            )
    _check_frames(pipe, request)
    frames = (request.frames or 1) - 1
    sides = ((side or n) // n for side, n in zip((request.height, request.width), multiples, strict=True))
    TokenLayout((frames // getattr(pipe, "vae_scale_factor_temporal", 1) + 1, *sides))  # refuses too many


def _check_frames(pipe: DiffusionPipeline, request: Request) -> None:
    if request.frames is None:
        return
    if not is_video(pipe):
        raise ValueError(f"`--frames` is for video models, and {type(pipe).__name__} makes images")
    multiple = getattr(pipe, "vae_scale_factor_temporal", 1)
    if (request.frames - 1) % multiple:
        lower = (request.frames - 1) // multiple * multiple + 1
        raise ValueError(
            f"`--frames` must be a multiple of {multiple} plus 1 for this model, got {request.frames}; "
            f"try {lower} or {lower + multiple}"
        )


@dataclass(frozen=True)
class Run:
    """A finished generation and how long it took."""

    frames: np.ndarray  # uint8, (frames, height, width, 3)
    seconds: float  # the whole call: text encoding, denoising and decoding
    step_seconds: tuple[float, ...]

    @property
    def first_step_seconds(self) -> float:
        return self.step_seconds[0]

    @property
    def median_step_seconds(self) -> float:
        """Median over all steps but the first, which pays for what later steps reuse."""
        return median(self.step_seconds[1:] or self.step_seconds)


class _StepClock:
    """Notes when denoising starts and when each step ends, waiting for the device each time."""

    def __init__(self, pipe: DiffusionPipeline, on_step: Callable[[int], None] | None = None):
        self.marks: list[float] = []
        self._on_step = on_step
        self._device = pipe._execution_device
        self._hooks = [part.register_forward_pre_hook(self._start) for part in transformers(pipe)]

    def _mark(self) -> None:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.marks.append(time.perf_counter())

    def _start(self, *_: Any) -> None:
        self.remove()
        self._mark()

    def end_of_step(self, pipe: DiffusionPipeline, step: int, timestep: Any, values: dict) -> dict:
        self._mark()
        if self._on_step is not None:
            self._on_step(step + 1)
        return values

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def step_seconds(self) -> tuple[float, ...]:
        return tuple(end - start for start, end in zip(self.marks, self.marks[1:], strict=False))


def execute(
    pipe: DiffusionPipeline,
    request: Request,
    label: str | None,
    on_step: Callable[[int], None] | None = None,
    call: Callable[..., Any] | None = None,
) -> Run:
    """Runs `pipe`, with its own progress bar named `label`, if any, where stderr is a terminal.

    `on_step` is called with the number of finished steps after each; what it raises ends the run. `call` is
    what runs in the place of `pipe`, such as a high-resolution method on it.
    """
    from .media import to_uint8

    pipe.set_progress_bar_config(desc=label, disable=True if label is None else None)
    clock = _StepClock(pipe, on_step)
    start = time.perf_counter()
    try:
        result = (call or pipe)(**request.arguments(pipe), callback_on_step_end=clock.end_of_step)
    finally:
        clock.remove()
    seconds = time.perf_counter() - start
    frames = result.frames[0] if is_video(pipe) else result.images[:1]
    return Run(to_uint8(frames), seconds, clock.step_seconds)


class _Stopped(Exception):
    """Ends a run where its transformer is first called."""


def build_masks(pipe: DiffusionPipeline, request: Request) -> float:
    """Starts a run, stops it where the transformer is first called; returns the seconds its masks took.

    Raises:
        ValueError: a pattern that does not fit this size.
    """
    marks = []

    def start(*_: Any) -> None:
        marks.append(time.perf_counter())

    def stop(*_: Any) -> None:
        marks.append(time.perf_counter())
        raise _Stopped

    hooks = [part.register_forward_pre_hook(start, prepend=True) for part in transformers(pipe)]
    hooks += [part.register_forward_pre_hook(stop) for part in transformers(pipe)]
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe(**request.arguments(pipe))
    except _Stopped:
        return marks[1] - marks[0]
    finally:
        for hook in hooks:
            hook.remove()
    raise RuntimeError(f"{type(pipe).__name__} never called its transformer")


def warm_up(pipe: DiffusionPipeline, request: Request, recipe: Recipe | None = None) -> float:
    """Runs as many steps as it takes to reach a sparse one, and decodes; returns the seconds it took."""
    total = request.steps
    sparse = (step for step in range(total) if recipe and not recipe.is_dense_step(step, total))
    last = next(sparse, 0)

    def stop(pipe: DiffusionPipeline, step: int, timestep: Any, values: dict) -> dict:
        if step >= last:
            pipe._interrupt = True
        return values

    pipe.set_progress_bar_config(disable=True)
    start = time.perf_counter()
    pipe(**request.arguments(pipe), callback_on_step_end=stop)
    return time.perf_counter() - start


@dataclass(frozen=True)
class WarmRun:
    """A run after its warm-up, and the share of pairs that it computed."""

    run: Run
    warm_up_seconds: float
    densities: dict[str, float | None]  # of patterns and of the run, by pairs and by blocks


def attempt(
    pipe: DiffusionPipeline, request: Request, recipe: Recipe | None, label: str | None = None
) -> WarmRun:
    """Warms up and runs, dense where `recipe` is None; `label` as in `execute`.

    Raises:
        ValueError: a model that returns values that are not finite, or frames of one colour, such as black.
    """
    from . import accelerated, summary

    if recipe is None:
        seconds, run = warm_up(pipe, request), execute(pipe, request, label)
        _check_shown(run, DENSE, "another --dtype or more --steps")
        names = ("pattern_density", "block_density", "run_density", "run_block_density")
        return WarmRun(run, seconds, dict.fromkeys(names, 1.0))
    with accelerated(pipe, recipe) as handle:
        seconds, run = warm_up(pipe, request, recipe), execute(pipe, request, label)
        remedy = "another --dtype, or more of `dense_layers` and `dense_steps`"
        _check_shown(run, recipe.name or recipe.tag, remedy)
        of_run = {"run_density": handle.run_density, "run_block_density": handle.run_block_density}
        return WarmRun(run, seconds, _densities(summary(pipe).rows) | of_run)


def _check_shown(run: Run, name: str, remedy: str) -> None:
    """Refuses a picture that nothing can be compared with."""
    from .media import one_colour

    if one_colour(run.frames):
        colour = ", ".join(map(str, run.frames[0, 0, 0]))
        raise ValueError(
            f"{name}: the model returned one colour, RGB ({colour}), in every pixel, and PSNR and SSIM say "
            f"nothing of it; try {remedy}"
        )


def _densities(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Pattern and block density, averaged over the layers that are accelerated; None where not known."""
    answer = {}
    for ours, theirs in (("pattern_density", "density"), ("block_density", "block_density")):
        values = [row[theirs] for row in rows if row["pattern"]]
        answer[ours] = mean(values) if values else None
    return answer


def by_name(recipes: Sequence[Recipe]) -> dict[str, Recipe]:
    """Recipes by their names, or tags where they have none.

    Raises:
        ValueError: two of one name, or one with the name of dense attention.
    """
    named = {recipe.name or recipe.tag: recipe for recipe in recipes}
    if len(named) < len(recipes) or DENSE in named:
        raise ValueError(
            f"`--recipe` must name different recipes, none called {DENSE!r}; got "
            f"{', '.join(recipe.name or recipe.tag for recipe in recipes)}"
        )
    return named
