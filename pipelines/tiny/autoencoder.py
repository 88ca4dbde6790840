"""First stage: the autoencoder learns to reproduce crops of scenes drawn at many sizes."""

from __future__ import annotations

import random

import numpy as np
import torch

from dit_accel.training_loop import Draw, mixed_precision

from .adapters import Adapter
from .scenes import Scene, object_side, render, sample

KL_WEIGHT = 3e-4
CLIPS = (9, 17, 17, 29, 29, 61, 125)  # frames a moving scene takes in all


def _crop(rng: random.Random, scene: Scene, shape: tuple[int, int, int], adapter: Adapter) -> np.ndarray:
    """A crop (frames, height, width, 3) of ``scene``, more often than not across its object's outline."""
    frames, height, width = shape
    canvas = max(rng.choice(adapter.canvases), height)
    total = rng.choice([clip for clip in CLIPS if clip >= frames]) if frames > 1 else 1
    first = rng.randint(0, total - frames)
    centre_x, centre_y = rng.choice(scene.objects).centre()
    shift_x, shift_y = scene.shift((first + frames / 2) / total)
    reach = 0.6 * object_side(canvas, canvas) / canvas
    if rng.random() < adapter.anywhere:
        centre_x, centre_y = rng.random(), rng.random()
    else:
        centre_x += shift_x + rng.uniform(-reach, reach)
        centre_y += shift_y + rng.uniform(-reach, reach)
    top = min(max(round(centre_y * canvas - height / 2), 0), canvas - height)
    left = min(max(round(centre_x * canvas - width / 2), 0), canvas - width)
    window = (slice(first, first + frames), slice(top, top + height), slice(left, left + width))
    return render(scene, canvas, canvas, total, window)


def pixels(images: list[np.ndarray]) -> torch.Tensor:
    """Videos (F, H, W, 3) in [0, 1] as one batch (B, 3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 4, 1, 2, 3).contiguous() * 2 - 1


def _error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute plus mean squared error."""
    error = output.float() - target
    return error.abs().mean() + error.square().mean()


def _crops(
    adapter: Adapter, draw: Draw, shape: tuple[int, int, int], batch: int, device: torch.device
) -> torch.Tensor:
    """Crops (B, 3, F, H, W) in [-1, 1] of random training scenes."""
    scenes = [sample(draw.rng, video=shape[0] > 1) for _ in range(batch)]
    return pixels([_crop(draw.rng, scene, shape, adapter) for scene in scenes]).to(device)


def loss(adapter: Adapter, draw: Draw, progress: float, batch: int, device: torch.device) -> torch.Tensor:
    """Error of the reconstruction, plus a small share of the latents' divergence from N(0, 1)."""
    if progress < adapter.still:
        target = _crops(adapter, draw, (1, *adapter.crop[1:]), 2 * batch, device)
    else:
        target = _crops(adapter, draw, adapter.crop, batch, device)
    with mixed_precision(device):
        posterior = adapter.posterior(target)
        mean, std = posterior.mean.float(), posterior.std.float()
        output = adapter.decode(mean + std * draw.normal(mean.shape).to(device))
    divergence = (mean.square() + std.square() - 2 * std.log() - 1).mean() / 2
    return _error(output, target) + KL_WEIGHT * divergence


def decoder_loss(adapter: Adapter, draw: Draw, clips: dict[int, int], device: torch.device) -> torch.Tensor:
    """Error of decoding fixed latents of whole clips; ``clips`` maps numbers of frames to batch sizes.

    A causal decoder carries features from clip to clip: one that saw three latent frames at most fades on the
    fourth.
    """
    frames = draw.rng.choice(tuple(clips))
    target = _crops(adapter, draw, (frames, *adapter.crop[1:]), clips[frames], device)
    with mixed_precision(device):
        with torch.no_grad():
            posterior = adapter.posterior(target)
        return _error(adapter.decode(posterior.mean), target)
