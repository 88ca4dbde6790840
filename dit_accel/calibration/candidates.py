"""What heads may be given: patterns of the toolkit at several widths, so that densities can be matched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product

from dit_accel.arguments import shown
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import (
    Clear,
    Dense,
    InwardWindow,
    LocalGlobal,
    Neighborhood,
    Radial,
    SlidingTile,
    SpatialHead,
    StaticPattern,
    TemporalHead,
)
from dit_accel.patterns.calibration import STATIC

REORDERED_BLOCKS, EVERY_STATIC = "reordered", "static"
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)  # that widths are chosen for, and of reordered blocks


def check_candidates(asked: Sequence[str | StaticPattern]) -> None:
    """Raises ValueError for a name or a pattern that is no candidate, or changes by itself."""
    if not asked:
        raise ValueError("`candidates` must name at least one, such as 'reordered'")
    for one in asked:
        named = isinstance(one, str) and one in (REORDERED_BLOCKS, EVERY_STATIC, *STATIC)
        if not named and type(one) not in STATIC.values():
            raise ValueError(
                f"a candidate must be 'reordered', 'static', one of {', '.join(STATIC)} or such a pattern, "
                f"got {shown(one)}"
            )


def static_candidates(asked: Sequence[str | StaticPattern], layout: TokenLayout) -> tuple[StaticPattern, ...]:
    """The static patterns that candidates of `calibrate` mean on a layout.

    Raises:
        ValueError: see `check_candidates`, or a pattern that does not suit the layout.
    """
    check_candidates(asked)
    found: list[StaticPattern] = []
    for one in asked:
        if isinstance(one, StaticPattern):
            if one.pooled_keys(layout):
                raise ValueError(f"{one} has pooled keys, which heads of a calibration cannot have")
            one.density(layout)
            found.append(one)
        elif one == EVERY_STATIC:
            found += [pattern for kind in WIDTHS for pattern in widths_of(kind, layout)]
        elif one != REORDERED_BLOCKS:
            found += widths_of(one, layout)
    return tuple(dict.fromkeys(found))


def widths_of(kind: str, layout: TokenLayout) -> list[StaticPattern]:
    """Patterns of one kind, the nearest to each of `DENSITIES`; none where none suits the layout."""
    if kind == "Dense":
        return [Dense()]
    densities: dict[StaticPattern, float] = {}
    for make in WIDTHS[kind](layout.grid):
        try:
            pattern = make()
            density = pattern.density(layout)
        except ValueError:  # a width that does not suit this grid
            continue
        if pattern not in densities and density < 1:
            densities[pattern] = density
    if not densities:
        return []
    nearest = [min(densities, key=lambda p, d=d: abs(densities[p] - d)) for d in DENSITIES]
    return list(dict.fromkeys(nearest))


Grid = tuple[int, int, int]
Makers = Iterable[Callable[[], StaticPattern]]


def _radial(grid: Grid) -> Makers:
    return [lambda d=d: Radial(d) for d in (0.05, 0.1, 0.2, 0.4, 0.8, 1.2, 2.0, 4.0)] if grid[0] > 1 else []


def _neighborhood(grid: Grid) -> Makers:
    def window(share: float, side: int) -> int:
        return min(side, max(2, round(share * side)))

    shares = (0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0)
    frames = (0.12, 0.25, 0.5, 1.0) if grid[0] > 1 else (1.0,)
    sizes = [(window(f, grid[0]), window(s, grid[1]), window(s, grid[2])) for f, s in product(frames, shares)]
    return [lambda w=w: Neighborhood(w) for w in dict.fromkeys(sizes)]


def _sliding_tile(grid: Grid) -> Makers:
    tile = tuple(min(side, most) for side, most in zip(grid, (2, 4, 4), strict=True))
    counts = [-(-side // own) for side, own in zip(grid, tile, strict=True)]
    reach = [[n for n in (1, 3, 5, 7, 9) if n <= count + 1] for count in counts]
    return [lambda w=w: SlidingTile(w, tile) for w in product(*reach)]


def _clear(grid: Grid) -> Makers:
    longest = max(grid[1:])
    return [lambda s=s: Clear(max(1, s * longest)) for s in (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)]


def _inward(grid: Grid) -> Makers:
    shares = (0.05, 0.08, 0.12, 0.18, 0.25, 0.35)
    halves = [tuple(max(1, round(s * side)) for side in grid[1:]) for s in shares]
    return [lambda h=h: InwardWindow(h) for h in dict.fromkeys(halves)]


def _local_global(grid: Grid) -> Makers:
    windows = [tuple(max(1, round(side / n)) for side in grid[1:]) for n in (2, 3, 4, 6, 8)]
    return [lambda w=w: LocalGlobal(w) for w in dict.fromkeys(windows)]


def _spatial(grid: Grid) -> Makers:
    return [lambda d=d: SpatialHead(d, block_size=64) for d in DENSITIES]


def _temporal(grid: Grid) -> Makers:
    return [lambda d=d: TemporalHead(d, block_size=64) for d in DENSITIES] if grid[0] > 1 else []


WIDTHS: dict[str, Callable[[Grid], Makers]] = {
    "Radial": _radial,
    "Neighborhood": _neighborhood,
    "SlidingTile": _sliding_tile,
    "Clear": _clear,
    "InwardWindow": _inward,
    "LocalGlobal": _local_global,
    "SpatialHead": _spatial,
    "TemporalHead": _temporal,
}
