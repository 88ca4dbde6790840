"""Attention to pooled keys: every patch of visual tokens is one more key, behind those of the tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dit_accel.masks.layout import TokenLayout

from .call import AttentionCall
from .masked import Masked

POOLING = "spatial_weight"  # name of the weights of pooling, (factor, factor), among learned ones


@dataclass(frozen=True, eq=False)
class Patches:
    """Patches of `factor` x `factor` visual tokens of each frame, row by row; those at borders are cut.

    Attributes:
        factor: side of a patch.
        count: number of patches.
        patch: int64 (V,), the patch of each visual token, in the order of calls.
        place: int64 (V,), where it is inside the patch, row by row.
        cut: bool (count,), patches with fewer than factor^2 tokens.
    """

    factor: int
    count: int
    patch: torch.Tensor
    place: torch.Tensor
    cut: torch.Tensor

    @classmethod
    def of(
        cls, layout: TokenLayout, factor: int, places: torch.Tensor | None, device: torch.device | str
    ) -> Patches:
        """Of a layout, with visual tokens in the order `places`, int64 (V,); None: the model's own."""
        frame, row, column = layout.coordinates.long().unbind(1)
        rows, columns = patch_rows(layout, factor)
        patch = (frame * rows + row // factor) * columns + column // factor
        place = row % factor * factor + column % factor
        if places is not None:
            patch, place = patch[places.cpu()], place[places.cpu()]
        count = layout.grid[0] * rows * columns
        cut = torch.bincount(patch, minlength=count) < factor**2
        return cls(factor, count, patch.to(device), place.to(device), cut.to(device))

    def pool(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Weighted sums of x (B, H, V, D) over each patch: (B, H, count, D), in its dtype.

        Of a patch that is cut, the sum over its tokens times all weights over theirs.

        Args:
            weights: of a token by its place in the patch, (factor, factor); None: 1 / factor^2.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        even = torch.full((self.factor,) * 2, self.factor**-2, dtype=dtype, device=x.device)
        weights = (even if weights is None else weights.to(x.device, dtype)).flatten()
        own = weights[self.place]
        present = own.new_zeros(self.count).index_add(0, self.patch, own)
        scale = torch.where(self.cut, weights.sum() / torch.where(self.cut, present, 1), 1)
        sums = x.new_zeros((*x.shape[:2], self.count, x.shape[3]), dtype=dtype)
        sums = sums.index_add(2, self.patch, x.to(dtype) * own[:, None])
        return (sums * scale[:, None]).to(x.dtype)


def patch_rows(layout: TokenLayout, factor: int) -> tuple[int, int]:
    """Rows and columns of patches in a frame."""
    return -(-layout.grid[1] // factor), -(-layout.grid[2] // factor)


@dataclass(frozen=True, eq=False, kw_only=True)
class Pooled(Masked):
    """Attention under a `BlockMask` whose last keys are patches of visual tokens (CLEAR's second form).

    Keys and values are pooled after the rotary embedding, by the same weights for all heads and channels:
    those that the call's layer has learned (`POOLING`), or the mean.

    Attributes:
        patches: of the visual tokens, in the order of calls.
    """

    patches: Patches

    def enter(self, call: AttentionCall) -> AttentionCall:
        visual = call.layout.visual_slice
        pooled = [self.patches.pool(x[:, :, visual], call.learned.get(POOLING)) for x in (call.k, call.v)]
        call = super().enter(call)
        k, v = (torch.cat(pair, 2) for pair in zip((call.k, call.v), pooled, strict=True))
        return replace(call, k=k, v=v)
