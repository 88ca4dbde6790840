"""The most memory that tensors of a piece of work take at one time, also on the meta device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CONVOLUTIONS = (torch.ops.aten.convolution.default,)


class LiveTensors(TorchDispatchMode):
    """Counts, within it, the bytes of tensors that were made there and are in use.

    Args:
        copies: whether a convolution holds a copy of its input while it runs, in the layout of its kernel, as
            on a CPU.

    Attributes:
        peak: the most so far.
    """

    def __init__(self, copies: bool = False) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._copies = copies
        self._held: dict[int, list[int]] = {}  # by storage: tensors that use it, bytes

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, given)
        if self._copies and function in _CONVOLUTIONS:
            self.peak = max(self.peak, self.now + args[0].numel() * args[0].element_size())
        return made

    def _note(self, tensor: torch.Tensor, given: set[int]) -> None:
        key = _storage(tensor)
        if key not in self._held:
            if key in given:  # a view of what was there before
                return
            self._held[key] = [0, tensor.untyped_storage().nbytes()]
            self.now += self._held[key][1]
            self.peak = max(self.peak, self.now)
        self._held[key][0] += 1
        weakref.finalize(tensor, self._gone, key)

    def _gone(self, key: int) -> None:
        self._held[key][0] -= 1
        if self._held[key][0] == 0:
            self.now -= self._held.pop(key)[1]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class FusedAttention(TorchFunctionMode):
    """Within it attention on the meta device makes its output and log-sum-exps, and no scores."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        names = ("query", "key", "value")
        q, _, v = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
        return q.new_empty(*q.shape[:-2], q.shape[-2], v.shape[-1])
