"""Inputs of a transformer: tensors and plain values in lists and tuples, written down, changed, compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_PLAIN = (type(None), bool, int, float, str)


def is_plain(value: Any) -> bool:
    """Whether it is all tensors, numbers, texts and None, and lists and tuples of these."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return isinstance(value, (torch.Tensor, *_PLAIN))


def has_tensors(value: Any) -> bool:
    """Whether a tensor is among it."""
    if isinstance(value, list | tuple):
        return any(map(has_tensors, value))
    return isinstance(value, torch.Tensor)


def mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same with its tensors changed."""
    if isinstance(value, list | tuple):
        return type(value)(mapped(one, change) for one in value)
    return change(value) if isinstance(value, torch.Tensor) else value


def equal(a: Any, b: Any) -> bool:
    """Whether two are the same, their tensors bit for bit."""
    if isinstance(a, list | tuple):
        alike = type(a) is type(b) and len(a) == len(b)
        return alike and all(equal(one, other) for one, other in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return not isinstance(b, torch.Tensor) and a == b


def taken_apart(value: Any, tensors: list[torch.Tensor]) -> Any:
    """As JSON may hold it: tensors, which are appended to a list, by their places in it."""
    if isinstance(value, list | tuple):
        return {type(value).__name__: [taken_apart(one, tensors) for one in value]}
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    return value


def put_together(form: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """The way back."""
    if not isinstance(form, dict):
        return form
    ((kind, held),) = form.items()
    if kind == "tensor":
        return tensors[held]
    parts = [put_together(one, tensors) for one in held]
    return tuple(parts) if kind == "tuple" else parts
