"""Radial attention: a band per frame pair that halves in width whenever the distance in time doubles."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch

from dit_accel.arguments import integer, positive, switch
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.pair_rules import Factor, FactorRule, PairRule, Rule

from .base import StaticPattern


@dataclass(frozen=True)
class Radial(StaticPattern):
    """Nearer frames see each other through a wider band.

    For frames i, j of tpf tokens, d = |i - j| and base = 2^bl(tpf) / 2^bl(d), bl being the bit length.
    Tokens at positions row and col of the two frames are attended iff |row - col| <= w, with w = tpf for d
    <= 1, else max(decay_factor * base, block_size). Where base < 128 a frame pair survives only if d is a
    multiple of int(128 / base). The rule is then rounded to cells of `block_size` x `block_size` over the
    visual tokens: with hi the key columns of a cell that are attended by more than 1/3 of its rows and nz
    those attended by any, the whole cell is computed iff nz > 0 and hi / nz > 0.6. The last, shorter cell is
    judged on its real rows and columns.

    In two things this is not the authors' code, both of them without effect where frames are whole cells:

    - A cell across frame borders is judged as a whole, over all frame pairs in it. The authors judge each
      frame pair alone and keep the cell if any passes: 0.03% to 0.21% of the cells differ at the 480p and
      720p sizes of Wan and HunyuanVideo.
    - Cells on the diagonal are always computed, so that every token attends at least to its own cell. Where
      frames are much shorter than a cell rounding would drop them, and leave queries without any key.

    Args:
        decay_factor: width of the bands; the paper uses 0.95 (HunyuanVideo), 0.2 (Wan 2.1) and 0.8 (Wan 2.2).
        block_size: side of a cell in tokens, and the least half-width of a band.
        first_frame_sink: whether every query attends to frame 0 (Wan).
        exact: leave out the rounding to cells.

    Raises:
        ValueError: a decay factor or block size that is not positive, a switch that is not True or False.

    Source: Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video
    Generation", 2025.
    """

    decay_factor: float = 0.95
    block_size: int = 128
    first_frame_sink: bool = False
    exact: bool = False

    def __post_init__(self):
        object.__setattr__(self, "decay_factor", positive("decay_factor", self.decay_factor))
        object.__setattr__(self, "block_size", integer("block_size", self.block_size, 1))
        for name in ("first_frame_sink", "exact"):
            switch(name, getattr(self, name))

    def half_widths(self, layout: TokenLayout) -> torch.Tensor:
        """Half-width of the band for every frame distance, -1 where the frame pair is dropped: int64 (F,)."""
        frames, tpf = layout.grid[0], layout.grid[1] * layout.grid[2]
        widths = []
        for d in range(frames):
            base = Fraction(2) ** (tpf.bit_length() - d.bit_length())
            if base < 128 and d % int(128 / base):
                widths.append(-1)
            else:
                width = max(int(Fraction(self.decay_factor) * base), self.block_size)
                widths.append(tpf if d <= 1 else min(width, tpf))
        return torch.tensor(widths, dtype=torch.int64, device="cpu")

    def rule(self, layout: TokenLayout) -> Rule:
        if self.exact:
            return self._exact_rule(layout)
        return FactorRule([Factor(self._cell_of_tokens(layout), radial_cells(self, layout))])

    def visual_pairs(self, layout: TokenLayout) -> int:
        if not self.exact:
            sizes = torch.bincount(self._cell_of_tokens(layout)).double()
            return int(sizes @ radial_cells(self, layout).double() @ sizes)
        frames, tpf = layout.grid[0], layout.grid[1] * layout.grid[2]
        pairs = 0
        for d, width in enumerate(self.half_widths(layout).tolist()):
            outside = tpf - 1 - width  # distances that are too large; those of m tokens have tpf - m pairs
            in_band = tpf**2 - outside * (outside + 1) if width >= 0 else 0
            pairs += in_band * (frames if d == 0 else 2 * (frames - d))
            if self.first_frame_sink:  # of frame d and frame 0
                pairs += tpf**2 - in_band
        return pairs

    def _cell_of_tokens(self, layout: TokenLayout) -> torch.Tensor:
        return torch.arange(layout.visual_len, device="cpu") // _side(self, layout)

    def _exact_rule(self, layout: TokenLayout) -> PairRule:
        widths, columns = self.half_widths(layout), layout.grid[2]
        # the widest and the narrowest band among the frame distances lo .. hi
        n = len(widths)
        widest, narrowest = (torch.full((n, n), -1, dtype=torch.int64, device="cpu") for _ in range(2))
        for lo in range(n):
            widest[lo, lo:] = widths[lo:].cummax(0).values
            narrowest[lo, lo:] = widths[lo:].cummin(0).values

        def allows(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            distance = ((q[..., 1] - k[..., 1]) * columns + q[..., 2] - k[..., 2]).abs()
            computed = distance <= widths[(q[..., 0] - k[..., 0]).abs().long()]
            return computed | (k[..., 0] == 0) if self.first_frame_sink else computed

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
@torch.inference_mode(False)  # what is cached must be usable under autograd
def radial_cells(pattern: Radial, layout: TokenLayout) -> torch.Tensor:
    """Which cells of the visual tokens are computed: bool (n, n), n = ceil(F * H * W / block_size)."""
    frames, tpf, total = layout.grid[0], layout.grid[1] * layout.grid[2], layout.visual_len
    side = _side(pattern, layout)
    n = -(-total // side)
    dtype = torch.int16 if max(2 * tpf, side) < 2**15 else torch.int32
    place = (torch.arange(total, device="cpu") % tpf).to(dtype)
    widths = pattern.half_widths(layout).to(dtype)
    attended = torch.zeros(n * side, dtype=dtype, device="cpu")
    computed = torch.empty(n, n, dtype=torch.bool, device="cpu")
    for cell in range(n):
        start, stop = cell * side, min((cell + 1) * side, total)
        attended.zero_()  # rows of the cell that attend to each key column
        for f in range(start // tpf, (stop - 1) // tpf + 1):
            first, last = max(start - f * tpf, 0), min(stop - f * tpf, tpf) - 1
            width = widths[(torch.arange(frames, device="cpu") - f).abs()]
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
        computed[cell] = 10 * many > 6 * (columns > 0).sum(1)
    return computed.fill_diagonal_(True)


def _side(pattern: Radial, layout: TokenLayout) -> int:
    """Side of a cell; one cell that holds all tokens needs no more."""
    return min(pattern.block_size, layout.visual_len)
