"""What an autoencoder takes to decode and encode: memory and FLOPs of its real forward, without weights."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dit_accel.json_files import read_json

from .live_tensors import FusedAttention, LiveTensors
from .meta_values import EveryConditionHolds
from .model_config import ModelConfig, Size

_PICTURES = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
# those of published models, by family and (frames, pixels) of a latent
_PUBLISHED: dict[tuple[str, tuple[int, int]], tuple[str, dict[str, Any]]] = {
    ("flux", (1, 8)): ("AutoencoderKL", _PICTURES),
    ("sd3", (1, 8)): ("AutoencoderKL", _PICTURES),
    ("wan", (4, 8)): ("AutoencoderKLWan", {}),
    ("skyreels-v2", (4, 8)): ("AutoencoderKLWan", {}),
    ("hunyuan-video", (4, 8)): ("AutoencoderKLHunyuanVideo", {}),
}


class Taken(NamedTuple):
    """Bytes of tensors at the peak, weights not included, and FLOPs."""

    peak: int
    flops: int


def autoencoder(model: ModelConfig, folder: Path | None, dtype: torch.dtype) -> nn.Module | None:
    """A model's autoencoder on the meta device; None where nothing is known of it.

    Args:
        folder: of its pipeline; None: a published model.
    """
    import diffusers

    if folder is not None:
        config = read_json(folder / "vae" / "config.json")
        name = config["_class_name"]
    else:
        name, config = _PUBLISHED.get((model.family, model.vae), ("", {}))
    kind = getattr(diffusers, name, None)
    if kind is None:
        return None
    with torch.device("meta"):
        return nn.Module.to(kind.from_config(config).eval(), dtype)  # not diffusers', which warns


def decoding(vae: nn.Module, model: ModelConfig, size: Size, tiled: bool) -> Taken:
    """Of one sample of a size (frames, height, width) in pixels, in tiles or whole."""
    return _walked(vae, "decode", model, size, tiled)


def encoding(vae: nn.Module, model: ModelConfig, size: Size, tiled: bool) -> Taken:
    """The same of the way back."""
    return _walked(vae, "encode", model, size, tiled)


def _walked(vae: Any, way: str, model: ModelConfig, size: Size, tiled: bool) -> Taken:
    frames, height, width = size
    if not tiled or (tile := _tile(vae, size)) is None:
        return _frames(vae, way, model, size)
    peak, flops = _frames(vae, way, model, (frames, *tile[0]))
    tiles = math.prod(-(-side // step) for side, step in zip((height, width), tile[1], strict=True))
    channels = 3 if way == "decode" else 2 * _channels(vae) / (model.vae[1] ** 2 * model.vae[0])
    made = frames * channels * vae.dtype.itemsize
    # all tiles are kept until the last is done, and put together in rows, then whole
    return Taken(peak + int(made * (tiles * math.prod(tile[0]) + height * width)), flops * tiles)


def _tile(vae: Any, size: Size) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Sides of a tile and steps from one to the next in pixels; None where the size is none."""
    if hasattr(vae, "tile_sample_min_height"):
        sides = int(vae.tile_sample_min_height), int(vae.tile_sample_min_width)
        steps = int(vae.tile_sample_stride_height), int(vae.tile_sample_stride_width)
    else:
        side = int(vae.tile_sample_min_size)
        step = int(side * (1 - vae.tile_overlap_factor))
        sides, steps = (side, side), (step, step)
    return None if size[1] <= sides[0] and size[2] <= sides[1] else (sides, steps)


def latents_of(vae: Any, model: ModelConfig, size: Size) -> tuple[int, ...]:
    """Shape (1, C, [F,] H, W) of the latents of a size."""
    frames, height, width = size
    temporal, spatial = model.vae
    sides = ((frames - 1) // temporal + 1, height // spatial, width // spatial)
    return (1, _channels(vae), *sides[not model.video :])


def _channels(vae: Any) -> int:
    return getattr(vae.config, "z_dim", None) or vae.config.latent_channels


def _frames(vae: Any, way: str, model: ModelConfig, size: Size) -> Taken:
    """Of autoencoders that go frame by frame (Wan's), each from the third on taking as much as that."""
    latents = (size[0] - 1) // model.vae[0] + 1
    if latents <= 3 or not hasattr(vae, "clear_cache"):
        return _whole(vae, way, model, latents, size)
    two, three = (_whole(vae, way, model, n, size) for n in (2, 3))
    return Taken(*(b + (latents - 3) * (b - a) for a, b in zip(two, three, strict=True)))


def _whole(vae: Any, way: str, model: ModelConfig, latents: int, size: Size) -> Taken:
    """Of so many latent frames."""
    from torch.utils.flop_counter import FlopCounterMode

    frames, height, width = (latents - 1) * model.vae[0] + 1, *size[1:]
    shape = (1, 3, *(frames, height, width)[not model.video :])
    if way == "decode":
        shape = latents_of(vae, model, (frames, height, width))
    given = torch.empty(shape, device="meta", dtype=vae.dtype)
    with ExitStack() as stack:
        counter = FlopCounterMode(display=False)
        live = LiveTensors(copies=True)
        for mode in (torch.no_grad(), counter, EveryConditionHolds(), FusedAttention(), live):
            stack.enter_context(mode)
        getattr(vae, way)(given)
    return Taken(live.peak + given.numel() * given.element_size(), counter.get_total_flops())
