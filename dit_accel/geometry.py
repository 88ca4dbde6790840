"""What a token geometry makes of a recipe: token order, block size and each layer's mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import kernels
from .blockmask import BlockMask
from .choice import HeadChoice
from .layers import LayerPlan
from .layout import TokenLayout
from .mixture import join_heads
from .patterns import Dense, Pattern, SparseVideoGen
from .rates import Rates
from .recipe import Recipe


@dataclass(frozen=True, eq=False)
class Geometry:
    """What depends on the token geometry: the visual tokens' permutation, each layer's layout and mask.

    `order` is the order of the visual tokens in the masks, int64 (V,); `permutation` the same, or None where
    no token moves. `kept` says why a layer with a pattern keeps the model's own attention at this size, or is
    empty.
    """

    layout: TokenLayout
    block_size: tuple[int, int]
    order: torch.Tensor
    permutation: torch.Tensor | None
    inverse: torch.Tensor | None
    layouts: list[TokenLayout]
    masks: list[BlockMask | HeadChoice | None]
    densities: list[float]
    block_densities: list[float]
    kept: list[str]

    @property
    def sparse_pairs(self) -> float:
        """Pairs that sparse layers compute for one head, in whole blocks."""
        layers = zip(self.masks, self.block_densities, self.layouts, strict=True)
        return sum(blocks * own.seq_len**2 for mask, blocks, own in layers if mask is not None)

    def over_layers(self, densities: list[float]) -> float:
        """The density of all layers together, from one per layer."""
        pairs = [layout.seq_len**2 for layout in self.layouts]
        return sum(d * n for d, n in zip(densities, pairs, strict=True)) / sum(pairs)


def cheapest(
    recipe: Recipe,
    plans: Sequence[LayerPlan],
    layout: TokenLayout,
    layouts: Sequence[TokenLayout],
    leading: int,
    device: torch.device,
    rates: Rates,
    like: Geometry | None = None,
) -> Geometry:
    """Masks of all layers in the block size that is expected to take the least time.

    Args:
        layout: of the transformer's tokens.
        layouts: of each layer's.
        leading: how many visual tokens must stay in front.
        device: where masks are to be.
        rates: measured on it.
        like: has the token order and block size to take instead.
    """
    sizes, asked = block_sizes(recipe, device), recipe.order
    if like is not None:
        sizes, asked = {like.block_size: 1.0}, like.order
    built = []
    for size in sizes:
        masks, order = _masks(asked, plans, layouts, leading, size, device)
        kept = [_too_short(recipe, mask, own, rates) for mask, own in zip(masks, layouts, strict=True)]
        masks = [None if reason else mask for mask, reason in zip(masks, kept, strict=True)]
        in_place = torch.equal(order, torch.arange(layout.visual_len)) or all(mask is None for mask in masks)
        built.append(
            Geometry(
                layout=layout,
                block_size=size,
                order=order,
                permutation=None if in_place else order.to(device),
                inverse=None if in_place else torch.argsort(order).to(device),
                layouts=list(layouts),
                masks=masks,
                densities=[1.0 if mask is None else mask.density for mask in masks],
                block_densities=[1.0 if mask is None else mask.block_density for mask in masks],
                kept=kept,
            )
        )
    return min(built, key=lambda geometry: geometry.sparse_pairs * sizes[geometry.block_size])


def _masks(
    order: Any,
    plans: Sequence[LayerPlan],
    layouts: Sequence[TokenLayout],
    leading: int,
    size: tuple[int, int],
    device: torch.device,
) -> tuple[list[BlockMask | HeadChoice | None], torch.Tensor]:
    """Masks of all layers, and the visual tokens' order (V,) that suits the first sparse pattern.

    Heads of SparseVideoGen have orders of their own.
    """
    used = [(p, own) for plan, own in zip(plans, layouts, strict=True) for p in plan.patterns]
    by_pattern: dict[TokenLayout, dict[Pattern, BlockMask]] = {own: {} for own in layouts}
    for pattern, own in sorted(used, key=lambda pair: isinstance(pair[0], Dense)):
        if pattern in by_pattern[own]:
            continue
        if isinstance(pattern, SparseVideoGen):
            mask = pattern.head_mask(own, size, device)
        else:
            mask = pattern.block_mask(own, size, order=order, device=device)
            found = visual_permutation(mask, own)
            order = leading_first(found, leading)
            if not torch.equal(order, found):
                mask = pattern.block_mask(own, size, order=order, device=device)
        by_pattern[own][pattern] = mask
    if isinstance(order, str):  # all heads have orders of their own
        order = torch.arange(layouts[0].visual_len)
    by_heads: dict[tuple, BlockMask | HeadChoice | None] = {((), own): None for own in layouts}
    keys = [(plan.heads, own) for plan, own in zip(plans, layouts, strict=True)]
    for heads, own in keys:
        if (heads, own) not in by_heads:
            if any(isinstance(p, SparseVideoGen) for p in heads):
                by_heads[heads, own] = HeadChoice.of(heads, by_pattern[own], own, order)
            else:
                by_heads[heads, own] = join_heads(by_pattern[own], heads)
    return [by_heads[key] for key in keys], order


def _too_short(recipe: Recipe, mask: BlockMask | HeadChoice | None, layout: TokenLayout, rates: Rates) -> str:
    """Why a layer is below the recipe's `min_tokens`, or an empty text."""
    if mask is None:
        return ""
    least = recipe.min_tokens if recipe.min_tokens != "auto" else rates.least_tokens(mask.density)
    if layout.seq_len >= least:
        return ""
    if math.isinf(least):
        return f"at density {mask.density:.2f} sparse attention was not measured to be faster at any length"
    return f"{layout.seq_len} tokens, fewer than min_tokens ({least:.0f})"


def block_sizes(recipe: Recipe, device: torch.device | str) -> dict[tuple[int, int], float]:
    """The recipe's block size, or those worth trying on the device, with the relative time of a pair."""
    return {recipe.block_size: 1.0} if recipe.block_size else kernels.block_sizes(device)


def backend(recipe: Recipe, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """The kernel backend of a recipe, the one chosen on the device where it leaves that to `"auto"`."""
    if recipe.backend != "auto":
        return recipe.backend
    size = next(iter(block_sizes(recipe, device)))
    return kernels.automatic_backend(device, dtype, head_dim=head_dim, block_size=size)[0]


def visual_permutation(mask: BlockMask, layout: TokenLayout) -> torch.Tensor:
    """The order of the visual tokens in a mask: int64 (visual_len,) on the CPU."""
    if mask.order is None:
        return torch.arange(layout.visual_len)
    return mask.order[: layout.visual_len].cpu() - layout.visual_slice.start


def leading_first(permutation: torch.Tensor, count: int) -> torch.Tensor:
    """An order (n,) with the first `count` tokens of the model's own order in front, otherwise as it was."""
    return permutation[torch.argsort((permutation >= count).int(), stable=True)]
