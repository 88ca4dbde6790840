"""One step of whole transformers in the GPU benchmark: published configurations, random weights.

Dense is the model as diffusers runs it; every recipe of its family runs on a copy that shares its weights.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .. import switch
from ..blueprint import PUBLISHED, Blueprint, Size
from ..recipe import Recipe
from .scaling import Timer, Times
from .table import row

HEADINGS = ("model", "size", "recipe", "density", "block density", "dense ms", "sparse ms", "speed-up")


@dataclass(frozen=True)
class Step:
    """A model at a size: frames, height, width in pixels."""

    blueprint: Blueprint
    size: Size

    @property
    def name(self) -> str:
        frames, height, width = self.size
        return f"{self.blueprint.name} {width}x{height}" + (f"x{frames}" if self.blueprint.video else "")


def _step(name: str, *size: int) -> Step:
    blueprint = next(blueprint for blueprint in PUBLISHED if blueprint.name == name)
    return Step(blueprint, size or blueprint.size)


STEPS = (
    _step("flux.1-dev", 1, 1024, 1024),
    _step("flux.1-dev", 1, 2048, 2048),
    _step("flux.1-dev", 1, 4096, 4096),
    _step("sd3.5-large", 1, 1024, 1024),
    _step("hunyuan-video", 129, 720, 1280),
    _step("wan2.1-14b", 81, 720, 1280),
    _step("wan2.1-1.3b", 81, 480, 832),
)


@dataclass(frozen=True)
class Result:
    """One recipe on one model: densities of a sparse step, all layers, and the times of a call."""

    step: Step
    recipe: str
    dtype: torch.dtype
    density: float
    block_density: float
    dense: Times
    sparse: Times

    @property
    def speedup(self) -> float:
        return self.dense[1] / self.sparse[1]

    def rows(self, here: dict, device: str) -> Iterator[dict[str, str]]:
        """Rows of `bench_<device>.csv`."""
        shape = f"{self.step.name} {self.recipe} {str(self.dtype).removeprefix('torch.')}"
        write = partial(row, "step", here=here, device=device)
        yield write("dense", "ms", shape, self.dense)
        yield write("auto", "ms", shape, self.sparse)
        for metric in ("density", "block_density", "speedup"):
            yield write("auto", metric, shape, getattr(self, metric))

    def cells(self) -> list[str]:
        """The row of the table."""
        model, size = self.step.name.split(" ")
        numbers = [f"{self.density:.4f}", f"{self.block_density:.4f}"]
        times = [f"{self.dense[1]:.1f}", f"{self.sparse[1]:.1f}", f"{self.speedup:.2f}"]
        return [model, size, self.recipe, *numbers, *times]


def random_transformer(blueprint: Blueprint, device: str, dtype: torch.dtype) -> nn.Module:
    """The real class with random weights: of standard deviation 0.02, and 1 in norms.

    Weights are made on the device in their dtype, one by one: nothing larger than the model is held.
    """
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):  # buffers hold tables that the constructor computes
        model = getattr(diffusers, blueprint.description.transformer)(**blueprint.config)
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


def measure(
    step: Step, recipes: Mapping[str, Recipe], device: str, dtype: torch.dtype, timer: Timer
) -> Iterator[Result | str]:
    """Times a sparse step under each recipe against a dense one, in turn.

    Yields:
        a `Result`, or a line that names a recipe and why it does not fit this size.
    """
    dense = random_transformer(step.blueprint, device, dtype)
    generator = torch.Generator(device).manual_seed(0)

    def fill(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    inputs = step.blueprint.inputs(dense, step.blueprint.grid(dense, step.size), fill)
    for name, recipe in recipes.items():
        sparse = share(dense)
        with switch.accelerated(sparse, dataclasses.replace(recipe, dense_steps=0)) as handle:
            try:
                sparse(**inputs)
            except ValueError as error:
                yield f"{step.name}, {name}: left out, {error}"
                continue
            densities = handle.run_density, handle.run_block_density
            times = timer(partial(dense, **inputs), partial(sparse, **inputs))
        yield Result(step, name, dtype, *densities, *times)
