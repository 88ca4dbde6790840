"""What a high-resolution run takes, stage by stage, before anyone waits: time and peak memory.

No weights are needed. Memory is that of tensors, weights included: the real forwards of transformer and
autoencoder run on the meta device, and what is in use at one time is counted. Time is FLOPs by rates of this
machine: of dense attention and of the autoencoder, measured when asked, in seconds; of sparse attention and
of the rest of a step, relative to dense attention, as `dit_accel.planning.plan` has them.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dit_accel.highres.context import ContextWindows, context_windows
from dit_accel.highres.method import Job, Method, Pass, Work
from dit_accel.highres.native import Native, Size, check_supported
from dit_accel.highres.registry import method_of
from dit_accel.latents import TILED_FROM
from dit_accel.patterns import Dense
from dit_accel.pipelines import tiny
from dit_accel.recipe.recipe import Recipe, resolve

from . import autoencoders, probes
from .live_tensors import FusedAttention, LiveTensors
from .meta_values import EveryConditionHolds
from .model_config import ModelConfig
from .plan import chosen_model, plan
from .speedups import ASSUMED_REST


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        name: what it is.
        size: frames, height, width in pixels.
        steps, calls: sampler steps, and calls of the transformer in all of them, for one sample each.
        seconds: None where this machine has no such device, or nothing is known of the autoencoder.
        peak: bytes of tensors, weights included; None where nothing is known of the autoencoder.
    """

    name: str
    size: tuple[int, int, int]
    steps: int
    calls: int
    seconds: float | None
    peak: int | None


@dataclass(frozen=True)
class HighresPlan:
    """What `plan_highres` returns; `weights` in bytes, `notes` say what the numbers rest on."""

    model: str
    method: str
    device: str
    dtype: str
    weights: int
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float | None:
        """Of the run; None where that of a stage is not known."""
        found = [stage.seconds for stage in self.stages]
        return None if None in found else sum(x for x in found if x is not None)

    @property
    def peak(self) -> int:
        """The most of the stages whose peak is known."""
        return max(stage.peak or 0 for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {**dataclasses.asdict(self), "seconds": self.seconds, "peak": self.peak}


def plan_highres(
    method: str | Method = "swim",
    *,
    size: tuple[int, int],
    model: str | ModelConfig | None = None,
    family: str | None = None,
    variant: str | None = None,
    frames: int | None = None,
    steps: int | None = None,
    strength: float = 0.7,
    guided: bool | None = None,
    recipe: Any = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> HighresPlan:
    """The stages of `dit_accel.highres.generate` for one sample, with time and peak memory of each.

    Args:
        method: a name of `dit_accel.highres.METHODS`, or such an object.
        size: (width, height) of the result in pixels.
        model, family, variant, frames, steps, device, dtype: as of `dit_accel.planning.plan.plan`.
        strength: as of `dit_accel.highres.generate`.
        guided: whether every step has an unconditional sample as well; None: as is usual for the model.
        recipe: what is enabled on the pipeline; None: nothing.

    Raises:
        ValueError: a method, model, size or strength that cannot be.
    """
    config = chosen_model(model, family, variant)
    check_supported(config.description)
    found = None if recipe is None else resolve(recipe)
    planner = _Planner(config, _folder(model), guided, found, device, dtype)
    native = planner.native
    target = Size(*size, native.size.frames if frames is None else frames)
    chosen = method_of(method, native, native.of_aspect(target))
    job = Job.checked(native, target, config.steps if steps is None else steps, strength)
    return planner.plan(chosen, job)


def _folder(model: str | ModelConfig | None) -> Path | None:
    if not isinstance(model, str):
        return None
    return tiny.weights_dir(model) if model in tiny.NAMES else Path(model).expanduser()


class _Cost(NamedTuple):
    """Of a call of the transformer: seconds for a sample, None without such a device; bytes at its peak."""

    seconds: float | None
    peak: int


class _Planner:
    """What is known of a model, and what its parts take at a size."""

    def __init__(
        self,
        config: ModelConfig,
        folder: Path | None,
        guided: bool | None,
        recipe: Recipe | None,
        device: str,
        dtype: torch.dtype,
    ):
        self.config, self.folder, self.recipe = config, folder, recipe
        self.device, self.dtype = device, dtype
        self.here = device == "cpu" or torch.cuda.is_available()
        self.transformer = nn.Module.to(config.transformer(), dtype)  # not diffusers', which warns
        self.vae = autoencoders.autoencoder(config, folder, dtype)
        self.guided = self._usually_guided() if guided is None else guided
        self._costs: dict[Any, _Cost] = {}
        self._vae_rate: float | None = None
        pixels = config.vae[1] * config.description.patch(self.transformer.config)[1]
        size = tiny.INFO[config.name].native if config.name in tiny.NAMES else config.size
        own = Size(size[2], size[1], size[0])
        bundled = config.name in tiny.NAMES
        self.native = Native(
            config.description, own, (pixels, pixels), config.vae[0], config.video, bundled
        )  # fmt: skip

    def _usually_guided(self) -> bool:
        if self.config.name in tiny.NAMES:
            return tiny.INFO[self.config.name].guidance > 1
        embedded = self.config.config.get("guidance_embeds")
        return embedded is None  # a distilled model takes its scale itself, and FLUX.1-schnell none

    def plan(self, method: Method, job: Job) -> HighresPlan:
        passes, stages = method.passes(job), []
        tiled = job.target.width * job.target.height >= TILED_FROM
        for before, one in zip([None, *passes[:-1]], passes, strict=True):
            if before is not None:
                stages.append(self._enlarging(before, one, tiled))
            stages.append(self._pass(method, one, job))
        stages.append(self._decoding(method, passes[-1], job, tiled))
        weights = self._weights()
        stages = [dataclasses.replace(x, peak=x.peak and x.peak + weights) for x in stages]
        number = str(self.dtype).removeprefix("torch.")
        return HighresPlan(
            self.config.name, method.name, self.device, number, weights, tuple(stages), tuple(self._notes())
        )

    # -- stages ------------------------------------------------------------------------------------------

    def _pass(self, method: Method, one: Pass, job: Job) -> Stage:
        steps = one.part.count
        dense = Work(((Dense(), 1, 1),))
        work = method.work(job, one) if one.above_native else dense
        windows, size = self._over_time(one.size, job)
        calls, seconds, peak = 0.0, 0.0, 0
        for pattern, conditional, unconditional in work.calls:
            count = conditional + (unconditional if self.guided else 0)
            cost = self._call(pattern, work.size or size, self._together(work))
            calls += steps * windows * count
            seconds = None if cost.seconds is None or seconds is None else (
                seconds + steps * windows * count * cost.seconds
            )  # fmt: skip
            peak = max(peak, cost.peak)
        if work.keeps:
            peak += self._kept(size)
        name = "pass above native size" if one.above_native else "native pass"
        return Stage(name, _pixels(one.size), steps, round(calls), seconds, peak)

    def _enlarging(self, before: Pass, one: Pass, tiled: bool) -> Stage:
        name = "decode, enlarge, encode"
        if self.vae is None:
            return Stage(name, _pixels(one.size), 0, 0, None, None)
        down = autoencoders.decoding(self.vae, self.config, _pixels(before.size), tiled)
        up = autoencoders.encoding(self.vae, self.config, _pixels(one.size), tiled)
        seconds = self._vae_seconds(down.flops + up.flops)
        return Stage(name, _pixels(one.size), 0, 0, seconds, max(down.peak, up.peak))

    def _decoding(self, method: Method, one: Pass, job: Job, tiled: bool) -> Stage:
        if self.vae is None:
            return Stage("decode", _pixels(one.size), 0, 0, None, None)
        taken = autoencoders.decoding(self.vae, self.config, _pixels(one.size), tiled)
        keeps = one.above_native and method.work(job, one).keeps  # until the pipeline returns
        peak = taken.peak + (self._kept(one.size) if keeps else 0)
        return Stage("decode", _pixels(one.size), 0, 0, self._vae_seconds(taken.flops), peak)

    def _over_time(self, size: Size, job: Job) -> tuple[int, Size]:
        """Windows over time of a call, as `generate` has them by default, and the size of each."""
        native = self.native
        if not native.video or size.frames <= native.size.frames:
            return 1, size
        own = native.grid(native.size)[0]
        windows = ContextWindows(own, own // 5)
        count = len(context_windows(native.grid(size)[0], windows.size, windows.overlap))
        return count, dataclasses.replace(size, frames=native.size.frames)

    # -- what they take ----------------------------------------------------------------------------------

    def _together(self, work: Work) -> int:
        """Samples of a call of the transformer, at most."""
        batched = self.guided and self.config.description.batches_guidance
        return sum(work.together) if batched else max(work.together[: 1 + self.guided])

    def _call(self, pattern: Any, size: Size, together: int) -> _Cost:
        key = (pattern, size, together)
        if key not in self._costs:
            grid = self.config.grid(self.transformer, _pixels(size))
            self._costs[key] = _Cost(self._seconds(pattern, size, grid), self._live(grid, together))
        return self._costs[key]

    def _seconds(self, pattern: Any, size: Size, grid: tuple[int, int, int]) -> float | None:
        if not self.here:
            return None
        recipe = Recipe(pattern) if pattern != Dense() else self.recipe or Recipe(Dense())
        answer = plan(
            recipe, model=self.config, size=(size.width, size.height), device=self.device, dtype=self.dtype,
            frames=size.frames if self.config.video else None,
        )  # fmt: skip
        rate = probes.attention_rate(self.device, self.dtype, answer.head_dim)
        rest = answer.flops.rest / (answer.rates.rest or ASSUMED_REST)
        return (answer.flops.attention + rest) / rate / (answer.run.predicted or answer.run.ideal)

    def _live(self, grid: tuple[int, int, int], together: int) -> int:
        """Bytes of a call's tensors."""

        def fill(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device="meta", dtype=self.dtype)

        inputs = self.config.inputs(self.transformer, grid, fill)
        if together > 1:
            inputs = {
                name: x if name.endswith("_ids") else _repeated(x, together) for name, x in inputs.items()
            }
        with ExitStack() as stack:
            live = LiveTensors(copies=True)
            for mode in (torch.no_grad(), EveryConditionHolds(), FusedAttention(), live):
                stack.enter_context(mode)
            self.transformer(**inputs)
        return live.peak + sum(x.numel() * x.element_size() for x in inputs.values())

    def _kept(self, size: Size) -> int:
        """Bytes of an output of every layer with its log-sum-exps."""
        description = self.config.description
        layers = len(description.text_layers(self.transformer) or description.layers(self.transformer))
        heads, dim = description.heads(self.transformer)
        return layers * self.native.tokens(size) * heads * (dim * self.dtype.itemsize + 4)

    def _vae_seconds(self, flops: int) -> float | None:
        if not self.here or self.vae is None:
            return None
        if self._vae_rate is None:
            small = (1, probes.SIDE, probes.SIDE)
            taken = autoencoders.decoding(self.vae, self.config, small, False)
            shape = autoencoders.latents_of(self.vae, self.config, small)
            self._vae_rate = probes.autoencoder_rate(self.vae, self.device, shape, taken.flops)
        return flops / self._vae_rate

    def _weights(self) -> int:
        count = self.config.transformers * _parameters(self.transformer)
        count += _parameters(self.vae) if self.vae is not None else 0
        return (count + self._text_parameters()) * self.dtype.itemsize

    def _text_parameters(self) -> int:
        from safetensors import safe_open

        found = 0
        for file in () if self.folder is None else self.folder.glob("text_encoder*/*.safetensors"):
            with safe_open(file, "pt") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
            found += sum(math.prod(shape) for shape in shapes)
        return found

    def _notes(self) -> list[str]:
        notes = ["memory is of tensors and weights, for one sample; the program itself is not counted"]
        if self.folder is None:
            notes.append("text encoders are not counted: a published model's are not known here")
        if self.vae is None:
            notes.append(f"nothing is known of the autoencoder of {self.config.name}: no time, no memory")
        if self.here:
            notes.append(
                "times are by dense attention and a small picture through the autoencoder, measured now; "
                "what else this machine does meanwhile is in them, and the text encoders' time is not"
            )
        else:
            notes.append(f"no times: this machine has no {self.device} to measure")
        samples = "two samples" if self.guided else "one sample"
        return [*notes, f"every step predicts {samples}: {'with' if self.guided else 'without'} guidance"]


def _pixels(size: Size) -> tuple[int, int, int]:
    return size.frames, size.height, size.width


def _repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    return x.repeat(times, *[1] * (x.ndim - 1))


def _parameters(module: nn.Module) -> int:
    return sum(int(p.numel()) for p in module.parameters())
