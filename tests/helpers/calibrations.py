"""Calibrations for tests: any choice for any head, drawn from a seed."""

from __future__ import annotations

import math

import torch

from dit_accel import Calibration
from dit_accel.masks.orders import AXIS_ORDERS
from dit_accel.patterns import Dense, Neighborhood, StaticPattern
from dit_accel.patterns.reordered_blocks import packed_blocks
from dit_accel.pipelines import family_of


def drawn(
    grid: tuple[int, int, int],
    *,
    family: str = "wan",
    layers: tuple[str, ...] = ("blocks.0", "blocks.1"),
    heads: int = 4,
    head_dim: int = 16,
    rows: int = 2,
    steps: int = 4,
    block_size: int = 16,
    patterns: tuple[StaticPattern, ...] = (Dense(), Neighborhood(3)),
    share: float = 0.4,
    tails: bool = True,
    seed: int = 0,
) -> Calibration:
    """Of reordered blocks, half of the heads, and `patterns`, the others; some with a tail if `tails`."""
    generator = torch.Generator().manual_seed(seed)
    shape, count = (rows, len(layers), heads), -(-math.prod(grid) // block_size)
    chosen = torch.randint(-len(patterns), len(patterns), shape, generator=generator)
    chosen = chosen.clamp(min=-1).to(torch.int16)
    mine = chosen == -1
    place = torch.full(shape, -1, dtype=torch.int32)
    place[mine] = torch.arange(int(mine.sum()), dtype=torch.int32)
    kept = torch.rand(int(mine.sum()), count, count, generator=generator) < share
    kept |= torch.eye(count, dtype=torch.bool)
    return Calibration(
        family=family,
        layers=tuple(layers),
        heads=heads,
        head_dim=head_dim,
        grid=grid,
        steps=steps,
        stretches=tuple(range(rows)),
        density=share,
        block_size=block_size,
        patterns=patterns,
        chosen=chosen,
        tail=(torch.rand(shape, generator=generator) < 0.5) & tails,
        order=torch.randint(len(AXIS_ORDERS), shape, generator=generator).to(torch.uint8),
        place=place,
        blocks=packed_blocks(kept),
    )


def drawn_for(transformer, grid: tuple[int, ...], **options) -> Calibration:
    """For a transformer of a known family, on a grid of two or three axes."""
    family = family_of(transformer)
    return drawn(
        (1, *grid)[-3:],
        family=family.name,
        layers=tuple(family.layers(transformer)),
        heads=family.heads(transformer)[0],
        head_dim=family.heads(transformer)[1],
        **options,
    )
