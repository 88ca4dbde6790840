"""The second pass of a calibration: error and cost of every head's output under each of its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dit_accel import kernels
from dit_accel.attention.call import AttentionCall
from dit_accel.attention.head_masked import HeadMasked
from dit_accel.attention.layer_masks import LayerMasks
from dit_accel.attention.tail_densities import mask_densities
from dit_accel.bounded_dict import make_room
from dit_accel.masks.orders import AXIS_ORDERS
from dit_accel.patterns import StaticPattern
from dit_accel.patterns.head_choice import HeadChoice
from dit_accel.patterns.reordered_blocks import ReorderedBlocks
from dit_accel.runtime.switching import Handle

from .block_choice import best_orders, kept_blocks
from .candidates import DENSITIES
from .mass_pass import MassPass, place

ORDERS = 2  # of a head, the best by their mass, that are tried
_ORDERS_AT = 0.2  # share of blocks by which they are the best: one set of errors then serves all densities
_LAYERS_KEPT = 512  # what they compute under an option


@dataclass(frozen=True)
class Option:
    """What all heads of a layer are tried with.

    Attributes:
        pattern: the same for all; None: blocks of each head's own.
        rank, density: of these: along which of the head's best orders, and how many.
        tail: whether what is left out contributes by its means.
    """

    pattern: StaticPattern | None = None
    rank: int = 0
    density: float = 0.0
    tail: bool = False


def options(static: Sequence[StaticPattern], reordered: bool, tails: bool) -> list[Option]:
    """All that are tried: each pattern, and blocks of each density along the best orders, also with tails."""
    plain = [Option(pattern) for pattern in static if pattern.sparse]
    if reordered:
        plain += [Option(rank=rank, density=d) for rank in range(ORDERS) for d in DENSITIES]
    return plain + [replace(one, tail=True) for one in plain if tails]


class ErrorPass:
    """Sums of squared errors of heads' outputs, as shares of the squared outputs of their layers.

    Attributes:
        options: what is tried.
        errors: fp64 (rows, layers, heads, options), the mean over calls.
        costs: of that shape, pairs in computed blocks, and with pooled keys, as a share of all.
    """

    name = "errors"

    def __init__(self, found: MassPass, tried: list[Option]):
        self.found, self.options = found, tried
        self.orders = best_orders(found.mass, _ORDERS_AT)[..., :ORDERS]  # (layers, heads, ORDERS)
        shape = (*found.mass.shape[:3], len(tried))
        self.errors, self.costs = (torch.zeros(shape, dtype=torch.float64, device="cpu") for _ in range(2))
        self._calls = torch.zeros(shape[:2], dtype=torch.float64, device="cpu")
        self._built: dict[tuple[Any, ...], tuple[HeadMasked, torch.Tensor]] = {}

    @property
    def settings(self) -> dict[str, Any]:
        return {"options": [str(one) for one in self.options]}

    @property
    def mean_errors(self) -> torch.Tensor:
        return self.errors / self._calls.clamp(min=1)[..., None, None]

    def choice(self, option: Option, row: int, layer: int, head: int) -> HeadChoice:
        """What a head has under an option."""
        if option.pattern is not None:
            return HeadChoice(option.pattern, option.tail)
        order = int(self.orders[layer, head, option.rank])
        kept = kept_blocks(self.found.mass[row, layer, head, order], option.density)
        grid, size = self.found.model["grid"], self.found.model["block_size"]
        return HeadChoice(ReorderedBlocks.of(grid, list(AXIS_ORDERS)[order], size, kept), option.tail)

    def see(self, handle: Handle, layer: str, call: AttentionCall, out: torch.Tensor) -> None:
        row, index = place(self.found.model, handle, layer, call, self.found.layout)
        exact = out.double()
        whole = exact.square().sum((1, 2, 3)).clamp(min=torch.finfo(torch.float64).tiny)
        for number, option in enumerate(self.options):
            attention, cost = self._under(option, row, index, call)
            lost = (attention(replace(call, tail=None)).double() - exact).square().sum((2, 3))
            self.errors[row, index, :, number] += (lost / whole[:, None]).mean(0).cpu()
            self.costs[row, index, :, number] = cost
        self._calls[row, index] += 1

    def _block_size(self, device: torch.device) -> tuple[int, int]:
        """Of masks: the device's first that divides the blocks that heads choose, if any does."""
        sizes, own = list(kernels.block_sizes(device)), self.found.model["block_size"]
        return next((size for size in sizes if own % size[0] == own % size[1] == 0), sizes[0])

    def _under(
        self, option: Option, row: int, layer: int, call: AttentionCall
    ) -> tuple[HeadMasked, torch.Tensor]:
        """What a layer computes under an option, and what that costs each head."""
        shared = option.pattern is not None
        key = (option, call.layout, call.q.device, None if shared else (row, layer))
        if key not in self._built:
            with torch.inference_mode(False):
                made = self._made(option, row, layer, call)
            make_room(self._built, _LAYERS_KEPT)
            self._built[key] = made
        return self._built[key]

    def _made(
        self, option: Option, row: int, layer: int, call: AttentionCall
    ) -> tuple[HeadMasked, torch.Tensor]:
        masks = LayerMasks(call.layout, "auto", self._block_size(call.q.device), call.q.device)
        heads = [self.choice(option, row, layer, head) for head in range(call.q.shape[1])]
        own = {choice.pattern: choice.own_mask(masks) for choice in dict.fromkeys(heads)}
        tails = ["pooled" if option.tail else None] * len(heads)
        calls = torch.arange(call.layout.seq_len, device="cpu")
        attention = HeadMasked.of([own[choice.pattern] for choice in heads], tails, calls)
        each = {pattern: mask_densities(mask, tails[0])[1] for pattern, mask in own.items()}
        cost = torch.tensor([each[choice.pattern] for choice in heads], dtype=torch.float64, device="cpu")
        return attention, cost

    def sums(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {"errors": self.errors, "costs": self.costs, "calls": self._calls}, {}

    def restore(self, tensors: dict[str, torch.Tensor], data: dict[str, Any]) -> None:
        self.errors, self.costs, self._calls = tensors["errors"], tensors["costs"], tensors["calls"]
