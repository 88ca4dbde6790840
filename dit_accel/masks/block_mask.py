"""The one mask representation: per query block its key blocks and, for partial ones, a tile of bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from . import mask_files
from .block_lists import BlockLists
from .mask_fields import MaskFields
from .tiles import border_tiles, check_block_size, check_text, pack_bits, unmaskable, unpack_bits

_MOVED = ("full", "partial", "tiles", "order", "key_order", "head_groups")


class BlockMask(MaskFields):
    """A block-sparse attention mask, exact to the element; a value that never changes.

    Each of G mask groups lists, for each of R = ceil(seq_len / block_size[0]) query blocks, the **full** key
    blocks, computed without a mask, and the **partial** ones, each under one of `tiles`. Tiles are shared:
    translation-invariant patterns need a handful. Blocks that touch text or reach past `kv_len` are always
    partial, so that only the partial loop of a kernel needs bounds and a per-sample text length.

    Positions are in *kernel order*. In a mask of a pattern the visual tokens come first, then anchor tokens,
    then text (unless asked otherwise), then extra key columns (pooled keys).

    Attributes:
        block_size: (query, key) tokens of a block, multiples of 16 and 8.
        seq_len, kv_len: number of queries and of keys.
        full, partial: the listed key blocks, (G, R) rows each; `partial.tile` is each block's tile.
        tiles: uint8 (T, block_size[0], block_size[1] / 8), bit j of byte b being key column 8 b + j; rows
            past `seq_len` and columns past `kv_len` are zero.
        order: position of a query in kernel order -> its place in the model's order, int64 (seq_len,), or of
            every sample and head (batch, heads, seq_len); None: the same.
        key_order: the same of keys, int64 (n,) or (batch, heads, n); those from n on keep their place. None:
            all do.
        text: (start, stop) of the text among the keys.
        head_groups: mask group of each head, int32 (heads,), or of each sample's heads, (batch, heads); None:
            one group serves all.

    Raises:
        ValueError: tensors whose dtype, shape or device does not fit; `validate` looks into them.
    """

    # -- conversion ----------

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask with its tensors on `device` (itself when already there)."""
        device = torch.device(device)
        if device == self.device:
            return self
        with torch.inference_mode(False):  # what is kept must be usable under autograd later
            moved = {n: getattr(self, n).to(device) for n in _MOVED if getattr(self, n) is not None}
        copy = replace(self, **moved)
        return copy.trusted() if self.is_trusted else copy

    def transposed(self) -> tuple[BlockLists, BlockLists]:
        """Per mask group and key block its query blocks, full and partial: lists of (G, num_cols) rows.

        For a backward pass; made on the mask's device without asking it for a size.
        """
        return self.full.transposed(self.num_cols), self.partial.transposed(self.num_cols)

    def unpacked_tiles(self) -> torch.Tensor:
        """The tiles as bool (T, block_size[0], block_size[1])."""
        return unpack_bits(self.tiles)

    def block_tiles(self) -> torch.Tensor:
        """What each block is: its tile, -1 where absent, -2 where full: int32 (G, R, num_cols)."""
        shape = (self.num_groups, self.num_rows, self.num_cols)
        tiles = torch.full((shape[0] * shape[1], shape[2]), -1, dtype=torch.int32, device=self.device)
        for lists, tile in ((self.full, None), (self.partial, self.partial.tile)):
            row, where = lists.entries()
            tiles[row, lists.index[where].long()] = -2 if tile is None else tile[where]
        return tiles.view(shape)

    def listed_blocks(self) -> torch.Tensor:
        """Which key blocks each query block computes: bool (G, R, num_cols), without asking the device."""
        shape = (self.num_groups, self.num_rows, self.num_cols)
        listed = torch.zeros(
            shape[0] * shape[1], shape[2] + 1, dtype=torch.bool, device=self.device
        )  # the last column takes what no row lists
        for lists in (self.full, self.partial):
            row, here = lists.places()
            listed[row, torch.where(here, lists.index, self.num_cols).long()] = True
        return listed[:, :-1].view(shape)

    def with_whole_blocks(self) -> BlockMask:
        """The mask in which every listed block is attended whole, made on its device without waiting for it.

        Rows that attend nothing in blocks that others of their query block attend then attend there too.
        """
        if self.has_whole_blocks:
            return self
        listed = self.listed_blocks()
        return BlockMask.from_blocks(
            listed[0] if self.head_groups is None else listed,
            block_size=self.block_size,
            seq_len=self.seq_len,
            kv_len=self.kv_len,
            text=self.text,
            head_groups=self.head_groups,
            order=self.order,
            key_order=self.key_order,
        )

    def to_kernel_mask(self) -> torch.Tensor:
        """Dense bool (G, seq_len, kv_len) in kernel order. Small sizes only."""
        shape = (1, *self.block_size)
        tiles = torch.cat([self.unpacked_tiles(), self.tiles.new_ones(shape), self.tiles.new_zeros(shape)])
        blocks = tiles.bool()[self.block_tiles().long()].transpose(2, 3)  # the last tiles are -2 and -1
        dense = blocks.flatten(3, 4).flatten(1, 2)
        return dense[:, : self.seq_len, : self.kv_len].contiguous()

    def to_token_mask(self) -> torch.Tensor:
        """Dense bool mask in the model's token order, (seq_len, kv_len); (heads, ...) or (batch, heads, ...)
        in front where they differ.

        Extra key columns (pooled keys) keep their place at the end. Small sizes only: this is for tests.
        """
        mask = self.to_kernel_mask()
        mask = mask[0] if self.head_groups is None else mask[self.head_groups.long()]
        if self.order is not None:
            mask = _taken(mask, torch.argsort(self.order)[..., None], -2)
        if self.key_order is not None:
            n = self.key_order.shape[-1]
            extra = torch.arange(n, self.kv_len, device=self.device).expand(*self.key_order.shape[:-1], -1)
            mask = _taken(mask, torch.cat([torch.argsort(self.key_order), extra], -1)[..., None, :], -1)
        return mask

    def to_flex(self):
        """The same mask as a `torch.nn.attention.flex_attention.BlockMask`, for any FlexAttention backend.

        Its block lists and mask function are in kernel order; the mask function looks the element up in the
        tiles.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        bq, bk = self.block_size
        tile_of = self.block_tiles()
        if self.head_groups is not None:
            tile_of = tile_of[self.head_groups.long()]
        tile_of = tile_of.view(-1, *tile_of.shape[-3:])
        samples, heads = tile_of.shape[:2]
        tiles = self.unpacked_tiles()
        if not tiles.shape[0]:
            tiles = torch.zeros(1, bq, bk, dtype=torch.bool, device=self.device)

        def mask_mod(b, h, q, k):
            tile = tile_of[b if samples > 1 else 0, h if heads > 1 else 0, q // bq, k // bk]
            return (tile == -2) | ((tile >= 0) & tiles[tile.clamp(min=0), q % bq, k % bk])

        def dense_lists(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            counts = chosen.sum(-1, dtype=torch.int32)
            return counts, torch.argsort(chosen.int(), dim=-1, descending=True, stable=True).int()

        return FlexBlockMask.from_kv_blocks(
            *dense_lists(tile_of >= 0),
            *dense_lists(tile_of == -2),
            BLOCK_SIZE=(bq, bk),
            mask_mod=mask_mod,
            seq_lengths=(self.seq_len, self.kv_len),
        )

    # -- other ways to make one ----------

    @classmethod
    @torch.inference_mode(False)
    def from_token_mask(
        cls,
        mask: torch.Tensor,
        block_size: tuple[int, int] = (128, 64),
        text: tuple[int, int] = (0, 0),
    ) -> BlockMask:
        """From a dense bool mask (S, K), (heads, S, K) or (batch, heads, S, K), already in kernel order.

        `text` is the (start, stop) of the text tokens, whose key blocks are listed as partial. Small sizes
        only.

        Raises:
            ValueError: a mask that is not bool of two to four dimensions, or a block size that is not usable.
        """
        check_block_size(block_size)
        if mask.dtype != torch.bool or mask.ndim not in (2, 3, 4):
            raise ValueError(
                "`mask` must be bool of shape (S, K), (heads, S, K) or (batch, heads, S, K), got "
                f"{mask.dtype} {tuple(mask.shape)}"
            )
        (bq, bk), (seq_len, kv_len) = block_size, mask.shape[-2:]
        check_text(text, kv_len)
        groups = mask.shape[:-2].numel()
        rows, cols = -(-seq_len // bq), -(-kv_len // bk)
        padded = mask.new_zeros(groups, rows * bq, cols * bk)
        padded[:, :seq_len, :kv_len] = mask.reshape(groups, seq_len, kv_len)
        blocks = padded.view(groups, rows, bq, cols, bk).transpose(2, 3)
        beyond = (torch.arange(rows * bq, device=mask.device) >= seq_len).view(rows, 1, bq, 1)
        full = (blocks | beyond).flatten(-2).all(-1)
        full[..., unmaskable(kv_len, bk, text, mask.device)] = False
        partial = blocks.flatten(-2).any(-1) & ~full
        tiles, tile = torch.unique(pack_bits(blocks[partial]), dim=0, return_inverse=True)
        return cls(
            block_size=tuple(block_size),
            seq_len=seq_len,
            kv_len=kv_len,
            full=BlockLists.packed(full),
            partial=BlockLists.packed(partial, tile.int()),
            tiles=tiles,
            text=tuple(text),
            head_groups=_group_of_its_own(mask.shape[:-2], mask.device),
        ).trusted()

    @classmethod
    def from_blocks(
        cls,
        selected: torch.Tensor,
        *,
        block_size: tuple[int, int],
        seq_len: int,
        kv_len: int,
        text: tuple[int, int] = (0, 0),
        head_groups: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
        key_order: torch.Tensor | None = None,
    ) -> BlockMask:
        """From a choice of whole blocks, made in every call: on its device, without waiting for it.

        Also inside compiled code. Blocks with text or past `kv_len` are listed as partial; their tokens are
        attended where the block is selected. Lists have room for all blocks in every row.

        Args:
            selected: key blocks of every query block, bool (R, C), (heads, R, C) or (batch, heads, R, C);
                with `head_groups`, (G, R, C).
            block_size, seq_len, kv_len, text, head_groups, order, key_order: as of the mask.

        Raises:
            ValueError: a selection that is not bool or does not fit the number of blocks.
        """
        check_block_size(block_size)
        rows, cols = -(-seq_len // block_size[0]), -(-kv_len // block_size[1])
        shape = tuple(selected.shape)
        if selected.dtype != torch.bool or shape[-2:] != (rows, cols) or len(shape) > 4:
            raise ValueError(
                f"`selected` must be bool of shape ({rows}, {cols}), the blocks of {seq_len} x {kv_len} "
                f"tokens, with heads, or samples and heads, in front; got {selected.dtype} {shape}"
            )
        check_text(text, kv_len)
        device = selected.device
        if head_groups is None:
            head_groups = _group_of_its_own(selected.shape[:-2], device)
        selected = selected.reshape(-1, rows, cols)
        partial = unmaskable(kv_len, block_size[1], text, device)
        full = torch.arange(cols, dtype=torch.int32, device=device)
        can_be_full = torch.ones(cols, dtype=torch.bool, device=device).index_fill(0, partial, False)
        past_end = [  # of query blocks, of the partial key blocks
            torch.arange(n, dtype=torch.int32, device=device) == length // size
            for n, length, size in zip((rows, cols), (seq_len, kv_len), block_size, strict=True)
        ]
        tile = past_end[0][:, None] * 2 + past_end[1][partial].int()
        return cls(
            block_size=tuple(block_size),
            seq_len=seq_len,
            kv_len=kv_len,
            full=BlockLists.with_room(selected & can_be_full, full),
            partial=BlockLists.with_room(selected[:, :, partial], partial.int(), tile.int()),
            tiles=border_tiles(seq_len, kv_len, block_size, device),
            order=order,
            key_order=key_order,
            text=tuple(text),
            head_groups=head_groups,
        ).trusted(whole_blocks=True)

    def restricted(self, selected: torch.Tensor) -> BlockMask:
        """This mask of one group in the selected blocks alone, on its device, without waiting for it.

        Args:
            selected: bool (batch, heads, R, num_cols); what the mask does not list stays out.
        """
        tile = self.block_tiles()[0]
        selected = selected.expand(*selected.shape[:2], *tile.shape)
        groups, columns = selected.flatten(0, 1), torch.arange(self.num_cols, device=tile.device).int()
        some = self.tiles.new_zeros(1, *self.tiles.shape[1:])  # which places that hold nothing name
        return replace(
            self,
            tiles=self.tiles if self.tiles.shape[0] else some,
            full=BlockLists.with_room(groups & (tile == -2), columns),
            partial=BlockLists.with_room(groups & (tile >= 0), columns, tile.clamp(min=0)),
            head_groups=_group_of_its_own(selected.shape[:2], tile.device),
        ).trusted()

    # -- files ----------

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        fields = {n: getattr(self, n) for n in ("block_size", "seq_len", "kv_len", "text")}
        mask_files.write(Path(path), self.tensors(), fields)

    @classmethod
    def load(cls, path: str | Path) -> BlockMask:
        """Read a file written by `save`; nothing in it is believed before it is checked.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is not a saved block mask, is damaged, or describes no mask.
        """
        tensors, fields = mask_files.read(Path(path))
        lists = {
            name: BlockLists(**{k: tensors.pop(f"{name}.{k}") for k in keys})
            for name, keys in (
                ("full", ("start", "count", "index")),
                ("partial", ("start", "count", "index", "tile")),
            )
        }
        try:
            mask = cls(**lists, **tensors, **fields)
            mask.validate()
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        return mask

    def __repr__(self) -> str:
        heads = "" if self.head_groups is None else f", heads={tuple(self.head_groups.shape)}"
        return (
            f"BlockMask({self.seq_len} x {self.kv_len}, block_size={self.block_size}{heads}, "
            f"density={self.density:.4f}, block_density={self.block_density:.4f}, "
            f"full={self.num_full}, partial={self.num_partial}, tiles={self.tiles.shape[0]})"
        )


def _taken(mask: torch.Tensor, places: torch.Tensor, axis: int) -> torch.Tensor:
    """Rows (-2) or columns (-1) of masks, where samples and heads of either may be missing."""
    shape = torch.broadcast_shapes(mask.shape[:-2], places.shape[:-2])
    mask, places = (x.expand(*shape, *x.shape[-2:]) for x in (mask, places))
    return mask.take_along_dim(places, axis)


def _group_of_its_own(shape: torch.Size, device: torch.device) -> torch.Tensor | None:
    """A mask group for each head, of each sample: int32, of that shape."""
    return torch.arange(shape.numel(), dtype=torch.int32, device=device).view(shape) if shape else None
