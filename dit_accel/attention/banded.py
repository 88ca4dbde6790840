"""Attention of one of several processes that each have a band of a picture's rows: patch parallelism.

A local pattern reaches some rows up and down. So a process needs, beside its own keys and values, those of so
many rows of the two neighbouring bands (the halo), however many processes there are; text is in all of them.
Keys that are pooled from patches of the whole picture are gathered from all bands, which end between patches.
Text queries attend to the whole picture: to each band by itself, and these parts are joined by their
log-sum-exps (exact), or averaged.

Source: Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", 2024, whose
text is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from dit_accel import kernels
from dit_accel.masks.block_mask import BlockMask
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.per_head import join_heads

from .call import AttentionCall, LayerAttention
from .dual_path import whole_mask
from .layer_masks import LayerMasks
from .pooled import POOLING, Patches
from .shards import exchange

if TYPE_CHECKING:
    from dit_accel.patterns import StaticPattern


@dataclass(frozen=True)
class Bands:
    """Which band of the rows a process has.

    Attributes:
        rank, count: which of how many, from the top.
        reach: rows of the halo on each side that has a neighbour.
        least: rows that every band must have for that to be enough.
        averaged: whether text takes the mean of what it reads in each band, instead of the exact attention.
        patch: rows of a patch whose keys are pooled; 1: none are.
        group: of processes; None: the default one.
        picture: holds, as `"height"`, the rows of the picture of the call in progress.
    """

    rank: int
    count: int
    reach: int
    least: int = 1
    averaged: bool = False
    patch: int = 1
    group: Any = None
    picture: dict[str, int] = field(default_factory=dict, compare=False)

    @property
    def above(self) -> int:
        """Rows of the halo above the band."""
        return self.reach if self.rank > 0 else 0

    @property
    def below(self) -> int:
        return self.reach if self.rank < self.count - 1 else 0

    def rows(self, height: int) -> range:
        """The rows of a picture that this process has."""
        edges = self._edges(height)
        return range(edges[self.rank], edges[self.rank + 1])

    def sizes(self, height: int) -> list[int]:
        """How many rows each process has."""
        return [stop - start for start, stop in pairwise(self._edges(height))]

    def check(self, sizes: Sequence[int]) -> None:
        """Raise ValueError where a band of so many rows is too small for the pattern."""
        if min(sizes) < self.least:
            raise ValueError(
                f"{self.count} processes have bands of {min(sizes)} rows, and the pattern needs bands of at "
                f"least {self.least}; use fewer processes, a larger picture or a smaller window"
            )

    def _edges(self, height: int) -> list[int]:
        """Where bands begin, and where the last one ends."""
        patches = -(-height // self.patch)
        edges = [rank * patches // self.count * self.patch for rank in range(self.count)]
        return [*edges, height]

    def pooled_counts(self, layout: TokenLayout) -> list[int]:
        """How many patches each process has, by the layout of one's own tokens."""
        if self.patch == 1:
            return [0] * self.count
        columns = layout.grid[0] * -(-layout.grid[2] // self.patch)
        return [-(-rows // self.patch) * columns for rows in self.sizes(self.picture["height"])]

    def sent_numbers(self, layout: TokenLayout, heads: int, head_dim: int) -> tuple[int, int]:
        """What this process sends in one call of a layer, of one sample: of the halo, and to all others.

        Args:
            layout: of its own tokens.
            heads, head_dim: of the layer.
        """
        frames, _, width = layout.grid
        halo = 2 * (self.above + self.below) * frames * width * heads * head_dim
        others = layout.text_len * heads * (head_dim + 2 * (not self.averaged))
        others += 2 * self.pooled_counts(layout)[self.rank] * heads * head_dim
        return halo, (self.count - 1) * others


@dataclass(frozen=True, eq=False)
class BandedAttention(LayerAttention):
    """One layer of a process that has a band.

    Attributes:
        bands: which.
        layout: of the process' own tokens.
        mask_with: makes, of a number of pooled keys, the mask from its visual queries, in the order of calls,
            to these keys: its own visual ones in the same order, the halo above and below row by row, and
            what all of them attend to: text and pooled keys.
        patches: whose keys are pooled, or None.
        edges: where in a call the visual tokens of its first and of its last rows stand that neighbours need,
            int64 (n,) each.
    """

    bands: Bands
    layout: TokenLayout
    mask_with: Callable[[int], BlockMask]
    edges: tuple[torch.Tensor, torch.Tensor]
    patches: Patches | None = None

    @property
    def mask(self) -> BlockMask:  # pyright: ignore[reportIncompatibleVariableOverride]
        """For the picture of the call in progress."""
        return self.mask_with(sum(self.bands.pooled_counts(self.layout)))

    @classmethod
    def of(cls, bands: Bands, heads: Sequence[StaticPattern], masks: LayerMasks) -> BandedAttention:
        """Of a layer with these heads and, of the process' own tokens, this geometry.

        Raises:
            ValueError: fewer rows than the pattern needs.
        """
        layout, device = masks.layout, masks.device
        frames, height, width = layout.grid
        bands.check([height])
        rows = bands.above + height + bands.below
        places = torch.arange(layout.visual_len, device="cpu") if masks.places is None else masks.places.cpu()
        at = torch.arange(frames * rows * width, device="cpu").view(frames, rows, width)
        above, own, below = (part.flatten() for part in at.split([bands.above, height, bands.below], dim=1))
        queries = TokenLayout(layout.grid, offset=(0, bands.above, 0))
        options = {"order": places, "key_order": torch.cat([own[places], above, below])}

        @lru_cache(maxsize=4)
        def mask_with(pooled: int) -> BlockMask:
            keys = TokenLayout((frames, rows, width), text_len=layout.text_len + pooled)
            made = {
                pattern: pattern.without_pooled_keys().block_mask(
                    queries, masks.block_size, device=device, keys=keys, **options
                )
                for pattern in dict.fromkeys(heads)
            }
            return replace(join_heads(made, heads), order=None, key_order=None).trusted()

        inverse = torch.argsort(places).view(frames, height, width)
        first, last = inverse[:, : bands.above], inverse[:, height - bands.below :]
        return cls(
            bands,
            layout,
            mask_with,
            (first.flatten().to(device), last.flatten().to(device)),
            Patches.of(layout, bands.patch, masks.places, device) if bands.patch > 1 else None,
        )

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        layout = call.layout
        q, k, v = (x[:, :, layout.visual_slice] for x in (call.q, call.k, call.v))
        text = [x[:, :, layout.text_slice] for x in (call.q, call.k, call.v)]
        kv = torch.stack((k, v))
        parts = [kv, *self._halo(kv), torch.stack(text[1:]), *self._pooled(kv, call.learned.get(POOLING))]
        keys, values = torch.cat(parts, 3)
        out: Any = kernels.block_sparse_attention(
            q, keys, values, self.mask, scale=call.scale, backend=call.backend
        )
        halo, others = self.bands.sent_numbers(layout, q.shape[1], q.shape[3])
        call.notes["sent bytes"] = len(q) * q.element_size() * (halo + others)
        call.notes["halo bytes"] = len(q) * q.element_size() * halo
        if not layout.text_len:
            return out
        parts = [out, self._of_text(call, text, k, v)]
        return torch.cat(parts[::-1] if layout.text_first else parts, 2)

    def _halo(self, kv: torch.Tensor) -> list[torch.Tensor]:
        """The neighbours' rows of keys and values (2, B, H, n, D), above and below."""
        bands, (first, last) = self.bands, self.edges
        sent = [kv.new_empty(0)] * bands.count
        received = [0] * bands.count
        if bands.above:
            sent[bands.rank - 1] = kv[:, :, :, first].flatten()
            received[bands.rank - 1] = len(sent[bands.rank - 1])
        if bands.below:
            sent[bands.rank + 1] = kv[:, :, :, last].flatten()
            received[bands.rank + 1] = len(sent[bands.rank + 1])
        got = exchange(sent, received, bands.group)
        shape = (*kv.shape[:3], -1, kv.shape[4])
        return [
            got[rank].view(shape) if rows else kv[:, :, :, :0]
            for rank, rows in ((bands.rank - 1, bands.above), (bands.rank + 1, bands.below))
        ]

    def _pooled(self, kv: torch.Tensor, weights: torch.Tensor | None) -> list[torch.Tensor]:
        """Keys and values of the patches of all bands, (2, B, H, n, D) each."""
        if self.patches is None:
            return []
        own = torch.stack([self.patches.pool(x, weights) for x in kv])
        shapes = [(*kv.shape[:3], n, kv.shape[4]) for n in self.bands.pooled_counts(self.layout)]
        sent, bands = [own.flatten()] * self.bands.count, self.bands
        got = exchange(sent, [math.prod(shape) for shape in shapes], bands.group)
        return [part.view(shape) for part, shape in zip(got, shapes, strict=True)]

    def _of_text(
        self, call: AttentionCall, text: list[torch.Tensor], k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Attention of text queries to the whole picture and to text, from the processes' parts."""
        q, *kv = text
        bands, options = self.bands, {"scale": call.scale, "backend": call.backend, "return_lse": True}
        if bands.averaged or bands.rank == 0:  # text keys count once
            k, v = (torch.cat(pair, 2) for pair in zip((k, v), kv, strict=True))
        mask = whole_mask(q.shape[2], k.shape[2], q.device)
        out, lse = kernels.block_sparse_attention(q, k, v, mask, **options)
        told = out if bands.averaged else torch.cat([out, _in_two(lse, out.dtype)], -1)
        parts = exchange([told.flatten()] * bands.count, [told.numel()] * bands.count, bands.group)
        parts = [part.view(told.shape) for part in parts]
        if bands.averaged:
            return torch.stack(parts).mean(0)
        lses = [part[..., -2:].to(lse.dtype).sum(-1) for part in parts]
        return kernels.merge([part[..., :-2] for part in parts], lses)[0]


def _in_two(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers (...) as sums of two in another dtype (..., 2): a log-sum-exp of 16 bits is off by percents."""
    first = x.to(dtype)
    return torch.stack([first, (x - first).to(dtype)], -1)
