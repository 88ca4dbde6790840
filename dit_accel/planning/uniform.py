"""What one mask in every layer would do to a model's speed, from its block density: no mask is built."""

from __future__ import annotations

from functools import lru_cache

import torch

from dit_accel.patterns import Pattern
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.binding import Binding
from dit_accel.runtime.measured_speed import measured_speed
from dit_accel.runtime.steps import StepTracker

from .densities import LayerDensities
from .model_config import Flops, ModelConfig
from .speedups import AtSteps, Speedup, speedups


def uniform_speedups(
    pattern: Pattern,
    model: ModelConfig,
    grid: tuple[int, int, int],
    density: float,
    block_density: float,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Speedup]:
    """Times faster than dense of `"attention"` and of a `"step"`, with this pattern in all layers and heads.

    What the model computes is counted once for a grid, in seconds; later answers for it take none.

    Args:
        pattern: any.
        model: its configuration.
        grid: of tokens, (F, H, W).
        density, block_density: of the pattern's mask on this grid.
        device, dtype: that speeds are looked up for, see `measured_speed`.

    Raises:
        ValueError: a grid that the transformer refuses.
    """
    transformer, flops = _counted(model, grid)
    rates = measured_speed(device, dtype, model.description.heads(transformer)[1], model.name)
    binding = Binding(
        transformer, model.description, Recipe(pattern), StepTracker(), torch.device("cpu"), rates
    )
    layout, count = model.layout(grid), len(binding.layers)
    found = LayerDensities(
        block_size=(0, 0),
        layouts=[model.description.layer_layout(layer.name, layout) for layer in binding.layers],
        sparse=[pattern.sparse] * count,
        densities=[density] * count,
        block_densities=[block_density] * count,
        dense_reasons=[""] * count,
        orders=(),
    )
    answer = speedups(binding, [AtSteps(found, binding.layers, 1)], flops, rates, dense_share=0.0)
    return {name: answer[name] for name in ("attention", "step")}


@lru_cache(8)
def _counted(model: ModelConfig, grid: tuple[int, int, int]) -> tuple[torch.nn.Module, Flops]:
    transformer = model.transformer()
    return transformer, model.flops(transformer, grid)
