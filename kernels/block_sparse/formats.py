"""Numeric formats of quantized attention: in what Q, K, P = softmax(Q K^T) and V are multiplied.

Q and K are always int8 (SageAttention, Zhang et al., arXiv 2410.02367); formats differ in P and V:

| format | P | V | as in |
|---|---|---|---|
| `"int8"` | 16 bit | 16 bit | SageAttention |
| `"int8-fp8"` | e4m3 | e4m3, a scale for each channel | SageAttention2 (arXiv 2411.10958) |
| `"int8-int8"` | 0 to 127 | -127 to 127, likewise | PAROAttention (arXiv 2506.16054) |
| `"int8-int4"` | 0 to 15 | -7 to 7, likewise | the same |

Four bits are held in eight, and multiplied so: no tensor core since Hopper takes less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

LARGEST_GROUP = 64  # keys that share a scale


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    """x, of magnitudes up to 448, rounded to float8_e4m3fn."""
    return x.to(torch.float8_e4m3fn).to(x.dtype)


@dataclass(frozen=True)
class Format:
    """A numeric format.

    Attributes:
        name: the value of `quantization` that stands for it.
        weights: what the largest weight of a row in a group of keys becomes; None: P and V stay in 16 bit.
        values: what the largest value of a channel becomes.
        rounding: of weights and values at that size, to the nearest, halves to even.
        dtype: in which they are stored.
    """

    name: str
    weights: int | None = None
    values: int | None = None
    rounding: Callable[[torch.Tensor], torch.Tensor] = torch.round
    dtype: torch.dtype = torch.int8

    def powers(self, scores: torch.Tensor, group: int) -> torch.Tensor:
        """2^scores, rounded as the format multiplies them.

        The weights of a row in each group of keys are rounded at a scale of their own, that of the largest
        of them: so no weight depends on the order in which a kernel meets the groups, and small ones of a
        row that has a large one elsewhere are not lost.

        Args:
            scores: (..., keys), below 127, -inf where hidden; keys a multiple of `group`.
        """
        if self.weights is None:
            return scores.exp2()
        scores = scores.unflatten(-1, (-1, group))
        top = scores.amax(-1, keepdim=True)
        top = top.masked_fill(top == -math.inf, 0.0)
        weights = self.rounding((scores - top).exp2() * self.weights)
        return (weights * (top.exp2() / self.weights)).flatten(-2)


FORMATS = {
    format.name: format
    for format in (
        Format("int8"),
        Format("int8-fp8", 448, 448, _e4m3, torch.float8_e4m3fn),
        Format("int8-int8", 127, 127),
        Format("int8-int4", 15, 7),
    )
}


def key_group(block_keys: int) -> int:
    """How many keys share a scale in a mask of blocks of so many: at most 64, and whole groups in each."""
    return math.gcd(LARGEST_GROUP, block_keys)
