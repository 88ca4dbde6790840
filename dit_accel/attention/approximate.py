"""Attention of visual queries by a formula of its own, without a mask; others attend to everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from dit_accel.masks.layout import TokenLayout

from .call import AttentionCall, LayerAttention, LayerSizes
from .cubes import Cubes

# of kernels of 3 x 3, made by two grouped linear layers of the mean input, as learned
TAPS_IN, TAPS_IN_BIAS = "taps_in.weight", "taps_in.bias"  # (H, D, C / H), (H, D)
TAPS_OUT, TAPS_OUT_BIAS = "taps_out.weight", "taps_out.bias"  # (H, 9 D, D), (H, 9 D)


@dataclass(frozen=True, eq=False)
class Approximate(LayerAttention):
    """A layer whose visual queries do something else than attend to keys under a mask.

    Attributes:
        pattern: says what.
        layout: of the layer's tokens.
    """

    pattern: Any
    layout: TokenLayout
    mask = None

    def of_visual(self, call: AttentionCall, hidden: torch.Tensor | None) -> torch.Tensor:
        """The output of the visual queries, (B, H, V, D); `hidden` are keys of padded text, bool (B, S)."""
        raise NotImplementedError

    @property
    def density(self) -> float:
        return self.pattern.density(self.layout)

    @property
    def block_density(self) -> float:
        return self.density

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        visual, hidden = call.layout.visual_slice, call.hidden_keys()
        seen = None if hidden is None else ~hidden[:, None, None]

        def dense(q: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, call.k, call.v, attn_mask=seen, scale=call.scale)

        parts = [self.of_visual(call, hidden).to(call.q.dtype)]
        if visual.start:
            parts.insert(0, dense(call.q[:, :, : visual.start]))
        if visual.stop < call.layout.seq_len:
            parts.append(dense(call.q[:, :, visual.stop :]))
        return torch.cat(parts, 2)


@dataclass(frozen=True, eq=False)
class AgentAttention(Approximate):
    """Attention through agents, the mean queries of patches.

    Attributes:
        cubes: the patches, of the visual tokens in the order of calls.
    """

    cubes: Cubes

    def of_visual(self, call: AttentionCall, hidden: torch.Tensor | None) -> torch.Tensor:
        q = call.q[:, :, call.layout.visual_slice]
        scale = call.factor
        agents = self.cubes.means_of(q).to(q.dtype)
        seen = None if hidden is None else ~hidden[:, None, None]
        read = F.scaled_dot_product_attention(agents, call.k, call.v, attn_mask=seen, scale=scale)
        out = F.scaled_dot_product_attention(q, agents, read, scale=scale**self.pattern.exponent)
        return out + self.pattern.shortcut * call.v[:, :, call.layout.visual_slice]


@dataclass(frozen=True, eq=False)
class InLineAttention(Approximate):
    """Linear attention whose weights sum to one, plus kernels of 3 x 3 over the values of a frame.

    Attributes:
        places: the visual token at each place of calls, int64 (V,); None: the model's own order.
        back: its inverse.
    """

    places: torch.Tensor | None = None
    back: torch.Tensor | None = None

    def pairs_beside(self, sizes: LayerSizes) -> float:
        """Sums of k^T v, their products with q, and nine weights for each value."""
        visual = self.layout.visual_len
        return sizes.head_dim * (self.layout.seq_len + visual) / 2 + 4.5 * visual

    def of_visual(self, call: AttentionCall, hidden: torch.Tensor | None) -> torch.Tensor:
        visual, exact = call.layout.visual_slice, torch.promote_types(call.q.dtype, torch.float32)
        with torch.autocast(call.q.device.type, enabled=False):
            q, k, v = (x.to(exact) for x in (call.q[:, :, visual], call.k, call.v))
            own, number = v[:, :, visual], torch.tensor(float(k.shape[2]), dtype=exact, device=k.device)
            if hidden is not None:
                k, v = (x.masked_fill(hidden[:, None, :, None], 0) for x in (k, v))
                number = (~hidden).sum(1).to(exact)[:, None, None, None]
            q = q * call.factor
            means = [x.sum(2, keepdim=True) / number for x in (k, v)]
            out = q @ (k.mT @ v) / number + (1 - q @ means[0].mT) * means[1]
            taps = call.of_input(TAPS_IN, "a local kernel")
            return out if taps is None else out + self._local(own, taps.to(exact))

    def _local(self, v: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
        """Kernels of 3 x 3, taps (B, H, 9, D), over the frames of v (B, H, V, D); zeros around them."""
        grid = self.layout.grid
        _, height, width = grid
        if self.back is not None:
            v = v[:, :, self.back]
        padded = F.pad(v.unflatten(2, grid), (0, 0, 1, 1, 1, 1))
        out = torch.zeros_like(v).unflatten(2, grid)
        for tap in range(9):
            row, column = divmod(tap, 3)
            part = padded[:, :, :, row : row + height, column : column + width]
            out = out + part * taps[:, :, tap, None, None, None]
        out = out.flatten(2, 4)
        return out if self.places is None else out[:, :, self.places]
