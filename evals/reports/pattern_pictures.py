"""Draws docs/patterns/*.png: `python -m dit_accel.evals.reports.pattern_pictures`.

Each picture shows one pattern three times: the tokens that one query attends to, on the grid of the picture
or of some frames of the video; the mask with queries downwards and keys to the right in the model's row-major
order; and the same mask in the order that kernels get, cut into blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dit_accel.files import atomic
from dit_accel.masks.block_mask import BlockMask
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.plot import shares
from dit_accel.patterns import (
    ByNoise,
    ChunkCausal,
    ChunkGrowth,
    Clear,
    Clustered,
    Dense,
    InwardWindow,
    LocalGlobal,
    Neighborhood,
    OnlinePattern,
    Pattern,
    Radial,
    Rectified,
    Routed,
    ShiftedWindow,
    Skipping,
    SlidingTile,
    SparseLinear,
    SpatialHead,
    TemporalHead,
    VideoSparse,
)

FOLDER = Path("docs/patterns")
BLOCKS = (64, 32)
PANEL, GAP, TITLE = 300, 20, 26  # pixels
WHITE, GREY, INK = (255, 255, 255), (225, 228, 232), (36, 41, 47)
NONE, KEY, QUERY = (236, 239, 243), (47, 109, 246), (255, 70, 60)
IMAGE = TokenLayout((1, 40, 40), text_len=64, text_first=True)
VIDEO = TokenLayout((6, 10, 20), text_len=32)
DISCS = ((0.35, 0.3, 0.2), (0.7, 0.72, 0.22))  # centre and radius, of the side


@dataclass(frozen=True)
class Example:
    """A pattern on a layout, with the query (frame, row, column) whose keys are shown.

    What chooses by content is shown on made-up content, two discs on a background; `options` are of `select`.
    """

    pattern: Pattern
    layout: TokenLayout
    query: tuple[int, int, int]
    options: dict[str, Any] = field(default_factory=dict)

    def mask(self) -> BlockMask:
        """What kernels get."""
        if isinstance(self.pattern, OnlinePattern):
            tokens = content(self.layout)
            options = {"block_size": BLOCKS, **self.options}
            mask = self.pattern.select(tokens, tokens, self.layout, **options)
            return _of_one_head(mask)
        return self.pattern.block_mask(self.layout, BLOCKS)

    def keys(self) -> torch.Tensor:
        """What the query attends to: bool (keys,) in the model's order."""
        f, h, w = self.query
        token = self.layout.visual_slice.start + (f * self.layout.grid[1] + h) * self.layout.grid[2] + w
        if isinstance(self.pattern, OnlinePattern):
            mask = self.mask().to_token_mask()
            return mask.view(-1, *mask.shape[-2:])[0, token]
        return self.pattern.token_mask(self.layout)[token]


EXAMPLES = {
    "clear": Example(Clear(radius=8), IMAGE, (0, 14, 12)),
    "neighborhood": Example(Neighborhood(window=(16, 16), stride=(4, 4)), IMAGE, (0, 3, 12)),
    "shifted-window": Example(ShiftedWindow(windows=(2, 2), shift=1), IMAGE, (0, 14, 12)),
    "local-global": Example(LocalGlobal(window=(8, 8)), replace(IMAGE, anchor=(1, 10, 10)), (0, 14, 12)),
    "radial": Example(Radial(decay_factor=0.5, block_size=16), VIDEO, (2, 4, 9)),
    "sliding-tile": Example(SlidingTile(window=(3, 1, 3), tile=(2, 5, 4)), VIDEO, (2, 4, 9)),
    "inward-window": Example(InwardWindow(half_window=(3, 4)), VIDEO, (2, 1, 9)),
    "spatial-head": Example(SpatialHead(keep=0.25, block_size=32), VIDEO, (2, 4, 9)),
    "temporal-head": Example(TemporalHead(keep=0.25, block_size=32), VIDEO, (2, 4, 9)),
    "routed": Example(Routed(top_k=0.2, block_size=BLOCKS), IMAGE, (0, 14, 12), {"order": "tile"}),
    "clustered": Example(Clustered(8, 12, top_p=0.5), IMAGE, (0, 14, 12)),
    "rectified": Example(Rectified(mass=0.3, block_size=64), IMAGE, (0, 14, 12)),
    "skipping": Example(Skipping(-10, block_size=BLOCKS), IMAGE, (0, 14, 12), {"order": "tile"}),
    "sparse-linear": Example(SparseLinear(0.1, block_size=BLOCKS), IMAGE, (0, 14, 12), {"order": "tile"}),
    "video-sparse": Example(VideoSparse(0.15, (2, 2, 4)), VIDEO, (2, 4, 9), {"block_size": (16, 16)}),
    "chunk-causal": Example(ChunkCausal(frames=2), VIDEO, (2, 4, 9)),
    "chunk-growth": Example(
        ChunkGrowth(2, 0.3, 0.1, top_frames=1, block_size=(32, 16)),
        replace(VIDEO, grid=(8, *VIDEO.grid[1:])),
        (6, 4, 9),
    ),
    "by-noise": Example(
        ByNoise({0.9: Dense(), 0.6: Radial(1.0, block_size=16), 0: Radial(0.25, block_size=16)}),
        VIDEO,
        (2, 4, 9),
    ),
}


def _of_one_head(mask: BlockMask) -> BlockMask:
    """A mask of one sample and head, whose order is that head's own, as one that all heads share."""
    if mask.order is None or mask.key_order is None or mask.order.ndim == 1:
        return mask
    return replace(mask, order=mask.order[0, 0], key_order=mask.key_order[0, 0], head_groups=None)


def content(layout: TokenLayout) -> torch.Tensor:
    """Queries, and keys alike, of pictures of two discs: (1, 1, seq_len, 16), the same on every machine.

    float64, as with fp32 the rounding of one CPU's products led k-means to other clusters than another's.
    """
    random = np.random.default_rng(4)
    _, rows, columns = layout.grid
    y, x = torch.meshgrid(*(torch.arange(n, device="cpu") for n in (rows, columns)), indexing="ij")
    near = [(y - a * rows) ** 2 + (x - b * columns) ** 2 < (r * rows) ** 2 for a, b, r in DISCS]
    place = near[0].long() + 2 * near[1].long()
    kinds = 4 * torch.from_numpy(random.standard_normal((4, 16)))
    noise = torch.from_numpy(random.standard_normal((layout.seq_len, 16)))
    noise[layout.visual_slice] += kinds[place.flatten()].repeat(layout.grid[0], 1)
    return noise[None, None]


def draw(example: Example) -> Image.Image:
    """The three panels side by side with their titles; of a pattern by noise the mask of each level."""
    if isinstance(example.pattern, ByNoise):
        return _side_by_side(_levels(example.pattern, example.layout))
    mask, count = example.mask(), int(example.keys().sum())
    panels = [
        (f"keys of one query ({count} of {example.layout.seq_len})", keys_panel(example)),
        (f"mask, model's order ({mask.density:.0%} of pairs)", mask_panel(mask, model=True)),
        (f"kernel's order ({mask.block_density:.0%} of blocks)", mask_panel(mask, model=False)),
    ]
    return _side_by_side(panels)


def _levels(pattern: ByNoise, layout: TokenLayout) -> list[tuple[str, Image.Image]]:
    """Title and mask, in the model's order, of each level's pattern."""
    panels = []
    for level, own in pattern.levels:
        mask = own.block_mask(layout, BLOCKS)
        title = f"from noise {level:g} ({mask.density:.0%} of pairs)"
        panels.append((title, mask_panel(mask, model=True)))
    return panels


def _side_by_side(panels: list[tuple[str, Image.Image]]) -> Image.Image:
    width = sum(panel.width for _, panel in panels) + GAP * (len(panels) + 1)
    picture = Image.new("RGB", (width, PANEL + TITLE + 2 * GAP), WHITE)
    pen, left = ImageDraw.Draw(picture), GAP
    for title, panel in panels:
        pen.text((left, GAP), title, fill=INK, font=ImageFont.load_default(14))
        picture.paste(panel, (left, GAP + TITLE))
        left += panel.width + GAP
    return picture


def keys_panel(example: Example) -> Image.Image:
    """The frames of the grid, two to a row, with the query and its keys; text is not shown."""
    layout = example.layout
    keys = example.keys()
    frames, height, width = layout.grid
    columns, rows = min(frames, 2), -(-frames // 2)
    cell = min((PANEL - 8 * (rows - 1)) // (rows * height), PANEL // (columns * width))
    panel = Image.new("RGB", (columns * width * cell + 8 * (columns - 1), PANEL), WHITE)
    pen = ImageDraw.Draw(panel)
    visual = keys[layout.visual_slice].reshape(layout.grid)
    for frame in range(frames):
        left = (frame % columns) * (width * cell + 8)
        top = (frame // columns) * (height * cell + 8)
        for row in range(height):
            for column in range(width):
                place = (frame, row, column)
                colour = QUERY if place == example.query else KEY if visual[place] else NONE
                x, y = left + column * cell, top + row * cell
                pen.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colour)
    return panel


def mask_panel(mask: BlockMask, model: bool) -> Image.Image:
    """Shares of attended pairs; in the kernel's order with the lines between blocks."""
    grid = shares(mask, mask.order, mask.key_order) if model else shares(mask)
    share = grid.numpy()[..., None]
    pixels = ((1 - share) * np.array(WHITE) + share * np.array(KEY)).round().astype(np.uint8)
    panel = Image.fromarray(pixels).resize((PANEL, PANEL), Image.Resampling.BOX)
    pen = ImageDraw.Draw(panel)
    if not model:
        for edge in range(0, mask.seq_len, mask.block_size[0]):
            y = edge * PANEL // mask.seq_len
            pen.line((0, y, PANEL, y), fill=GREY)
        for edge in range(0, mask.kv_len, mask.block_size[1]):
            x = edge * PANEL // mask.kv_len
            pen.line((x, 0, x, PANEL), fill=GREY)
    pen.rectangle((0, 0, PANEL - 1, PANEL - 1), outline=(160, 165, 172))
    return panel


def save(path: Path, picture: Image.Image) -> None:
    """As a PNG of few colours; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        picture.quantize(64, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
            temporary, "PNG", optimize=True
        )


def main() -> None:
    """Draws every example."""
    for name, example in EXAMPLES.items():
        save(FOLDER / f"{name}.png", draw(example))


if __name__ == "__main__":
    main()
