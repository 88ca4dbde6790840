"""The fields of a block mask: their shapes, the checks that they fit, and the densities they amount to."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch._dynamo import maybe_mark_dynamic

from .block_lists import BlockLists
from .launch_data import Kind, LaunchData
from .tensor_checks import LONGEST, check_range, check_tensor
from .tiles import POPCOUNT, border_tiles, check_block_size, check_text

Mask = TypeVar("Mask", bound="MaskFields")


@dataclass(frozen=True, eq=False, repr=False)
class MaskFields:
    """What `BlockMask` holds; documented there."""

    block_size: tuple[int, int]
    seq_len: int
    kv_len: int
    full: BlockLists
    partial: BlockLists
    tiles: torch.Tensor
    order: torch.Tensor | None = None
    key_order: torch.Tensor | None = None
    text: tuple[int, int] = (0, 0)
    head_groups: torch.Tensor | None = None

    # -- shape ----------

    @property
    def num_rows(self) -> int:
        """Query blocks per mask group."""
        return -(-self.seq_len // self.block_size[0])

    @property
    def num_cols(self) -> int:
        """Key blocks."""
        return -(-self.kv_len // self.block_size[1])

    @property
    def num_groups(self) -> int:
        return self.full.start.shape[0]

    @property
    def num_full(self) -> int:
        """Full blocks, over all mask groups."""
        return self.full.listed

    @property
    def num_partial(self) -> int:
        """Partial blocks, over all mask groups."""
        return self.partial.listed

    @property
    def device(self) -> torch.device:
        return self.tiles.device

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        own = {id(x): x.nbytes for x in self.tensors().values()}
        return sum(own.values())

    @cached_property
    def group_weights(self) -> torch.Tensor:
        """Share of the heads in each mask group: float64 (G,), on the CPU."""
        if self.head_groups is None:
            return torch.ones(1, dtype=torch.float64, device="cpu")
        groups = self.head_groups.cpu().long().flatten()
        return torch.bincount(groups, minlength=self.num_groups).double() / groups.numel()

    @property
    def block_density(self) -> float:
        """Computed blocks / all blocks, averaged over heads: what a block-sparse kernel pays."""
        blocks = (self.full.count.sum(1) + self.partial.count.sum(1)).cpu()
        return float(blocks.double() @ self.group_weights) / (self.num_rows * self.num_cols)

    @cached_property
    def density(self) -> float:
        """Computed pairs / (seq_len * kv_len), averaged over heads, exact."""
        (bq, bk), full, partial = self.block_size, self.full.to("cpu"), self.partial.to("cpu")
        rows = torch.full((self.num_rows,), bq, dtype=torch.int64, device="cpu")
        rows[-1] = self.seq_len - (self.num_rows - 1) * bq
        pairs = (full.count * rows * bk).sum(1)
        row, where = partial.entries()
        bits = POPCOUNT[self.tiles.cpu().long()].sum((1, 2))[partial.tiles[where].long()]
        pairs.index_add_(0, row // self.num_rows, bits)
        return float(pairs.double() @ self.group_weights) / (self.seq_len * self.kv_len)

    def pair_counts(self) -> torch.Tensor:
        """Computed pairs of each block: int64 (G, R, num_cols), on the device, which is not waited for."""
        bq, bk = self.block_size
        counts = torch.zeros(
            self.num_groups * self.num_rows, self.num_cols, device=self.device, dtype=torch.int64
        )
        rows = torch.full((self.num_rows,), bq, dtype=torch.int64, device=self.device)
        rows[-1] = self.seq_len - (self.num_rows - 1) * bq
        bits = POPCOUNT.to(self.device)[self.tiles.long()].sum((1, 2))
        for lists in (self.full, self.partial):
            row, listed = lists.places()
            pairs = rows[row % self.num_rows] * bk if lists.tile is None else bits[lists.tile.long()]
            counts.index_put_((row, lists.index.long()), pairs * listed, accumulate=True)
        return counts.view(self.num_groups, self.num_rows, self.num_cols)

    def achieved_density(self) -> torch.Tensor:
        """`density` as a tensor, float64 () on the mask's device, which is not waited for."""
        bq, bk = self.block_size
        rows = torch.full((self.num_rows,), bq, dtype=torch.int64, device=self.device)
        rows[-1] = self.seq_len - (self.num_rows - 1) * bq
        pairs = (self.full.count * rows * bk).sum(1)
        row, listed = self.partial.places()
        bits = POPCOUNT.to(self.device)[self.tiles.long()].sum((1, 2))[self.partial.tiles.long()] * listed
        pairs = pairs.index_add(0, row // self.num_rows, bits)
        if self.head_groups is not None:
            pairs = pairs[self.head_groups.long()]
        return pairs.double().mean() / (self.seq_len * self.kv_len)

    def group_of_heads(self, batch: int, heads: int) -> torch.Tensor:
        """Mask group of each head: int32 (batch, heads), or (1, heads) where all samples share theirs.

        Raises:
            ValueError: a mask made for another number of heads or samples.
        """
        self.check_heads(batch, heads)
        if self.head_groups is None:
            return torch.zeros(1, heads, dtype=torch.int32, device=self.device)
        return self.head_groups.view(-1, heads)

    def check_heads(self, batch: int, heads: int) -> None:
        """Raise ValueError unless the mask can serve that many samples and heads."""
        made_for = (batch, heads) if self.head_groups is None else tuple(self.head_groups.shape)
        if made_for[-1] != heads:
            raise ValueError(f"`mask` is for {made_for[-1]} heads, got tensors with {heads}")
        if len(made_for) == 2 and made_for[0] != batch:
            raise ValueError(f"`mask` is for a batch of {made_for[0]}, got tensors with {batch}")

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, those of the lists as `full.start` and so on."""
        lists = {f"{n}.{k}": x for n in ("full", "partial") for k, x in getattr(self, n).tensors().items()}
        own = {
            name: getattr(self, name)
            for name in ("tiles", "order", "key_order", "head_groups")
            if getattr(self, name) is not None
        }
        return {**lists, **own}

    @cached_property
    def launch_data(self) -> LaunchData:
        """What kernels have derived from this mask."""
        return LaunchData()

    def derived(self, kind: type[Kind], make: Callable[[], Kind], *arguments: Hashable) -> Kind:
        """What a kernel needs of this mask: see `LaunchData.get`. Compiled code makes it in every call."""
        return make() if torch.compiler.is_compiling() else self.launch_data.get(kind, make, *arguments)

    # -- checks ----------

    def __post_init__(self):
        check_block_size(self.block_size)
        if not (type(self.seq_len) is type(self.kv_len) is int and self.seq_len > 0 and self.kv_len > 0):
            raise ValueError(
                f"`seq_len` and `kv_len` must be positive integers, got {self.seq_len!r} and {self.kv_len!r}"
            )
        if self.seq_len > LONGEST or self.kv_len > LONGEST:
            raise ValueError(
                f"a mask has at most {LONGEST} queries and keys, got {self.seq_len} x {self.kv_len}"
            )
        check_text(self.text, self.kv_len)
        if self.full.start.ndim != 2 or not self.num_groups:
            shape = tuple(self.full.start.shape)
            raise ValueError(f"`full.start` must be of shape (groups, query blocks), got {shape}")
        if self.full.tile is not None or self.partial.tile is None:
            raise ValueError("`partial` must have tiles, and `full` none")
        for name, lists in (("full", self.full), ("partial", self.partial)):
            lists.check_form(name, self.num_groups, self.num_rows)
        bq, bk = self.block_size
        check_tensor("tiles", self.tiles, torch.uint8, (None, bq, bk // 8))
        check_tensor("order", self.order, torch.int64, (self.seq_len,), (None, None, self.seq_len))
        check_tensor("key_order", self.key_order, torch.int64, (None,), (None, None, None))
        check_tensor("head_groups", self.head_groups, torch.int32, (None,), (None, None))
        if self.key_order is not None and self.key_order.shape[-1] > self.kv_len:
            raise ValueError(f"`key_order` has {self.key_order.shape[-1]} entries for {self.kv_len} keys")
        if self.head_groups is None and self.num_groups != 1:
            raise ValueError(f"a mask of {self.num_groups} groups needs `head_groups`")
        devices = {x.device for x in self.tensors().values()}
        if len(devices) > 1:
            raise ValueError(f"all tensors of a mask must be on one device, got {sorted(map(str, devices))}")
        if (
            not torch.compiler.is_compiling()
        ):  # one graph is to serve masks whatever the length of their lists
            for x in (*self.full.tensors().values(), *self.partial.tensors().values(), self.tiles):
                maybe_mark_dynamic(x, 0)

    def trusted(self: Mask, whole_blocks: bool = False) -> Mask:
        """The mask itself, which need not be looked into: who makes it knows that it is valid.

        With `whole_blocks` that is also known of `has_whole_blocks`.
        """
        self.derived(_Validated, _Validated)
        if whole_blocks:
            self.derived(_WholeBlocks, _WholeBlocks)
        return self

    @property
    def has_whole_blocks(self) -> bool:
        """Whether all tokens of listed blocks are known to be attended."""
        return (_WholeBlocks,) in self.launch_data

    @property
    def is_trusted(self) -> bool:
        """Whether it was looked into, or need not be."""
        return (_Validated,) in self.launch_data

    def validate(self) -> None:
        """Look into every tensor, once: with a mask that passes, no kernel reads outside its inputs.

        Kernels ask for it; masks of patterns, of this class's methods and of files need no second look.
        Rows lie in order inside the lists; blocks, tiles and groups exist; no row lists a block twice; orders
        are permutations; full blocks reach neither text nor past `kv_len`, and no tile does past the end.

        Raises:
            ValueError: naming what does not hold.
        """
        self.launch_data.get(_Validated, lambda: self.to("cpu")._validated())

    def _validated(self) -> _Validated:
        columns, tiles = self.num_cols, self.tiles.shape[0]
        self.full.check_contents("full", columns, 0)
        self.partial.check_contents("partial", columns, tiles)
        for name, order in (("order", self.order), ("key_order", self.key_order)):
            if order is None:
                continue
            tokens = torch.arange(order.shape[-1], device="cpu")
            if not torch.equal(order.sort().values, tokens.expand_as(order)):
                raise ValueError(f"`{name}` must be a permutation of its {len(tokens)} tokens")
        if self.head_groups is not None:
            check_range("head_groups", self.head_groups, self.num_groups)
        (full_row, full_at), (row, at) = self.full.entries(), self.partial.entries()
        full, partial = self.full.index[full_at].long(), self.partial.index[at].long()
        first, stop = full * self.block_size[1], (full + 1) * self.block_size[1]
        with_text = (first < self.text[1]) & (stop > self.text[0]) & (self.text[0] < self.text[1])
        if (with_text | (stop > self.kv_len)).any():
            raise ValueError(
                "full key blocks must neither touch text nor reach past `kv_len`; list them as partial"
            )
        listed = (torch.cat([full_row, row]) * columns + torch.cat([full, partial])).sort().values
        if (listed[1:] == listed[:-1]).any():
            raise ValueError("a query block lists a key block twice")
        past_end = (row % self.num_rows == self.num_rows - 1).long() * 2 + (partial == columns - 1)
        exists = border_tiles(self.seq_len, self.kv_len, self.block_size, self.device)
        used = torch.stack([past_end, self.partial.tiles[at].long()]).unique(dim=1)
        if (self.tiles[used[1]] & ~exists[used[0]]).any():
            raise ValueError("tiles must be zero past `seq_len` and `kv_len`")
        return _Validated()


class _Validated:
    """Kept with a mask that was looked into."""


class _WholeBlocks:
    """Kept with a mask whose listed blocks are attended whole."""
