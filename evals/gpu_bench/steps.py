"""One step of whole transformers in the GPU benchmark: published configurations, random weights.

Dense is the model as diffusers runs it; every recipe of its family runs on a copy that shares its weights.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from dit_accel.errors import UnavailableError
from dit_accel.patterns import Neighborhood
from dit_accel.planning.model_config import ModelConfig, Size, all_published
from dit_accel.recipe.recipe import Recipe, presets
from dit_accel.runtime import switching as switch

from .attention import dtype_on
from .job import Row
from .timing import measure


@dataclass(frozen=True)
class Step:
    """A model at a size: frames, height, width in pixels; `recipes` in place of its family's presets."""

    model: ModelConfig
    size: Size
    recipes: Mapping[str, Recipe] | None = None

    @property
    def name(self) -> str:
        frames, height, width = self.size
        return f"{self.model.name} {width}x{height}" + (f"x{frames}" if self.model.video else "")


def _step(name: str, *size: int) -> Step:
    model = all_published()[name]
    return Step(model, size or model.size)


STEPS = (  # the most informative first
    _step("wan2.1-1.3b", 81, 480, 832),
    _step("flux.1-dev", 1, 2048, 2048),
    _step("hunyuan-video", 129, 720, 1280),
    _step("flux.1-dev", 1, 4096, 4096),
    _step("wan2.1-14b", 81, 720, 1280),
    _step("flux.1-dev", 1, 1024, 1024),
    _step("sd3.5-large", 1, 1024, 1024),
)
_SMALL_WAN = ModelConfig(
    "small-wan", "wan",
    {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
     "freq_dim": 8, "ffn_dim": 40, "num_layers": 2},
    (4, 8), 7, (9, 96, 128), 10,
)  # fmt: skip
REHEARSAL = (Step(_SMALL_WAN, _SMALL_WAN.size, {"near": Recipe(Neighborhood((3, 3, 5)))}),)
BY_NAME = {step.name: step for step in (*STEPS, *REHEARSAL)}


def recipes_for(step: Step) -> dict[str, Recipe]:
    """The presets of the model's family, without those for the bundled models and those by noise level.

    What the latter compute at a step is what another preset does.
    """
    if step.recipes is not None:
        return dict(step.recipes)
    family = presets(step.model.family)
    return {name: r for name, r in family.items() if not (name.startswith("tiny-") or r.needs_noise)}


def random_transformer(model_config: ModelConfig, device: str, dtype: torch.dtype) -> nn.Module:
    """The real class with random weights: of standard deviation 0.02, and 1 in norms.

    Weights are made on the device in their dtype, one by one: nothing larger than the model is held.
    """
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):  # buffers hold tables that the constructor computes
        model = getattr(diffusers, model_config.description.transformer)(**model_config.config)
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            value = torch.empty(empty.shape, device=device, dtype=dtype)
            norm = name == "weight" and value.ndim == 1
            value = value.fill_(1) if norm else value.normal_(0, 0.02, generator=generator)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return model.to(device).eval()


def share(model: nn.Module) -> nn.Module:
    """A copy of a model with the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def run(device: str, step: str) -> Iterator[Row]:
    """Times a dense step, then a sparse one under each recipe of the family: a row each."""
    for package in ("diffusers", "accelerate", "yaml"):
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(f"whole transformers need {package}, which is not installed")
    yield from compare(BY_NAME[step], recipes_for(BY_NAME[step]), device, dtype_on(device))


def compare(step: Step, recipes: Mapping[str, Recipe], device: str, dtype: torch.dtype) -> Iterator[Row]:
    """The rows: times, densities of a sparse step over all layers; or why a recipe does not fit this size."""
    dense = random_transformer(step.model, device, dtype)
    generator = torch.Generator(device).manual_seed(0)

    def fill(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    inputs = step.model.inputs(dense, step.model.grid(dense, step.size), fill)
    row = {"kind": "step", "step": step.name, "dtype": str(dtype).removeprefix("torch.")}
    dense(**inputs)
    yield {**row, "recipe": None, **measure(partial(dense, **inputs), device).as_row()}
    for name, recipe in recipes.items():
        sparse = share(dense)
        with switch.accelerated(sparse, dataclasses.replace(recipe, dense_steps=0)) as handle:
            try:
                sparse(**inputs)
            except ValueError as error:
                yield {"kind": "left out", "recipe": name, "reason": str(error)}
                continue
            densities = {"density": handle.run_density, "block_density": handle.run_block_density}
            timed = measure(partial(sparse, **inputs), device)
        yield {**row, "recipe": name, **densities, **timed.as_row()}
