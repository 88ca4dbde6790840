"""What an adapter holds for one transformer: LoRA or whole weights of linear layers, and pooling weights.

Whole weights and pooling weights have the names of the published CLEAR checkpoints
(`clear_local_16_down_4.safetensors`): `LAYER.to_q.weight`, `LAYER.to_q.bias`, ..., and
`LAYER.processor.spatial_weight` of shape (1, 1, 1, f, 1, f, 1): the weight of a token by its row and column
in a patch of f x f.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dit_accel.arguments import shown

DTYPES = {"F16", "BF16", "F32"}
POOLING = "processor.spatial_weight"
_WEIGHT = re.compile(r"([\w.]+\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out))\.(weight|bias)")
_POOLING = re.compile(rf"([\w.]+)\.{re.escape(POOLING)}")

Shapes = Mapping[str, tuple[list[int], str]]  # of the tensors of a file, with their dtypes


@dataclass(frozen=True)
class LowRank:
    """LoRA of one linear layer as its file announces it: sizes, not the numbers."""

    rank: int
    inputs: int
    outputs: int
    scale: float


@dataclass(frozen=True)
class Whole:
    """Weights that stand in for those of one linear layer."""

    inputs: int
    outputs: int
    bias: bool


@dataclass(frozen=True)
class Part:
    """What an adapter holds for one transformer.

    Attributes:
        file: safetensors.
        keys: in the file, by the name of the linear layer in the transformer: of A and B, or of whole weights
            and, where there is one, the bias.
        layers: what the file announces, by the same names; all of one kind.
        pooling: by the name of the attention module, the key of its pooling weights and the side of a patch.
        pooling_file: where those are.
    """

    file: Path
    keys: Mapping[str, tuple[str, ...]]
    layers: Mapping[str, LowRank | Whole]
    pooling: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    pooling_file: Path | None = None

    @property
    def whole(self) -> bool:
        """Whether it has whole weights."""
        return any(isinstance(own, Whole) for own in self.layers.values())

    @property
    def files(self) -> list[Path]:
        """All that it is read from."""
        return list(dict.fromkeys(filter(None, [self.file, self.pooling_file])))

    def tensors(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """By layer, on the CPU: A (rank, in) and B (out, rank), or weight (out, in) and bias (out,).

        Raises:
            ValueError: a file that changed since the recipe was made, or numbers that are not finite.
        """
        found = _read(self.file, self.keys)
        for name, tensors in found.items():
            own = self.layers[name]
            if isinstance(own, Whole):
                expected = [(own.outputs, own.inputs), *[(own.outputs,)] * own.bias]
            else:
                expected = [(own.rank, own.inputs), (own.outputs, own.rank)]
            if [tuple(x.shape) for x in tensors] != expected:
                raise ValueError(
                    f"{self.file} has changed since the recipe was made: {name} has other shapes"
                )
            if not all(x.isfinite().all() for x in tensors):
                kind = "weight" if isinstance(own, Whole) else "LoRA"
                raise ValueError(f"{self.file} is damaged: the {kind} of {name} is not finite")
        return found

    def pooling_weights(self) -> dict[str, torch.Tensor]:
        """By attention module (factor, factor), fp32 on the CPU; of a token by its place in a patch.

        Raises:
            ValueError: as `tensors`.
        """
        if self.pooling_file is None:
            return {}
        found = _read(self.pooling_file, {name: (key,) for name, (key, _) in self.pooling.items()})
        for name, (x,) in found.items():
            if x.numel() != self.pooling[name][1] ** 2:
                raise ValueError(f"{self.pooling_file} has changed since the recipe was made: {name}")
            if not x.isfinite().all():
                raise ValueError(f"{self.pooling_file} is damaged: pooling weights of {name} are not finite")
        return {name: x.float().view([self.pooling[name][1]] * 2) for name, (x,) in found.items()}

    def describe(self) -> str:
        """In a few words: `"LoRA of rank 8 in 57 linear layers"`."""
        if self.whole:
            text = f"whole weights of {len(self.layers)} linear layers"
        else:
            ranks = [own.rank for own in self.layers.values() if isinstance(own, LowRank)]
            rank = str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
            text = f"LoRA of rank {rank} in {len(self.layers)} linear layers"
        return text + (f", pooling weights of {len(self.pooling)} layers" if self.pooling else "")


def _read(path: Path, keys: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[torch.Tensor, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return {name: tuple(map(file.get_tensor, own)) for name, own in keys.items()}
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{path} has changed since the recipe was made: {error!s:.300}") from None


def weights_part(file: Path, keys: Iterable[str], shapes: Shapes, prefix: str = "") -> Part:
    """The part of a file of whole weights, and pooling weights among them.

    Raises:
        ValueError: any other key, a bias without its weight, or other shapes than theirs.
    """
    tensors: dict[str, dict[str, str]] = {}
    pooled = []
    for key in keys:
        match = _WEIGHT.fullmatch(key.removeprefix(prefix))
        if match is not None:
            tensors.setdefault(match[1], {})[match[2]] = key
        elif _POOLING.fullmatch(key.removeprefix(prefix)):
            pooled.append(key)
        else:
            raise ValueError(
                f"{file} has the key {shown(key)}, which is neither of a projection of an attention layer "
                f"(LAYER.to_q.weight, ...) nor of pooling weights (LAYER.{POOLING})"
            )
    layers = {name: _whole(file, name, own, shapes) for name, own in tensors.items()}
    if not layers:
        raise ValueError(f"{file} is empty: it holds no weights of linear layers")
    names = {name: tuple(own[k] for k in ("weight", "bias") if k in own) for name, own in tensors.items()}
    return Part(file, names, layers, pooling_of(file, pooled, shapes, prefix), file if pooled else None)


def _whole(file: Path, name: str, own: Mapping[str, str], shapes: Shapes) -> Whole:
    if "weight" not in own:
        raise ValueError(f"{file} has a bias of {name} and no weight")
    _check_dtypes(file, name, [shapes[key][1] for key in own.values()])
    weight = shapes[own["weight"]][0]
    bias = shapes[own["bias"]][0] if "bias" in own else weight[:1]
    if len(weight) != 2 or 0 in weight or bias != weight[:1]:
        raise ValueError(f"{file}: {name} has the shapes {weight} and {bias}, not those of a linear layer")
    return Whole(weight[1], weight[0], "bias" in own)


def pooling_of(
    file: Path, keys: Iterable[str], shapes: Shapes, prefix: str = ""
) -> dict[str, tuple[str, int]]:
    """Key and side of a patch of pooling weights, by attention module.

    Raises:
        ValueError: another key, or another shape than (1, 1, 1, f, 1, f, 1).
    """
    found = {}
    for key in keys:
        match, (shape, kind) = _POOLING.fullmatch(key.removeprefix(prefix)), shapes[key]
        if match is None:
            raise ValueError(f"{file} has the key {shown(key)}, which is none of pooling weights")
        factor = shape[3] if len(shape) == 7 else 0
        if factor < 2 or shape != [1, 1, 1, factor, 1, factor, 1]:
            raise ValueError(
                f"{file}: pooling weights of {match[1]} have the shape {shape}, not (1, 1, 1, f, 1, f, 1)"
            )
        _check_dtypes(file, match[1], [kind])
        found[match[1]] = (key, factor)
    return found


def _check_dtypes(file: Path, name: str, kinds: list[str]) -> None:
    if not set(kinds) <= DTYPES:
        raise ValueError(f"{file}: {name} is in {' and '.join(kinds)}; save it in 16 or 32 bit floats")
