"""Another pattern at other noise levels: dense or denser in strong noise, sparser in weak noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.arguments import noise_level, shown
from dit_accel.attention.layer_masks import layer_attention
from dit_accel.masks import orders
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.order_choice import choose_orders
from dit_accel.masks.pair_rules import Rule

from .base import Pattern, StaticPattern

if TYPE_CHECKING:
    from dit_accel.attention.call import LayerAttention
    from dit_accel.attention.layer_masks import LayerMasks
    from dit_accel.masks.block_mask import BlockMask


@dataclass(frozen=True)
class ByNoise(StaticPattern):
    """From each noise level upwards a pattern: `ByNoise({0.9: Dense(), 0.6: Radial(0.8), 0: Radial(0.2)})`.

    A step follows the pattern of the highest level that its own noise level, with which it begins, reaches.
    Noise levels are the flow's: 1 is pure noise, where runs begin, and 0 where they end, so that one recipe
    suits runs of 4 and of 50 steps. Outside of a run, as in `token_mask`, it is its last pattern, that of the
    weakest noise.

    Args:
        levels: noise levels and their patterns, a mapping or pairs (in YAML a list of pairs); the lowest
            level must be 0.

    Raises:
        ValueError: levels that are not different numbers from 0 to 1 with 0 among them.
        TypeError: something that is no pattern, or a pattern by noise within another.

    Source: ours; that errors of sparse attention grow with the noise was measured on the bundled models, and
    published methods keep the first steps dense.
    """

    levels: tuple[tuple[float, Pattern], ...]

    by_noise = True

    def __post_init__(self):
        pairs = list(self.levels.items()) if isinstance(self.levels, Mapping) else self.levels
        in_pairs = isinstance(pairs, tuple | list) and len(pairs) > 0
        if not in_pairs or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
            raise ValueError(
                f"`levels` must be pairs of a noise level and a pattern, got {shown(self.levels)}"
            )
        wrong = next((p for _, p in pairs if not isinstance(p, Pattern) or p.by_noise), None)
        if wrong is not None:
            raise TypeError(f"`levels` must hold patterns that are not by noise, got {shown(wrong)}")
        pairs = sorted(((noise_level("levels", n), p) for n, p in pairs), key=lambda pair: -pair[0])
        numbers = [level for level, _ in pairs]
        if len(set(numbers)) < len(numbers) or numbers[-1] != 0:
            raise ValueError(f"`levels` must be different ones of which the lowest is 0, got {numbers}")
        object.__setattr__(self, "levels", tuple(pairs))

    @property
    def last(self) -> Pattern:
        """That of the weakest noise."""
        return self.levels[-1][1]

    def at_step(self, step: int, sigma: float | None = None, total: int | None = None) -> Pattern:
        if sigma is None:
            raise ValueError(
                f"{type(self).__name__} needs the noise level of the step; give `sigma`, 1 for pure noise"
            )
        return next(p for level, p in self.levels if sigma >= level or level == 0).at_step(step, sigma, total)

    def for_head(self, layer: str | None, head: int) -> Pattern:
        pairs = tuple((level, pattern.for_head(layer, head)) for level, pattern in self.levels)
        return self if pairs == self.levels else ByNoise(pairs)

    def check_model(self, family: str, layers: Sequence[str], heads: int, head_dim: int) -> None:
        for _, pattern in self.levels:
            pattern.check_model(family, layers, heads, head_dim)

    @property
    def notes(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return [note for _, pattern in self.levels for note in pattern.notes]

    @property
    def own_tail(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(pattern.own_tail for _, pattern in self.levels)

    @property
    def variants(self) -> Sequence[Pattern]:
        return [variant for _, pattern in self.levels for variant in pattern.variants]

    @property
    def sparse(self) -> bool:
        return any(pattern.sparse for _, pattern in self.levels)

    @property
    def online(self) -> bool:
        return self.last.online

    # -- outside of a run ------------------------------------------------------------------------------------

    def layer_attention(self, heads: Sequence[Pattern], masks: LayerMasks) -> LayerAttention:
        return layer_attention([pattern.at_step(0, sigma=0.0) for pattern in heads], masks)

    def rule(self, layout: TokenLayout) -> Rule:
        return self.last.rule(layout)

    def visual_pairs(self, layout: TokenLayout) -> int:
        return self.last.visual_pairs(layout)

    def pooled_keys(self, layout: TokenLayout) -> int:
        return self.last.pooled_keys(layout)

    def token_order(
        self,
        layout: TokenLayout,
        block_size: tuple[int, int] = (128, 64),
        order: str | Sequence[int] | torch.Tensor = "auto",
    ) -> torch.Tensor:
        """One for all static patterns of a run."""
        static = [p for p in self.variants if p.sparse and not (p.online or p.per_head)]
        tokens = orders.raster(layout.grid)
        if not static:
            return tokens
        natural = [one for pattern in static for one in pattern.natural_orders(layout)]
        rules = [pattern.rule(layout) for pattern in static]
        return choose_orders(rules, layout.grid, tokens, tuple(block_size), order, natural_orders=natural)[1]

    def token_mask(self, layout: TokenLayout, keys: TokenLayout | None = None) -> torch.Tensor:
        return self.last.token_mask(layout, keys)

    def block_mask(
        self,
        layout: TokenLayout,
        block_size: tuple[int, int] = (128, 64),
        order: str | Sequence[int] | torch.Tensor = "auto",
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> BlockMask:
        if isinstance(order, str) and options.get("keys") in (None, layout):
            order = self.token_order(layout, block_size, order)
        return self.last.block_mask(layout, block_size, order, device, **options)

    def density(self, layout: TokenLayout, keys: TokenLayout | None = None) -> float:
        return self.last.density(layout, keys) if keys is not None else self.last.density(layout)
