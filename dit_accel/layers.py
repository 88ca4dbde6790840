"""What each attention layer of a transformer does under a recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import selectors
from .patterns import Dense, Pattern, SparseVideoGen
from .recipe import Recipe


@dataclass(frozen=True)
class LayerPlan:
    """What one attention layer does at steps that are not dense.

    `heads` holds one pattern per head, or is empty where the layer keeps the model's own
    attention, for the `reason` given.
    """

    name: str
    heads: tuple[Pattern, ...] = ()
    reason: str = ""

    @property
    def patterns(self) -> list[Pattern]:
        """The distinct patterns, in order of first use."""
        return list(dict.fromkeys(self.heads))

    def at_step(self, step: int) -> LayerPlan:
        """The same with what the patterns are at a sampler step."""
        return replace(self, heads=tuple(pattern.at_step(step) for pattern in self.heads))


def plan_layers(recipe: Recipe, layers: list[str], heads: int) -> list[LayerPlan]:
    """What each layer does under a recipe.

    Raises:
        ValueError: selectors and indices that match nothing, or a layer with two settings of SparseVideoGen.
    """
    attention = recipe.attention if isinstance(recipe.attention, dict) else {"all": recipe.attention}
    indices = selectors.flat_indices(layers)
    dense = recipe.dense_layer_indices(len(set(indices)))
    plans = []
    rows = selectors.assign(attention, layers, heads)
    for name, index, row in zip(layers, indices, rows, strict=True):
        if index in dense:
            plans.append(LayerPlan(name, reason="dense_layers"))
        elif all(p is None for p in row):
            plans.append(LayerPlan(name, reason="no selector names it"))
        elif all(p is None or isinstance(p, Dense) for p in row):
            plans.append(LayerPlan(name, reason="Dense()"))
        else:
            plans.append(LayerPlan(name, tuple(p or Dense() for p in row)))
            if sum(isinstance(p, SparseVideoGen) for p in plans[-1].patterns) > 1:
                raise ValueError(f"heads of layer {name} have different settings of SparseVideoGen; use one")
    return plans
