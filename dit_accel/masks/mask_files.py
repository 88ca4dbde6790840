"""Block masks in files: which tensors and fields those hold, see `dit_accel.tensor_files`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dit_accel import tensor_files

FORMAT = "dit-accel block mask 2"
_REQUIRED = {
    *("full.start", "full.count", "full.index", "tiles"),
    *("partial.start", "partial.count", "partial.index", "partial.tile"),
}
_OPTIONAL = {"order", "key_order", "head_groups"}
_PAIRS, _NUMBERS = ("block_size", "text"), ("seq_len", "kv_len")


def write(path: Path, tensors: dict[str, torch.Tensor], fields: dict[str, Any]) -> None:
    """Write tensors and fields to a file, whole or not at all."""
    tensor_files.write(path, FORMAT, tensors, fields)


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and fields of a file: those of a mask and no other, undamaged since they were written.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind or of an earlier format, or a damaged one.
    """
    tensors, fields = tensor_files.read(path, FORMAT, "block mask", _REQUIRED, _OPTIONAL)
    try:
        fields = dict(fields)
        pairs = {name: tuple(fields.pop(name)) for name in _PAIRS}
        numbers = {name: fields.pop(name) for name in _NUMBERS}
        wrong = fields or any(len(pair) != 2 for pair in pairs.values())
        wrong = wrong or any(type(n) is not int for n in (*sum(pairs.values(), ()), *numbers.values()))
    except (ValueError, TypeError, AttributeError, KeyError):
        wrong = True
    if wrong:
        raise ValueError(f"{path} is damaged: its fields are {fields!r:.300}")
    return tensors, {**pairs, **numbers}
