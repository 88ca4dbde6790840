"""Sparse attention rescaled to its true share, with pooled values in place of what it leaves out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dit_accel.errors import UnavailableError
from dit_accel.masks.block_mask import BlockMask
from dit_accel.masks.layout import TokenLayout

from .block_scores import block_means
from .call import AroundAnother, AttentionCall, LayerAttention
from .masked import Masked

if TYPE_CHECKING:
    from dit_accel.patterns import Rectified


class Shares(NamedTuple):
    """How a query block's attention divides, by pooled scores; weights of a row sum to one.

    Attributes:
        blocks: of the blocks of visual keys, (B, H, R, C).
        others: of all text and anchor keys together, (B, H, R, 1).
    """

    blocks: torch.Tensor
    others: torch.Tensor


def shares(q: torch.Tensor, k: torch.Tensor, call: AttentionCall, size: int) -> Shares:
    """The shares of blocks of `size` visual keys, isolated from text, which is not pooled.

    Block j of n_j keys weighs n_j exp(scale mean q_i . mean k_j), a text or anchor key t exp(scale mean q_i .
    k_t), and padded text nothing.

    Args:
        q, k: means of the blocks, (B, H, R, D) and (B, H, C, D).
        call: with visual tokens first, then anchor and text tokens.
        size: tokens of a block, the last of which may be shorter.
    """
    visual = call.layout.visual_len
    n = torch.full((k.shape[2],), size, dtype=k.dtype, device=k.device)
    n[-1] = visual - (len(n) - 1) * size
    others = call.k[:, :, visual:].to(k.dtype)
    scores = torch.cat([q @ k.mT * call.factor + n.log(), q @ others.mT * call.factor], -1)
    if call.text_valid is not None:
        place = torch.arange(others.shape[2], device=k.device) - call.layout.anchor_len
        scores[..., k.shape[2] :].masked_fill_((place >= call.text_valid[:, None])[:, None, None], -torch.inf)
    weights = scores.softmax(-1)
    return Shares(weights[..., : k.shape[2]], weights[..., k.shape[2] :].sum(-1, keepdim=True))


def trusted(q: torch.Tensor, k: torch.Tensor, size: int) -> torch.Tensor:
    """Where a pooled score says more than what is lost in pooling, bool (B, H, R, C).

    |mean q . mean k| > |a . mean k| + |mean q . b|, a and b being the mean absolute deviations of the queries
    and the keys of a block from their mean; q and k (B, H, n, D).
    """
    means = [block_means(x, size) for x in (q, k)]
    spread = [
        block_means((x - mean.repeat_interleave(size, 2)[:, :, : x.shape[2]]).abs(), size)
        for x, mean in zip((q, k), means, strict=True)
    ]
    lost = (spread[0] @ means[1].mT).abs() + (means[0] @ spread[1].mT).abs()
    return (means[0] @ means[1].mT).abs() > lost


def kept_share(mask: BlockMask, layout: TokenLayout, size: int) -> torch.Tensor:
    """The share of the pairs of visual tokens that a mask keeps of every pair of blocks: float64 (G, R, C).

    Without waiting for the device. Tokens stand as in `shares`; all pairs with others are kept.
    """
    every, visual = layout.seq_len, layout.visual_len
    counts = mask.pair_counts()
    for axis, own in ((1, mask.block_size[0]), (2, mask.block_size[1])):
        padding = -counts.shape[axis] % (size // own)
        counts = torch.nn.functional.pad(counts, (0, 0, 0, padding) if axis == 1 else (0, padding))
        counts = counts.unflatten(axis, (-1, size // own)).sum(axis + 1)
    at = torch.arange(-(-visual // size), device=mask.device) * size
    tokens, own = ((stop - at).clamp(max=size) for stop in (every, visual))
    pairs = own[:, None] * own
    counts = counts[:, : len(at), : len(at)] - (tokens[:, None] * tokens - pairs)
    return counts.double() / pairs


@dataclass(frozen=True, eq=False)
class RectifiedAttention(AroundAnother):
    """The attention under another's mask, O, as R O + the sum of P_j mean v_j over what is pooled.

    With the shares P of blocks and the part f_j of a block that the mask keeps, a block is pooled by 1 - f_j
    where that is to be trusted, and R is the share of all else: sum of P_j less what is pooled.

    Attributes:
        pattern: says how.
        inner: the other attention, with text last in its masks.
        layout: of this layer.
    """

    pattern: Rectified
    inner: LayerAttention
    layout: TokenLayout

    def resolved(self, call: AttentionCall) -> RectifiedAttention:
        return replace(self, inner=self.inner.resolved(call))

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        inner, moved = self._entered(call)
        out = _masked(inner)(moved)
        return inner.leave(self._rectified(moved, inner.mask, out)[0])

    def with_lse(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """As R is the share of the keys in O, their log-sum-exp less log R is that of all."""
        inner, moved = self._entered(call)
        out, lse = _masked(inner).with_lse(moved)
        out, rest = self._rectified(moved, inner.mask, out)
        visual = self.layout.visual_len
        rest = rest.clamp(min=torch.finfo(lse.dtype).tiny).log().to(lse.dtype)
        lse = torch.cat([lse[:, :, :visual, None] - rest, lse[:, :, visual:, None]], 2)
        return inner.leave(out), inner.leave(lse).squeeze(-1)

    def _entered(self, call: AttentionCall) -> tuple[Any, AttentionCall]:
        """The other attention as this call decides it, and the call in the order of its mask."""
        if call.tail is not None:
            raise UnavailableError(
                f"`tail={call.tail!r}` and Rectified both stand for what is left out; use one of them"
            )
        inner: Any = self.inner.resolved(call)
        return inner, inner.enter(call)

    def _rectified(
        self, call: AttentionCall, mask: BlockMask, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`out` (B, H, S, D) with its visual tokens rectified, and R of those, (B, H, V, 1)."""
        size, visual = self.pattern.block_size, self.layout.visual_len
        q, k, v = (x[:, :, :visual] for x in (call.q, call.k, call.v))
        q_means, k_means, v_means = (block_means(x, size) for x in (q, k, v))
        weights = shares(q_means, k_means, call, size)
        groups = mask.group_of_heads(*q.shape[:2]).long()
        pooled = weights.blocks * (1 - kept_share(mask, self.layout, size)[groups].to(weights.blocks.dtype))
        if self.pattern.gain_aware:
            pooled = pooled * trusted(q, k, size)
        added, rest = pooled @ v_means, 1 - pooled.sum(-1, keepdim=True)
        added, rest = (x.repeat_interleave(size, 2)[:, :, :visual] for x in (added, rest))
        own = (rest * out[:, :, :visual] + added).to(out.dtype)
        return torch.cat([own, out[:, :, visual:]], 2), rest


def _masked(inner: Any) -> Masked:
    """The other attention in the order of its mask."""
    return Masked(inner.mask, None, getattr(inner, "pv_threshold", None))
