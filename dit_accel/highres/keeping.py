"""The native result in a file, so that a run that was stopped, or another method, goes on from it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_accel.files import atomic

_VERSION = 1


@dataclass
class Kept:
    """A finished native pass.

    Attributes:
        frames: (B, F, 3, H, W) in [0, 1], on the CPU.
        estimates: see `dit_accel.highres.method.Before`.
        generators: states of the call's generators after the pass.
        watched: see `dit_accel.highres.method.Before`.
    """

    frames: torch.Tensor
    estimates: list[torch.Tensor] = field(default_factory=list)
    generators: list[torch.Tensor] = field(default_factory=list)
    watched: list[torch.Tensor] = field(default_factory=list)


def check_path(path: str | Path) -> Path:
    """Raise ValueError unless the path names a safetensors file."""
    path = Path(path)
    if path.suffix != ".safetensors" or path.is_dir():
        raise ValueError(f"`keep` must name a .safetensors file, got {str(path)!r}")
    return path


def request_of(
    prompt: Any, size: Any, part: Any, call: dict[str, Any], generators: list[torch.Generator]
) -> dict[str, str]:
    """What a native pass depends on, as text by name."""
    plain = (str, int, float, bool, type(None), list, tuple)
    told = {name: repr(value) for name, value in sorted(call.items()) if isinstance(value, plain)}
    told.pop("generator", None)  # a list of them, which are told by their seeds
    seeds = [generator.initial_seed() for generator in generators]
    return {"prompt": repr(prompt), "size": str(size), "part": repr(part), "seeds": repr(seeds), **told}


def save(path: Path, kept: Kept, request: dict[str, str]) -> None:
    """Writes the file whole or not at all."""
    from safetensors.torch import save_file

    tensors = {"frames": kept.frames.contiguous()}
    for name in ("estimates", "generators", "watched"):
        tensors |= {f"{name}.{i}": x.cpu().contiguous() for i, x in enumerate(getattr(kept, name))}
    metadata = {"dit_accel_native_pass": str(_VERSION), "request": json.dumps(request)}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata)


def load(path: Path, request: dict[str, str]) -> Kept:
    """Reads a file that `save` wrote for the same request.

    Raises:
        ValueError: another file, or that of another request; the message says what differs.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("dit_accel_native_pass") != str(_VERSION):
                raise ValueError(f"{path} is not the native result of a high-resolution run")
            before = json.loads(metadata["request"])
            other = [name for name in {**before, **request} if before.get(name) != request.get(name)]
            if other:
                raise ValueError(
                    f"{path} is of another request: `{other[0]}` was {before.get(other[0])}, now "
                    f"{request.get(other[0])}; name another file, or remove it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from None
    lists: dict[str, list[torch.Tensor]] = {"estimates": [], "generators": [], "watched": []}
    for name, found in lists.items():
        while f"{name}.{len(found)}" in tensors:
            found.append(tensors[f"{name}.{len(found)}"])
    return Kept(tensors["frames"], **lists)
