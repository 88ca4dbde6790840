"""Cubes of visual tokens as the blocks of a mask: cut ones are filled up with places that hold no key."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dit_accel.masks.block_lists import BlockLists
from dit_accel.masks.block_mask import BlockMask
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.tiles import pack_bits

from .arrangement import call_order

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Cubes:
    """The tokens of a layer in cubes, row by row, then anchor tokens, then text; each cube is a block.

    Cubes at the far borders may be cut. Each block has `size` places, of which those that are left over, and
    the last ones behind the text, repeat a token of the block; as keys they are hidden.

    Attributes:
        layout: of the tokens.
        size: places of a block.
        count: cubes; the blocks behind them hold anchor and text.
        sizes: tokens of each cube, int64 (count,).
        gather: the token at each place, int64 (P,), in the order of calls.
        exists: which places hold a token of their own, bool (P,).
        places: the place of each token, int64 (S,), in the order of calls.
        cube: the cube of each visual token, int64 (V,), in the order of calls.
        order: the model's token at each place, int64 (P,); those without one are numbered from S on.
        cut: blocks with places that hold no token, or with text, int64 (n,).
    """

    layout: TokenLayout
    size: int
    count: int
    sizes: torch.Tensor
    gather: torch.Tensor
    exists: torch.Tensor
    places: torch.Tensor
    cube: torch.Tensor
    order: torch.Tensor
    cut: torch.Tensor

    @classmethod
    def of(
        cls,
        layout: TokenLayout,
        cube: Grid,
        places: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Cubes:
        """Of a layout in which calls have visual tokens in the order `places`, int64 (V,)."""
        size, of_token = math.prod(cube), cube_of(layout, cube)
        count = math.prod(-(-n // side) for n, side in zip(layout.grid, cube, strict=True))
        sizes = torch.bincount(of_token, minlength=count)
        visual = torch.argsort(of_token, stable=True)
        ends = sizes.cumsum(0)
        inside = torch.arange(size, device="cpu")
        at = (ends - sizes)[:, None] + torch.minimum(inside, sizes[:, None] - 1)
        tokens = [layout.visual_slice.start + visual[at].flatten()]
        exists = [(inside < sizes[:, None]).flatten()]
        others = layout.text_last[layout.visual_len :]
        if len(others):
            at = torch.arange(-(-len(others) // size) * size, device="cpu")
            tokens.append(others[at.clamp(max=len(others) - 1)])
            exists.append(at < len(others))
        model, real = torch.cat(tokens), torch.cat(exists)
        order = model.clone()
        order[~real] = layout.seq_len + torch.arange(int((~real).sum()), device="cpu")
        calls = call_order(layout, places)
        gather = torch.argsort(calls)[model]
        place = torch.empty(layout.seq_len, dtype=torch.int64, device="cpu")
        place[gather[real]] = torch.nonzero(real).flatten()
        own = of_token if places is None else of_token[places.cpu()]
        partial = ~real.view(-1, size).all(1)
        if layout.text_len:
            partial[count + layout.anchor_len // size :] = True
        cut = torch.nonzero(partial).flatten()
        moved = (x.to(device) for x in (sizes, gather, real, place, own, order, cut))
        return cls(layout, size, count, *moved)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, H, S, D) in the order of calls, by place: (B, H, P, D)."""
        return x.transpose(1, 2).index_select(1, self.gather).transpose(1, 2)  # whole tokens, the fastest

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse, of places that hold a token of their own."""
        return x.transpose(1, 2).index_select(1, self.places).transpose(1, 2)

    def means(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over each cube, of x (B, H, P, D) by place: (B, H, count, D), in at least fp32."""
        exact, stop = torch.promote_types(x.dtype, torch.float32), self.count * self.size
        own = self.exists[:stop].view(self.count, self.size, 1).to(x.dtype)
        sums = (x[:, :, :stop].unflatten(2, (self.count, self.size)) * own).sum(3, dtype=exact)
        return sums / self.sizes[:, None]

    def means_of(self, x: torch.Tensor) -> torch.Tensor:
        """The same of the visual tokens x (B, H, V, D) in the order of calls."""
        exact = torch.promote_types(x.dtype, torch.float32)
        sums = x.new_zeros((*x.shape[:2], self.count, x.shape[3]), dtype=exact)
        return sums.index_add(2, self.cube, x.to(exact)) / self.sizes[:, None]

    def every(self, chosen: torch.Tensor) -> torch.Tensor:
        """All blocks that are computed where these cubes are, bool (..., count, count): bool (..., R, R)."""
        blocks = len(self.exists) // self.size
        behind = torch.arange(blocks, device=chosen.device) >= self.count
        chosen = F.pad(chosen, (0, blocks - self.count, 0, blocks - self.count))
        return chosen | behind | behind[:, None]

    def mask(self, chosen: torch.Tensor, rows: int | None = None) -> BlockMask:
        """The mask of chosen cubes and of all blocks behind them, queries and keys by place.

        Args:
            chosen: bool (B, H, count, count).
            rows: places of a block of queries, which divide a cube's; None: a cube's.
        """
        size, rows = self.size, rows or self.size
        every = self.every(chosen).repeat_interleave(size // rows, 2)
        held = self.exists.view(-1, size)
        first = self.count * size + self.layout.anchor_len
        text = (first, first + self.layout.text_len) if self.layout.text_len else (0, 0)
        samples, total, cut = every.shape[:2], len(self.exists), self.cut
        blocks = torch.arange(len(held), dtype=torch.int32, device=held.device)
        whole = torch.ones(len(held), dtype=torch.bool, device=held.device).index_fill(0, cut, False)
        groups = every.flatten(0, 1)
        tile = torch.arange(len(cut), dtype=torch.int32, device=held.device)
        return BlockMask(
            block_size=(rows, size),
            seq_len=total,
            kv_len=total,
            full=BlockLists.with_room(groups & whole, blocks),
            partial=BlockLists.with_room(groups[:, :, cut], cut.int(), tile.expand(every.shape[2], -1)),
            tiles=pack_bits(held[cut][:, None].expand(-1, rows, -1)),
            order=self.order,
            key_order=self.order,
            text=text,
            head_groups=torch.arange(samples.numel(), dtype=torch.int32, device=held.device).view(samples),
        ).trusted()

    def share(self, chosen: torch.Tensor) -> torch.Tensor:
        """The share of all pairs of tokens that is computed where these cubes are chosen, fp64."""
        sizes, tokens = self.sizes.double(), self.layout.seq_len
        pairs = (chosen.double() @ sizes @ sizes).mean()
        return (pairs + tokens**2 - self.layout.visual_len**2) / tokens**2

    def block_share(self, listed: float) -> float:
        """What a kernel pays as a share of all pairs of tokens, for this share of all blocks."""
        return listed * (len(self.exists) / self.layout.seq_len) ** 2


def cube_of(layout: TokenLayout, cube: Grid) -> torch.Tensor:
    """The cube of each visual token, counted row by row: int64 (V,), in the model's order."""
    rows, columns = (-(-n // side) for n, side in zip(layout.grid[1:], cube[1:], strict=True))
    frame, row, column = (
        axis // n for axis, n in zip(layout.coordinates.long().unbind(1), cube, strict=True)
    )
    return (frame * rows + row) * columns + column
