"""What is timed: the shapes of real models under the masks of their presets, and a mask of full blocks."""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Clear, Dense, Neighborhood, Pattern, Radial, SlidingTile


@dataclass(frozen=True)
class Case:
    """A geometry of a real model and a pattern on it.

    Attributes:
        preset: the recipe whose pattern it is; "" for none.
        head_dim: as many numbers as a token has in each head.
    """

    name: str
    preset: str
    layout: TokenLayout
    heads: int
    head_dim: int
    pattern: Pattern

    @property
    def title(self) -> str:
        return f"{self.name} {self.pattern_name}"

    @property
    def pattern_name(self) -> str:
        return self.preset or "all pairs"


def _flux(side: int, preset: str = "flux-clear-r16", pattern: Pattern = Clear(16)) -> Case:  # noqa: B008
    layout = TokenLayout((1, side // 16, side // 16), text_len=512, text_first=True)
    return Case(f"flux-{side}", preset, layout, 24, 128, pattern)


def _sd3(side: int) -> Case:
    layout = TokenLayout((1, side // 16, side // 16), text_len=333)
    return Case(f"sd3-{side}", "sd3-clear-r16", layout, 24, 64, Clear(16))


def _wan_480p(preset: str, pattern: Pattern) -> Case:
    return Case("wan-1.3b-480p", preset, TokenLayout((21, 30, 52)), 12, 128, pattern)


def _wan_720p(preset: str, pattern: Pattern) -> Case:
    return Case("wan-14b-720p", preset, TokenLayout((21, 45, 80)), 40, 128, pattern)


def _hunyuan(preset: str, pattern: Pattern) -> Case:
    return Case("hunyuan-720p", preset, TokenLayout((33, 45, 80), text_len=256), 24, 128, pattern)


_TILES = SlidingTile((3, 3, 5), (6, 8, 8))
_NEAR = Neighborhood((18, 24, 24), (16, 8, 8))
_RADIAL = Radial(0.2, first_frame_sink=True)

# full blocks alone: how fast the kernel is where no mask is in its way
RATE = (
    Case("full-128", "", TokenLayout((1, 128, 128)), 24, 128, Dense()),
    Case("full-64", "", TokenLayout((1, 128, 128)), 24, 64, Dense()),
)
# real shapes, the most informative first
SHAPES = (
    _flux(2048),
    _hunyuan("hunyuan-video-sta", _TILES),
    _flux(4096),
    _wan_480p("wan-radial", _RADIAL),
    _flux(1024),
    _wan_720p("wan-neighborhood", _NEAR),
    _flux(8192),
    _hunyuan("hunyuan-video-radial", Radial(0.95)),
    _wan_720p("wan-radial", _RADIAL),
    _sd3(1024),
    _wan_480p("wan-sta", _TILES),
    _hunyuan("hunyuan-video-neighborhood", _NEAR),
    _wan_720p("wan-sta", _TILES),
    _wan_480p("wan-neighborhood", _NEAR),
    _flux(4096, "flux-neighborhood", Neighborhood((80, 80), (16, 16))),
)
# on which launches are chosen, by head_dim: full and partial blocks, a millisecond or so each
TUNING = {
    128: (_flux(4096), _wan_480p("wan-radial", _RADIAL)),
    64: (_sd3(2048), RATE[1]),
}
# without a GPU: the same work on next to nothing
_PICTURE = Case("picture", "clear", TokenLayout((1, 8, 12), text_len=7, text_first=True), 2, 64, Clear(3))
_CLIP = Case("clip", "tiles", TokenLayout((4, 6, 8)), 2, 64, SlidingTile((3, 3, 3), (2, 2, 4)))
_FULL = Case("full", "", TokenLayout((1, 16, 16)), 2, 64, Dense())
REHEARSAL = {"rate": (_FULL,), "shapes": (_PICTURE, _CLIP), "tuning": {64: (_PICTURE, _CLIP)}}

BY_NAME = {
    (case.name, case.preset): case
    for case in (*RATE, *SHAPES, *TUNING[128], *TUNING[64], _PICTURE, _CLIP, _FULL)
}
