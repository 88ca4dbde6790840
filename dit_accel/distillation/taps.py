"""Attention outputs of some layers in a forward pass: heads joined, before the layer's output projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dit_accel.masks.layout import TokenLayout

Outputs = dict[str, list[torch.Tensor]]  # by layer (B, S, D), of visual tokens or all, and of text by itself
Order = Callable[[], "torch.Tensor | None"]


class Taps:
    """What some attention layers of a transformer put out.

    A layer with an output projection of its own is read where that begins, for visual tokens (`to_out`) and
    text (`to_add_out`); one without, as in FLUX's single-stream blocks, at its end.

    Args:
        layers: attention modules by name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]):
        self.layers = layers

    @contextmanager
    def recording(self, order: Order, layout: Callable[[], TokenLayout]) -> Iterator[Outputs]:
        """Records a forward pass in a `with` block; after it tokens are in the model's own order.

        Args:
            order: in a call, the visual token at each place, int64 (V,); None: the model's own.
            layout: in a call, of its tokens.
        """
        found: Outputs = {name: [] for name in self.layers}
        orders: dict[str, torch.Tensor | None] = {}
        hooks = []

        def note(name: str, x: torch.Tensor) -> None:
            found[name].insert(0, x)
            orders[name] = order()

        for name, module in self.layers.items():
            if getattr(module, "to_out", None) is None:

                def after(
                    _: nn.Module, inputs: tuple, output: torch.Tensor | tuple, name: str = name
                ) -> None:
                    visual, *text = output if isinstance(output, tuple) else (output,)
                    note(name, visual)
                    found[name] += [x for x in text if x is not None]

                hooks.append(module.register_forward_hook(after))
                continue

            def before(_: nn.Module, inputs: tuple, name: str = name) -> None:
                note(name, inputs[0])

            to_out: Any = module.to_out
            hooks.append(to_out[0].register_forward_pre_hook(before))
            if getattr(module, "to_add_out", None) is not None:

                def of_text(_: nn.Module, inputs: tuple, name: str = name) -> None:
                    found[name].append(inputs[0])

                hooks.append(module.to_add_out.register_forward_pre_hook(of_text))
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()
        for name, moved in orders.items():  # not in the blocks, whose backward pass may compute them again
            found[name][0] = _restored(found[name][0], layout, moved)


def _restored(x: torch.Tensor, layout: Callable[[], TokenLayout], order: torch.Tensor | None) -> torch.Tensor:
    """x (B, S or V, D) with its visual tokens in the model's own order."""
    if order is None:
        return x
    own = layout()
    first = own.visual_slice.start if x.shape[1] == own.seq_len else 0
    before, visual, after = x.split([first, own.visual_len, x.shape[1] - first - own.visual_len], 1)
    return torch.cat([before, visual.index_select(1, torch.argsort(order)), after], 1)


def distance(ours: Outputs, theirs: Outputs) -> torch.Tensor:
    """Mean over layers of the mean squared difference over all tokens and channels."""
    parts = []
    for name, outputs in ours.items():
        pairs = list(zip(outputs, theirs[name], strict=True))
        squares = sum((a.float() - b.float()).square().sum() for a, b in pairs)
        parts.append(squares / sum(a.numel() for a, _ in pairs))
    return torch.stack(parts).mean()


def default_taps(layers: Mapping[str, nn.Module], changed: Sequence[str]) -> list[str]:
    """CLEAR's choice, for any model.

    Of layers that a recipe changes the single-stream ones, or all where there are none; of these every one
    whose flat index is a multiple of 4, or the last.

    Args:
        layers: all, in flat order.
        changed: those that a recipe changes.
    """
    single = [name for name in changed if getattr(layers[name], "to_out", None) is None]
    index = {name: place for place, name in enumerate(layers)}
    chosen = [name for name in single or changed if index[name] % 4 == 0]
    return chosen or [(single or list(changed))[-1]]
