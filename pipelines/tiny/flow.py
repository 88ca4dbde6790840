"""Last stage: transformer and text encoders learn rectified flow on latents of scenes at mixed sizes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.training_loop import Draw, mixed_precision

from .adapters import Adapter
from .autoencoder import pixels
from .captions import caption
from .models import Size
from .scenes import Scene, Split, layers, render, sample

PLACE_WEIGHT = 0.3
MEASURED = 64  # scenes that tell the latents' mean and deviation
EMPTY_PROMPT = 0.1  # share of captions dropped, for classifier-free guidance
LONG_PROMPT = 0.02  # share of steps with prompts padded to 512 tokens, the pipelines' default
LONG_LENGTH = 512
DECOYS = 2  # scenes at whose objects a step on some tokens computes tokens too
BACKGROUND_KEPT = 0.08  # share of all other tokens that it computes
SHORT_SEQUENCE = 200  # below this many tokens plain matrix products beat the fused attention kernel on CPUs


@dataclass(frozen=True)
class TrainingSize:
    """From which ``start`` on (a fraction of the stage) and how often a ``size`` is trained on."""

    size: Size
    batch: int
    pool: int  # scenes drawn at this size
    weights: tuple[tuple[float, float], ...]  # (start, weight) in ascending order; 0 before the first
    tokens: int | None = None  # scene after scene, on about so many tokens at most (see ``kept_tokens``)

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
            with torch.no_grad(), mixed_precision(device):
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

    def forward(self, latents: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Mean squared error for the last forward pass, which was on ``latents`` (B, C, F, H, W).

        ``kept`` (n,) are the tokens that took part; None means all.
        """
        frames, height, width = latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2
        axes = [(torch.arange(size) + 0.5) * 2 / size - 1 for size in (frames, height, width)]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
        places = places.to(latents.device) if kept is None else places[kept].to(latents.device)
        return (self.read(self.tokens.float()) - places).square().mean()


def in_a_row(latents: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The tokens ``kept`` (n,) of latents (B, C, F, H, W), 2 x 2 each, as one row (B, C, 1, 2, 2 n)."""
    tokens = latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 4, 2, 3, 5, 6).flatten(3, 5)
    return tokens[:, :, :, kept].flatten(3).unsqueeze(2)


def kept_tokens(draw: Draw, near: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (n,) that a step at a large size computes, a few times fewer than all.

    Those at a scene's objects, and of the background a few; so that they do not betray where the objects are,
    those at the objects of other scenes too: ``near`` (scenes, 1, F, H, W). Where these are more than
    ``limit``, those of some frames alone. (MaskDiT, Zheng et al. 2024, drops tokens at random, which on large
    canvases of small objects would leave little to learn from.) Also for how many tokens each of them stands,
    float32 (n,).
    """
    objects = F.max_pool3d(near.amax(0), (1, 2, 2))[0] > 0
    counts, some = objects.sum((1, 2)), torch.zeros(len(objects), dtype=torch.bool)
    for frame in draw.rng.sample(range(len(objects)), len(objects)):
        some[frame] = not some.any() or counts[some].sum() + counts[frame] <= limit
    chosen = objects & some[:, None, None]
    numbers = torch.where(chosen, len(some) / some.sum(), 1 / BACKGROUND_KEPT).flatten()
    kept = (chosen | (draw.uniform(objects.shape) < BACKGROUND_KEPT)).flatten().nonzero()[:, 0]
    return kept, numbers[kept]


@contextlib.contextmanager
def standing_for(numbers: torch.Tensor, text_first: bool) -> Iterator[None]:
    """Context in which visual tokens weigh in attention as ``numbers`` (n,) tokens like them would.

    Without that a model that learned from some tokens is lost among all, of which most are background.
    """
    attend, bias = F.scaled_dot_product_attention, numbers.log()

    def weighted(query, key, value, attn_mask=None, **options):
        if query.shape[-2] == key.shape[-2]:  # not a picture's attention to its text
            text = key.shape[-2] - len(bias)
            weights = F.pad(bias, (text, 0) if text_first else (0, text)).to(query.dtype)
            weights = weights.view(1, 1, 1, -1)
            attn_mask = weights if attn_mask is None else weights.where(attn_mask, -math.inf)
        return attend(query, key, value, attn_mask=attn_mask, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", weighted):
        yield


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
        length = LONG_LENGTH if long else self.adapter.text_length
        if entry.tokens:
            losses = [
                self._partial_loss(draw, entry, index, text, length, (place, batch))
                for place, (index, text) in enumerate(zip(chosen, captions, strict=True))
            ]
            return torch.stack(losses).mean()
        latents = pool.latents[chosen].to(self.device)
        error = self._error(draw, latents, captions, length)
        near = pool.near[chosen].to(self.device)
        return balanced(error, near) + PLACE_WEIGHT * self.position_probe(latents)

    def _partial_loss(
        self, draw: Draw, entry: TrainingSize, index: int, text: str, length: int, stratum: tuple[int, int]
    ) -> torch.Tensor:
        """The same for one scene, some of whose tokens take part alone."""
        pool = self._pool(entry)
        latents = pool.latents[index, None].to(self.device)
        others = [draw.rng.randrange(len(pool.scenes)) for _ in range(DECOYS)]
        kept, numbers = kept_tokens(draw, pool.near[[index, *others]], entry.tokens or 0)
        if len(kept) == length:  # which text has too, and attention is told by
            kept, numbers = kept[1:], numbers[1:]
        error = self._error(draw, latents, [text], length, (kept, numbers.to(self.device)), stratum)
        near = in_a_row(pool.near[index, None], kept).to(self.device)
        return balanced(error, near) + PLACE_WEIGHT * self.position_probe(latents, kept)

    @torch.no_grad()
    def held_out(self, size: Size, count: int) -> float:
        """The loss on ``count`` scenes that are not trained on, the same at every call; without the probe."""
        folder = self.folder / "held-out"
        pool = Pool(self.adapter, size, count, folder, self.seed, self.device, "held_out")
        latents = pool.latents.to(self.device)
        captions = [caption(scene) for scene in pool.scenes]
        error = self._error(Draw(self.seed, "held out", size), latents, captions, self.adapter.text_length)
        return balanced(error, pool.near.to(self.device)).item()

    def _error(
        self,
        draw: Draw,
        latents: torch.Tensor,
        captions: list[str],
        length: int,
        some: tuple[torch.Tensor, torch.Tensor] | None = None,
        stratum: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Squared error of the velocity at noise and levels from ``draw``, of the shape of ``latents``.

        Of some tokens alone, `in_a_row`, if `kept_tokens` are given. Levels are stratified over the batch, or
        over the steps of which this is one (``stratum``: which, of how many).
        """
        place, strata = stratum or (torch.arange(len(latents)), len(latents))
        shift = self.adapter.shift(latents)
        uniform = (place + draw.uniform((len(latents),))) / strata
        sigma = shifted(uniform, shift).to(self.device)
        canvas = latents.shape
        if some is not None:
            latents = in_a_row(latents, some[0])
        noise = draw.normal(latents.shape).to(self.device)
        level = sigma.view(-1, 1, 1, 1, 1)
        with mixed_precision(self.device), contextlib.ExitStack() as stack:
            text = self.adapter.encode_text(captions, length)
            if latents[0, 0].numel() // 4 < SHORT_SEQUENCE:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if some is not None:
                stack.enter_context(self.adapter.placed(canvas, some[0]))
                stack.enter_context(standing_for(some[1], self.adapter.text_first))
            output = self.adapter.velocity((1 - level) * latents + level * noise, sigma, text)
        return (output.float() - (noise - latents)).square()


def shifted(levels: torch.Tensor, shift: float) -> torch.Tensor:
    """Evenly spread noise levels in [0, 1] as the scheduler moves them (see ``Adapter.shift``)."""
    return shift * levels / (1 + (shift - 1) * levels)


@torch.no_grad()
def set_statistics(adapter: Adapter, size: Size, seed: int, device: torch.device) -> None:
    """Measures the latents' mean and deviation over scenes of ``size`` for the adapter to normalise with."""
    frames, height, width = size
    rng = Draw(seed, "statistics").rng
    drawn = [render(sample(rng, video=frames > 1), height, width, frames) for _ in range(MEASURED)]
    latents = torch.cat([adapter.posterior(pixels([one]).to(device)).mean for one in drawn])
    axes = [axis for axis in range(latents.ndim) if axis != 1]
    adapter.set_statistics(latents.mean(axes), latents.std(axes))
