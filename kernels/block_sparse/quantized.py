"""Q, K and V in eight bits for attention, smoothed: what every quantized kernel multiplies.

Attention does not change if all keys move by a constant: keys without their mean over tokens m lack what
makes them alike and large (SageAttention, arXiv 2410.02367, "smoothing"), and every row of scores lacks
scale q.m, which is added to the log-sum-exp. Nor does it change, weights adding up to 1, if values without
their mean are attended to and the mean is added to the result (SageAttention2). Means are taken over all
tokens that are no padded text, in fp32.

Nor if a channel of the keys is divided by a factor that the queries' is multiplied with: sqrt(max |k| /
max |q|) shares what stands out in a channel between both (SmoothQuant, Xiao et al., arXiv 2211.10438).

Scales: for queries one each, which costs a kernel nothing; for keys one of each group (`formats.key_group`),
inside a mask's block; for values one of each channel. What is not finite makes its own query, the keys of its
group, or its channel of the values NaN, and touches neither means nor factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dit_accel.arguments import is_integer, shown
from dit_accel.masks.block_mask import BlockMask

from .formats import Format, key_group
from .problem import Lengths, valid_keys

LEVELS = 127
LEAST = 1e-30  # of a largest magnitude: below, all codes are 0, and the scale is a number still
LOG2_E = math.log2(math.e)


def quantize_int8(x: torch.Tensor, group: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """x * scale as int8 codes times a scale for each group of tokens.

    A group's scale is its largest magnitude over 127. Codes are rounded half away from zero. A group of zeros
    has codes 0 and a finite scale; one with what is not finite, codes 0 in its place and a scale that is not.

    Args:
        x: (batch, heads, tokens, head_dim), any floating dtype; not smoothed here.
        group: tokens that share a scale; the last group may have fewer.
        scale: factor on x, which the codes then stand for.

    Returns:
        codes, int8 like x, and scales, fp32 (batch, heads, ceil(tokens / group)): codes * scale is about
        x * `scale`.

    Raises:
        TypeError, ValueError: x of other than four dimensions or no floating dtype, or a group below 1.
    """
    if not x.is_floating_point():
        raise TypeError(f"`x` must be of a floating dtype, got {x.dtype}")
    if x.ndim != 4:
        raise ValueError(f"`x` must have shape (batch, heads, tokens, head_dim), got {tuple(x.shape)}")
    if not is_integer(group) or group < 1:
        raise ValueError(f"`group` must be a number of tokens from 1, got {shown(group)}")
    x = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    tokens = x.shape[2]
    grouped = F.pad(x, (0, 0, 0, -tokens % group)).unflatten(2, (-1, group))
    scales = (grouped.abs().amax((3, 4)).clamp(min=LEAST) / LEVELS).float()
    codes = grouped / scales.to(x.dtype)[..., None, None]
    codes = (codes + torch.where(codes < 0, -0.5, 0.5)).trunc().nan_to_num(0.0)
    return codes.to(torch.int8).flatten(2, 3)[:, :, :tokens], scales


@dataclass(frozen=True, eq=False)
class Quantized:
    """Inputs of attention in a format: softmax_2(q_scale k_scale q.k) over keys, of v_scale v + v_mean.

    Attributes:
        q, q_scale: int8 (B, H, S, D) and fp32 (B, H, S); scores are in base 2, their factor is in here.
        k, k_scale: int8 (B, H, K, D) and fp32 (B, H, ceil(K / group)).
        v: as given, or codes in the format's dtype; (B, H, K, D).
        v_scale, v_mean: fp32 (B, H, D) where v is codes, else None.
        shift: what smoothed keys took from each row's scores, fp32 (B, H, S) in base 2.
        group: keys that share a scale.
    """

    q: torch.Tensor
    q_scale: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    v: torch.Tensor
    v_scale: torch.Tensor | None
    v_mean: torch.Tensor | None
    shift: torch.Tensor
    group: int

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: BlockMask,
        format: Format,
        *,
        scale: float,
        text_valid: Lengths = None,
        smooth: bool = True,
    ) -> Quantized:
        """The inputs of `block_sparse_attention` in a format; `smooth=False` leaves the keys as they are."""
        exact = torch.promote_types(q.dtype, torch.float32)
        hidden = None if text_valid is None else ~valid_keys(mask, text_valid).mT
        group, factor = key_group(mask.block_size[1]), scale * LOG2_E
        keys, mean = _smoothed(k.to(exact), hidden)
        q = q.to(exact)
        shift = (q @ mean.mT).squeeze(-1) * factor
        if not smooth:
            keys, shift = keys + mean, torch.zeros_like(shift)
        moved = balance(_largest(keys), _largest(q))
        q_codes, q_scale = quantize_int8(q * moved, 1, factor)
        k_codes, k_scale = quantize_int8(keys / moved, group)
        v_scale = v_mean = None
        if format.values is not None:
            values, v_mean = _smoothed(v.to(exact), hidden)
            v_scale = values.abs().amax(2).clamp(min=LEAST) / format.values
            v = format.rounding((values / v_scale.unsqueeze(2)).nan_to_num(0.0)).to(format.dtype)
            v_mean, v_scale = v_mean.squeeze(2).float(), v_scale.float()
        return cls(q_codes, q_scale, k_codes, k_scale, v, v_scale, v_mean, shift.float(), group)

    def widened(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v as numbers of a dtype; v still without its scale and mean."""
        k_scale = self.k_scale.repeat_interleave(self.group, 2)[:, :, : self.k.shape[2]]
        q, k = (x.to(dtype) * s.to(dtype)[..., None] for x, s in ((self.q, self.q_scale), (self.k, k_scale)))
        return q, k, self.v.to(dtype)

    def finished(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The result of attention to `v`, and the natural log-sum-exp of its scores, as of the inputs."""
        if self.v_scale is not None and self.v_mean is not None:
            out = out * self.v_scale.unsqueeze(2).to(out.dtype) + self.v_mean.unsqueeze(2).to(out.dtype)
            out = out.masked_fill((lse == -math.inf).unsqueeze(-1), 0.0)
        return out, lse + self.shift.to(lse.dtype) / LOG2_E


def _largest(x: torch.Tensor) -> torch.Tensor:
    """The largest finite magnitude of each channel: (B, H, 1, D)."""
    return x.masked_fill(~x.isfinite(), 0.0).abs().amax(2, keepdim=True)


def balance(keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The factor of queries, by which keys are divided, of their largest magnitudes in each channel."""
    return torch.where((keys > LEAST) & (queries > LEAST), keys / queries, 1.0).sqrt()


def _smoothed(x: torch.Tensor, hidden: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, H, K, D) less its mean, 0 where hidden, and the mean (B, H, 1, D), of finite numbers alone."""
    if hidden is not None:
        x = x.masked_fill(hidden, 0.0)
    finite = x.isfinite()
    if hidden is not None:
        finite = finite & ~hidden
    mean = x.masked_fill(~finite, 0.0).sum(2, keepdim=True) / finite.sum(2, keepdim=True).clamp(min=1)
    x = x - mean
    return (x if hidden is None else x.masked_fill(hidden, 0.0)), mean
