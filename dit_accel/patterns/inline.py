"""InLine attention: linear attention that is injective, with local kernels made of the layer's input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from dit_accel.attention.approximate import (
    TAPS_IN,
    TAPS_IN_BIAS,
    TAPS_OUT,
    TAPS_OUT_BIAS,
    InLineAttention,
)
from dit_accel.masks.layout import TokenLayout

from .maskless import Maskless

if TYPE_CHECKING:
    from dit_accel.attention.call import LayerSizes
    from dit_accel.attention.layer_masks import LayerMasks


@dataclass(frozen=True)
class InLine(Maskless):
    """Visual tokens read all keys, text included, by weights that are linear in the scores and sum to one:

        out_i = sum over j of [s q_i . k_j / n + (1 - s q_i . kbar) / n] v_j,   s = 1 / sqrt(D),

    with n keys of mean kbar; computed as s / n q (K^T V) + (1 - s q . kbar) vbar, which grows with S D^2 and
    not with S^2. To it a local part is added: each frame's values under a kernel of 3 x 3 of every channel,
    zeros around the frame. The nine weights are made of the mean x of the layer's input, by two linear layers
    in each head: W2 gelu(W1 x + b1) + b2. These are learned (`dit_accel.distill`), W2 and b2 from 0; without
    an adapter there is no local part. Trained with the projections, as it is far from softmax attention.

    Source: Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention", 2024.
    """

    reads_input = True
    rest = "linear attention"

    def learned(self, sizes: LayerSizes) -> dict[str, torch.Tensor]:
        heads, dim, width = sizes.heads, sizes.head_dim, sizes.width // sizes.heads
        shapes = {
            TAPS_IN_BIAS: (heads, dim),
            TAPS_OUT: (heads, 9 * dim, dim),
            TAPS_OUT_BIAS: (heads, 9 * dim),
        }
        zeros = {name: torch.zeros(n, dtype=torch.float32, device="cpu") for name, n in shapes.items()}
        eye = torch.eye(dim, width, dtype=torch.float32, device="cpu")
        return {TAPS_IN: eye.expand(heads, -1, -1).clone(), **zeros}

    def of_input(
        self, x: torch.Tensor, learned: Mapping[str, torch.Tensor], heads: int
    ) -> torch.Tensor | None:
        """Nine weights for each channel, (B, heads, 9, D)."""
        if TAPS_IN not in learned:
            return None
        first, bias, second, last = (
            learned[name].to(x.dtype) for name in (TAPS_IN, TAPS_IN_BIAS, TAPS_OUT, TAPS_OUT_BIAS)
        )
        mean = x.mean(1)[:, : heads * first.shape[2]].unflatten(1, (heads, -1))
        inner = F.gelu(torch.einsum("bhc,hdc->bhd", mean, first) + bias)
        return (torch.einsum("bhd,hed->bhe", inner, second) + last).unflatten(2, (9, -1))

    def layer(self, masks: LayerMasks) -> InLineAttention:
        layout, places = masks.layout, masks.places
        if places is None:
            return InLineAttention(self, layout)
        back = torch.argsort(places)
        return InLineAttention(self, layout, places.to(masks.device), back.to(masks.device))

    def density(self, layout: TokenLayout) -> float:
        """That of the queries of text and anchor, which attend to everything."""
        return 1 - layout.visual_len / layout.seq_len
