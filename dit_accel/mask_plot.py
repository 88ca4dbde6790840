"""A picture of a mask: who attends to whom, in the kernel's order and in the model's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .blockmask import BlockMask
from .choice import HeadChoice

if TYPE_CHECKING:
    from PIL.Image import Image

PANEL, MARGIN, CAPTION = 512, 12, 20  # pixels
_QUERIES = 4  # looked at per row of pixels, at most


def draw(mask: BlockMask | HeadChoice, title: str = "") -> Image:
    """Two panels side by side: kernel order and model order, queries downwards, keys to the right.

    The grey level of a pixel is the share of its pairs that are attended, white none and black all: over all
    its keys and up to four of its queries, averaged over heads. Heads that choose their order by content are
    drawn in the model's order as the mean of a spatial and a temporal one. Nothing of size S x S is made.

    Returns:
        a grey image of `2 * PANEL + 3 * MARGIN` by `PANEL + CAPTION + 2 * MARGIN` pixels.
    """
    from PIL import Image, ImageDraw

    blocks = mask.mask if isinstance(mask, HeadChoice) else mask
    if isinstance(mask, HeadChoice):
        orders = [mask.order[1].cpu(), mask.order[2].cpu()]
    else:
        orders = [torch.arange(blocks.seq_len) if blocks.order is None else blocks.order.cpu()]
    by_model = torch.stack([shares(blocks, order) for order in orders]).mean(0)
    panels = {"kernel order": shares(blocks), "model order": by_model}
    image = Image.new("L", (2 * PANEL + 3 * MARGIN, PANEL + CAPTION + 2 * MARGIN), 255)
    pen = ImageDraw.Draw(image)
    for i, (caption, share) in enumerate(panels.items()):
        left, top = MARGIN + i * (PANEL + MARGIN), MARGIN + CAPTION
        pixels = (255 * (1 - share)).round().to(torch.uint8).numpy()
        image.paste(Image.fromarray(pixels).resize((PANEL, PANEL), Image.Resampling.NEAREST), (left, top))
        pen.rectangle((left - 1, top - 1, left + PANEL, top + PANEL), outline=128)
        pen.text((left, MARGIN), caption if i else f"{caption}   {title}", fill=0)
    return image


def shares(mask: BlockMask, order: torch.Tensor | None = None) -> torch.Tensor:
    """The share of attended pairs in each cell of a grid of at most PANEL x PANEL, float32.

    Args:
        mask: on any device.
        order: position in the kernel's order -> place in the order to be drawn, int64 (S,); None: the same.
    """
    mask = mask.to("cpu")
    length, side = mask.seq_len, min(PANEL, mask.seq_len)
    place = torch.arange(length) if order is None else order
    position = torch.argsort(place)  # of each place
    start = torch.arange(side + 1) * length // side
    column = torch.bucketize(place, start[1:], right=True)
    keys = torch.bincount(column, minlength=side)
    weights = mask._group_weights().float()
    result = torch.zeros(side, side)
    for row in range(side):
        count = int(start[row + 1] - start[row])
        chosen = start[row] + torch.arange(min(count, _QUERIES)) * count // min(count, _QUERIES)
        for group, weight in enumerate(weights):
            attended = rows_of(mask, position[chosen], group).sum(0, dtype=torch.float32)
            result[row].index_add_(0, column, attended * weight / len(chosen))
    return result / keys


def rows_of(mask: BlockMask, positions: torch.Tensor, group: int = 0) -> torch.Tensor:
    """What queries attend to: bool (n, seq_len) over keys in kernel order, pooled keys left out."""
    bq, bk = mask.block_size
    blocks = torch.zeros(len(positions), mask.num_cols, bk, dtype=torch.bool)
    bits = torch.arange(8, dtype=torch.uint8)
    for out, position in zip(blocks, positions.tolist(), strict=True):
        r = position // bq
        full = slice(int(mask.full_ptr[group, r]), int(mask.full_ptr[group, r + 1]))
        part = slice(int(mask.part_ptr[group, r]), int(mask.part_ptr[group, r + 1]))
        out[mask.full_idx[full].long()] = True
        rows = mask.tiles[mask.part_tile[part].long(), position % bq]
        out[mask.part_idx[part].long()] = (rows.unsqueeze(-1) >> bits & 1).bool().flatten(-2)
    return blocks.flatten(1)[:, : mask.seq_len]
