"""Token orders: the sequence in which the visual tokens are laid out, so that a pattern becomes block-shaped.

Every function returns a permutation, int64 (F * H * W,): kernel position -> row-major index of the visual
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

Grid = tuple[int, int, int]
# the six orders of the axes by name, slowest axis first, each with the axes it runs over
AXIS_ORDERS = {
    "FHW": (0, 1, 2),
    "FWH": (0, 2, 1),
    "HWF": (1, 2, 0),
    "HFW": (1, 0, 2),
    "WHF": (2, 1, 0),
    "WFH": (2, 0, 1),
}


def raster(grid: Grid) -> torch.Tensor:
    """Row-major (f, h, w), the model's own order."""
    return torch.arange(grid[0] * grid[1] * grid[2], device="cpu")


def axes(grid: Grid, permutation: tuple[int, int, int]) -> torch.Tensor:
    """Row-major over permuted axes: `(1, 2, 0)` runs over frames fastest, then columns, then rows (PARO)."""
    if sorted(permutation) != [0, 1, 2]:
        raise ValueError(f"`permutation` must be a permutation of (0, 1, 2), got {permutation!r}")
    return raster(grid).view(grid).permute(permutation).flatten()


def tiles(grid: Grid, tile: Grid) -> torch.Tensor:
    """Tile-major: whole tiles first, row-major, then the cut tiles at the far borders.

    Whole tiles thus stay aligned with blocks of their size whatever the grid. Inside a tile the longest side
    is halved again and again, so that every aligned power-of-two run is a compact box: smaller key blocks
    stay compact too.

    Raises:
        ValueError: a tile that is not three positive integers.
    """
    if len(tile) != 3 or min(tile) < 1:
        raise ValueError(f"`tile` must be three positive integers, got {tile!r}")
    counts = [-(-n // t) for n, t in zip(grid, tile, strict=True)]
    volume = tile[0] * tile[1] * tile[2]
    places = [torch.arange(n, device="cpu") for n in grid]
    where = [place // t for place, t in zip(places, tile, strict=True)]
    inside = [place % t for place, t in zip(places, tile, strict=True)]
    cut_f, cut_h, cut_w = (at == n // t for at, n, t in zip(where, grid, tile, strict=True))
    cut = cut_f[:, None, None] | cut_h[:, None] | cut_w
    rank = torch.argsort(inside_tile(tile))[_row_major(inside, tile)]
    tile_id = _row_major(where, counts) + cut * (counts[0] * counts[1] * counts[2])
    return torch.argsort((tile_id * volume + rank).flatten())


def _row_major(at: Sequence[torch.Tensor], sides: Sequence[int]) -> torch.Tensor:
    """Row-major index in a box of every combination of positions along its axes: int64 (F, H, W)."""
    f, h, w = at
    return (f[:, None, None] * sides[1] + h[:, None]) * sides[2] + w


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is cached must be usable under autograd
def inside_tile(tile: Grid) -> torch.Tensor:
    """The order inside one tile, by halving of the longest side: place -> row-major position, int64 (n,)."""

    def halve(box: torch.Tensor) -> torch.Tensor:
        if box.numel() == 1:
            return box.flatten()
        axis = max(range(3), key=lambda a: box.shape[a])
        return torch.cat([halve(part) for part in box.tensor_split(2, dim=axis)])

    return halve(raster(tile).view(tile))


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is cached must be usable under autograd
def hilbert(grid: Grid) -> torch.Tensor:
    """A generalised Hilbert curve through any grid: consecutive tokens are neighbours, runs are compact.

    The box is cut recursively into boxes that a curve can enter and leave at corners, longest axis first
    (J. Cerveny's construction for arbitrary sizes).
    """
    points: list[tuple[int, int, int]] = []
    sides = sorted(range(3), key=lambda axis: -grid[axis])
    unit = [tuple(grid[axis] if i == axis else 0 for i in range(3)) for axis in sides]
    _curve((0, 0, 0), *unit, points)
    f, h, w = torch.tensor(points, dtype=torch.int64, device="cpu").unbind(1)
    return (f * grid[1] + h) * grid[2] + w


def _curve(start, a, b, c, points: list) -> None:
    """Append the curve through the box spanned by a, b, c from `start`; it leaves at the far end of a."""
    la, lb, lc = (abs(sum(v)) for v in (a, b, c))
    da, db, dc = (_sign(v) for v in (a, b, c))
    if sum(n > 1 for n in (la, lb, lc)) <= 1:
        step, count = max(((da, la), (db, lb), (dc, lc)), key=lambda pair: pair[1])
        points.extend(tuple(start[i] + n * step[i] for i in range(3)) for n in range(count))
        return
    a2, b2, c2 = _half(a, da), _half(b, db), _half(c, dc)
    if 2 * la > 3 * lb and 2 * la > 3 * lc:  # a long box: two boxes one after the other
        _curve(start, a2, b, c, points)
        _curve(_add(start, a2), _sub(a, a2), b, c, points)
    elif 3 * lb > 4 * lc:  # flat in c: three boxes, around the corner along b
        _curve(start, b2, c, a2, points)
        _curve(_add(start, b2), a, _sub(b, b2), c, points)
        _curve(_add(start, _sub(a, da), _sub(b2, db)), _neg(b2), c, _neg(_sub(a, a2)), points)
    elif 3 * lc > 4 * lb:  # flat in b
        _curve(start, c2, a2, b, points)
        _curve(_add(start, c2), a, b, _sub(c, c2), points)
        _curve(_add(start, _sub(a, da), _sub(c2, dc)), _neg(c2), _neg(_sub(a, a2)), b, points)
    else:  # five boxes
        _curve(start, b2, c2, a2, points)
        _curve(_add(start, b2), c, a2, _sub(b, b2), points)
        _curve(_add(start, _sub(b2, db), _sub(c, dc)), a, _neg(b2), _neg(_sub(c, c2)), points)
        corner = _add(start, _sub(a, da), b2, _sub(c, dc))
        _curve(corner, _neg(c), _neg(_sub(a, a2)), _sub(b, b2), points)
        _curve(_add(start, _sub(a, da), _sub(b2, db)), _neg(b2), c2, _neg(_sub(a, a2)), points)


def _sign(v):
    return tuple((x > 0) - (x < 0) for x in v)


def _half(v, unit):
    """Half of an axis vector, an even number of steps where the axis is longer than two."""
    half = tuple(int(x / 2) for x in v)
    n = abs(sum(half))
    return _add(half, unit) if n % 2 and abs(sum(v)) > 2 else half


def _add(*vectors):
    return tuple(map(sum, zip(*vectors, strict=True)))


def _sub(v, w):
    return tuple(x - y for x, y in zip(v, w, strict=True))


def _neg(v):
    return tuple(-x for x in v)
