"""One step of a distillation: samples at noise levels, the parts of the loss, and their gradients."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_accel.pipelines.families.base import Family
from dit_accel.recipe.noise import NoiseRange
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.steps import timestep_at
from dit_accel.training_loop import Draw

from .nested import equal, mapped
from .samples import Sample, Samples
from .settings import Settings
from .student import Student
from .taps import distance

PARTS = ("flow", "prediction", "attention")


@dataclass
class Batch:
    """Samples of one forward pass, of the same shapes, and their noise levels.

    Attributes:
        samples: what they are.
        levels: noise levels, from 0 to 1.
        noise: of each, like its latents.
        dense: whether steps at these levels are dense.
    """

    dense: bool
    samples: list[Sample] = field(default_factory=list)
    levels: list[float] = field(default_factory=list)
    noise: list[torch.Tensor] = field(default_factory=list)

    def takes(self, sample: Sample, dense: bool, family: Family) -> bool:
        """Whether a sample can be in the same forward pass."""
        first = self.samples[0]
        return (
            dense == self.dense
            and first.shapes == sample.shapes
            and all(
                equal(value, sample.inputs[name])
                for name, value in first.inputs.items()
                if name not in family.listed_inputs and not _is_own(name, value, family)
            )
        )

    def inputs(self, family: Family, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Of the transformer's forward."""
        first, sigma = self.samples[0], torch.tensor(self.levels, dtype=torch.float32, device=device)

        def placed(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, dtype if x.is_floating_point() else None)

        found = {name: mapped(self._joined(name, family), placed) for name in first.inputs}
        assert family.pure_noise is not None  # `capture` refuses such a family
        timestep = timestep_at(sigma, family.pure_noise, family.clean)
        timestep = timestep.view(-1, *[1] * len(first.per_token)).expand(-1, *first.per_token)
        return family.with_denoised(found, self.noisy(device).to(dtype), timestep)

    def _joined(self, name: str, family: Family) -> Any:
        """An input of all samples."""
        values = [one.inputs[name] for one in self.samples]
        if name in family.listed_inputs:
            return [entry for value in values for entry in value]
        return torch.cat(values) if _is_own(name, values[0], family) else values[0]

    def noisy(self, device: torch.device) -> torch.Tensor:
        """(1 - level) latents + level noise, fp32."""
        latents, noise = self._pair(device)
        sigma = torch.tensor(self.levels, dtype=torch.float32, device=device)
        sigma = sigma.view(-1, *[1] * (latents.ndim - 1))
        return (1 - sigma) * latents + sigma * noise

    def velocity(self, device: torch.device) -> torch.Tensor:
        """Noise less latents, fp32: what a model of the flow predicts."""
        latents, noise = self._pair(device)
        return noise - latents

    def _pair(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        latents = torch.cat([one.latents for one in self.samples]).to(device, torch.float32)
        return latents, torch.cat(self.noise).to(device)


def _is_own(name: str, value: Any, family: Family) -> bool:
    """Whether an input is a tensor of each sample's own, and not shared by all."""
    return isinstance(value, torch.Tensor) and name not in family.shared_inputs


def noise_level(place: float, levels: Sequence[float], kind: str) -> float:
    """The noise level at a place from 0 to 1 of a run: `"uniform"`, or as the `"scheduler"` spreads steps.

    Between two steps it is interpolated; after the last one lies 0.
    """
    if kind == "uniform":
        return 1 - place
    whole = [*levels, 0.0]
    step = min(int(place * len(levels)), len(levels) - 1)
    return whole[step] + (place * len(levels) - step) * (whole[step + 1] - whole[step])


def is_dense(level: float, levels: Sequence[float], recipe: Recipe) -> bool:
    """Whether a recipe makes the step dense whose noise level is nearest."""
    if isinstance(recipe.dense_steps, NoiseRange):
        return level in recipe.dense_steps
    after = bisect_right([-one for one in levels], -level)
    near = [step for step in (after - 1, after) if 0 <= step < len(levels)]
    step = min(near, key=lambda one: abs(levels[one] - level))
    return recipe.is_dense_step(step, len(levels))


class Steps:
    """Steps of a training.

    Args:
        student, family, recipe, settings: of the distillation.
        samples: of which the first `train` are trained on.
        state: `accelerate.PartialState`.
        device: to compute on.
    """

    def __init__(
        self,
        student: Student,
        family: Family,
        recipe: Recipe,
        settings: Settings,
        samples: Samples,
        train: int,
        state: Any,
        device: torch.device,
    ):
        self.student, self.family, self.recipe, self.settings = student, family, recipe, settings
        self.samples, self.number, self.state, self.device = samples, train, state, device
        self.dtype = student.transformer.dtype
        self.empty = samples.empty if settings.empty else None

    def train(self, draw: Draw) -> list[float]:
        """The parts of a step's loss, of all processes together.

        This process computes its share of the batch, and adds the gradients to what is trained.
        """
        settings, totals = self.settings, torch.zeros(len(PARTS), dtype=torch.float64, device="cpu")
        chosen = []
        for place in range(settings.batch):
            rng = draw.rng
            index, empty = rng.randrange(self.number), rng.random() < settings.empty
            where = (place + rng.random()) / settings.batch
            chosen.append((index, empty, where, Draw(settings.seed, "noise", rng.random())))
        own = chosen[self.state.process_index :: self.state.num_processes]
        for batch in self._batches(own, settings.at_once):
            share = len(batch.samples) / settings.batch
            totals += (
                torch.tensor(self._add_gradients(batch, share), dtype=torch.float64, device="cpu") * share
            )
        return self._summed(totals)

    def errors(self) -> dict[str, float]:
        """On held-out samples the mean squared distance to the teacher, with the adapter and without.

        `error` and `error_without`; nothing where no sample is held out. The noise is always the same.
        """
        held_out = range(self.number, len(self.samples))
        if not held_out:
            return {}
        totals = torch.zeros(2, dtype=torch.float64, device="cpu")
        for index in held_out[self.state.process_index :: self.state.num_processes]:
            draw = Draw(self.settings.seed, "held out", index)
            (batch,) = self._batches([(index, False, draw.rng.random(), draw)], 1)
            inputs = batch.inputs(self.family, self.device, self.dtype)
            with self._autocast():
                right, _ = self.student.teacher(inputs, record=False)
            for place, adapter in enumerate((True, False)):
                # gradients stay enabled, so that nothing is kept from one sample for the next
                with self._autocast(), self.student.student(inputs, batch.dense, False, adapter) as (own, _):
                    totals[place] += (own.detach() - right).square().mean().item() / len(held_out)
        found = zip(("error", "error_without"), self._summed(totals), strict=True)
        return {name: float(f"{value:.4g}") for name, value in found}

    def _batches(self, chosen: Iterable[tuple[int, bool, float, Draw]], most: int) -> list[Batch]:
        """Samples (index, whether without their text, place in a run, draw) in forward passes of `most`."""
        found: list[Batch] = []
        for index, empty, place, draw in chosen:
            sample = self.samples[index]
            if empty and self.empty is not None:
                sample = sample.with_text_of(self.empty, self.family)
            level = noise_level(place, sample.levels, self.settings.levels)
            dense = is_dense(level, sample.levels, self.recipe)
            fits = (one for one in found if len(one.samples) < most)
            batch = next((one for one in fits if one.takes(sample, dense, self.family)), None)
            if batch is None:
                found.append(batch := Batch(dense))
            batch.samples.append(sample)
            batch.levels.append(level)
            batch.noise.append(draw.normal(sample.latents.shape))
        return found

    def _add_gradients(self, batch: Batch, share: float) -> list[float]:
        """The parts of the loss of one forward pass."""
        settings, record = self.settings, self.settings.attention > 0
        inputs, theirs, right = batch.inputs(self.family, self.device, self.dtype), {}, None
        if settings.prediction or settings.attention:
            with self._autocast():
                right, theirs = self.student.teacher(inputs, record)
        with ExitStack() as stack:  # in which blocks may be computed again
            with self._autocast():
                ours = self.student.student(inputs, batch.dense, record)
                own, outputs = stack.enter_context(ours)
            zero = own.new_zeros(())
            parts = [
                (own - batch.velocity(self.device)).square().mean(),
                (own - right).square().mean() if right is not None else zero,
                distance(outputs, theirs) if record else zero,
            ]
            weights = [getattr(settings, name) for name in PARTS]
            total = sum(weight * part for weight, part in zip(weights, parts, strict=True) if weight)
            (total * share).backward()
        return [part.item() for part in parts]

    def _summed(self, totals: torch.Tensor) -> list[float]:
        """Over all processes."""
        if self.state.num_processes > 1:
            from accelerate.utils import reduce

            totals = reduce(totals.to(self.device, torch.float32), "sum").double().cpu()
        return totals.tolist()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)
