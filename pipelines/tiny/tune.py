"""Tunes LoRA of a bundled model's attention to a recipe's pattern, as an adapter that the recipe then loads.

The base weights stay. A step's loss is that of the flow on drawn scenes plus the squared distance to what the
untouched model predicts for the same noisy latents, as CLEAR distils, here without its loss of attention
outputs (Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", 2024). At
noise levels whose steps are dense by the recipe attention is dense here too: the adapter acts there as well.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_accel import kernels
from dit_accel.errors import UnavailableError
from dit_accel.json_files import check_same, read_json, write_json
from dit_accel.patterns import Dense
from dit_accel.recipe import adapter as files
from dit_accel.recipe.noise import NoiseRange
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.adapted import Adapted
from dit_accel.runtime.switching import accelerated
from dit_accel.seeds import check_seed
from dit_accel.training_loop import Draw, Loop, Stage

from .adapters import Adapter, adapter
from .autoencoder import pixels
from .flow import EMPTY_PROMPT, shifted
from .models import Size, spec
from .scenes import Split
from .worlds import world_of

HELD_OUT = 8  # scenes on which the result is measured
SETTINGS = "settings.json"


class Scenes:
    """Drawn scenes of one size, with their latents, encoded once and kept on disk."""

    def __init__(
        self,
        family: Adapter,
        size: Size,
        count: int,
        path: Path,
        draw: Draw,
        split: Split,
        device: torch.device,
    ):
        frames, height, width = size
        self.world = world_of(family.pipe)
        self.scenes = [self.world.sample(draw.rng, split, frames > 1) for _ in range(count)]
        if path.exists():
            self.latents = torch.load(path, weights_only=True)
            return
        parts = []
        for scene in self.scenes:
            picture = pixels([self.world.render(scene, height, width, frames)]).to(device)
            with torch.no_grad():
                parts.append(family.normalise(family.posterior(picture).mean.float()).cpu())
        self.latents = torch.cat(parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.latents, path)


class Weights(nn.Module):
    """A and B of LoRA by layer; B begins at 0, so that nothing is changed at first."""

    def __init__(self, layers: Mapping[str, nn.Linear], rank: int, draw: Draw):
        super().__init__()
        self.names = list(layers)
        shapes = [(own.in_features, own.out_features) for own in layers.values()]
        self.a = nn.ParameterList(draw.normal((rank, n)) / n**0.5 for n, _ in shapes)
        self.b = nn.ParameterList(torch.zeros(n, rank) for _, n in shapes)

    def pairs(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A (rank, in) and B (out, rank) by layer."""
        return dict(zip(self.names, zip(self.a, self.b, strict=True), strict=True))


@dataclass
class Group:
    """Noisy latents (B, C, F, H, W), their noise levels (B,), text and velocity; whether steps are dense."""

    noisy: torch.Tensor
    sigma: torch.Tensor
    text: Any
    velocity: torch.Tensor
    dense: bool


class Tuning:
    """One adapter in the making, resumable: killed at any step, it ends with the same weights.

    Args:
        name: of a bundled model.
        recipe: what to tune to; an adapter that it names already is tuned anew, from nothing.
        out: the adapter's folder, written at the end.
        run: folder of checkpoints and encoded scenes.
        pipe: instead of the bundled weights.
        size: frames, height, width in pixels; by default the model's demo size, for which its presets are.
        steps, batch, rank, rate: of the training; `rate` is AdamW's.
        flow_weight: of the flow's own loss; 0 leaves the distance to the untouched model alone.
        scenes: how many are drawn.
        resume: whether to go on with the run in `run`.

    Raises:
        ValueError: a recipe for another family or whose patterns change with noise level, or a run of other
            settings.
        UnavailableError: a recipe without gradients: quantized, or with a backend that has none.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        out: Path,
        run: Path,
        *,
        pipe: Any = None,
        size: Size | None = None,
        steps: int = 600,
        batch: int = 2,
        rank: int = 8,
        rate: float = 1e-3,
        flow_weight: float = 1.0,
        scenes: int = 256,
        seed: int = 0,
        resume: bool = False,
        device: torch.device | None = None,
    ):
        self.spec, self.recipe, self.out, self.run_folder = spec(name), recipe, out, run
        self.size, self.batch, self.rank = size or self.spec.demo, batch, rank
        self.seed, self.device = check_seed(seed), device or torch.device("cpu")
        for number, value in (("steps", steps), ("batch", batch), ("rank", rank), ("scenes", scenes)):
            if value < 1:
                raise ValueError(f"`{number}` must be a positive integer, got {value}")
        recipe.check_family(self.spec.family, f"{name} is of {self.spec.family!r}")
        self.sparse = replace(recipe, dense_steps=0, adapter=None, guidance=None, guard=False)
        _check_gradients(self.sparse, self.device)
        self.about = {"model": name, "recipe": replace(recipe, adapter=None).tag, "size": list(self.size)}
        self.about |= {
            "steps": steps,
            "batch": batch,
            "rank": rank,
            "rate": rate,
            "scenes": scenes,
            "flow_weight": flow_weight,
            "seed": seed,
        }
        self.pipe = pipe or _load(name)
        for module in self.pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).to(self.device)
        self.family = adapter(self.spec, self.pipe)
        self.transformer: nn.Module = self.pipe.transformer
        layers = self._layers()
        self._begin(resume)
        self.weights = Weights(layers, rank, Draw(seed, "lora")).to(self.device)
        announced = {n: files.LowRank(rank, x.in_features, x.out_features, 1.0) for n, x in layers.items()}
        part = files.Part(out / files.WEIGHTS, {}, announced)
        self.adapted = Adapted(self.transformer, part, str(out))
        stage = Stage("tune", steps=steps, rate=rate, warmup=min(50, steps), decay=0.5, averaging=0.99)
        self.loop = Loop(stage, {"lora": self.weights}, run / "tune.pt", seed, resume)

    def _begin(self, resume: bool) -> None:
        """A new run folder, or the one that is gone on with."""
        path = self.run_folder / SETTINGS
        if resume and path.is_file():
            made = f"the run in {self.run_folder} was made"
            check_same(read_json(path, "settings of a run"), self.about, made, "give another --run")
            return
        shutil.rmtree(self.run_folder, ignore_errors=True)
        write_json(path, self.about)

    def _layers(self) -> dict[str, nn.Linear]:
        """Linear layers of the attention that is sparse, by their names in the transformer."""
        with accelerated(self.transformer, self.sparse) as handle:
            binding = handle.bindings["transformer"]
            layers = [binding.modules[name] for name in binding.sparse_layers]
        places = {module: name for name, module in self.transformer.named_modules()}
        found = {
            f"{places[layer]}.{name}": module
            for layer in layers
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        if not found:
            raise ValueError("the recipe makes no layer of this model sparse: there is nothing to tune")
        return found

    def run(self, until: int | None = None) -> dict[str, Any]:
        """Trains to the end or to step `until`; at the end writes the adapter.

        Returns:
            what is said of the adapter in its file; at the end with `error`, the mean squared distance to the
            untouched model's prediction on scenes that were not trained on, and `error_without` the adapter.
        """
        train, held_out = (
            self._scenes(*one) for one in (("train", self.about["scenes"]), ("held_out", HELD_OUT))
        )
        with accelerated(self.transformer, self.sparse):
            self.loop.run(lambda draw, progress: self._losses(draw, train), until=until, save_every=100)
            if not self.loop.done:
                return self.about
            with self.loop.averaged():
                errors = {"error": self._error(held_out), "error_without": self._error(held_out, tuned=False)}
                said = {**self.about, **{name: float(f"{value:.4g}") for name, value in errors.items()}}
                files.write(self.out, self.weights.pairs(), float(self.rank), said)
        return said

    def _scenes(self, split: Split, count: int) -> Scenes:
        path, draw = self.run_folder / f"{split}.pt", Draw(self.seed, split)
        return Scenes(self.family, self.size, count, path, draw, split, self.device)

    def _losses(self, draw: Draw, scenes: Scenes) -> torch.Tensor:
        """Of one batch: the flow's, and the distance to the untouched model."""
        chosen = [draw.rng.randrange(len(scenes.scenes)) for _ in range(self.batch)]
        total = torch.zeros((), device=self.device)
        for group in self._groups(draw, scenes, chosen, EMPTY_PROMPT, draw.rng):
            student = self._tuned(group)
            targets = (group.velocity, self.about["flow_weight"]), (self._untouched(group), 1.0)
            for target, weight in targets:
                total = total + (student - target).square().mean() * (weight * len(student) / self.batch)
        return total

    def _error(self, scenes: Scenes, tuned: bool = True) -> float:
        """Mean squared distance to the untouched model on all scenes, at the same noise in every call."""
        total = 0.0
        for index in range(len(scenes.scenes)):
            for group in self._groups(Draw(self.seed, "held out", index), scenes, [index]):
                error = (self._tuned(group, tuned) - self._untouched(group)).square().mean()
                total += error.item() / len(scenes.scenes)
        return total

    def _groups(
        self,
        draw: Draw,
        scenes: Scenes,
        chosen: list[int],
        empty: float = 0.0,
        words: random.Random | None = None,
    ) -> Iterator[Group]:
        """A batch at noise levels as the scheduler spreads them, those of dense steps by themselves."""
        captions = [
            "" if draw.rng.random() < empty else scenes.world.caption(scenes.scenes[i], words) for i in chosen
        ]
        latents = scenes.latents[chosen].to(self.device)
        noise = draw.normal(latents.shape).to(self.device)
        even = (torch.arange(len(chosen)) + draw.uniform((len(chosen),))) / len(chosen)
        sigma = shifted(even, self.family.shift(latents)).to(self.device)
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy, dense = (1 - level) * latents + level * noise, self._dense(sigma, latents)
        for whole in (False, True):
            rows = (dense == whole).nonzero()[:, 0]
            if len(rows):
                with torch.no_grad(), self._autocast():
                    text = self.family.encode_text([captions[i] for i in rows], self.family.text_length)
                yield Group(noisy[rows], sigma[rows], text, (noise - latents)[rows], whole)

    def _untouched(self, group: Group) -> torch.Tensor:
        """What the model predicts without recipe and adapter."""
        with torch.no_grad(), accelerated(self.transformer, Dense()), self._autocast():
            return self.family.velocity(group.noisy, group.sigma, group.text).float()

    def _tuned(self, group: Group, tuned: bool = True) -> torch.Tensor:
        """What it predicts with the adapter, under the attention that the recipe has at these levels."""
        if tuned:
            self.adapted.attach(self.weights.pairs())
        try:
            attention = accelerated(self.transformer, Dense()) if group.dense else nullcontext()
            with attention, self._autocast():
                return self.family.velocity(group.noisy, group.sigma, group.text).float()
        finally:
            self.adapted.detach()

    def _dense(self, sigma: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Which of noise levels (B,) belong to steps that are dense: those of the nearest step of a run."""
        if isinstance(self.recipe.dense_steps, NoiseRange):
            return torch.tensor([level in self.recipe.dense_steps for level in sigma.tolist()])
        total = self.spec.steps
        levels = shifted(1 - torch.arange(total) / total, self.family.shift(latents))
        nearest = (levels[None] - sigma.cpu()[:, None]).abs().argmin(1)
        return torch.tensor([self.recipe.is_dense_step(step, total) for step in nearest.tolist()])

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16)


def _check_gradients(recipe: Recipe, device: torch.device) -> None:
    if recipe.quantization is not None:
        raise UnavailableError(
            "quantized attention has no gradients; tune to the recipe without `quantization`"
        )
    if any(pattern.by_noise for pattern in recipe.patterns):
        raise ValueError("patterns that change with the noise level cannot be tuned to; tune to one of them")
    size = recipe.block_size or kernels.default_block_size(device)
    reason = kernels.can_run(
        recipe.backend, device=device, dtype=torch.bfloat16, head_dim=32, block_size=size, requires_grad=True
    )
    if reason is not None:
        raise UnavailableError(f"backend {recipe.backend!r} cannot be trained here: {reason}; leave it out")


def _load(name: str) -> Any:
    from dit_accel.pipelines import load

    pipe = load(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe
