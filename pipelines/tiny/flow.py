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

from .adapters import Adapter
from .autoencoder import pixels
from .captions import caption
from .loop import Draw
from .models import Size
from .scenes import Scene, Split, layers, render, sample

PLACE_WEIGHT = 0.3
MEASURED = 64  # scenes that tell the latents' mean and deviation
EMPTY_PROMPT = 0.1  # share of captions dropped, for classifier-free guidance
LONG_PROMPT = 0.02  # share of steps with prompts padded to 512 tokens, the pipelines' default
LONG_LENGTH = 512
SHORT_SEQUENCE = 200  # below this many tokens plain matrix products beat the fused attention kernel on CPUs


@dataclass(frozen=True)
class TrainingSize:
    """From which ``start`` on (a fraction of the stage) and how often a ``size`` is trained on."""

    size: Size
    batch: int
    pool: int  # scenes drawn at this size
    weights: tuple[tuple[float, float], ...]  # (start, weight) in ascending order; 0 before the first

    def weight(self, progress: float) -> float:
        return next((weight for start, weight in reversed(self.weights) if progress >= start), 0.0)


class Pool:
    """Scenes of one size with their latents, encoded once and kept on disk in ``folder``."""

    def __init__(
        self,
        adapter: Adapter,
        size: Size,
        count: int,
        folder: Path,
        seed: int,
        device: torch.device,
        split: Split = "train",
    ):
        frames, height, width = size
        rng = Draw(seed, "pool", size).rng
        self.scenes: list[Scene] = [sample(rng, split, frames > 1) for _ in range(count)]
        path = folder / f"pool-{frames}x{height}x{width}-{count}-{seed}.pt"
        if path.exists():
            self.latents, self.near = torch.load(path, weights_only=True)
            return
        batch = max(1, min(32, 32 * 17 * 64 * 64 // (frames * height * width)))
        parts, near = [], []
        for start in range(0, count, batch):
            drawn, covers = zip(
                *(layers(scene, height, width, frames) for scene in self.scenes[start : start + batch]),
                strict=True,
            )
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                mean = adapter.posterior(pixels(list(drawn)).to(device)).mean.float()
            parts.append(adapter.normalise(mean).cpu())
            near += [_near(cover) for cover in covers]
        self.latents, self.near = torch.cat(parts), torch.cat(near)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save((self.latents, self.near), path)


def _near(cover: np.ndarray) -> torch.Tensor:
    """Which latents (1, 1, F, H, W) are at or next to an object: 1, elsewhere 0."""
    covered = torch.from_numpy(cover > 0.05).float()
    first, rest = covered[:1], covered[1:]
    groups = torch.cat([first, rest.unflatten(0, (-1, 4)).amax(1)]) if len(rest) else first
    return F.max_pool2d(F.max_pool2d(groups, 4), 3, 1, padding=1)[None, None]


def balanced(error: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Mean of errors (B, C, F, H, W) in which the objects, which captions are about, weigh half.

    Objects take a quarter of a small canvas and a tenth of a large one; ``near`` (B, 1, F, H, W) is 1 there.
    """
    share = near.mean((1, 2, 3, 4), keepdim=True).clamp(0.02, 0.98)
    return (error * (near / share + (1 - near) / (1 - share))).mean() / 2


class PositionProbe(nn.Module):
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
        sizes: tuple[TrainingSize, ...],
        folder: Path,
        seed: int,
        device: torch.device,
        position_probe: PositionProbe,
    ):
        self.adapter, self.sizes, self.folder = adapter, sizes, folder
        self.seed, self.device, self.position_probe = seed, device, position_probe
        self.pools: dict[Size, Pool] = {}

    def _pool(self, entry: TrainingSize) -> Pool:
        if entry.size not in self.pools:
            arguments = (entry.size, entry.pool, self.folder, self.seed, self.device)
            self.pools[entry.size] = Pool(self.adapter, *arguments)
        return self.pools[entry.size]

    def __call__(self, draw: Draw, progress: float) -> torch.Tensor:
        """Mean squared error of the velocity, `balanced`, on one batch of one size."""
        rng = draw.rng
        entry = rng.choices(self.sizes, [entry.weight(progress) for entry in self.sizes])[0]
        pool = self._pool(entry)
        long = rng.random() < LONG_PROMPT
        batch = max(1, entry.batch // 4) if long else entry.batch
        chosen = [rng.randrange(len(pool.scenes)) for _ in range(batch)]
        captions = [
            "" if rng.random() < EMPTY_PROMPT else caption(pool.scenes[index], rng) for index in chosen
        ]
        latents = pool.latents[chosen].to(self.device)
        error = self._error(draw, latents, captions, LONG_LENGTH if long else self.adapter.text_length)
        near = pool.near[chosen].to(self.device)
        return balanced(error, near) + PLACE_WEIGHT * self.position_probe(latents)

    @torch.no_grad()
    def held_out(self, size: Size, count: int) -> float:
        """The loss on ``count`` scenes that are not trained on, the same at every call; without the probe."""
        folder = self.folder / "held-out"
        pool = Pool(self.adapter, size, count, folder, self.seed, self.device, "held_out")
        latents = pool.latents.to(self.device)
        captions = [caption(scene) for scene in pool.scenes]
        error = self._error(Draw(self.seed, "held out", size), latents, captions, self.adapter.text_length)
        return balanced(error, pool.near.to(self.device)).item()

    def _error(self, draw: Draw, latents: torch.Tensor, captions: list[str], length: int) -> torch.Tensor:
        """Squared error of the velocity, of ``latents``'s shape, at noise and levels from ``draw``."""
        batch = len(latents)
        noise = draw.normal(latents.shape).to(self.device)

        shift = self.adapter.shift(latents)
        uniform = (torch.arange(batch) + draw.uniform((batch,))) / batch  # stratified
        sigma = (shift * uniform / (1 + (shift - 1) * uniform)).to(self.device)
        level = sigma.view(-1, 1, 1, 1, 1)
        tokens = latents[0, 0].numel() // 4
        with torch.autocast(self.device.type, torch.bfloat16):
            text = self.adapter.encode_text(captions, length)
            with sdpa_kernel(SDPBackend.MATH) if tokens < SHORT_SEQUENCE else contextlib.nullcontext():
                output = self.adapter.velocity((1 - level) * latents + level * noise, sigma, text)
        return (output.float() - (noise - latents)).square()


@torch.no_grad()
def set_statistics(adapter: Adapter, size: Size, seed: int, device: torch.device) -> None:
    """Measures the latents' mean and deviation over scenes of ``size`` for the adapter to normalise with."""
    frames, height, width = size
    rng = Draw(seed, "statistics").rng
    drawn = [render(sample(rng, video=frames > 1), height, width, frames) for _ in range(MEASURED)]
    latents = torch.cat([adapter.posterior(pixels([one]).to(device)).mean for one in drawn])
    axes = [axis for axis in range(latents.ndim) if axis != 1]
    adapter.set_statistics(latents.mean(axes), latents.std(axes))
