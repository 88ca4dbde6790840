"""What a distillation was begun with, in terms by which another process can tell that it goes on with it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dit_accel import tensor_files
from dit_accel.json_files import plain

_LOOKED_AT = 64  # values of a tensor: other weights differ in nearly all


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline by name."""
    return {name: part for name, part in vars(pipe).items() if isinstance(part, nn.Module)}


def weights_of(modules: Mapping[str, nn.Module]) -> str:
    """A checksum of the weights of modules: of their names, shapes, dtypes and some values of each.

    Those that are not in memory, as under sequential offload, count without their values.
    """
    found: dict[str, torch.Tensor] = {}
    shapes = []
    for place, module in modules.items():
        for name, weight in module.named_parameters():
            for part, x in _parts(f"{place}.{name}".replace("_orig_mod.", ""), weight.detach()):
                shapes.append(f"{part} {x.dtype} {tuple(x.shape)}")
                if not x.is_meta:
                    found[part] = x.flatten()[:: max(1, x.numel() // _LOOKED_AT)].cpu()
    return tensor_files.checksum(found, "\n".join(sorted(shapes)))[:16]


def _parts(name: str, x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a quantized one is made of; of others itself."""
    if not hasattr(x, "__tensor_flatten__"):
        yield name, x
        return
    for inner in x.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{inner}", getattr(x, inner))


def told(value: Any) -> Any:
    """A value in JSON's terms: tensors, arrays and pictures by a checksum, objects without their address."""
    if isinstance(value, Mapping):
        return {str(key): told(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return f"tensor {tensor_files.checksum({'': value.detach().cpu()}, '')[:16]}"
    if hasattr(value, "tobytes"):  # of NumPy and PIL, which need not be there
        form = [getattr(value, name, None) for name in ("dtype", "mode", "shape", "size")]
        return (
            f"{type(value).__name__} {hashlib.sha256(f'{form}'.encode() + value.tobytes()).hexdigest()[:16]}"
        )
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [told(item) for item in value]
    found = plain(value)
    return found if found is value or not isinstance(found, str) else re.sub(r" at 0x[0-9a-fA-F]+", "", found)
