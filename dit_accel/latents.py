"""Latents of pictures and videos: encoding, resizing, packing into tokens, low frequencies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

TILED_FROM = 1.5e6  # pixels of a frame above which an autoencoder works in tiles


def resized(frames: torch.Tensor, height: int, width: int, mode: str = "bilinear") -> torch.Tensor:
    """Frames (B, F, 3, H, W) at another size, each by itself; half-pixel centres, no antialiasing."""
    flat = F.interpolate(frames.flatten(0, 1).float(), (height, width), mode=mode, align_corners=False)
    return flat.clamp(0, 1).unflatten(0, frames.shape[:2])


def sharpened(frames: torch.Tensor) -> torch.Tensor:
    """2 I - blur(I) of frames (B, F, 3, H, W), by a Gaussian of 3 x 3 pixels and sigma 1."""
    weights = torch.tensor([-1.0, 0.0, 1.0], dtype=frames.dtype, device=frames.device)
    weights = torch.softmax(-(weights**2) / 2, 0)
    kernel = (weights[:, None] * weights).expand(3, 1, 3, 3)
    flat = F.pad(frames.flatten(0, 1), (1, 1, 1, 1), mode="replicate")
    blurred = F.conv2d(flat, kernel, groups=3).unflatten(0, frames.shape[:2])
    return (2 * frames - blurred).clamp(0, 1)


def encoded(pipe: Any, frames: torch.Tensor, video: bool) -> torch.Tensor:
    """The latents that a pipeline denoises, fp32 (B, C, [F,] H, W), of frames (B, F, 3, H, W) in [0, 1].

    The mode of the autoencoder's distribution, one sample after the other.
    """
    vae, found = pipe.vae, []
    for sample in frames:
        pixels = sample.transpose(0, 1)[None] if video else sample
        pixels = (pixels * 2 - 1).to(pipe._execution_device, vae.dtype)
        with torch.no_grad():
            found.append(_normalised(vae, vae.encode(pixels).latent_dist.mode().float()))
    return torch.cat(found)


def _normalised(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    config = vae.config
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        shape = (1, -1, *[1] * (latents.ndim - 2))
        options = {"dtype": latents.dtype, "device": latents.device}
        mean, std = (
            torch.tensor(x, **options).view(shape) for x in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) / std
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


@contextmanager
def tiled(pipe: Any, height: int, width: int) -> Iterator[None]:
    """The autoencoder works in tiles, for the length of a `with` block, where a frame is large."""
    vae = pipe.vae
    before = getattr(vae, "use_tiling", None)
    if before is None or before or height * width < TILED_FROM:
        yield
        return
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()


def packing(pipe: Any, height: int, width: int) -> Callable[[torch.Tensor], tuple[torch.Tensor, Callable]]:
    """A function from what a pipeline's scheduler sees to latents, and to the function back.

    FLUX's pipelines pack 2 x 2 latents into a token (B, S, 4 C); others see latents.
    """
    if not hasattr(pipe, "_pack_latents"):
        return lambda x: (x, lambda y: y)
    rows, columns = (side // pipe.vae_scale_factor // 2 for side in (height, width))

    def unpacked(x: torch.Tensor) -> tuple[torch.Tensor, Callable]:
        latents = x.unflatten(1, (rows, columns)).unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
        return latents.flatten(4, 5).flatten(2, 3), packed

    return unpacked


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, H, W) as FLUX's tokens (B, H W / 4, 4 C)."""
    patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
    return patches.flatten(3, 5).flatten(1, 2)
