"""Models without weights: a configuration, its token grid at a size in pixels, the FLOPs of one call."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .layout import TokenLayout
from .pipelines import families
from .pipelines.attention import Family

Size = tuple[int, int, int]  # frames, height, width in pixels
Fill = Callable[..., torch.Tensor]  # a tensor of this shape


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
class Blueprint:
    """A model as its configuration describes it.

    Attributes:
        name, family: what it is called, and its family.
        config: arguments of the transformer's class.
        vae: frames and pixels (along a side) per latent.
        text_len: text tokens of a prompt, padding included.
        size: what is planned where no size is given: frames, height, width in pixels.
        steps: sampler steps of a run where none are given.
        transformers: 2 where a run changes from one to another (Wan 2.2 14B).
        expand_timesteps: a timestep per token (Wan 2.2 5B).
    """

    name: str
    family: str
    config: dict[str, Any] = field(hash=False)
    vae: tuple[int, int]
    text_len: int
    size: Size
    steps: int
    transformers: int = 1
    expand_timesteps: bool = False

    @property
    def description(self) -> Family:
        return next(family for family in families() if family.name == self.family)

    @property
    def video(self) -> bool:
        return self.family in ("hunyuan-video", "wan")

    def transformer(self) -> nn.Module:
        """The real class with this configuration, on the meta device: no memory, no values."""
        import diffusers

        with torch.device("meta"):
            return getattr(diffusers, self.description.transformer)(**self.config).eval()

    def patch(self, transformer: nn.Module) -> tuple[int, int, int]:
        """Latents per token along frames, rows and columns."""
        config = transformer.config
        if self.family == "flux":
            return 1, 2, 2  # packed by the pipeline
        if self.family == "wan":
            return tuple(config.patch_size)
        return getattr(config, "patch_size_t", 1), config.patch_size, config.patch_size

    def grid(self, transformer: nn.Module, size: Size) -> Size:
        """The token grid (F, H, W) of a size (frames, height, width) in pixels.

        Raises:
            ValueError: a size that the pipeline would round, or frames of an image model.
        """
        frames, height, width = size
        temporal, spatial = self.vae
        patch = self.patch(transformer)
        if not self.video and frames != 1:
            raise ValueError(f"`frames` is for video models, and {self.name} makes images; leave it out")
        if self.video and (frames - 1) % temporal:
            lower = (frames - 1) // temporal * temporal + 1
            raise ValueError(
                f"`frames` must be a multiple of {temporal} plus 1 for {self.name}, got {frames}; "
                f"try {lower} or {lower + temporal}"
            )
        for name, value, step in zip(("height", "width"), (height, width), patch[1:], strict=True):
            if value % (spatial * step):
                lower = value // (spatial * step) * spatial * step
                tries = " or ".join(str(n) for n in (lower, lower + spatial * step) if n)
                raise ValueError(
                    f"`size`: {name} must be a multiple of {spatial * step} for {self.name}, got {value}; "
                    f"try {tries}"
                )
        return (
            ((frames - 1) // temporal + 1) // patch[0],
            height // (spatial * patch[1]),
            width // (spatial * patch[2]),
        )

    def layout(self, grid: Size) -> TokenLayout:
        """The geometry of its attention layers; text is no part of Wan's."""
        text = 0 if self.family == "wan" else self.text_len
        return TokenLayout(grid, text_len=text, text_first=self.family == "flux")

    def inputs(self, transformer: nn.Module, grid: Size, fill: Fill) -> dict[str, torch.Tensor]:
        """Inputs of the transformer's forward for one sample."""
        config, text = transformer.config, self.text_len
        patch = self.patch(transformer)
        latents = [n * p for n, p in zip(grid, patch, strict=True)]
        timestep = fill(1).fill_(500)
        if self.family == "flux":
            place = (torch.arange(n, dtype=timestep.dtype, device=timestep.device) for n in grid)
            inputs = {
                "hidden_states": fill(1, grid[1] * grid[2], config.in_channels),
                "encoder_hidden_states": fill(1, text, config.joint_attention_dim),
                "pooled_projections": fill(1, config.pooled_projection_dim),
                "timestep": timestep / 1000,
                "img_ids": torch.cartesian_prod(*place),
                "txt_ids": fill(text, 3).zero_(),
            }
        elif self.family == "sd3":
            inputs = {
                "hidden_states": fill(1, config.in_channels, *latents[1:]),
                "encoder_hidden_states": fill(1, text, config.joint_attention_dim),
                "pooled_projections": fill(1, config.pooled_projection_dim),
                "timestep": timestep,
            }
        elif self.family == "hunyuan-video":
            inputs = {
                "hidden_states": fill(1, config.in_channels, *latents),
                "encoder_hidden_states": fill(1, text, config.text_embed_dim),
                "encoder_attention_mask": fill(1, text).fill_(1).long(),
                "pooled_projections": fill(1, config.pooled_projection_dim),
                "timestep": timestep,
            }
        else:
            tokens = grid[0] * grid[1] * grid[2]
            inputs = {
                "hidden_states": fill(1, config.in_channels, *latents),
                "encoder_hidden_states": fill(1, text, config.text_dim),
                "timestep": timestep.expand(1, tokens) if self.expand_timesteps else timestep,
            }
        if getattr(config, "guidance_embeds", False):
            inputs["guidance"] = timestep * 2
        return inputs

    def flops(self, transformer: nn.Module, grid: Size) -> Flops:
        """Counts what the real forward computes, on the meta device.

        Raises:
            ValueError: a size that the transformer refuses (SD3 beyond its table of positions).
        """
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter, torch.no_grad():
            transformer(**self.inputs(transformer, grid, lambda *shape: torch.empty(shape, device="meta")))
        counts = counter.get_flop_counts()
        names = {module: name for name, module in transformer.named_modules()}
        layers = {
            layer: _pairs(counts[f"{type(transformer).__name__}.{names[module]}"])
            for layer, module in self.description.layers(transformer).items()
        }
        other = _pairs(counts["Global"]) - sum(layers.values())
        return Flops(counter.get_total_flops(), layers, other)


def _pairs(counts: dict[Any, int]) -> int:
    """FLOPs of products of two activations; those with weights are `addmm`, `mm` and `convolution`."""
    return sum(n for op, n in counts.items() if "bmm" in str(op) or "scaled_dot_product" in str(op))


# -- published models ----------------------------------------------------------------------------------------

_SD3 = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64,
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
}  # fmt: skip
_SD3_MEDIUM = {**_SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
_WAN = {
    "patch_size": (1, 2, 2), "attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256,
    "in_channels": 16, "out_channels": 16,
}  # fmt: skip
_WAN_14B = {**_WAN, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
_FLUX = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24,
    "attention_head_dim": 128, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
}  # fmt: skip
_HUNYUAN = {
    "in_channels": 16, "out_channels": 16, "num_layers": 20, "num_single_layers": 40, "num_refiner_layers": 2,
    "num_attention_heads": 24, "attention_head_dim": 128, "mlp_ratio": 4.0, "text_embed_dim": 4096,
    "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip
_IMAGE, _VIDEO, _720P = (1, 8), (4, 8), (81, 720, 1280)
_SQUARE = (1, 1024, 1024)
_DUAL = {"qk_norm": "rms_norm", "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))}
_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}

PUBLISHED = (  # the first of a family is its reference
    Blueprint("flux.1-dev", "flux", {**_FLUX, "guidance_embeds": True}, _IMAGE, 512, _SQUARE, 28),
    Blueprint("flux.1-schnell", "flux", {**_FLUX, "guidance_embeds": False}, _IMAGE, 256, _SQUARE, 4),
    Blueprint("sd3-medium", "sd3", {**_SD3_MEDIUM, "pos_embed_max_size": 192}, _IMAGE, 333, _SQUARE, 28),
    Blueprint("sd3.5-medium", "sd3", {**_SD3_MEDIUM, **_DUAL}, _IMAGE, 333, _SQUARE, 40),
    Blueprint(
        "sd3.5-large", "sd3", {**_SD3, **_LARGE, "qk_norm": "rms_norm", "pos_embed_max_size": 192},
        _IMAGE, 333, _SQUARE, 28,
    ),
    Blueprint("hunyuan-video", "hunyuan-video", _HUNYUAN, _VIDEO, 256, (129, 720, 1280), 50),
    Blueprint("wan2.1-14b", "wan", _WAN_14B, _VIDEO, 512, _720P, 50),
    Blueprint(
        "wan2.1-1.3b", "wan", {**_WAN, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        _VIDEO, 512, (81, 480, 832), 50,
    ),
    Blueprint("wan2.2-14b", "wan", _WAN_14B, _VIDEO, 512, _720P, 40, transformers=2),
    Blueprint(
        "wan2.2-5b", "wan",
        {**_WAN, "num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48,
         "out_channels": 48},
        (4, 16), 512, (121, 704, 1280), 50, expand_timesteps=True,
    ),
)  # fmt: skip


def published(family: str, variant: str | None = None) -> Blueprint:
    """A published model of a family, its reference unless a variant is named.

    Raises:
        ValueError: an unknown family or variant.
    """
    names = list(dict.fromkeys(blueprint.family for blueprint in PUBLISHED))
    if family not in names:
        raise ValueError(f"no family is called {family!r}; the families are {', '.join(names)}")
    variants = {blueprint.name: blueprint for blueprint in PUBLISHED if blueprint.family == family}
    if variant is not None and variant not in variants:
        raise ValueError(f"{family} has no variant {variant!r}; its variants are {', '.join(variants)}")
    return variants[variant or next(iter(variants))]


# -- pipeline folders ----------------------------------------------------------------------------------------


def of_model(name: str) -> Blueprint:
    """A bundled model or a local pipeline folder, from its configuration files alone.

    Raises:
        ValueError: neither of the two, or a transformer of no supported family.
    """
    from .pipelines import tiny

    if name not in tiny.NAMES:
        return _of_folder(Path(name).expanduser(), name)
    info = tiny.INFO[name]
    return _of_folder(tiny.weights_dir(name), name, info.max_sequence_length, info.demo, info.steps)


def _of_folder(
    folder: Path, name: str, text_len: int | None = None, size: Size | None = None, steps: int | None = None
) -> Blueprint:
    if not (folder / "model_index.json").is_file():
        references = ", ".join(blueprint.name for blueprint in PUBLISHED)
        raise ValueError(
            f"{name!r} is neither a bundled model nor a pipeline folder (one with a model_index.json); for a "
            f"published model give its family and, if need be, its variant ({references})"
        )
    index, transformer, vae = (
        json.loads((folder / file).read_text())
        for file in ("model_index.json", "transformer/config.json", "vae/config.json")
    )
    known = {family.transformer: family.name for family in families()}
    if transformer["_class_name"] not in known:
        raise ValueError(
            f"{folder / 'transformer'} is a {transformer['_class_name']}, which plans do not know; they know "
            f"{', '.join(known)}"
        )
    reference = published(known[transformer["_class_name"]])
    longest = text_len or {"sd3": 256}.get(reference.family, reference.text_len)
    second = (index.get("transformer_2") or [None])[0] is not None
    return Blueprint(
        name=name,
        family=reference.family,
        config={key: value for key, value in transformer.items() if not key.startswith("_")},
        vae=_vae_factors(vae, reference.video),
        text_len=longest + (_clip_length(folder) if reference.family == "sd3" else 0),
        size=size or reference.size,
        steps=steps or reference.steps,
        transformers=2 if second else 1,
        expand_timesteps=bool(index.get("expand_timesteps")),
    )


def _vae_factors(config: dict[str, Any], video: bool) -> tuple[int, int]:
    """Frames and pixels per latent, as the families' pipelines read them."""
    if not video:
        return 1, 2 ** (len(config["block_out_channels"]) - 1)
    temporal = config.get("scale_factor_temporal") or config.get("temporal_compression_ratio") or 4
    return temporal, config.get("scale_factor_spatial") or config.get("spatial_compression_ratio") or 8


def _clip_length(folder: Path) -> int:
    """Tokens of a CLIP prompt, which stand before T5's in SD3."""
    path = folder / "tokenizer" / "tokenizer_config.json"
    return json.loads(path.read_text()).get("model_max_length", 77) if path.is_file() else 77
