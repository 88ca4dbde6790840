"""Values that a model asks of tensors on the meta device, where tensors have none."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


class _Autocast(torch.autocast):
    """PyTorch's, of which the meta device has none."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        if device_type == "meta":
            device_type, args, kwargs = "cpu", (), {"enabled": False}
        super().__init__(device_type, *args, **kwargs)


class EveryConditionHolds(TorchDispatchMode):
    """Within it, forwards on the meta device may branch on values, select by masks and enter autocasts.

    A condition is true, a mask selects everything, and its negation nothing: so does a call whose text is
    not padded.
    """

    def __init__(self) -> None:
        super().__init__()
        self._negations: list[torch.Tensor] = []

    def __enter__(self) -> EveryConditionHolds:
        torch.autocast = _Autocast
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch.autocast = _Autocast.__mro__[1]
        super().__exit__(*raised)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function is _aten._local_scalar_dense.default:
            return True
        if function is _aten.nonzero.default:
            return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
        first = args[1][0] if function is _aten.index.Tensor else None
        if first is not None and first.dtype == torch.bool:
            tensor, (mask, *_) = args
            nothing = any(mask is negation for negation in self._negations)
            return tensor.new_empty(0 if nothing else mask.numel(), *tensor.shape[mask.ndim :])
        made = function(*args, **(kwargs or {}))
        if function is _aten.bitwise_not.default:
            self._negations.append(made)
        return made
