"""What a token geometry makes of a recipe: token order, block size and what each layer computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dit_accel import kernels
from dit_accel.attention.call import LayerAttention
from dit_accel.attention.head_balance import Balance
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.attention.shards import Shards
from dit_accel.attention.tail_densities import tail_densities
from dit_accel.kernels import least_pooled_density
from dit_accel.masks.block_mask import BlockMask
from dit_accel.masks.layout import TokenLayout
from dit_accel.recipe.layer_patterns import Chunks, LayerPatterns
from dit_accel.recipe.recipe import Recipe

from .measured_speed import MeasuredSpeed


@dataclass(frozen=True, eq=False)
class Geometry:
    """What depends on the token geometry: the order of the visual tokens, and what each layer computes.

    Attributes:
        layout: of the transformer's tokens.
        block_size: of all masks.
        order: of the visual tokens in masks, int64 (V,) on the CPU.
        permutation, inverse: the same on the device, and its inverse; None where no token moves.
        layouts: of each layer's tokens.
        attentions: of each layer; None where it keeps the model's own.
        dense_reasons: why a layer with a pattern keeps the model's own attention at this size, or empty.
        formats: numeric formats, by the name of each layer that has one.
        densities: of each layer, 1 where it is dense; with a tail, of blocks that are computed whole.
        block_densities: the same in whole blocks, pooled keys of a tail among them: what a kernel pays.
        balances: where processes share layers by heads, which each computes, by the name of each layer whose
            heads differ.
    """

    layout: TokenLayout
    block_size: tuple[int, int]
    order: torch.Tensor
    permutation: torch.Tensor | None
    inverse: torch.Tensor | None
    layouts: list[TokenLayout]
    attentions: list[LayerAttention | None]
    dense_reasons: list[str]
    formats: dict[str, str]
    densities: list[float]
    block_densities: list[float]
    balances: dict[str, Balance] = field(default_factory=dict)

    @property
    def sparse_pairs(self) -> float:
        """Pairs that sparse layers compute for one head, in whole blocks."""
        layers = zip(self.attentions, self.block_densities, self.layouts, strict=True)
        return sum(blocks * own.pairs for attention, blocks, own in layers if attention is not None)

    def over_layers(self, densities: list[float]) -> float:
        """The density of all layers together, from one per layer."""
        pairs = [layout.pairs for layout in self.layouts]
        return sum(d * n for d, n in zip(densities, pairs, strict=True)) / sum(pairs)


def cheapest(
    recipe: Recipe,
    layers: Sequence[LayerPatterns],
    layout: TokenLayout,
    layouts: Sequence[TokenLayout],
    leading: int,
    device: torch.device,
    speed: MeasuredSpeed,
    like: Geometry | None = None,
    moves: bool = True,
    chunks: Chunks | None = None,
) -> Geometry:
    """What all layers compute, in the block size that is expected to take the least time.

    Args:
        layout: of the transformer's tokens.
        layouts: of each layer's.
        leading: how many visual tokens must stay in front.
        device: where masks are to be.
        speed: measured on it.
        like: has the token order and block size to take instead.
        moves: whether tokens are put into the masks' order where they enter the transformer; if not, each
            layer does it.
        chunks: of frames that the model tells apart; tokens then stay in their frame.
    """
    sizes, asked = block_sizes(recipe, device), recipe.order
    if like is not None:
        sizes, asked = {like.block_size: 1.0}, like.order
    required = chunks is not None and chunks.causal  # the masks are the model's own
    built = []
    for size in sizes:
        order = token_order(asked, layers, layouts, leading, size)
        if chunks is not None:
            order = order[torch.argsort(order // math.prod(layout.grid[1:]), stable=True)]
        attentions = _attentions(order, layers, layouts, size, device, moves)
        reasons = [
            "" if attention is None or required else too_short(recipe, attention.density, own, speed)
            for attention, own in zip(attentions, layouts, strict=True)
        ]
        attentions = [None if why else own for own, why in zip(attentions, reasons, strict=True)]
        in_place = torch.equal(order, torch.arange(layout.visual_len, device="cpu"))
        in_place = in_place or not moves or all(attention is None for attention in attentions)
        densities, block_densities = _densities(attentions, layers, layouts, size)
        built.append(
            Geometry(
                layout=layout,
                block_size=size,
                order=order,
                permutation=None if in_place else order.to(device),
                inverse=None if in_place else torch.argsort(order).to(device),
                layouts=list(layouts),
                attentions=attentions,
                dense_reasons=reasons,
                formats={layer.name: layer.quantization for layer in layers if layer.quantization},
                densities=densities,
                block_densities=block_densities,
            )
        )
    return min(built, key=lambda geometry: geometry.sparse_pairs * sizes[geometry.block_size])


def of_process(
    geometry: Geometry,
    layers: Sequence[LayerPatterns],
    shards: Shards,
    device: torch.device,
    moves: bool,
    like: Geometry | None = None,
) -> Geometry:
    """The same with what one process computes of its heads alone; order and densities stay those of all.

    Args:
        layers: those that the geometry was made of.
        shards: what the process has.
        device, moves: as of `cheapest`.
        like: of the same run: heads that keep something from step to step stay in their process.
    """
    order, size = geometry.order, geometry.block_size
    works = head_works(layers, geometry.layouts, geometry.attentions, order, size)
    sizes, balances, own = shards.sizes(shards.heads), {}, []
    for layer, work in zip(layers, works, strict=True):
        stays = like is not None and any(pattern.online for pattern in layer.heads)
        balance = like.balances.get(layer.name) if stays else Balance.of(work, sizes, device)
        if balance is not None:
            balances[layer.name] = balance
        heads = shards.own_heads if balance is None else balance.groups[shards.rank]
        own.append(replace(layer, heads=tuple(layer.heads[head] for head in heads) if layer.heads else ()))
    made = _attentions(order, own, geometry.layouts, size, device, moves)
    kept = zip(geometry.attentions, made, strict=True)
    attentions = [None if every is None else one for every, one in kept]
    return replace(geometry, attentions=attentions, balances=balances)


def head_works(
    layers: Sequence[LayerPatterns],
    layouts: Sequence[TokenLayout],
    attentions: Sequence[LayerAttention | None],
    order: torch.Tensor,
    size: tuple[int, int],
) -> list[tuple[float, ...]]:
    """Of each layer the block density of every head; one number where all do alike.

    Args:
        layers, layouts, attentions: of all heads, as a geometry has them.
        order: of the visual tokens in masks.
        size: of blocks.
    """
    cpu = torch.device("cpu")
    masks = {own: LayerMasks(own, order, size, cpu) for own in layouts}
    known: dict[tuple, float] = {}
    works = []
    for layer, own, attention in zip(layers, layouts, attentions, strict=True):
        if attention is None or len(layer.patterns) == 1:
            works.append((1.0,))
            continue
        for pattern in layer.patterns:
            if (pattern, own) not in known:
                known[pattern, own] = layer_attention((pattern,), masks[own]).block_density
        works.append(tuple(known[pattern, own] for pattern in layer.heads))
    return works


def _densities(
    attentions: Sequence[LayerAttention | None],
    layers: Sequence[LayerPatterns],
    layouts: Sequence[TokenLayout],
    size: tuple[int, int],
) -> tuple[list[float], list[float]]:
    """Densities and block densities of the layers; many share an attention."""
    found: dict[tuple[int, str | None], tuple[float, float]] = {}
    rows = []
    for attention, layer, own in zip(attentions, layers, layouts, strict=True):
        key = id(attention), layer.tail
        if attention is None:
            found[key] = 1.0, 1.0
        elif key not in found and layer.tail:
            found[key] = tail_densities(attention, least_pooled_density(size[1], own.seq_len))
        elif key not in found:
            found[key] = attention.density, attention.block_density
        rows.append(found[key])
    return [density for density, _ in rows], [blocks for _, blocks in rows]


def token_order(
    asked: Any,
    layers: Sequence[LayerPatterns],
    layouts: Sequence[TokenLayout],
    leading: int,
    size: tuple[int, int],
) -> torch.Tensor:
    """The visual tokens' order, int64 (V,): as asked, `"auto"` for what suits the first sparse pattern.

    Patterns that choose by content, or have an order in each head, come last.
    """
    used = [(p, own) for layer, own in zip(layers, layouts, strict=True) for p in layer.patterns]
    if not used:
        return torch.arange(layouts[0].visual_len, device="cpu")
    pattern, own = min(used, key=lambda pair: (not pair[0].sparse, pair[0].online or pair[0].per_head))
    return leading_first(pattern.token_order(own, size, asked), leading)


def _attentions(
    order: torch.Tensor,
    layers: Sequence[LayerPatterns],
    layouts: Sequence[TokenLayout],
    size: tuple[int, int],
    device: torch.device,
    moves: bool,
) -> list[LayerAttention | None]:
    """What each layer computes; layers of the same patterns and tokens share it."""
    places = order if moves else None
    masks = {own: LayerMasks(own, order, size, device, places) for own in layouts}
    made: dict[tuple, LayerAttention | None] = {((), own): None for own in layouts}
    keys = [(layer.heads, own) for layer, own in zip(layers, layouts, strict=True)]
    for heads, own in keys:
        if (heads, own) not in made:
            made[heads, own] = layer_attention(heads, masks[own])
    return [made[key] for key in keys]


def too_short(recipe: Recipe, density: float, layout: TokenLayout, speed: MeasuredSpeed) -> str:
    """Why a layer of this density is below the recipe's `min_tokens`, or an empty text."""
    least = speed.least_tokens(density) if isinstance(recipe.min_tokens, str) else recipe.min_tokens
    if layout.seq_len >= least:
        return ""
    if math.isinf(least):
        reason = f"at density {density:.2f} sparse attention was not measured to be faster at any length"
    else:
        reason = f"{layout.seq_len} tokens, fewer than min_tokens ({least:.0f})"
    elsewhere = recipe.min_tokens == "auto" and speed.another_machine
    return reason + (", as measured on another machine" if elsewhere else "")


def block_sizes(recipe: Recipe, device: torch.device | str) -> dict[tuple[int, int], float]:
    """The recipe's block size, or those worth trying on the device, with the relative time of a pair."""
    return {recipe.block_size: 1.0} if recipe.block_size else kernels.block_sizes(device)


def backend(
    recipe: Recipe,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    quantization: str | None = None,
) -> str:
    """The kernel backend of a recipe, the one chosen on the device where it leaves that to `"auto"`."""
    if recipe.backend != "auto":
        return recipe.backend
    size = next(iter(block_sizes(recipe, device)))
    inputs = {"head_dim": head_dim, "block_size": size, "quantization": quantization}
    return kernels.automatic_backend(device, dtype, **inputs)[0]


def visual_permutation(mask: BlockMask, layout: TokenLayout) -> torch.Tensor:
    """The order of the visual tokens in a mask: int64 (visual_len,) on the CPU."""
    if mask.order is None:
        return torch.arange(layout.visual_len, device="cpu")
    return mask.order[: layout.visual_len].cpu() - layout.visual_slice.start


def leading_first(permutation: torch.Tensor, count: int) -> torch.Tensor:
    """An order (n,) with the first `count` tokens of the model's own order in front, otherwise as it was."""
    return permutation[torch.argsort((permutation >= count).int(), stable=True)]
