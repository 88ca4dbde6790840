"""The tokens of a layer cut into blocks of which a call chooses some, and the mask of what was chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn import functional as F

from dit_accel.masks.block_mask import BlockMask
from dit_accel.masks.layout import TokenLayout

from .arrangement import Arrangement, call_order


@dataclass(frozen=True, eq=False)
class BlockGrid:
    """Blocks of queries and keys of a layer: visual tokens in some order, then anchor tokens, then text.

    Blocks of visual tokens alone are chosen by content; those that hold others are always kept, rows and
    columns, with the visual tokens that are in them.

    Attributes:
        layout: of the tokens.
        size: tokens of a block of queries, and of keys.
        order: the model's token at each place of the blocks, int64 (S,) on the device; None: the same.
        always: blocks that are kept whatever the content, bool (R, C).
    """

    layout: TokenLayout
    size: tuple[int, int]
    order: torch.Tensor | None
    always: torch.Tensor

    @classmethod
    def of(
        cls,
        layout: TokenLayout,
        size: tuple[int, int],
        visual: torch.Tensor | None = None,
    ) -> BlockGrid:
        """On the CPU; `visual` is the visual token at each place, int64 (V,), None: the model's own order."""
        order = call_order(layout, visual)[layout.text_last]
        same = torch.equal(order, torch.arange(layout.seq_len, device="cpu"))
        tokens = layout.seq_len, layout.visual_len
        rows, columns = (cls._blocks(*tokens, n) for n in size)
        always = torch.ones(rows[0], columns[0], dtype=torch.bool, device="cpu")
        always[: rows[1], : columns[1]] = False
        return cls(layout, tuple(size), None if same else order, always)

    def to(self, device: torch.device | str) -> BlockGrid:
        order = None if self.order is None else self.order.to(device)
        return replace(self, order=order, always=self.always.to(device))

    @staticmethod
    def _blocks(tokens: int, visual: int, size: int) -> tuple[int, int]:
        """How many blocks there are, and how many of visual tokens alone."""
        every = -(-tokens // size)
        return every, every if tokens == visual else visual // size

    @cached_property
    def chosen(self) -> tuple[int, int]:
        """How many blocks of queries and of keys are chosen by content: the first ones."""
        tokens = self.layout.seq_len, self.layout.visual_len
        return self._blocks(*tokens, self.size[0])[1], self._blocks(*tokens, self.size[1])[1]

    def visual(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of the blocks that are chosen by content, of q and k (B, H, S, D) in their order."""
        queries, keys = (
            min(n * size, self.layout.visual_len) for n, size in zip(self.chosen, self.size, strict=True)
        )
        return q[:, :, :queries], k[:, :, :keys]

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, H, S, D) in the model's order, in that of the blocks."""
        return x if self.order is None else x[:, :, self.order]

    def from_calls(self, places: torch.Tensor | None, device: torch.device) -> Arrangement | None:
        """How tokens go from the order of calls to that of the blocks; `places` as for `call_order`."""
        order = call_order(self.layout) if self.order is None else self.order.cpu()
        return Arrangement.between(call_order(self.layout, places), order, device)

    def every(self, chosen: torch.Tensor) -> torch.Tensor:
        """All blocks that are computed where these are chosen: bool (B, H, R, C) of (B, H, *self.chosen)."""
        rows, columns = self.always.shape
        return F.pad(chosen, (0, columns - chosen.shape[3], 0, rows - chosen.shape[2])) | self.always

    def density(self, share: float) -> float:
        """The share of all pairs that is computed where this share of the blocks is chosen by content."""
        (rows, columns), tokens = self.chosen, self.layout.seq_len
        blocks = self.always.cpu().double()
        blocks[:rows, :columns] = blocks[:rows, :columns].clamp(min=share)
        sizes = [
            torch.full((n,), size, dtype=torch.float64, device="cpu")
            for n, size in zip(blocks.shape, self.size, strict=True)
        ]
        for one in sizes:
            one[-1] -= one.sum() - tokens
        return float(sizes[0] @ blocks @ sizes[1]) / tokens**2

    def padding(self, text_valid: torch.Tensor) -> torch.Tensor:
        """Which tokens are padded text, bool (B, S); `text_valid` says how many are real, integers (B,)."""
        place = torch.arange(self.layout.seq_len, device=text_valid.device)
        return place >= self.layout.seq_len - self.layout.text_len + text_valid[:, None]

    def mask(
        self,
        chosen: torch.Tensor,
        block_size: tuple[int, int] | None = None,
        orders: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> BlockMask:
        """The mask of the chosen blocks and of those that are always kept.

        Args:
            chosen: bool (B, H, *self.chosen).
            block_size: of the mask, by which those of the grid can be divided; None: the grid's.
            orders: the model's token at each place of queries and of keys, int64 (B, H, S); None: the grid's.

        Raises:
            ValueError: a block size that does not divide the grid's.
        """
        block_size = self.size if block_size is None else (block_size[0], block_size[1])
        if any(own % other for own, other in zip(self.size, block_size, strict=True)):
            raise ValueError(
                f"`block_size` {block_size} must divide the blocks of {self.size} tokens that are chosen"
            )
        every = self.every(chosen)
        for axis in (0, 1):
            every = every.repeat_interleave(self.size[axis] // block_size[axis], axis + 2)
        layout = self.layout
        rows, columns = (-(-layout.seq_len // size) for size in block_size)
        text = (layout.visual_len + layout.anchor_len, layout.seq_len) if layout.text_len else (0, 0)
        return BlockMask.from_blocks(
            every[:, :, :rows, :columns],
            block_size=block_size,
            seq_len=layout.seq_len,
            kv_len=layout.seq_len,
            text=text,
            order=self.order if orders is None else orders[0],
            key_order=self.order if orders is None else orders[1],
        )
