"""Models without weights: configurations, published ones by name; token grid at a size; FLOPs of a call."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_accel.bounded_dict import make_room
from dit_accel.errors import UnavailableError
from dit_accel.json_files import read_json
from dit_accel.masks.layout import TokenLayout
from dit_accel.pipelines.families import families, family_named
from dit_accel.pipelines.families.base import Family, Fill

from .meta_values import EveryConditionHolds
from .twins import counting

Size = tuple[int, int, int]  # frames, height, width in pixels


@dataclass(frozen=True)
class Flops:
    """Multiplications and additions of one call of a transformer with a batch of one, as PyTorch counts them.

    Attributes:
        total: of the call, matrix products and convolutions.
        layers: by layer that a recipe can name, those of its scores and weighted sums.
        other_attention: the same of all other attention: cross-attention, text refiners.
    """

    total: int
    layers: dict[str, int]
    other_attention: int

    @property
    def attention(self) -> int:
        return sum(self.layers.values())

    @property
    def rest(self) -> int:
        """All that no recipe changes, other attention included."""
        return self.total - self.attention


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of a model, from which plans and benchmarks build it without its weights.

    Attributes:
        name, family: what it is called, and its family.
        config: arguments of the transformer's class.
        vae: frames and pixels (along a side) per latent.
        text_len: text tokens of a prompt, padding included.
        size: what is planned where no size is given: frames, height, width in pixels.
        steps: sampler steps of a run where none are given.
        transformers: 2 where a run changes from one to another (Wan 2.2 14B).
        timestep_per_token: whether every token has a timestep of its own (Wan 2.2 5B).
        shift: of its noise schedule: a factor, or (tokens, more tokens, the factor's logarithm at both),
            between which the logarithm is linear in tokens; None: not known.
        reference: token grid of the image that calls are given beside the picture; None: they are given none.
    """

    name: str
    family: str
    config: dict[str, Any] = field(hash=False)
    vae: tuple[int, int]
    text_len: int
    size: Size
    steps: int
    transformers: int = 1
    timestep_per_token: bool = False
    shift: float | tuple[int, int, float, float] | None = None
    reference: Size | None = None

    @property
    def description(self) -> Family:
        """What is known of its family."""
        return family_named(self.family)

    @property
    def video(self) -> bool:
        return self.description.video

    def transformer(self) -> nn.Module:
        """The real class with this configuration, on the meta device: no memory, no values.

        Raises:
            UnavailableError: a diffusers version without that class.
        """
        import diffusers

        kind = getattr(diffusers, self.description.transformer, None)
        if kind is None:
            raise UnavailableError(
                f"{self.name} needs diffusers' {self.description.transformer}, which diffusers "
                f"{diffusers.__version__} does not have; update it"
            )
        with torch.device("meta"):
            return kind(**self.config).eval()

    def grid(self, transformer: nn.Module, size: Size) -> Size:
        """The token grid (F, H, W) of a size (frames, height, width) in pixels.

        Raises:
            ValueError: a size that the pipeline would round, or frames of an image model.
        """
        frames, height, width = size
        (temporal, spatial), (beside, latents, each) = self.vae, self.description.whole_latents
        patch = self.description.patch(transformer.config)
        if not self.video and frames != 1:
            raise ValueError(f"`frames` is for video models, and {self.name} makes images; leave it out")
        if self.video and (frames - beside) % temporal:
            lower = (frames - beside) // temporal * temporal + beside
            tries = " or ".join(str(n) for n in (lower, lower + temporal) if n > 0)
            raise ValueError(
                f"`frames` must be a multiple of {temporal} plus {beside} for {self.name}, got {frames}; "
                f"try {tries}"
            )
        for name, value, step in zip(("height", "width"), (height, width), patch[1:], strict=True):
            if value % (spatial * step):
                lower = value // (spatial * step) * spatial * step
                tries = " or ".join(str(n) for n in (lower, lower + spatial * step) if n)
                raise ValueError(
                    f"`size`: {name} must be a multiple of {spatial * step} for {self.name}, got {value}; "
                    f"try {tries}"
                )
        latents += (frames - beside) // temporal * each
        return (
            -(-latents // patch[0]),  # CogVideoX 1.5 fills its last patch up
            height // (spatial * patch[1]),
            width // (spatial * patch[2]),
        )

    def layout(self, grid: Size) -> TokenLayout:
        """The geometry of its attention layers with this token grid."""
        layout = self.description.planned_layout(grid, self.text_len)
        return layout if self.reference is None else replace(layout, anchor=self.reference)

    def noise_levels(self, steps: int, tokens: int) -> list[float]:
        """The noise level of the flow at which each step of a run begins, as Euler's scheduler has them.

        Raises:
            ValueError: a model whose `shift` is not known.
        """
        shift = self.shift
        if shift is None:
            raise ValueError(
                f"the recipe goes by noise level, and the noise schedule of {self.name} is not known; give "
                "its `shift`, 1 for an even one"
            )
        if isinstance(shift, tuple):
            few, many, low, high = shift
            shift = math.exp(low + (high - low) * (tokens - few) / (many - few))
        even = (1 - step / steps for step in range(steps))
        return [round(shift * level / (1 + (shift - 1) * level), 6) for level in even]

    def inputs(self, transformer: nn.Module, grid: Size, fill: Fill) -> dict[str, Any]:
        """Inputs of the transformer's forward for one sample, made by `fill` where any values will do."""
        inputs = self.description.example_inputs(transformer.config, grid, self.text_len, fill)
        if self.reference is not None:
            inputs = self.description.with_reference(inputs, self.reference, fill)
        if self.timestep_per_token:
            inputs["timestep"] = inputs["timestep"].expand(1, math.prod(grid))
        return inputs

    def flops(self, transformer: nn.Module, grid: Size) -> Flops:
        """Counts what the real forward computes, on the meta device, once for each model and size.

        Raises:
            ValueError: a size that the transformer refuses (SD3 beyond its table of positions).
        """
        key = (self, type(transformer), repr(transformer.config), grid)
        if (known := _counted.get(key)) is None:
            known = self.count_flops(transformer, grid)
            make_room(_counted, most=16)
            _counted[key] = known
        return known

    def count_flops(self, transformer: nn.Module, grid: Size) -> Flops:
        """The same, counted now, with whatever acts in the transformer."""
        able = self.description.countable(transformer)
        with counting(transformer) as counter, EveryConditionHolds(), able, torch.no_grad():
            transformer(**self.inputs(transformer, grid, lambda *shape: torch.empty(shape, device="meta")))
        counts = counter.get_flop_counts()
        names = {module: name for name, module in transformer.named_modules()}
        layers = {
            layer: _pairs(counts[f"{type(transformer).__name__}.{names[module]}"])
            for layer, module in self.description.layers(transformer).items()
        }
        other = _pairs(counts["Global"]) - sum(layers.values())
        return Flops(counter.get_total_flops(), layers, other)


_counted: dict[Any, Flops] = {}  # what was counted lately: seconds for a model of many layers


def _pairs(counts: dict[Any, int]) -> int:
    """FLOPs of products of two activations; those with weights are `addmm`, `mm` and `convolution`."""
    return sum(n for op, n in counts.items() if "bmm" in str(op) or "scaled_dot_product" in str(op))


# -- published models ----------------------------------------------------------------------------------------


def published(family: str, variant: str | None = None) -> ModelConfig:
    """A published model of a family, its reference unless a variant is named.

    Raises:
        ValueError: an unknown family or variant, or a family of which no published model is known.
    """
    variants = _published_of(family_named(family))
    if not variants:
        raise ValueError(f"no published model of the family {family!r} is known; give a pipeline folder")
    if variant is not None and variant not in variants:
        raise ValueError(f"{family} has no variant {variant!r}; its variants are {', '.join(variants)}")
    return variants[variant or next(iter(variants))]


def all_published() -> dict[str, ModelConfig]:
    """The published models of all families by name, the first of a family its reference."""
    return {name: config for family in families() for name, config in _published_of(family).items()}


@cache
def _published_of(family: Family) -> dict[str, ModelConfig]:
    models = {}
    for fields in family.published():
        pair = {key: tuple(fields[key]) for key in ("vae", "size", "reference") if key in fields}
        pair |= {"shift": tuple(fields["shift"])} if isinstance(fields.get("shift"), list) else {}
        models[fields["name"]] = ModelConfig(family=family.name, **fields | pair)
    return models


# -- pipeline folders ----------------------------------------------------------------------------------------


def of_model(name: str) -> ModelConfig:
    """A bundled model or a local pipeline folder, from its configuration files alone.

    Raises:
        ValueError: neither of the two, a transformer of no supported family, or one of a family of which no
            published model is known, where its usual size and steps would come from.
    """
    from dit_accel.pipelines import tiny

    if name not in tiny.NAMES:
        return _of_folder(Path(name).expanduser(), name)
    info = tiny.INFO[name]
    return _of_folder(tiny.weights_dir(name), name, info.max_sequence_length, info.demo, info.steps)


def _of_folder(
    folder: Path, name: str, text_len: int | None = None, size: Size | None = None, steps: int | None = None
) -> ModelConfig:
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{name!r} is neither a bundled model nor a pipeline folder (one with a model_index.json); for a "
            f"published model give its family and, if need be, its variant ({', '.join(all_published())})"
        )
    index, transformer, vae = (
        read_json(folder / file)
        for file in ("model_index.json", "transformer/config.json", "vae/config.json")
    )
    known = {family.transformer: family for family in families()}
    if transformer["_class_name"] not in known:
        raise ValueError(
            f"{folder / 'transformer'} is a {transformer['_class_name']}, which plans do not know; they know "
            f"{', '.join(known)}"
        )
    family = known[transformer["_class_name"]]
    reference = published(family.name)
    second = (index.get("transformer_2") or [None])[0] is not None
    return ModelConfig(
        name=name,
        family=family.name,
        config={key: value for key, value in transformer.items() if not key.startswith("_")},
        vae=family.vae_factors(vae),
        text_len=family.prompt_tokens(folder, text_len) or reference.text_len,
        size=size or reference.size,
        steps=steps or reference.steps,
        transformers=2 if second else 1,
        timestep_per_token=bool(index.get("expand_timesteps")),
        shift=_shift(folder / "scheduler" / "scheduler_config.json"),
        reference=family.reference_grid(str(index.get("_class_name"))),
    )


def _shift(path: Path) -> float | tuple[int, int, float, float] | None:
    """`ModelConfig.shift` by the configuration of a scheduler; None where it is no flow's, or not there."""
    config = read_json(path) if path.is_file() else {}
    if config.get("shift_terminal") or config.get("invert_sigmas"):  # LTX stretches levels, Mochi has its own
        return None
    if config.get("use_dynamic_shifting") and config.get("time_shift_type", "exponential") == "exponential":
        lengths = config["base_image_seq_len"], config["max_image_seq_len"]
        return (*lengths, config["base_shift"], config["max_shift"])
    if config.get("use_flow_sigmas"):
        return config["flow_shift"]
    return config.get("shift") if str(config.get("_class_name")).startswith("FlowMatch") else None
