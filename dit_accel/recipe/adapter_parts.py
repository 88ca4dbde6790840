"""What an adapter holds for one transformer: LoRA or whole weights of linear layers, and learned weights.

Learned weights are those that a layer's pattern has beside the projections (`Pattern.learned`). Whole weights
and pooling weights have the names of the published CLEAR checkpoints (`clear_local_16_down_4.safetensors`):
`LAYER.to_q.weight`, `LAYER.to_q.bias`, ..., and `LAYER.processor.spatial_weight` of shape (1, 1, 1, f, 1, f,
1): the weight of a token by its row and column in a patch of f x f. Other learned weights have such names
too, `LAYER.processor.NAME`, and their own shapes; SLA's projections also those of the TurboWan checkpoints,
`blocks.0.self_attn.attn_op.local_attn.proj_l.weight`, and VSA's gates those of FastWan's,
`blocks.0.to_gate_compress.weight`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dit_accel.arguments import shown
from dit_accel.attention.pooled import POOLING
from dit_accel.files import digest

DTYPES = {"F16", "BF16", "F32"}
NOUNS = {
    POOLING: "pooling weights",
    "proj_l": "projections of linear attention",
    "to_gate_compress": "gates of the coarse branch",
    "taps_in": "local kernels",
    "taps_out": "local kernels",
}  # of learned weights, by the first part of their names
_WEIGHT = re.compile(r"([\w.]+\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out))\.(weight|bias)")
_LEARNED = re.compile(rf"([\w.]+)\.processor\.((?:{'|'.join(NOUNS)})(?:\.\w+)?)")

_TURBO_WAN = re.compile(r"(blocks\.\d+)\.self_attn\.attn_op\.local_attn\.(proj_l\.(?:weight|bias))")
_FAST_WAN = re.compile(r"(blocks\.\d+)\.(to_gate_compress\.(?:weight|bias))")

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
class Learned:
    """One tensor of what a layer's pattern has learned: its key, its shape in calls, and its file."""

    key: str
    shape: tuple[int, ...]
    file: Path | None = None


@dataclass(frozen=True)
class Part:
    """What an adapter holds for one transformer.

    Attributes:
        file: safetensors.
        keys: in the file, by the name of the linear layer in the transformer: of A and B, or of whole weights
            and, where there is one, the bias.
        layers: what the file announces, by the same names; all of one kind.
        learned: by the name of the attention module, what its pattern has learned, by name.
        others: names of the model's own weights in the same files, which are not read.
    """

    file: Path
    keys: Mapping[str, tuple[str, ...]]
    layers: Mapping[str, LowRank | Whole]
    learned: Mapping[str, Mapping[str, Learned]] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it has whole weights."""
        return any(isinstance(own, Whole) for own in self.layers.values())

    @property
    def files(self) -> list[Path]:
        """All that it is read from."""
        learned = (one.file for own in self.learned.values() for one in own.values())
        own = [self.file] if self.keys or not self.learned else []
        return list(dict.fromkeys(filter(None, [*own, *learned])))

    def digest(self) -> str:
        """Of its contents: of its files, or of the learned weights alone where others are in them."""
        if not self.others:
            return "".join(map(digest, self.files))
        found = hashlib.sha256()
        for module, own in sorted(self.learned_weights().items()):
            for name, x in sorted(own.items()):
                found.update(f"{module} {name} {x.dtype}".encode())
                found.update(x.contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def tensors(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """By layer, on the CPU: A (rank, in) and B (out, rank), or weight (out, in) and bias (out,).

        Raises:
            ValueError: a file that changed since the recipe was made, or numbers that are not finite.
        """
        found = _read(self.file, self.keys) if self.keys else {}
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

    def learned_weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """By attention module and name, as calls take them (`AttentionCall.learned`), on the CPU.

        In the dtype of the file.

        Raises:
            ValueError: as `tensors`.
        """
        found: dict[str, dict[str, torch.Tensor]] = {}
        by_file: dict[Path, dict[tuple[str, str], Learned]] = {}
        for module, own in self.learned.items():
            for name, one in own.items():
                if one.file is not None:
                    by_file.setdefault(one.file, {})[module, name] = one
        for file, learned in by_file.items():
            tensors = _read(file, {str(place): (one.key,) for place, one in learned.items()}).values()
            for ((module, name), one), (x,) in zip(learned.items(), tensors, strict=True):
                if x.numel() != math.prod(one.shape):
                    raise ValueError(f"{file} has changed since the recipe was made: {module}")
                if not x.isfinite().all():
                    raise ValueError(f"{file} is damaged: {noun(name)} of {module} are not finite")
                found.setdefault(module, {})[name] = x.view(one.shape)
        return found

    def describe(self) -> str:
        """In a few words: `"LoRA of rank 8 in 57 linear layers"`."""
        said = []
        ranks = [own.rank for own in self.layers.values() if isinstance(own, LowRank)]
        if ranks:
            rank = str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
            said.append(f"LoRA of rank {rank} in {len(self.layers)} linear layers")
        elif self.layers:
            said.append(f"whole weights of {len(self.layers)} linear layers")
        kinds = [kind for own in self.learned.values() for kind in dict.fromkeys(map(noun, own))]
        said += [f"{kind} of {kinds.count(kind)} layers" for kind in dict.fromkeys(kinds)]
        return ", ".join(said)


def noun(name: str) -> str:
    """What learned weights of a name are."""
    return NOUNS[name.partition(".")[0]]


def _read(path: Path, keys: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[torch.Tensor, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return {name: tuple(map(file.get_tensor, own)) for name, own in keys.items()}
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{path} has changed since the recipe was made: {error!s:.300}") from None


def weights_part(file: Path, keys: Iterable[str], shapes: Shapes, prefix: str = "") -> Part:
    """The part of a file of whole weights, and learned weights among them.

    Raises:
        ValueError: any other key, a bias without its weight, or other shapes than theirs.
    """
    tensors: dict[str, dict[str, str]] = {}
    learned = []
    for key in keys:
        match = _WEIGHT.fullmatch(key.removeprefix(prefix))
        if match is not None:
            tensors.setdefault(match[1], {})[match[2]] = key
        elif _learned_name(key.removeprefix(prefix)):
            learned.append(key)
        else:
            raise ValueError(
                f"{file} has the key {shown(key)}, which is neither of a projection of an attention layer "
                f"(LAYER.to_q.weight, ...) nor of what patterns learn (LAYER.processor.{POOLING}, ...)"
            )
    layers = {name: _whole(file, name, own, shapes) for name, own in tensors.items()}
    if not layers and not learned:
        raise ValueError(f"{file} is empty: it holds no weights of linear layers")
    names = {name: tuple(own[k] for k in ("weight", "bias") if k in own) for name, own in tensors.items()}
    return Part(file, names, layers, learned_of(file, learned, shapes, prefix))


def _whole(file: Path, name: str, own: Mapping[str, str], shapes: Shapes) -> Whole:
    if "weight" not in own:
        raise ValueError(f"{file} has a bias of {name} and no weight")
    _check_dtypes(file, name, [shapes[key][1] for key in own.values()])
    weight = shapes[own["weight"]][0]
    bias = shapes[own["bias"]][0] if "bias" in own else weight[:1]
    if len(weight) != 2 or 0 in weight or bias != weight[:1]:
        raise ValueError(f"{file}: {name} has the shapes {weight} and {bias}, not those of a linear layer")
    return Whole(weight[1], weight[0], "bias" in own)


def learned_of(
    file: Path, keys: Iterable[str], shapes: Shapes, prefix: str = ""
) -> dict[str, dict[str, Learned]]:
    """Learned weights by attention module and name.

    Raises:
        ValueError: another key, or pooling weights of another shape than (1, 1, 1, f, 1, f, 1).
    """
    found: dict[str, dict[str, Learned]] = {}
    for key in keys:
        place, (shape, kind) = _learned_name(key.removeprefix(prefix)), shapes[key]
        if place is None:
            raise ValueError(f"{file} has the key {shown(key)}, which is none of learned weights")
        module, name = place
        if name == POOLING:
            factor = shape[3] if len(shape) == 7 else 0
            if factor < 2 or shape != [1, 1, 1, factor, 1, factor, 1]:
                raise ValueError(
                    f"{file}: pooling weights of {module} have the shape {shape}, not (1, 1, 1, f, 1, f, 1)"
                )
            shape = [factor, factor]
        _check_dtypes(file, module, [kind])
        found.setdefault(module, {})[name] = Learned(key, tuple(shape), file)
    return found


def _learned_name(key: str) -> tuple[str, str] | None:
    """The attention module and the name of learned weights, by their key; None where it is of no such."""
    if match := _LEARNED.fullmatch(key):
        return match[1], match[2]
    match = _TURBO_WAN.fullmatch(key) or _FAST_WAN.fullmatch(key)
    return None if match is None else (f"{match[1]}.attn1", match[2])


def model_part(folder: Path, files: Mapping[Path, Shapes]) -> Part:
    """The part of a folder of a whole transformer that has learned weights among its own.

    Args:
        folder: of the transformer.
        files: of its weights, with what they hold.

    Raises:
        ValueError: no learned weights in them, or as `learned_of`.
    """
    found: dict[str, dict[str, Learned]] = {}
    others = []
    for file, shapes in files.items():
        learned = [key for key in shapes if _learned_name(key)]
        others += [key for key in shapes if not _learned_name(key)]
        for module, own in learned_of(file, learned, shapes).items():
            found.setdefault(module, {}).update(own)
    if not found:
        raise ValueError(
            f"`adapter` {folder} is a model's folder whose weights have none that a pattern learns (such as "
            "FastWan's `blocks.0.to_gate_compress.weight`); load it as the model, and leave `adapter` out"
        )
    return Part(folder, {}, {}, found, tuple(others))


def in_files(learned: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Learned weights by attention module and name, by the keys and in the shapes of files."""
    return {
        f"{module}.processor.{name}": x[None, None, None, :, None, :, None] if name == POOLING else x
        for module, own in learned.items()
        for name, x in own.items()
    }


def _check_dtypes(file: Path, name: str, kinds: list[str]) -> None:
    if not set(kinds) <= DTYPES:
        raise ValueError(f"{file}: {name} is in {' and '.join(kinds)}; save it in 16 or 32 bit floats")
