"""Patterns that choose whole blocks of visual tokens by content: their blocks, and the order they lie in."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from dit_accel.attention.block_grid import BlockGrid
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.order_choice import order_of_blocks

from .base import OnlinePattern


class BlockWise(OnlinePattern):
    """A pattern that chooses among blocks of `block_size` visual tokens, in an order of them."""

    block_size: Any  # (queries, keys), or one number of both

    def grid(self, layout: TokenLayout, order: Any = "auto", device: torch.device | str = "cpu") -> BlockGrid:
        """The blocks of a layout; those that are always kept, such as those with text, are marked."""
        if isinstance(order, str) or order is None:
            return _grid(self, layout, order or "auto", torch.device(device))
        return self.made_grid(layout, self.token_order(layout, order=order)).to(device)

    def made_grid(self, layout: TokenLayout, visual: torch.Tensor) -> BlockGrid:
        """The same, on the CPU, with visual tokens in the order `visual`, int64 (V,)."""
        return BlockGrid.of(layout, self.block_size, visual)

    def token_order(
        self, layout: TokenLayout, block_size: tuple[int, int] = (128, 64), order: Any = "auto"
    ) -> torch.Tensor:
        """The order of the visual tokens, int64 (V,), that `order` names, or a permutation of them."""
        return order_of_blocks(layout.grid, self.block_size[0], order)


@lru_cache(maxsize=64)
def _grid(pattern: BlockWise, layout: TokenLayout, order: str, device: torch.device) -> BlockGrid:
    with torch.inference_mode(False):  # what stays must be usable under autograd later
        return pattern.made_grid(layout, pattern.token_order(layout, order=order)).to(device)
