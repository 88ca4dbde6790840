"""The one mask representation: per query block its key blocks and, for partial ones, a tile of bits."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

_TENSORS = ("full_ptr", "full_idx", "part_ptr", "part_idx", "part_tile", "tiles", "order", "head_groups")


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """A block-sparse attention mask, exact to the element.

    Query block r of head group g computes the **full** key blocks `full_idx[full_ptr[g, r]:full_ptr[g, r +
    1]]` without a mask and the **partial** key blocks `part_idx[part_ptr[g, r]:part_ptr[g, r + 1]]` under the
    tiles `tiles[part_tile[...]]`. Tiles are distinct: translation-invariant patterns need a handful.

    Everything is in *kernel order*; `order` maps a kernel position to the model's token index (None: the
    same). In kernel order the visual tokens come first, then anchor tokens, then text, whatever the model
    does.

    Shapes and dtypes: `full_ptr`, `part_ptr` int32 (G, R + 1), offsets into the flat index lists, with G
    head groups and R = ceil(seq_len / block_size[0]) query blocks; `full_idx`, `part_idx`, `part_tile`
    int32 (n,); `tiles` uint8 (T, block_size[0], block_size[1] / 8), bit j of byte b being key column 8 b +
    j, rows past `seq_len` and columns past `kv_len` zero; `order` int64 (seq_len,); `head_groups` int32
    (heads,), or None when one group serves every head.

    Blocks that touch text or reach past `kv_len` are always partial, so that only the partial loop of a
    kernel needs bounds and a per-sample text length.
    """

    block_size: tuple[int, int]
    seq_len: int
    kv_len: int
    full_ptr: torch.Tensor
    full_idx: torch.Tensor
    part_ptr: torch.Tensor
    part_idx: torch.Tensor
    part_tile: torch.Tensor
    tiles: torch.Tensor
    order: torch.Tensor | None = None
    text: tuple[int, int] = (0, 0)
    head_groups: torch.Tensor | None = None
    cache: dict = field(default_factory=dict)

    # -- shape ----------

    @property
    def num_rows(self) -> int:
        """Query blocks per head group."""
        return -(-self.seq_len // self.block_size[0])

    @property
    def num_cols(self) -> int:
        """Key blocks."""
        return -(-self.kv_len // self.block_size[1])

    @property
    def num_groups(self) -> int:
        return self.full_ptr.shape[0]

    @property
    def num_full(self) -> int:
        """Full blocks, over all head groups."""
        return self.full_idx.numel()

    @property
    def num_partial(self) -> int:
        """Partial blocks, over all head groups."""
        return self.part_idx.numel()

    @property
    def device(self) -> torch.device:
        return self.full_ptr.device

    def _group_weights(self) -> torch.Tensor:
        """Share of the heads in each group: float64 (G,)."""
        if self.head_groups is None:
            return torch.full((self.num_groups,), 1.0 / self.num_groups, dtype=torch.float64)
        counts = torch.bincount(self.head_groups.cpu().long(), minlength=self.num_groups).double()
        return counts / counts.sum()

    @property
    def block_density(self) -> float:
        """Computed blocks / all blocks, averaged over heads: what a block-sparse kernel pays."""
        per_group = (
            self.full_ptr[:, -1] - self.full_ptr[:, 0] + self.part_ptr[:, -1] - self.part_ptr[:, 0]
        ).cpu()
        return float((per_group.double() * self._group_weights()).sum() / (self.num_rows * self.num_cols))

    @property
    def density(self) -> float:
        """Computed pairs / (seq_len * kv_len), averaged over heads, exact."""
        if "density" not in self.cache:
            bq, bk = self.block_size
            rows = torch.full((self.num_rows,), bq, dtype=torch.int64)
            rows[-1] = self.seq_len - (self.num_rows - 1) * bq
            bits = _POPCOUNT[self.tiles.cpu().long()].sum((1, 2))
            part = torch.cat([torch.zeros(1, dtype=torch.int64), bits[self.part_tile.cpu().long()].cumsum(0)])
            full_ptr, part_ptr = self.full_ptr.cpu().long(), self.part_ptr.cpu().long()
            pairs = (full_ptr.diff(dim=1) * rows * bk).sum(1) + part[part_ptr[:, -1]] - part[part_ptr[:, 0]]
            total = float((pairs.double() * self._group_weights()).sum())
            self.cache["density"] = total / (self.seq_len * self.kv_len)
        return self.cache["density"]

    # -- conversion ----------

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask with its tensors on `device` (itself when already there)."""
        device = torch.device(device)
        if device == self.device:
            return self
        moved = {n: getattr(self, n).to(device) for n in _TENSORS if getattr(self, n) is not None}
        return replace(self, **moved, cache={})

    def group_of_heads(self, heads: int) -> torch.Tensor:
        """Head group of each of `heads` heads: int32 (heads,).

        Raises:
            ValueError: a mask made for another number of heads.
        """
        if self.head_groups is None:
            return torch.zeros(heads, dtype=torch.int32, device=self.device)
        if self.head_groups.numel() != heads:
            raise ValueError(f"this mask is for {self.head_groups.numel()} heads, got tensors with {heads}")
        return self.head_groups

    def block_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Query-block row (counted through all groups) of every full and of every partial block, int64."""
        rows = torch.arange(self.num_groups * self.num_rows, device=self.device)
        counts = [p.diff(dim=1).flatten().long() for p in (self.full_ptr, self.part_ptr)]
        return torch.repeat_interleave(rows, counts[0]), torch.repeat_interleave(rows, counts[1])

    def unpacked_tiles(self) -> torch.Tensor:
        """The tiles as bool (T, block_size[0], block_size[1])."""
        bits = torch.arange(8, dtype=torch.uint8, device=self.device)
        return (self.tiles.unsqueeze(-1) >> bits & 1).bool().flatten(-2)

    def to_kernel_mask(self) -> torch.Tensor:
        """Dense bool (G, seq_len, kv_len) in kernel order. Small sizes only."""
        (bq, bk), (rows, cols) = self.block_size, (self.num_rows, self.num_cols)
        blocks = torch.zeros(self.num_groups * rows, cols, bq, bk, dtype=torch.bool, device=self.device)
        full_rows, part_rows = self.block_rows()
        blocks[full_rows, self.full_idx.long()] = True
        blocks[part_rows, self.part_idx.long()] = self.unpacked_tiles()[self.part_tile.long()]
        dense = blocks.view(self.num_groups, rows, cols, bq, bk).transpose(2, 3)
        return dense.reshape(self.num_groups, rows * bq, cols * bk)[
            :, : self.seq_len, : self.kv_len
        ].contiguous()

    def to_token_mask(self) -> torch.Tensor:
        """Dense bool mask in the model's token order, (seq_len, kv_len), with heads first where they differ.

        Extra key columns (pooled keys) keep their place at the end. Small sizes only: this is for tests.
        """
        mask = self.to_kernel_mask()
        if self.order is not None:
            extra = torch.arange(self.seq_len, self.kv_len, device=self.device)
            inverse = torch.argsort(self.order)
            mask = mask[:, inverse][:, :, torch.cat([inverse, extra])]
        return mask[0] if self.head_groups is None else mask[self.head_groups.long()]

    def to_flex(self):
        """The same mask as a `torch.nn.attention.flex_attention.BlockMask`, for any FlexAttention backend.

        Its block lists and mask function are in kernel order; the mask function looks the element up in the
        tiles.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        bq, bk = self.block_size
        groups, rows, cols = self.num_groups, self.num_rows, self.num_cols
        full_rows, part_rows = self.block_rows()
        tile_of = torch.full(
            (groups * rows, cols), -1, dtype=torch.int32, device=self.device
        )  # -1 empty, -2 full
        tile_of[full_rows, self.full_idx.long()] = -2
        tile_of[part_rows, self.part_idx.long()] = self.part_tile
        tile_of = tile_of.view(groups, rows, cols)
        heads = self.head_groups.long() if self.head_groups is not None else None
        tile_of_head = tile_of if heads is None else tile_of[heads]
        num_heads = tile_of_head.shape[0]
        tiles = self.unpacked_tiles()
        if not tiles.shape[0]:
            tiles = torch.zeros(1, bq, bk, dtype=torch.bool, device=self.device)

        def mask_mod(b, h, q, k):
            tile = tile_of_head[h if num_heads > 1 else 0, q // bq, k // bk]
            return (tile == -2) | ((tile >= 0) & tiles[tile.clamp(min=0), q % bq, k % bk])

        def dense_lists(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            counts = chosen.sum(-1, dtype=torch.int32)
            return counts[None], torch.argsort(chosen.int(), dim=-1, descending=True, stable=True).int()[None]

        part_num, part_idx = dense_lists(tile_of_head >= 0)
        full_num, full_idx = dense_lists(tile_of_head == -2)
        return FlexBlockMask.from_kv_blocks(
            part_num,
            part_idx,
            full_num,
            full_idx,
            BLOCK_SIZE=(bq, bk),
            mask_mod=mask_mod,
            seq_lengths=(self.seq_len, self.kv_len),
        )

    @classmethod
    def from_token_mask(
        cls,
        mask: torch.Tensor,
        block_size: tuple[int, int] = (128, 64),
        text: tuple[int, int] = (0, 0),
    ) -> BlockMask:
        """From a dense bool mask (S, K), or (heads, S, K), already in kernel order. Small sizes only.

        `text` is the (start, stop) of the text tokens, whose key blocks are listed as partial.

        Raises:
            ValueError: a mask that is not bool of two or three dimensions, or a block size that is not
            usable.
        """
        check_block_size(block_size)
        if mask.dtype != torch.bool or mask.ndim not in (2, 3):
            raise ValueError(
                f"`mask` must be bool of shape (S, K) or (heads, S, K), got {mask.dtype} {tuple(mask.shape)}"
            )
        per_head = mask.ndim == 3
        mask = mask if per_head else mask[None]
        (bq, bk), (groups, seq_len, kv_len) = block_size, mask.shape
        rows, cols = -(-seq_len // bq), -(-kv_len // bk)
        padded = torch.zeros(groups, rows * bq, cols * bk, dtype=torch.bool, device=mask.device)
        padded[:, :seq_len, :kv_len] = mask
        blocks = padded.view(groups, rows, bq, cols, bk).transpose(2, 3)
        row_in_range = (torch.arange(rows * bq, device=mask.device) < seq_len).view(rows, 1, bq, 1)
        full = (blocks | ~row_in_range).flatten(-2).all(-1) & ~unmaskable(cols, bk, kv_len, text).to(
            mask.device
        )
        part = blocks.flatten(-2).any(-1) & ~full
        tiles, part_tile = torch.unique(pack_bits(blocks[part]), dim=0, return_inverse=True)
        return cls(
            block_size=tuple(block_size), seq_len=seq_len, kv_len=kv_len,
            full_ptr=row_pointers(full), full_idx=full.nonzero()[:, 2].int(),
            part_ptr=row_pointers(part), part_idx=part.nonzero()[:, 2].int(), part_tile=part_tile.int(),
            tiles=tiles, text=tuple(text),
            head_groups=torch.arange(groups, dtype=torch.int32, device=mask.device) if per_head else None,
        )  # fmt: skip

    # -- files ----------

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        from safetensors.torch import save_file

        tensors = {n: getattr(self, n).cpu().contiguous() for n in _TENSORS if getattr(self, n) is not None}
        fields = {n: getattr(self, n) for n in ("block_size", "seq_len", "kv_len", "text")}
        save_file(
            tensors, str(path), metadata={"format": "dit-accel block mask 1", "fields": json.dumps(fields)}
        )

    @classmethod
    def load(cls, path: str | Path) -> BlockMask:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is not a saved block mask.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"no block mask file at {path}")
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from None
        if metadata.get("format") != "dit-accel block mask 1":
            raise ValueError(
                f"{path} is not a block mask saved by dit-accel (format {metadata.get('format')!r})"
            )
        fields = json.loads(metadata["fields"])
        fields.update({n: tuple(fields[n]) for n in ("block_size", "text")})
        return cls(**fields, **tensors)

    def __repr__(self) -> str:
        heads = "" if self.head_groups is None else f", heads={self.head_groups.numel()}"
        return (
            f"BlockMask({self.seq_len} x {self.kv_len}, block_size={self.block_size}{heads}, "
            f"density={self.density:.4f}, block_density={self.block_density:.4f}, "
            f"full={self.num_full}, partial={self.num_partial}, tiles={self.tiles.shape[0]})"
        )


_POPCOUNT = torch.tensor([bin(i).count("1") for i in range(256)], dtype=torch.int64)


def check_block_size(block_size: tuple[int, int]) -> None:
    """Raise ValueError unless (query, key) block sizes are positive multiples of 16 and 8."""
    sizes = block_size if isinstance(block_size, (tuple, list)) else ()
    whole = len(sizes) == 2 and all(isinstance(n, int) and n > 0 for n in sizes)
    if not whole or sizes[0] % 16 or sizes[1] % 8:
        raise ValueError(f"`block_size` must be (a multiple of 16, a multiple of 8), got {block_size!r}")


def unmaskable(cols: int, bk: int, kv_len: int, text: tuple[int, int]) -> torch.Tensor:
    """Key blocks never to be listed as full, which touch text or reach past kv_len: bool (cols,)."""
    start = torch.arange(cols) * bk
    stop = start + bk
    return (stop > kv_len) | ((start < text[1]) & (stop > text[0]))


def row_pointers(chosen: torch.Tensor) -> torch.Tensor:
    """Offsets (G, R + 1) int32 into the flat list of the True entries of `chosen` (G, R, C)."""
    groups, rows, _ = chosen.shape
    ends = chosen.sum(-1).flatten().cumsum(0).view(groups, rows)
    first = torch.cat([ends.new_zeros(1), ends[:-1, -1]])
    return torch.cat([first[:, None], ends], dim=1).int()


def pack_bits(blocks: torch.Tensor) -> torch.Tensor:
    """Bool (n, bq, bk) to uint8 (n, bq, bk / 8), least significant bit first."""
    weights = (1 << torch.arange(8, device=blocks.device)).to(torch.uint8)
    return (blocks.unflatten(-1, (-1, 8)).to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)
