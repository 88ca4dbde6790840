"""What a recipe makes of a model's layers at a size: from the masks themselves, or estimated without them.

Building the masks of very long sequences takes minutes and gigabytes. Beyond `EXACT_UP_TO` tokens block
densities are counted on a sample of the query blocks; the densities of patterns stay exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean
from typing import NamedTuple

import torch

from dit_accel.attention.call import LayerAttention
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.kernels import least_pooled_density
from dit_accel.masks.estimate import MaskEstimate, estimate_mask
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.order_choice import HILBERT_UP_TO
from dit_accel.patterns import Pattern
from dit_accel.patterns.base import StaticPattern
from dit_accel.recipe.layer_patterns import LayerPatterns
from dit_accel.runtime.binding import Binding
from dit_accel.runtime.geometry import block_sizes, head_works, token_order, too_short, visual_permutation

EXACT_UP_TO = 2**17  # tokens: a picture of 7680x4320 pixels, 129 frames of 720p
BlockSize = tuple[int, int]


class Moment(NamedTuple):
    """A step of a run: its number, the noise level at which it begins (None: not known), and the steps."""

    step: int
    sigma: float | None
    total: int


@dataclass(frozen=True)
class OrderDensity:
    """Block density of one pattern under one token order; of `"auto"`, `takes` says which it is."""

    pattern: str
    tokens: int
    order: str
    block_density: float
    takes: str = ""


@dataclass(frozen=True, eq=False)
class LayerDensities:
    """Each attention layer of a model at a size; lists have an entry per layer.

    Attributes:
        block_size: of all masks.
        layouts: geometry of each layer.
        sparse: whether it computes less than everything.
        densities, block_densities: 1.0 where the model's own attention stays.
        dense_reasons: why a layer with a pattern keeps the model's own attention at this size, or empty.
        orders: of each pattern under each order worth trying.
        attentions: what sparse layers compute, None for the others; None for all where masks were not built.
        sampled: "N of M query blocks" that block densities are estimated from; empty where they are exact.
        head_works: makes, of each layer, the block density of every head; one number where all do alike.
    """

    block_size: BlockSize
    layouts: list[TokenLayout]
    sparse: list[bool]
    densities: list[float]
    block_densities: list[float]
    dense_reasons: list[str]
    orders: tuple[OrderDensity, ...]
    attentions: list[LayerAttention | None] | None = None
    sampled: str = ""
    head_works: Callable[[], list[tuple[float, ...]]] = list

    def over_layers(self, densities: list[float]) -> float:
        """The density of all layers together, from one per layer."""
        pairs = [layout.pairs for layout in self.layouts]
        return sum(d * n for d, n in zip(densities, pairs, strict=True)) / sum(pairs)


def layer_densities(binding: Binding, layout: TokenLayout, moment: Moment | None = None) -> LayerDensities:
    """Of a recipe bound to a model without weights, at this geometry and moment of a run."""
    patterns = {pattern for layer in plans(binding, moment) for pattern in layer.patterns}
    static = not any(p.online or p.per_head or p.pooled_keys(layout) for p in patterns)
    estimated = layout.seq_len > EXACT_UP_TO and static
    return (_estimated if estimated else _of_masks)(binding, layout, moment)


def plans(binding: Binding, moment: Moment | None) -> list[LayerPatterns]:
    """What each layer does at a moment of a run; None: where it does not matter."""
    return binding.layers if moment is None else [plan.at_step(*moment) for plan in binding.layers]


# -- from the masks ------------------------------------------------------------------------------------------


def _of_masks(binding: Binding, layout: TokenLayout, moment: Moment | None) -> LayerDensities:
    geometry, layers = binding.geometry_of(layout, *(moment or ())), plans(binding, moment)
    used = _patterns_and_layouts(layers, geometry.layouts)
    size, attentions = geometry.block_size, geometry.attentions
    return LayerDensities(
        block_size=size,
        layouts=geometry.layouts,
        sparse=[attention is not None for attention in attentions],
        densities=geometry.densities,
        block_densities=geometry.block_densities,
        dense_reasons=geometry.dense_reasons,
        orders=tuple(order for pair in used for order in _orders(*pair, size)),
        attentions=attentions,
        head_works=partial(head_works, layers, geometry.layouts, attentions, geometry.order, size),
    )


def _patterns_and_layouts(
    layers: Iterable[LayerPatterns], layouts: Iterable[TokenLayout]
) -> dict[tuple[Pattern, TokenLayout], None]:
    """The different patterns that leave something out, each with the geometry of its layers.

    Without those that have an order in each head, so that there is none to choose.
    """
    pairs = ((p, own) for layer, own in zip(layers, layouts, strict=True) for p in layer.patterns)
    return dict.fromkeys(pair for pair in pairs if pair[0].sparse and not pair[0].per_head)


def _orders(pattern: Pattern, layout: TokenLayout, blocks: BlockSize) -> list[OrderDensity]:
    """A pattern under every order worth trying on its layout."""
    if pattern.online:
        masks = LayerMasks(layout, None, blocks, torch.device("cpu"))
        density = layer_attention([pattern], masks).block_density
        return [OrderDensity(str(pattern), layout.seq_len, "chosen in each call", density)]
    names = ["raster", "tile", *(["hilbert"] if layout.visual_len <= HILBERT_UP_TO else [])]
    masks = {name: pattern.block_mask(layout, blocks, name) for name in names}
    auto = pattern.block_mask(layout, blocks, "auto")
    chosen = visual_permutation(auto, layout)
    same = (name for name, mask in masks.items() if torch.equal(visual_permutation(mask, layout), chosen))
    rows = [(name, mask.block_density, "") for name, mask in masks.items()]
    rows.append(("auto", auto.block_density, next(same, "the pattern's own")))
    return [OrderDensity(str(pattern), layout.seq_len, *row) for row in rows]


# -- from a sample of their query blocks ---------------------------------------------------------------------


def _estimated(binding: Binding, layout: TokenLayout, moment: Moment | None) -> LayerDensities:
    recipe, layers = binding.recipe, plans(binding, moment)
    layouts = [binding.family.layer_layout(layer.name, layout) for layer in layers]
    leading = binding.family.leading(binding.transformer, layout)
    used = _patterns_and_layouts(layers, layouts)
    by_size: dict[BlockSize, dict[tuple[Pattern, TokenLayout], MaskEstimate]] = {}

    def in_size(size: BlockSize) -> LayerDensities:
        order = token_order(recipe.order, layers, layouts, leading, size) if used else None
        masks = {(pattern, own): estimate_mask(pattern, own, size, order) for pattern, own in used}
        by_size[size] = masks
        rows = [_layer(binding, layer, own, masks, size) for layer, own in zip(layers, layouts, strict=True)]
        sampled = dict.fromkeys(f"{mask.sampled} of {mask.rows}" for mask in masks.values())
        sparse, densities, block_densities, reasons = map(list, zip(*rows, strict=True))
        return LayerDensities(
            size, layouts, sparse, densities, block_densities, reasons, (), None, " and ".join(sampled)
        )

    def paid(found: LayerDensities) -> float:
        pairs = zip(found.sparse, found.block_densities, layouts, strict=True)
        return sizes[found.block_size] * sum(d * own.pairs for sparse, d, own in pairs if sparse)

    sizes = block_sizes(recipe, binding.device)
    best = min(map(in_size, sizes), key=paid)
    # a pattern that has the order to itself was estimated in what `"auto"` takes
    alone = recipe.order == "auto" and len(used) == 1 and not leading
    known = by_size[best.block_size] if alone else {}
    orders = (row for pair in used for row in _estimated_orders(*pair, best.block_size, known.get(pair)))
    works = partial(_head_works, layers, best, by_size[best.block_size])
    return replace(best, orders=tuple(orders), head_works=works)


def _head_works(
    layers: Iterable[LayerPatterns],
    found: LayerDensities,
    masks: Mapping[tuple[Pattern, TokenLayout], MaskEstimate],
) -> list[tuple[float, ...]]:
    def work(pattern: Pattern, layout: TokenLayout) -> float:
        mask = masks.get((pattern, layout))
        return 1.0 if mask is None else mask.block_density

    return [
        tuple(work(pattern, own) for pattern in layer.heads) if sparse else (1.0,)
        for layer, own, sparse in zip(layers, found.layouts, found.sparse, strict=True)
    ]


def _layer(
    binding: Binding,
    layer: LayerPatterns,
    layout: TokenLayout,
    masks: Mapping[tuple[Pattern, TokenLayout], MaskEstimate],
    size: BlockSize,
) -> tuple[bool, float, float, str]:
    """Whether a layer is sparse, its density and block density, and why it keeps its own attention."""
    if not layer.heads:
        return False, 1.0, 1.0, ""
    heads = [masks.get((pattern, layout)) for pattern in layer.heads]  # None: Dense
    density = mean(1.0 if mask is None else mask.density for mask in heads)
    reason = too_short(binding.recipe, density, layout, binding.speed())
    if reason:
        return False, 1.0, 1.0, reason
    blocks = mean(1.0 if mask is None else mask.block_density for mask in heads)
    if layer.tail:  # blocks are computed whole
        density = blocks
        blocks += least_pooled_density(size[1], layout.seq_len)
    return True, density, blocks, ""


def _estimated_orders(
    pattern: StaticPattern, layout: TokenLayout, size: BlockSize, auto: MaskEstimate | None
) -> list[OrderDensity]:
    """As `_orders`; beyond `HILBERT_UP_TO` tokens what is neither raster nor tile order is not tried."""
    masks = {"auto": auto or estimate_mask(pattern, layout, size)}
    masks["raster"] = estimate_mask(pattern, layout, size, "raster")
    if torch.equal(masks["auto"].order, masks["raster"].order):
        takes, masks["tile"] = "raster", estimate_mask(pattern, layout, size, "tile")
    else:
        takes, masks["tile"] = "tile", masks["auto"]
    rows = [(name, masks[name].block_density, "") for name in ("raster", "tile")]
    rows.append(("auto", masks["auto"].block_density, takes))
    return [OrderDensity(str(pattern), layout.seq_len, *row) for row in rows]
