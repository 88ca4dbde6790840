"""Last stage: transformer and text encoders learn rectified flow on latents of scenes at mixed sizes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.patterns import Pattern
from dit_accel.recipe import Recipe
from dit_accel.switch import accelerated

from .adapters import Adapter
from .autoencoder import pixels
from .captions import caption
from .loop import Draw
from .models import Size
from .scenes import Scene, render, sample

OBJECT_WEIGHT = 5.0  # of the small share of latents that most of a caption is about; backgrounds have 1
PLACE_WEIGHT = 0.3
EMPTY_PROMPT = 0.1  # share of captions dropped, for classifier-free guidance
LONG_PROMPT = 0.02  # share of steps with prompts padded to 512 tokens, the pipelines' default
LONG_LENGTH = 512
SHORT_SEQUENCE = 200  # below this many tokens plain matrix products beat the fused attention kernel on CPUs


@dataclass(frozen=True)
class Diet:
    """From which ``start`` on (a fraction of the stage) and how often a ``size`` is trained on."""

    size: Size
    batch: int
    pool: int  # scenes drawn at this size
    weights: tuple[tuple[float, float], ...]  # (start, weight) in ascending order; 0 before the first
    attention: Pattern | None = None  # to train under, instead of dense attention

    def weight(self, progress: float) -> float:
        return next((weight for start, weight in reversed(self.weights) if progress >= start), 0.0)


class Pool:
    """Scenes of one size with their latents, encoded once and kept on disk in ``folder``."""

    def __init__(
        self, adapter: Adapter, size: Size, count: int, folder: Path, seed: int, device: torch.device
    ):
        frames, height, width = size
        rng = Draw(seed, "pool", size).rng
        self.scenes: list[Scene] = [sample(rng, video=frames > 1) for _ in range(count)]
        self.weights = torch.cat([_weights(render(scene, height, width, frames)) for scene in self.scenes])
        path = folder / f"pool-{frames}x{height}x{width}-{count}-{seed}.pt"
        if path.exists():
            self.latents = torch.load(path, weights_only=True)
            return
        batch = max(1, min(32, 32 * 17 * 64 * 64 // (frames * height * width)))
        parts = []
        for start in range(0, count, batch):
            drawn = [render(scene, height, width, frames) for scene in self.scenes[start : start + batch]]
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                mean = adapter.posterior(pixels(drawn).to(device)).mean.float()
            parts.append(adapter.normalise(mean).cpu())
        self.latents = torch.cat(parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.latents, path)


def _weights(video: np.ndarray) -> torch.Tensor:
    """Loss weights (1, 1, F, H, W) of latents: ``OBJECT_WEIGHT`` at and next to the object, else 1."""
    coloured = torch.from_numpy(video.max(-1) - video.min(-1) > 0.1).float()
    first, rest = coloured[:1], coloured[1:]
    groups = torch.cat([first, rest.unflatten(0, (-1, 4)).amax(1)]) if len(rest) else first
    near = F.max_pool2d(F.max_pool2d(groups, 4), 3, 1, padding=1)
    return (1 + (OBJECT_WEIGHT - 1) * near)[None, None]


class Whereabouts(nn.Module):
    """Auxiliary loss: how well a linear read-out of early visual tokens tells their place on the canvas.

    Rotary embeddings are relative, so absolute position has to be worked out from the canvas's borders. The
    denoising loss rewards that late and only where an object is; this one does at once, everywhere and at
    every size. The read-out is not part of the model.
    """

    def __init__(self, adapter: Adapter):
        super().__init__()
        self.read = nn.Linear(adapter.width, 3)
        nn.init.zeros_(self.read.weight)  # drawn values would come from PyTorch's own generator
        nn.init.zeros_(self.read.bias)
        self.tokens: torch.Tensor | None = None
        adapter.landmark.register_forward_hook(
            lambda module, arguments, output: setattr(self, "tokens", adapter.visual(output))
        )

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Mean squared error for the last forward pass, which was on ``latents`` (B, C, F, H, W)."""
        frames, height, width = latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2
        axes = [(torch.arange(size) + 0.5) * 2 / size - 1 for size in (frames, height, width)]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2).to(latents.device)
        return (self.read(self.tokens.float()) - places).square().mean()


class Flow:
    """The stage's loss; callable as ``Loop.run`` wants it."""

    def __init__(
        self,
        adapter: Adapter,
        diets: tuple[Diet, ...],
        folder: Path,
        seed: int,
        device: torch.device,
        whereabouts: Whereabouts,
    ):
        self.adapter, self.diets, self.folder = adapter, diets, folder
        self.seed, self.device, self.whereabouts = seed, device, whereabouts
        self.pools: dict[Size, Pool] = {}

    def _pool(self, diet: Diet) -> Pool:
        if diet.size not in self.pools:
            arguments = (diet.size, diet.pool, self.folder, self.seed, self.device)
            self.pools[diet.size] = Pool(self.adapter, *arguments)
        return self.pools[diet.size]

    def __call__(self, draw: Draw, progress: float) -> torch.Tensor:
        """Weighted mean squared error of the velocity on one batch of one size."""
        rng = draw.rng
        diet = rng.choices(self.diets, [diet.weight(progress) for diet in self.diets])[0]
        pool = self._pool(diet)
        long = rng.random() < LONG_PROMPT
        batch = max(1, diet.batch // 4) if long else diet.batch
        chosen = [rng.randrange(len(pool.scenes)) for _ in range(batch)]
        captions = [
            "" if rng.random() < EMPTY_PROMPT else caption(pool.scenes[index], rng) for index in chosen
        ]
        latents = pool.latents[chosen].to(self.device)
        noise = draw.normal(latents.shape).to(self.device)

        shift = self.adapter.shift(latents)
        uniform = (torch.arange(batch) + draw.uniform((batch,))) / batch  # stratified
        sigma = (shift * uniform / (1 + (shift - 1) * uniform)).to(self.device)
        level = sigma.view(-1, 1, 1, 1, 1)
        tokens = latents[0, 0].numel() // 4
        with torch.autocast(self.device.type, torch.bfloat16):
            text = self.adapter.encode_text(captions, LONG_LENGTH if long else self.adapter.text_length)
            with self._attention(diet, tokens):
                output = self.adapter.velocity((1 - level) * latents + level * noise, sigma, text)
        weights = pool.weights[chosen].to(self.device)
        error = (output.float() - (noise - latents)).square()
        return (weights * error).mean() / weights.mean() + PLACE_WEIGHT * self.whereabouts(latents)

    def _attention(self, diet: Diet, tokens: int) -> contextlib.AbstractContextManager[object]:
        """Context for a forward pass: the diet's sparse attention, or the fastest dense one."""
        if diet.attention is not None:
            # in the model's own order: `whereabouts` reads tokens inside the transformer
            return accelerated(self.adapter.pipe, Recipe(diet.attention, order="raster"))
        return sdpa_kernel(SDPBackend.MATH) if tokens < SHORT_SEQUENCE else contextlib.nullcontext()


@torch.no_grad()
def set_statistics(adapter: Adapter, size: Size, seed: int, device: torch.device) -> None:
    """Measures the latents' mean and deviation over scenes of ``size`` for the adapter to normalise with."""
    frames, height, width = size
    rng = Draw(seed, "statistics").rng
    drawn = [render(sample(rng, video=frames > 1), height, width, frames) for _ in range(64)]
    latents = torch.cat([adapter.posterior(pixels([one]).to(device)).mean for one in drawn])
    axes = [axis for axis in range(latents.ndim) if axis != 1]
    adapter.set_statistics(latents.mean(axes), latents.std(axes))
