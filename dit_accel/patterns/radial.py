"""Radial attention: a band per frame pair that halves in width whenever the distance in time doubles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..layout import TokenLayout
from ..rules import Factor, FactorRule, PairRule, Rule
from .base import Pattern


@dataclass(frozen=True)
class Radial(Pattern):
    """Nearer frames see each other through a wider band.

    For frames i, j of tpf tokens, d = |i - j| and base = 2^bl(tpf) / 2^bl(d), bl being the bit length.
    Tokens at positions row and col of the two frames are attended iff |row - col| <= w, with w = tpf for d
    <= 1, else max(decay_factor * base, block_size). Where base < 128 a frame pair survives only if d is a
    multiple of int(128 / base). The rule is then rounded to cells of `block_size` x `block_size` over the
    visual tokens: with hi the key columns of a cell that are attended by more than 1/3 of its rows and nz
    those attended by any, the whole cell is kept iff nz > 0 and hi / nz > 0.6. The last, shorter cell is
    judged on its real rows and columns.

    Args:
        decay_factor: width of the bands; the paper uses 0.95 (HunyuanVideo), 0.2 (Wan 2.1) and 0.8 (Wan 2.2).
        block_size: side of a cell in tokens, and the least half-width of a band.
        first_frame_sink: whether every query attends to frame 0 (Wan).
        exact: leave out the rounding to cells.

    Raises:
        ValueError: a decay factor or block size that is not positive.

    Source: Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video
    Generation", 2025.
    """

    decay_factor: float = 0.95
    block_size: int = 128
    first_frame_sink: bool = False
    exact: bool = False

    def __post_init__(self):
        if not isinstance(self.decay_factor, (int, float)) or not 0 < self.decay_factor < math.inf:
            raise ValueError(f"`decay_factor` must be a positive number, got {self.decay_factor!r}")
        if type(self.block_size) is not int or self.block_size < 1:
            raise ValueError(f"`block_size` must be a positive integer, got {self.block_size!r}")

    def half_widths(self, layout: TokenLayout) -> torch.Tensor:
        """Half-width of the band for every frame distance, -1 where the frame pair is dropped: int64 (F,)."""
        frames, tpf = layout.grid[0], layout.grid[1] * layout.grid[2]
        widths = []
        for d in range(frames):
            base = 2 ** tpf.bit_length() / 2 ** d.bit_length()
            if base < 128 and d % int(128 / base):
                widths.append(-1)
            else:
                widths.append(tpf if d <= 1 else int(max(self.decay_factor * base, self.block_size)))
        return torch.tensor(widths).clamp(max=tpf)

    def rule(self, layout: TokenLayout) -> Rule:
        if self.exact:
            return self._exact_rule(layout)
        cell = torch.arange(layout.visual_len) // self.block_size
        return FactorRule([Factor(cell, radial_cells(self, layout))])

    def visual_pairs(self, layout: TokenLayout) -> int:
        if not self.exact:
            sizes = torch.bincount(torch.arange(layout.visual_len) // self.block_size).double()
            return int(sizes @ radial_cells(self, layout).double() @ sizes)
        frames, tpf = layout.grid[0], layout.grid[1] * layout.grid[2]
        # pairs with |row - col| <= w among tpf positions: tpf + sum over 1 <= m <= w of 2 (tpf - m)
        in_band = [tpf + sum(2 * (tpf - m) for m in range(1, min(w, tpf - 1) + 1)) if w >= 0 else 0
                   for w in self.half_widths(layout).tolist()]  # fmt: skip
        sink = self.first_frame_sink
        return sum(
            tpf**2 if sink and j == 0 else in_band[abs(i - j)] for i in range(frames) for j in range(frames)
        )

    def _exact_rule(self, layout: TokenLayout) -> PairRule:
        widths, columns = self.half_widths(layout), layout.grid[2]
        # the widest and the narrowest band among the frame distances lo .. hi
        n = len(widths)
        widest, narrowest = (torch.full((n, n), -1, dtype=torch.int64) for _ in range(2))
        for lo in range(n):
            widest[lo, lo:] = widths[lo:].cummax(0).values
            narrowest[lo, lo:] = widths[lo:].cummin(0).values

        def allows(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            distance = ((q[..., 1] - k[..., 1]) * columns + q[..., 2] - k[..., 2]).abs()
            kept = distance <= widths[(q[..., 0] - k[..., 0]).abs().long()]
            return kept | (k[..., 0] == 0) if self.first_frame_sink else kept

        def bounds(q_lo, q_hi, k_lo, k_hi):
            near = torch.maximum(k_lo - q_hi, q_lo - k_hi).clamp(min=0).long()
            far = torch.maximum(k_hi - q_lo, q_hi - k_lo).long()
            least = (near[..., 1] * columns - far[..., 2]).clamp(min=0)
            maybe = least <= widest[near[..., 0], far[..., 0]]
            sure = far[..., 1] * columns + far[..., 2] <= narrowest[near[..., 0], far[..., 0]]
            if self.first_frame_sink:
                maybe, sure = maybe | (k_lo[..., 0] == 0), sure | (k_hi[..., 0] == 0)
            return maybe, sure

        return PairRule(layout, allows, bounds)


@lru_cache(maxsize=16)
def radial_cells(pattern: Radial, layout: TokenLayout) -> torch.Tensor:
    """Which cells of the visual tokens are kept: bool (n, n), n = ceil(F * H * W / block_size)."""
    frames, tpf, total, side = (
        layout.grid[0],
        layout.grid[1] * layout.grid[2],
        layout.visual_len,
        pattern.block_size,
    )
    n = -(-total // side)
    dtype = torch.int16 if 2 * tpf < 2**15 else torch.int32
    place = (torch.arange(total) % tpf).to(dtype)
    widths = pattern.half_widths(layout).to(dtype)
    attended = torch.zeros(n * side, dtype=dtype)
    kept = torch.empty(n, n, dtype=torch.bool)
    for cell in range(n):
        start, stop = cell * side, min((cell + 1) * side, total)
        attended.zero_()  # rows of the cell that attend to each key column
        for f in range(start // tpf, (stop - 1) // tpf + 1):
            first, last = max(start - f * tpf, 0), min(stop - f * tpf, tpf) - 1
            width = widths[(torch.arange(frames) - f).abs()]
            band = width.repeat_interleave(tpf)
            count = (
                (place + band).clamp_(max=last).sub_((place - band).clamp_(min=first)).add_(1).clamp_(min=0)
            )
            count.view(frames, tpf)[width < 0] = 0
            if pattern.first_frame_sink:
                count[:tpf] = last - first + 1
            attended[:total] += count
        columns = attended.view(n, side)
        many = (columns > (stop - start) // 3).sum(1)
        kept[cell] = 10 * many > 6 * (columns > 0).sum(1)
    return kept
