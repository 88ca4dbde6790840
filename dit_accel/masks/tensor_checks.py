"""Checks that a tensor is what kernels read: its dtype, its shape, the range of its values."""

from __future__ import annotations

import torch

LONGEST = 2**31 - 1  # what int32 addresses


def check_tensor(
    name: str, x: torch.Tensor | None, dtype: torch.dtype, *shapes: tuple[int | None, ...]
) -> None:
    """Raise ValueError unless x is None, or contiguous, of that dtype and one of the shapes (None: any)."""
    if x is None or (x.dtype == dtype and x.is_contiguous() and any(_fits(x, shape) for shape in shapes)):
        return
    form = " or ".join(str(shape).replace("None", "n") for shape in shapes)
    raise ValueError(f"`{name}` must be {dtype}, contiguous, of shape {form}, got {x.dtype} {tuple(x.shape)}")


def _fits(x: torch.Tensor, shape: tuple[int | None, ...]) -> bool:
    return x.ndim == len(shape) and all(n in (None, size) for n, size in zip(shape, x.shape, strict=True))


def check_range(name: str, x: torch.Tensor, stop: int) -> None:
    """Raise ValueError unless all values, if any, are in 0 .. stop - 1; reads them."""
    if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < stop:
        raise ValueError(f"`{name}` must be in 0 .. {stop - 1}, got {int(x.min())} .. {int(x.max())}")
