"""Moving tokens between the order of a call and the order of a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_accel.masks.layout import TokenLayout


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Where the tokens of a call stand in another order.

    Attributes:
        gather: int64 (S,), the token of the call at each place of the other order.
        scatter: int64 (S,), its inverse.
        rolled: how many tokens at the front of the call stand at the end of the other order, where that is
            the only difference; then no index is needed.
    """

    gather: torch.Tensor
    scatter: torch.Tensor
    rolled: int | None = None

    @classmethod
    def between(
        cls, call: torch.Tensor, other: torch.Tensor, device: torch.device | str
    ) -> Arrangement | None:
        """From the model's token at each place of the call and of the other order, int64 (S,).

        None where they are the same.
        """
        if torch.equal(call, other):
            return None
        gather = torch.argsort(call)[other]
        first = int(gather[0])
        rolled = first if torch.equal(gather, torch.arange(len(gather), device="cpu").roll(-first)) else None
        return cls(gather.to(device), torch.argsort(gather).to(device), rolled)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, H, S, D) of the call, in the other order."""
        return self._moved(x, self.gather, self.rolled)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse."""
        return self._moved(x, self.scatter, None if self.rolled is None else x.shape[2] - self.rolled)

    @staticmethod
    def _moved(x: torch.Tensor, index: torch.Tensor, rolled: int | None) -> torch.Tensor:
        x = x.transpose(1, 2)  # whole tokens are moved fastest
        x = x.index_select(1, index) if rolled is None else torch.cat([x[:, rolled:], x[:, :rolled]], 1)
        return x.transpose(1, 2)


def call_order(layout: TokenLayout, places: torch.Tensor | None = None) -> torch.Tensor:
    """The model's token at each place of a call: int64 (S,) on the CPU.

    Args:
        places: the visual token at each place of the visual tokens, int64 (V,); None: the model's own order.
    """
    order = torch.arange(layout.seq_len, device="cpu")
    if places is not None:
        order[layout.visual_slice] = layout.visual_slice.start + places.cpu()
    return order


def lay_out(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Row `index[b, h, s]` of each head of x (B, H, S, D); whole rows of tokens, which gathers fastest."""
    batch, heads, length, dim = x.shape
    sample, head = (torch.arange(n, device=x.device) for n in (batch, heads))
    row = (sample[:, None, None] * length + index) * heads + head[:, None]
    tokens = x.transpose(1, 2).reshape(-1, dim)
    chosen = tokens.index_select(0, row.transpose(1, 2).reshape(-1))
    return chosen.view(batch, length, heads, dim).transpose(1, 2)
