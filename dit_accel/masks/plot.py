"""A picture of a mask: who attends to whom, in the kernel's order and in the model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .block_mask import BlockMask
from .tiles import unpack_bits

if TYPE_CHECKING:
    from PIL.Image import Image

PANEL, MARGIN, CAPTION = 512, 12, 20  # pixels
_QUERIES = 4  # looked at per row of pixels, at most


def draw(mask: BlockMask, title: str = "", orders: Sequence[torch.Tensor] = ()) -> Image:
    """Two panels side by side: kernel order and model order, queries downwards, keys to the right.

    The grey level of a pixel is the share of its pairs that are attended, white none and black all: over all
    its keys and up to four of its queries, averaged over heads. Heads that choose their order by content are
    drawn in the model's order as the mean of a spatial and a temporal one. Nothing of size S x S is made.

    Returns:
        a grey image of `2 * PANEL + 3 * MARGIN` by `PANEL + CAPTION + 2 * MARGIN` pixels.
    """
    from PIL import Image, ImageDraw

    pairs = [(order, order) for order in orders] or [(mask.order, mask.key_order)]
    by_model = torch.stack([shares(mask, *pair) for pair in pairs]).mean(0)
    panels = {"kernel order": shares(mask), "model order": by_model}
    image = Image.new("L", (2 * PANEL + 3 * MARGIN, PANEL + CAPTION + 2 * MARGIN), 255)
    pen = ImageDraw.Draw(image)
    for i, (caption, share) in enumerate(panels.items()):
        left, top = MARGIN + i * (PANEL + MARGIN), MARGIN + CAPTION
        pixels = (255 * (1 - share)).round().to(torch.uint8).numpy()
        image.paste(Image.fromarray(pixels).resize((PANEL, PANEL), Image.Resampling.NEAREST), (left, top))
        pen.rectangle((left - 1, top - 1, left + PANEL, top + PANEL), outline=128)
        pen.text((left, MARGIN), caption if i else f"{caption}   {title}", fill=0)
    return image


def shares(
    mask: BlockMask, order: torch.Tensor | None = None, key_order: torch.Tensor | None = None
) -> torch.Tensor:
    """The share of attended pairs in each cell of a grid of at most PANEL x PANEL, float32.

    Args:
        mask: on any device.
        order: position in the kernel's order -> place in the order to be drawn, int64 (seq_len,); None: the
            same.
        key_order: the same of the keys, int64 (n,); those from n on keep their place.
    """
    mask = mask.to("cpu")
    first, columns = _cells(mask.seq_len), _cells(mask.kv_len)
    place = torch.arange(mask.kv_len, device="cpu")
    if key_order is not None:
        place[: len(key_order)] = key_order.cpu()
    column = torch.bucketize(place, columns[1:], right=True)
    places = torch.arange(mask.seq_len, device="cpu")
    position = places if order is None else torch.argsort(order.cpu())  # of each place
    weights = mask.group_weights.float()
    result = torch.zeros(len(first) - 1, len(columns) - 1, dtype=torch.float32, device="cpu")
    for row in range(len(result)):
        count = int(first[row + 1] - first[row])
        looked_at = min(count, _QUERIES)
        chosen = first[row] + torch.arange(looked_at, device="cpu") * count // looked_at
        for group, weight in enumerate(weights):
            attended = rows_of(mask, position[chosen], group).sum(0, dtype=torch.float32)
            result[row].index_add_(0, column, attended * weight / len(chosen))
    return result / columns.diff()


def _cells(length: int) -> torch.Tensor:
    """Where the cells of an axis of `length` tokens start, and where the last one ends: int64."""
    side = min(PANEL, length)
    return torch.arange(side + 1, device="cpu") * length // side


def rows_of(mask: BlockMask, positions: torch.Tensor, group: int = 0) -> torch.Tensor:
    """What queries attend to: bool (n, kv_len) over keys in kernel order."""
    bq, bk = mask.block_size
    blocks = torch.zeros(len(positions), mask.num_cols, bk, dtype=torch.bool, device="cpu")
    for out, position in zip(blocks, positions.tolist(), strict=True):
        r = position // bq
        full, _ = mask.full.row(group, r)
        partial, tile = mask.partial.row(group, r)
        out[full.long()] = True
        out[partial.long()] = unpack_bits(mask.tiles[tile.long(), position % bq])
    return blocks.flatten(1)[:, : mask.kv_len]
