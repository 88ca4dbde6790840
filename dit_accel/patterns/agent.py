"""Agent attention: few mean queries read all keys, and all queries read what these have read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit_accel.arguments import integers, is_number, shown
from dit_accel.attention.approximate import AgentAttention
from dit_accel.attention.call import LayerAttention, ModelAttention
from dit_accel.attention.cubes import Cubes
from dit_accel.masks.layout import TokenLayout

from .maskless import Maskless

if TYPE_CHECKING:
    from dit_accel.attention.layer_masks import LayerMasks


@dataclass(frozen=True)
class Agent(Maskless):
    """Visual tokens attend through agents a_i, the mean queries of patches of the grid:

        out = softmax(Q A^T s^exponent) [softmax(A K^T s) V] + shortcut V,   s = 1 / sqrt(D),

    over the keys of all tokens, text included. Queries are as they attend, after norm and rotary embedding.
    It takes 2 n / S of dense attention, with n agents of S tokens, and on a grid where that is no less than
    all of it the model's own attention stays. Nothing is learned beside the projections.

    Args:
        patch: frames, rows and columns of tokens whose mean query is an agent; cut at borders.
        exponent: on the scale of the queries' softmax over agents; below 1 it is sharper.
        shortcut: weight of each token's own value.

    Raises:
        ValueError: a patch of one token, or numbers outside their range.

    Source: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", 2023.
    """

    patch: tuple[int, int, int] = (1, 4, 4)
    exponent: float = 0.3
    shortcut: float = 0.075
    rest = "attention through agents"

    def __post_init__(self):
        object.__setattr__(self, "patch", integers("patch", self.patch, "(frames, rows, columns)", 1))
        if math.prod(self.patch) == 1:
            raise ValueError(f"`patch` must have more than one token, got {self.patch}; use `Dense()`")
        for name in ("exponent", "shortcut"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be a number from 0 to 1, got {shown(value)}")
            object.__setattr__(self, name, float(value))

    def agents(self, layout: TokenLayout) -> int:
        """How many there are; 0 where the model's own attention takes no more."""
        number = math.prod(-(-n // side) for n, side in zip(layout.grid, self.patch, strict=True))
        return number if 2 * number < layout.visual_len else 0

    def layer(self, masks: LayerMasks) -> LayerAttention:
        layout = masks.layout
        if not self.agents(layout):
            return ModelAttention()
        return AgentAttention(self, layout, Cubes.of(layout, self.patch, masks.places, masks.device))

    def density(self, layout: TokenLayout) -> float:
        number, tokens, visual = self.agents(layout), layout.seq_len, layout.visual_len
        if not number:
            return 1.0
        return (number * (tokens + visual) + (tokens - visual) * tokens) / tokens**2
