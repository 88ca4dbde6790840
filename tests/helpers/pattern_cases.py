"""Static patterns for tests: one of each, other forms of them, and those of the families of videos."""

from __future__ import annotations

from dit_accel.patterns import (
    Clear,
    Dense,
    InwardWindow,
    LocalGlobal,
    Neighborhood,
    Pattern,
    Radial,
    ShiftedWindow,
    SlidingTile,
    SpatialHead,
    TemporalHead,
)

# for grids of at least 3 x 4 x 6 tokens, even in height and width
STATIC: dict[str, Pattern] = {
    "dense": Dense(),
    "clear": Clear(2),
    "inward-window": InwardWindow((1, 2)),
    "shifted-window": ShiftedWindow((2, 2), shift=(1, 2)),
    "local-global": LocalGlobal((2, 3)),
    "neighborhood": Neighborhood((3, 3, 3)),
    "radial": Radial(0.2, block_size=16),
    "sliding-tile": SlidingTile((1, 1, 3), (1, 2, 2)),
    "spatial-head": SpatialHead(0.5, block_size=8),
    "temporal-head": TemporalHead(0.5, block_size=8),
}
# for grids of at least 3 x 6 x 6
FORMS: dict[str, Pattern] = {
    **STATIC,
    "clear-half": Clear(2.5),
    "local-global-sliding": LocalGlobal(3, sliding=True),
    "neighborhood-stride": Neighborhood((3, 3), stride=2),
    "neighborhood-dilation-causal": Neighborhood((3, 3), dilation=2, is_causal=True),
    "radial-exact": Radial(0.2, 4, exact=True),
    "spatial-head-sink": SpatialHead(0.5, True, block_size=8),
}
# on grids of (3, 6, 8) tokens, whose tiles are whole blocks of 16
VIDEO: dict[str, Pattern] = {
    "neighborhood": Neighborhood((3, 3, 3)),
    "radial": Radial(0.2, block_size=16),
    "tiles": SlidingTile((1, 3, 1), (2, 2, 4)),
    "clear": Clear(3),
}
