"""What several GPUs send each other in a call of a transformer and, as a model, how long the call then takes.

Bytes are counted. Times are a model: the time that one device was measured to take is divided as the work
is, and what the busiest device sends goes over its link after it, at the bandwidth that is given. Nothing is
taken to overlap, and what starting a transfer takes is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from dit_accel.arguments import positive
from dit_accel.attention.banded import Bands
from dit_accel.attention.head_balance import Balance
from dit_accel.attention.shards import Shards
from dit_accel.masks.layout import TokenLayout
from dit_accel.pipelines.families.registry import family_named
from dit_accel.recipe.recipe import Recipe

from .plan import Plan


@dataclass(frozen=True)
class Sharing:
    """One way to share a call of a transformer, a batch of one.

    Attributes:
        way: `"heads"`: `parallel.context_parallel`; `"rows"`: `parallel.patch_parallel`.
        gpus: how many.
        refused: why it is not possible, or empty; all else is None then.
        sent_bytes: what the device that sends most sends in all layers, and `halo_bytes` what of that are
            neighbouring rows.
        work: its share of what one device computes.
        imbalance, neighbours: attention that the device with most of it computes in the layers, as a
            multiple of the mean, with heads dealt out by their work, and with neighbouring heads.
        seconds: the modelled time of the call, of which `exchange_seconds` are the exchange's; None where
            the time of one device or the link is not known.
        speedup: times faster than one device.
    """

    way: str
    gpus: int
    refused: str = ""
    sent_bytes: int | None = None
    halo_bytes: int | None = None
    work: float | None = None
    imbalance: float | None = None
    neighbours: float | None = None
    exchange_seconds: float | None = None
    seconds: float | None = None
    speedup: float | None = None


def sharings(
    plan: Plan,
    recipe: Recipe,
    gpus: int,
    *,
    link: float | None = None,
    call_seconds: float | None = None,
) -> tuple[Sharing, Sharing]:
    """A call of a planned model under a recipe by so many GPUs: by heads, and by rows of the picture.

    Args:
        plan: of the recipe.
        gpus: how many, from 2.
        link: what a GPU sends in a second, in GB (10^9 bytes).
        call_seconds: what one device was measured to take for a sparse call.

    Raises:
        ValueError: fewer than two GPUs, or a link or a time that is not positive.
    """
    if gpus < 2:
        raise ValueError(f"`gpus` must be at least 2, got {gpus}")
    for name, value in (("link", link), ("call_seconds", call_seconds)):
        if value is not None:
            positive(name, value)
    heads, rows = by_heads(plan, gpus), by_rows(plan, recipe, gpus)
    return _timed(heads, link, call_seconds), _timed(rows, link, call_seconds)


def by_heads(plan: Plan, gpus: int) -> Sharing:
    """Every layer's q, k, v and output go to other heads and back; heads are dealt out by their work.

    What plans join besides (Helios does in each layer) is counted; the output's tokens, which have few
    channels, and attention of refiners are not.
    """
    family = family_named(plan.family)
    if family.parallel_refusal is not None:
        return Sharing("heads", gpus, f"{plan.family}: {family.parallel_refusal}")
    if gpus > plan.heads:
        return Sharing("heads", gpus, f"{plan.heads} heads are shared by at most as many GPUs")
    shards = Shards(0, gpus, None, plan.heads, frozenset(), uneven=True, together=family.split_together)
    width, itemsize = plan.heads * plan.head_dim, getattr(torch, plan.dtype).itemsize
    joined = family.gathered_per_layer * shards.sizes(plan.tokens)[0] * (gpus - 1) * width * itemsize
    sent = sum(
        len(group.names) * (shards.sent_bytes(_layout(plan, group.tokens), 1, width, itemsize) + joined)
        for group in plan.layers
    )
    balanced, neighbours = _imbalance(plan, shards.sizes(plan.heads))
    tokens = shards.sizes(plan.tokens)[0] / plan.tokens
    attention = plan.flops.attention * plan.block_density
    share = attention / (attention + plan.flops.rest)
    return Sharing(
        "heads",
        gpus,
        sent_bytes=sent,
        halo_bytes=0,
        work=share * balanced / gpus + (1 - share) * tokens,
        imbalance=balanced,
        neighbours=neighbours,
    )


def _imbalance(plan: Plan, sizes: list[int]) -> tuple[float, float]:
    """What the device with most attention computes in the layers, as a multiple of the mean.

    With heads that are dealt out by their work, and with neighbouring ones. Devices wait in each layer.
    """
    works, even = plan.head_works(), sizes[0] * len(sizes) / sum(sizes)
    total = balanced = neighbours = 0.0
    for group in plan.layers:
        pairs = group.tokens**2 * group.block_density
        for name in group.names:
            balance = Balance.of(works.get(name, (1.0,)), sizes, "cpu")
            total += pairs
            balanced += pairs * (even if balance is None else balance.balanced)
            neighbours += pairs * (even if balance is None else balance.neighbours)
    return balanced / total, neighbours / total


def by_rows(plan: Plan, recipe: Recipe, gpus: int) -> Sharing:
    """Every layer's keys and values of rows near an edge go to a neighbour; text is in all of them."""
    from dit_accel.parallel.patch import unbanded

    family = family_named(plan.family)
    if family.band_dim is None:
        return Sharing("rows", gpus, f"{plan.family} places its tokens inside; it is for FLUX and FLUX.2")
    if (reason := unbanded(recipe)) is not None:
        return Sharing("rows", gpus, reason)
    height = plan.grid[1]
    bands = Bands(
        rank=1,
        count=gpus,
        reach=max(pattern.row_reach or 0 for pattern in recipe.patterns),
        least=max(pattern.band_rows for pattern in recipe.patterns),
        patch=max(max(pattern.pools for pattern in recipe.patterns), 1),
        picture={"height": height},
    )
    sizes = bands.sizes(height)
    if min(sizes) < bands.least:
        return Sharing(
            "rows", gpus, f"bands of {min(sizes)} rows, fewer than the {bands.least} that the pattern needs"
        )
    rows, itemsize = max(sizes), getattr(torch, plan.dtype).itemsize
    own = replace(_layout(plan, plan.tokens), grid=(plan.grid[0], rows, plan.grid[2]))
    halo, text = (
        sum(len(group.names) for group in plan.layers) * numbers * itemsize
        for numbers in bands.sent_numbers(own, plan.heads, plan.head_dim)
    )
    return Sharing("rows", gpus, sent_bytes=halo + text, halo_bytes=halo, work=own.seq_len / plan.tokens)


def _layout(plan: Plan, tokens: int) -> TokenLayout:
    """Of a layer with so many tokens."""
    return TokenLayout(plan.grid, text_len=tokens - math.prod(plan.grid))


def _timed(sharing: Sharing, link: float | None, call_seconds: float | None) -> Sharing:
    if sharing.sent_bytes is None or sharing.work is None or link is None:
        return sharing
    exchange = sharing.sent_bytes / (link * 1e9)
    if call_seconds is None:
        return replace(sharing, exchange_seconds=exchange)
    seconds = call_seconds * sharing.work + exchange
    return replace(sharing, exchange_seconds=exchange, seconds=seconds, speedup=call_seconds / seconds)
