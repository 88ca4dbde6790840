"""Tensors in files: safetensors with fields and a checksum; nothing read is believed before it is checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch

from .files import atomic
from .json_files import from_json


def write(path: Path, kind: str, tensors: dict[str, torch.Tensor], fields: dict[str, Any]) -> None:
    """Write tensors and fields (plain data) to a file, whole or not at all; `kind` names its format."""
    from safetensors.torch import save_file

    whole = {"memory_format": torch.contiguous_format}
    tensors = {name: x.cpu().clone(**whole) for name, x in tensors.items()}  # one may be a part of another
    described = json.dumps(fields)
    metadata = {"format": kind, "fields": described, "sha256": checksum(tensors, described)}
    with atomic(path) as temporary:
        save_file(tensors, str(temporary), metadata=metadata)


def read(
    path: Path, kind: str, what: str, required: Set[str] | None, optional: Set[str] = frozenset()
) -> tuple[dict[str, torch.Tensor], Any]:
    """Tensors and fields of a file, undamaged since they were written.

    Args:
        path: the file.
        kind: its format, with a number at the end that counts versions.
        what: what it should be, as in "no block mask file at PATH".
        required, optional: names of tensors, those and no others; None: any.

    Returns:
        tensors by name, and the fields as JSON says them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind or of another format, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no {what} file at {path}")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    found = metadata.get("format", "")
    (name, _, number), (own, _, current) = found.rpartition(" "), kind.rpartition(" ")
    if name == own and number.isdigit() and int(number) < int(current):
        raise ValueError(
            f"{path} was saved by an earlier version of dit-accel; make the {what.split()[-1]} again and "
            "save it"
        )
    if found != kind:
        raise ValueError(f"{path} is not a {what} saved by dit-accel (format {found or None!r:.80})")
    if required is not None and not required <= set(tensors) <= required | optional:
        raise ValueError(f"{path} is damaged: its tensors are {sorted(tensors)!s:.300}")
    described = metadata.get("fields", "")
    if metadata.get("sha256") != checksum(tensors, described):
        raise ValueError(f"{path} is damaged: its contents do not match their checksum")
    try:
        return tensors, from_json(described)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its fields are no JSON: {error}") from None


def checksum(tensors: dict[str, torch.Tensor], described: str) -> str:
    """SHA-256 of tensors and of text."""
    digest = hashlib.sha256(described.encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
