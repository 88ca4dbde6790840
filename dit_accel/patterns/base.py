"""What a pattern is: a rule over pairs of visual tokens, from which masks and densities follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .. import orders
from ..layout import TokenLayout
from ..rules import Factor, FactorRule, Rule

if TYPE_CHECKING:
    from ..blockmask import BlockMask

Grid = tuple[int, int, int]


class Pattern:
    """Base of all patterns. A new one states its `rule` and counts its `visual_pairs`.

    Text and anchor tokens attend to everything, and everything attends to them; where `anchor_sees_visual` is
    False, anchor tokens attend to anchor and text alone.
    """

    anchor_sees_visual = True

    def at_step(self, step: int) -> Pattern:
        """What this pattern is at a sampler step; of the same density at all."""
        return self

    @property
    def variants(self) -> Sequence[Pattern]:
        """All that it is at some step. They share a token order, which `"auto"` chooses for all of them."""
        return (self,)

    def rule(self, layout: TokenLayout) -> Rule:
        """Which visual tokens attend to which, on this layout.

        Raises:
            ValueError: a pattern that does not fit the layout.
        """
        raise NotImplementedError

    def visual_pairs(self, layout: TokenLayout) -> int:
        """Number of attended pairs among the visual tokens, exact."""
        raise NotImplementedError

    def natural_tiles(self, layout: TokenLayout) -> list[Grid]:
        """Tile shapes that suit this pattern in particular, tried beside the general ones."""
        return []

    def natural_orders(self, layout: TokenLayout) -> list[torch.Tensor]:
        """Orders of the visual tokens that suit this pattern, each a permutation, int64 (V,)."""
        return [orders.tiles(layout.grid, tile) for tile in self.natural_tiles(layout)]

    def token_mask(self, layout: TokenLayout) -> torch.Tensor:
        """The exact definition: bool (S, S) in the model's token order, True = attend. Small sizes only."""
        mask = torch.ones(layout.seq_len, layout.seq_len, dtype=torch.bool)
        mask[layout.visual_slice, layout.visual_slice] = self.rule(layout).mask()
        mask[layout.anchor_slice, layout.visual_slice] = self.anchor_sees_visual
        return mask

    def block_mask(
        self,
        layout: TokenLayout,
        block_size: tuple[int, int] = (128, 64),
        order: str | Sequence[int] | torch.Tensor = "auto",
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """The `BlockMask` of this pattern on `layout`, without ever materialising S x S.

        Args:
            layout: token geometry.
            block_size: (query, key) block sizes, multiples of 16 and of 8.
            order: order of the visual tokens: `"auto"` (the cheapest), `"raster"`, `"tile"` (the cheapest
                tile shape), `"hilbert"`, or a permutation of the visual tokens.
            device: where the mask's tensors go.

        Raises:
            ValueError: a pattern that does not fit the layout, or an unknown order or unusable block size.
        """
        from ..builder import build

        return build(self, layout, tuple(block_size), order).to(device)

    def density(self, layout: TokenLayout) -> float:
        """Computed pairs / S^2, exact."""
        everywhere = layout.seq_len**2 - layout.visual_len**2
        if not self.anchor_sees_visual:
            everywhere -= layout.anchor_len * layout.visual_len
        return (self.visual_pairs(layout) + everywhere) / layout.seq_len**2


class AxisWise(Pattern):
    """A pattern that is an AND over the three axes of the grid, such as a window."""

    def axis_tables(self, layout: TokenLayout) -> list[torch.Tensor]:
        """For each of the axes (F, H, W) a bool table (n, n): may position q attend to position k?

        Raises:
            ValueError: a pattern that does not fit the layout.
        """
        raise NotImplementedError

    def rule(self, layout: TokenLayout) -> Rule:
        labels = layout.coordinates.long().unbind(1)
        return FactorRule([Factor(*pair) for pair in zip(labels, self.axis_tables(layout), strict=True)])

    def visual_pairs(self, layout: TokenLayout) -> int:
        return math.prod(int(table.sum()) for table in self.axis_tables(layout))


def per_axis(name: str, value, axes: int, kinds: type | tuple = int) -> tuple:
    """`value` once for each of `axes` axes: a scalar is repeated, a sequence must have that many entries.

    Raises:
        ValueError: the wrong number of entries or the wrong type.
    """
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if len(values) != axes or not all(
        type(v) in (kinds if isinstance(kinds, tuple) else (kinds,)) for v in values
    ):
        raise ValueError(
            f"`{name}` must be one value or {axes} of them (one per windowed axis), got {value!r}"
        )
    return values


def integers(name: str, value, axes: str, least: int | None = None) -> tuple[int, ...]:
    """`value` as a tuple of integers, one for each of `axes`, such as `"(rows, columns)"`, from `least` up.

    Raises:
        ValueError: something else.
    """
    count = axes.count(",") + 1
    values = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(values) != count or any(type(n) is not int or (least is not None and n < least) for n in values):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"`{name}` must be {count} integers {axes}{bound}, got {value!r}")
    return values
