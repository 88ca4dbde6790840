"""A mask before it is built: its blocks and one query's neighbourhood as pictures, in no time at any size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from .builder import on_the_cpu
from .layout import TokenLayout
from .tiles import check_block_size, unpack_bits

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_accel.patterns.base import StaticPattern

MOST_CELLS = 320  # of a side of the picture of blocks
_PAIRS_LOOKED_INTO = 40_000  # blocks that may be empty; beyond, those that may hold something are drawn so
_KEYS = 64  # of a block that one query is compared with
PAPER, TEXT, PARTIAL, FULL = (248, 250, 252), (203, 213, 225), (94, 200, 190), (15, 118, 110)
QUERY = (220, 38, 38)


def block_kinds(
    pattern: StaticPattern, layout: TokenLayout, block_size: tuple[int, int], order: torch.Tensor
) -> np.ndarray:
    """What becomes of each block of visual tokens: 0 left out, 1 partly computed, 2 wholly; uint8 (R, C).

    Of long sequences up to `MOST_CELLS` query blocks, evenly spread, are looked at; and where more than
    40,000 blocks of these may be empty, that is not looked into and 1 means that they may hold something.

    Args:
        pattern: without pooled keys.
        layout: of queries and keys.
        block_size: tokens of a query block and of a key block.
        order: of the visual tokens, int64 (V,); see `StaticPattern.token_order`.

    Raises:
        ValueError: a pattern that does not fit the layout, or a block size that kernels do not take.
    """
    check_block_size(block_size)
    with on_the_cpu():
        rule = pattern.rule(layout)
        rows, columns = (-(-layout.visual_len // size) for size in block_size)
        picked = torch.linspace(0, rows - 1, min(rows, MOST_CELLS), dtype=torch.float64, device="cpu").long()

        def side(blocks: torch.Tensor, size: int):
            places = blocks[:, None] * size + torch.arange(size, device="cpu")
            return rule.side(order[places.clamp(max=layout.visual_len - 1)])

        queries, keys = side(picked, block_size[0]), side(torch.arange(columns, device="cpu"), block_size[1])
        maybe, sure = rule.classify(queries, keys, slice(None))
        kinds = maybe.to(torch.uint8) + (maybe & sure).to(torch.uint8)
        partial = (kinds == 1).nonzero()
        if 0 < len(partial) <= _PAIRS_LOOKED_INTO:
            r, c = partial.unbind(1)
            kinds[r, c] = rule.attends(queries, keys, r, c).to(torch.uint8)
        return kinds.numpy()


def draw_blocks(
    pattern: StaticPattern,
    layout: TokenLayout,
    block_size: tuple[int, int],
    order: torch.Tensor,
    pixels: int = 480,
) -> Image:
    """`block_kinds` as a picture: queries downwards, keys to the right, in the kernel's order, text last.

    Light: left out; middle: partly computed; dark: wholly; grey: text. Nothing of size S x S is made.

    Returns:
        an RGB image of `pixels` by `pixels`, or of the next whole multiple of the blocks.
    """
    from PIL import Image

    kinds = _shrunk(block_kinds(pattern, layout, block_size, order))
    colours = np.array([PAPER, PARTIAL, FULL], dtype=np.uint8)[kinds]
    text = layout.seq_len - layout.visual_len
    strips = [round(text / layout.visual_len * side) for side in kinds.shape] if text else [0, 0]
    strips = [max(1, strip) if text else 0 for strip in strips]
    height, width = (side + strip for side, strip in zip(kinds.shape, strips, strict=True))
    canvas = np.full((height, width, 3), TEXT, dtype=np.uint8)
    canvas[: kinds.shape[0], : kinds.shape[1]] = colours
    return Image.fromarray(canvas).resize((pixels, pixels), Image.Resampling.NEAREST)


def _shrunk(kinds: np.ndarray) -> np.ndarray:
    """At most `MOST_CELLS` columns; one cell of several blocks shows the most that is computed of them."""
    columns = kinds.shape[1]
    if columns <= MOST_CELLS:
        return kinds
    starts = np.arange(MOST_CELLS) * columns // MOST_CELLS
    return np.maximum.reduceat(kinds, starts, axis=1)


def neighbourhood(pattern: StaticPattern, layout: TokenLayout, query: int | None = None) -> np.ndarray:
    """The visual tokens that one visual token attends to: bool (F, H, W); by default that in the middle.

    Raises:
        ValueError: a pattern that does not fit the layout, or no such token.
    """
    frames, height, width = layout.grid
    if query is None:
        query = (frames // 2 * height + height // 2) * width + width // 2
    if not 0 <= query < layout.visual_len:
        raise ValueError(f"`query` must be a visual token from 0 to {layout.visual_len - 1}, got {query}")
    with on_the_cpu():
        rule, last = pattern.rule(layout), layout.visual_len - 1
        keys = (
            torch.arange(-(-layout.visual_len // _KEYS) * _KEYS, device="cpu").clamp(max=last).view(-1, _KEYS)
        )
        c = torch.arange(len(keys), device="cpu")
        bits, tile = rule.tiles(
            rule.side(torch.tensor([[query]], device="cpu", dtype=torch.int64)),
            rule.side(keys),
            torch.zeros_like(c),
            c,
        )
        attended = unpack_bits(bits[tile]).flatten()[: layout.visual_len]
        return attended.view(layout.grid).numpy()


def draw_neighbourhood(
    pattern: StaticPattern, layout: TokenLayout, query: int | None = None, pixels: int = 480
) -> Image:
    """`neighbourhood` as a picture: the frames of the grid, row by row, the query in red.

    Of more than 25 frames 25 are drawn, evenly spread, the query's among them.

    Returns:
        an RGB image about `pixels` wide.
    """
    from PIL import Image

    attended = neighbourhood(pattern, layout, query)
    frames, height, width = layout.grid
    if query is None:
        query = (frames // 2 * height + height // 2) * width + width // 2
    own, row, column = query // (height * width), query // width % height, query % width
    picked = np.unique(np.append(np.linspace(0, frames - 1, min(frames, 24)).round().astype(int), own))
    across = math.ceil(math.sqrt(len(picked) * height / width)) if len(picked) > 1 else 1
    down, gap = -(-len(picked) // across), 1 if len(picked) > 1 else 0
    canvas = np.full((down * (height + gap) - gap, across * (width + gap) - gap, 3), 255, dtype=np.uint8)
    zoom = max(1, pixels // canvas.shape[1])
    reach = 2 // zoom  # the query is drawn larger than it is where a token is a pixel or two
    for place, frame in enumerate(picked):
        top, left = place // across * (height + gap), place % across * (width + gap)
        cells = np.where(attended[frame][..., None], FULL, np.uint8([226, 232, 240])).astype(np.uint8)
        if frame == own:
            cells[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1] = QUERY
        canvas[top : top + height, left : left + width] = cells
    size = (canvas.shape[1] * zoom, canvas.shape[0] * zoom)
    return Image.fromarray(canvas).resize(size, Image.Resampling.NEAREST)
