"""Generating at sizes above those that a model was trained for, from a native pass upwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dit_accel import latents
from dit_accel.arguments import positive, shown, switch
from dit_accel.errors import UnavailableError
from dit_accel.generation import transformers

from . import keeping
from .context import ContextWindows
from .extrapolation import Rotary
from .keeping import Kept
from .method import Before, Job, Method, Pass
from .native import Native, Size, check_supported, default_of, native_size
from .proportional import proportional as attending_proportionally
from .registry import method_of
from .schedule import OnStep, check_flow, first_level, own_shift, scheduled

_OURS = ("latents", "sigmas", "timesteps", "mu", "image", "video")  # arguments of calls that passes set


def generate(
    pipe: Any,
    prompt: str | list[str] | None = None,
    *,
    width: int,
    height: int,
    num_frames: int | None = None,
    method: str | Method = "swim",
    strength: float = 0.7,
    native: tuple[int, ...] | None = None,
    shift: float | None = None,
    rotary: str | Rotary | None = "method",
    proportional: bool | None = None,
    context: ContextWindows | str | None = "auto",
    base: Any = None,
    keep: str | Path | None = None,
    above: dict[str, Any] | None = None,
    callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
    **call: Any,
) -> Any:
    """A picture or a video larger than the model was trained for.

    The pipeline draws the scene at its native size; the result is enlarged, encoded, re-noised, and denoised
    at the target size in the way of the method. Everything is checked before the native pass runs. The
    autoencoder works in tiles where frames are large; offloading, and what is enabled on the pipeline by
    `dit_accel.enable`, stay on.

    Args:
        pipe: a diffusers pipeline of a known family, text to image or text to video.
        prompt: as of the pipeline's call; None where embeddings are given.
        width, height: of the result, in pixels.
        num_frames: of the result; None: as many as the model was trained for.
        method: a name of `dit_accel.highres.METHODS`, with options that suit the model, or such an object.
        strength: share of the steps that run above native size, above 0 and at most 1.
        native: (height, width), or with frames in front, that the model was trained for; None: as published.
            The native pass has this area and the aspect of the result.
        shift: of the noise schedule above native size; None: the family's, of bundled models the pipeline's
            own at that size.
        rotary: how positions go on above native size: `"ntk"`, `"yarn"`, `"dype"`, a
            `dit_accel.highres.Rotary`, or None: as in training, further; `"method"`: as the method has it.
        proportional: whether attention above native size is scaled by sqrt(ln L / ln L_trained), L being all
            keys; None: as the method has it.
        context: windows over time, in all passes; `"auto"`: of the trained length where the video is longer,
            with an overlap of a fifth; None: none.
        base: a picture or video to enlarge instead of a native pass: frames (B, F, 3, H, W) or pictures (B,
            3, H, W) with values from 0 to 1.
        keep: a .safetensors file for the native result; if it is there already, it is not made anew.
        above: arguments of the pipeline's call that differ above native size, such as `guidance_scale`.
        callback_on_step_end: as of the pipeline; steps count through all passes.
        call: arguments of the pipeline's call: `num_inference_steps`, `generator`, `output_type`, ...

    Returns:
        What the pipeline returns. Where it was interrupted in the native pass, that pass's result.

    Raises:
        ValueError, TypeError: a size, strength, method or other argument that cannot be, before any work.
        UnavailableError: a scheduler, or a model of unknown native size.
    """
    run = _Run.checked(
        pipe, prompt, Size(width, height, num_frames or 0), method, strength, native, shift, call, above or {}
    )
    run.extend(rotary, proportional)
    run.cut(context)
    path = None if keep is None else keeping.check_path(keep)
    given = None if base is None else _frames(base, run.job)
    return run.through(path, given, callback_on_step_end)


@dataclass
class _Run:
    """One generation: what was asked for, checked, and the way through its passes."""

    pipe: Any
    prompt: Any
    method: Method
    job: Job
    passes: list[Pass]
    call: dict[str, Any]
    above: dict[str, Any]
    rotary: Rotary | None = field(default=None, init=False)
    proportional: bool = field(default=False, init=False)
    context: ContextWindows | None = field(default=None, init=False)
    done: int = field(default=0, init=False)  # steps

    @classmethod
    def checked(
        cls,
        pipe: Any,
        prompt: Any,
        size: Size,
        method: Any,
        strength: Any,
        native: Any,
        shift: Any,
        call: dict[str, Any],
        above: dict[str, Any],
    ) -> _Run:
        model = Native.of(pipe, native_size(native))
        check_supported(model.family)
        target = model.target(pipe, size.width, size.height, size.frames or None)
        check_flow(pipe.scheduler)
        for name, arguments in (("", call), ("above", above)):
            for key in arguments:
                _check_argument(pipe, key, name)
        steps = call.get("num_inference_steps") or default_of(pipe, "num_inference_steps")
        job = Job.checked(model, target, steps, strength)
        if shift is None:
            default = None if model.bundled else model.family.upscaled_shift
            shift = own_shift(pipe.scheduler.config, model.tokens(target)) if default is None else default
        chosen = method_of(method, model, job.base)
        own = own_shift(pipe.scheduler.config, model.tokens(job.base))
        job = replace(job, shift=positive("shift", shift), native_shift=own)
        chosen.check(pipe, job)
        return cls(pipe, prompt, chosen, job, chosen.passes(job), call, above)

    def extend(self, rotary: Any, proportional: Any) -> None:
        """Checks and sets positions and scale above native size."""
        family, method = self.job.native.family, self.method
        there = family.rotary_module(transformers(self.pipe)[0]) is not None
        if isinstance(rotary, str):
            rotary = (method.rotary if there else None) if rotary == "method" else Rotary(rotary)
        if rotary is not None and not isinstance(rotary, Rotary):
            raise ValueError(f"`rotary` must be a name, a `Rotary` or None, got {shown(rotary)}")
        if rotary is not None and not there:
            raise UnavailableError(
                f"{family.name} has no rotary embedding but a table of places; use rotary=None"
            )
        if proportional is None:
            proportional = method.proportional
        if switch("proportional", proportional) and method.scales:
            raise ValueError(
                f'method "{method.name}" has a scale of attention of its own; use proportional=False'
            )
        self.rotary, self.proportional = rotary, proportional

    def cut(self, context: Any) -> None:
        """Checks and sets windows over time."""
        native, frames = self.job.native, self.job.target.frames
        if context == "auto":
            size = native.grid(native.size)[0]
            longer = native.video and frames > native.size.frames
            context = ContextWindows(size, size // 5) if longer else None
        if context is not None and not isinstance(context, ContextWindows):
            raise ValueError(f'`context` must be "auto", a `ContextWindows` or None, got {shown(context)}')
        if context is not None and not native.video:
            raise ValueError(f"`context` is for video models, and {type(self.pipe).__name__} makes images")
        if context is not None and context.schedule == "looped" and getattr(self.method, "cache_steps", None):
            raise ValueError(
                f'`context` of schedule "looped" has other windows at every step, for which method '
                f'"{self.method.name}" cannot keep what it read; use cache_steps=None, or schedule "static"'
            )
        self.context = context

    def through(self, path: Path | None, given: torch.Tensor | None, callback: Any) -> Any:
        """All passes, or those after a native result that is given or was kept."""
        kept, passes = None, list(self.passes)
        first = passes[0]
        if given is not None or path is not None:
            if first.above_native:
                raise ValueError(
                    f'method "{self.method.name}" has no native pass that `base` or `keep` could stand for'
                )
            if given is not None and self.method.keeps_estimates:
                raise ValueError(
                    f'method "{self.method.name}" follows the steps of its native pass; leave out `base`'
                )
            if given is not None and self.method.watches:
                raise ValueError(
                    f'method "{self.method.name}" reads the attention of its native pass; leave out `base`, '
                    "or give the method with screening=None"
                )
        request = keeping.request_of(self.prompt, first.size, first.part, self.call, self._generators)
        if given is not None:
            kept = Kept(given)
        elif path is not None and path.exists():
            kept = keeping.load(path, request)
            if self.method.watches and not kept.watched:
                raise ValueError(
                    f'{path} is of another method and lacks what "{self.method.name}" reads in its native '
                    "pass; name another file"
                )
            for generator, state in zip(self._generators, kept.generators, strict=True):
                generator.set_state(state)
        if kept is not None:
            passes = passes[1:]
        with self._progress(sum(one.part.count for one in passes)) as bar, ExitStack() as stack:
            stack.enter_context(latents.tiled(self.pipe, self.job.target.height, self.job.target.width))
            for one in passes[:-1]:
                made = Kept(torch.empty(0))
                made.frames = self._once(one, kept, bar, callback, made, last=False)
                made.generators = [generator.get_state() for generator in self._generators]
                kept = made
                if getattr(self.pipe, "interrupt", False):
                    return self._as_output(kept.frames)
                if path is not None and one is first:
                    keeping.save(path, kept, request)
            return self._once(passes[-1], kept, bar, callback, Kept(torch.empty(0)), last=True)

    def _once(self, one: Pass, kept: Kept | None, bar: Any, callback: Any, made: Kept, last: bool) -> Any:
        """One pass: its frames (B, F, 3, H, W) on the CPU, of the last what the pipeline returns.

        What else is to be kept of it goes into `made`.
        """
        pipe, size = self.pipe, one.size
        call: dict[str, Any] = {
            "prompt": self.prompt,
            "height": size.height,
            "width": size.width,
            **self.call,
        }
        call["num_inference_steps"] = self.job.steps
        if self.job.native.video:
            call["num_frames"] = size.frames
        before = on_step = None
        if kept is not None:
            call["latents"], before = self._begun(one, kept)
            on_step = self.method.on_step(before, one.part)
        if one.above_native:
            call |= self.above
        if not last:
            call |= {"output_type": "pt", "return_dict": True}
            if self.method.keeps_estimates:
                on_step = _noting(made.estimates, on_step)
        unpack = latents.packing(pipe, size.height, size.width)

        def step_ended(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            bar.update()
            self.done += 1
            return values if callback is None else callback(pipe, self.done - 1, timestep, values)

        with ExitStack() as stack:
            if one.above_native:
                stack.enter_context(self.method.applied(pipe))
                self._extended(stack)
                if before is not None:
                    stack.enter_context(self.method.around(pipe, before, self.job, call))
            else:
                stack.enter_context(self.method.watching(pipe, made.watched))
            if self.context is not None:
                stack.enter_context(self.context.applied(pipe))
            call |= stack.enter_context(scheduled(pipe, one.part, on_step, unpack))
            result = pipe(**call, callback_on_step_end=step_ended)
        if last:
            return result
        frames = result.frames if self.job.native.video else result.images[:, None]
        return frames.float().cpu()

    def _begun(self, one: Pass, kept: Kept) -> tuple[torch.Tensor, Before]:
        """The re-noised start of a pass as the pipeline takes it, and what methods take from those before."""
        from diffusers.utils.torch_utils import randn_tensor

        enlarged = latents.resized(kept.frames, one.size.height, one.size.width, self.method.enlarging)
        if self.method.sharpens:
            enlarged = latents.sharpened(enlarged)
        reference = latents.encoded(self.pipe, enlarged, self.job.native.video)
        generator = self.call.get("generator")
        noise = randn_tensor(reference.shape, generator, device=reference.device, dtype=reference.dtype)
        level = first_level(self.pipe, one.part)
        begun = level * noise + (1 - level) * reference
        before = Before(reference, kept.estimates, kept.frames, kept.watched)
        packs = hasattr(self.pipe, "_pack_latents")
        return (latents.packed(begun) if packs else begun), before

    def _extended(self, stack: ExitStack) -> None:
        """Switches on positions and scale beyond those of training."""
        native = self.job.native
        if self.proportional:
            stack.enter_context(attending_proportionally(self.pipe, native.tokens(native.size)))
        for transformer in () if self.rotary is None else transformers(self.pipe):
            stack.enter_context(self.rotary.applied(transformer, native.grid(native.size)[1:]))

    @property
    def _generators(self) -> list[torch.Generator]:
        given = self.call.get("generator")
        return [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]

    def _as_output(self, frames: torch.Tensor) -> Any:
        """The native result as the pipeline returns its own."""
        kind = self.call.get("output_type", default_of(self.pipe, "output_type"))
        scaled = frames * 2 - 1
        if self.job.native.video:
            shown_ = self.pipe.video_processor.postprocess_video(scaled.transpose(1, 2), output_type=kind)
            return _output_class(self.pipe)(frames=shown_)
        shown_ = self.pipe.image_processor.postprocess(scaled[:, 0], output_type=kind)
        return _output_class(self.pipe)(images=shown_)

    @contextmanager
    def _progress(self, steps: int) -> Iterator[Any]:
        """A bar over the steps of all passes, in the place of the pipeline's own."""
        from tqdm.auto import tqdm

        before = getattr(self.pipe, "_progress_bar_config", None)
        self.pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
        try:
            with tqdm(**{**(before or {}), "total": steps}) as bar:
                yield bar
        finally:
            self.pipe._progress_bar_config = {} if before is None else before


def _check_argument(pipe: Any, key: str, group: str) -> None:
    """Refuses arguments of calls that the pipeline does not have, or that passes set themselves."""
    where = f"`{group}` has" if group else "there is"
    if key in _OURS or (group and key in ("width", "height", "num_frames", "prompt", "num_inference_steps")):
        raise ValueError(f"{where} `{key}`, which the passes set themselves; leave it out")
    if key not in inspect.signature(pipe.__call__).parameters:
        raise TypeError(f"{where} `{key}`, which {type(pipe).__name__} does not take")


def _frames(base: Any, job: Job) -> torch.Tensor:
    """A given picture or video as frames (B, F, 3, H, W), fp32 on the CPU."""
    if not isinstance(base, torch.Tensor) or base.ndim not in (4, 5) or base.shape[-3] != 3:
        kind = tuple(base.shape) if isinstance(base, torch.Tensor) else type(base).__name__
        raise ValueError(
            f"`base` must be a tensor of pictures (B, 3, H, W) or of videos (B, F, 3, H, W), got {kind}"
        )
    frames = (base if base.ndim == 5 else base[:, None]).detach().float().cpu()
    if not 0 <= float(frames.min()) <= float(frames.max()) <= 1:
        raise ValueError(
            f"`base` must have values from 0 to 1, got {float(frames.min()):g} to {float(frames.max()):g}"
        )
    if frames.shape[1] != job.target.frames:
        raise ValueError(f"`base` must have {job.target.frames} frames as the result, got {frames.shape[1]}")
    return frames


def _noting(estimates: list[torch.Tensor], on_step: OnStep | None) -> OnStep:
    """Takes down the clean estimate after each step, of the model's own prediction."""

    def noted(v: torch.Tensor, x: torch.Tensor, level: float, step: int, steps: int) -> torch.Tensor:
        estimates.append((x - level * v).cpu())
        return v if on_step is None else on_step(v, x, level, step, steps)

    return noted


def _output_class(pipe: Any) -> Any:
    """The class of what a pipeline's call returns, which its module imports."""
    module = inspect.getmodule(type(pipe))
    return next(value for name, value in vars(module).items() if name.endswith("PipelineOutput"))
