"""`dit_accel.distill`: a transformer's attention learns to do with the keys that a recipe leaves it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_accel.arguments import integer
from dit_accel.errors import NonFiniteError, UnavailableError
from dit_accel.json_files import check_same, plain, read_json, write_json
from dit_accel.optional import required
from dit_accel.pipelines.families import family_of
from dit_accel.recipe import adapter
from dit_accel.recipe.recipe import Recipe, resolve
from dit_accel.runtime.switching import transformers_of
from dit_accel.training_loop import Draw, Loop, Stage, multiplies_bf16

from .folders import read_folder
from .identity import weights_of
from .progress import Progress
from .samples import Prompt, encoded, generated, is_folder, read_prompts
from .settings import Settings
from .steps import PARTS, Steps
from .student import Student, trainable
from .taps import default_taps

FILES = (adapter.CONFIG, adapter.WEIGHTS, adapter.LEARNED_WEIGHTS, adapter.ABOUT)
RUN, SAMPLES, CHECKPOINT = "distillation.json", "samples", "checkpoint.pt"
_SETTINGS = "settings of a distillation"
_log = logging.getLogger(__name__)


def distill(
    pipe: Any,
    recipe: Recipe | str | Path,
    data: str | Path | Sequence[Prompt],
    out: str | Path,
    *,
    call: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    log: str | Path | None = None,
    progress: bool = False,
    until: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a pipeline's attention to a recipe, and write what was learned as an adapter of that recipe.

    The teacher is the untouched model. A step's loss is that of the flow plus the distance to what the
    teacher predicts for the same noisy latents, plus the distance to its attention outputs in some layers, as
    CLEAR distils. What is trained stands beside the model's weights, which stay as they are: the projections
    that the patterns name (`Pattern.trained`) in the layers that the recipe changes, as LoRA or whole, and
    what these learn beside them (`Pattern.learned`). At noise levels whose steps are dense by the recipe
    attention is dense in training too, as the adapter acts there as well.

    Stopped at any time, it goes on with the same arguments, from the latest checkpoint, and ends with the
    same weights: all draws are those of their step. With more `steps` it goes on from there, its rate that of
    a run of as many. Samples are kept, and serve other runs in `folder`.
    Under `accelerate launch` each process takes its share of every batch; what comes out is the same up to
    rounding.

    Args:
        pipe: a diffusers pipeline with one transformer, on the device to train on.
        recipe: as of `dit_accel.enable`; an adapter that it names is left out: it is trained from nothing.
        data: prompts (texts, or mappings of arguments of the pipeline's call in their place) or a text file
            with one on each line, of which the pipeline generates its samples itself; or a folder of images
            or videos with captions (`metadata.jsonl`, or `a.txt` beside `a.png`).
        out: folder of the adapter, for `Recipe(adapter=out)`.
        call: arguments of the pipeline's call: sizes, `num_inference_steps`, `guidance_scale`, ...
        folder: of samples and checkpoints; None: beside `out`, with `.state` at the end.
        log: folder of a TensorBoard log of the loss and its parts; it needs `tensorboard`. Neither is in
            `out`.
        progress: whether to show progress bars on stderr, with the parts of the loss.
        until: a step to stop at, from 1, before the end; no adapter is written then.
        **options: fields of `dit_accel.distillation.settings.Settings`.

    Returns:
        what is said of the adapter in its `made_by.json`; with held-out samples also `error`, the mean
        squared distance to the teacher's prediction on them, and `error_without` the adapter.

    Raises:
        ValueError, TypeError: values outside these forms, a recipe that changes nothing or for another
            family, or a folder begun with other settings, more steps or other weights.
        UnavailableError: a recipe without gradients here, packages that are missing, a pipeline with two
            transformers or of no flow.
        NonFiniteError: training that has diverged.

    Source: Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", 2024.
    """
    recipe, settings, call = resolve(recipe), Settings(**options), dict(call or {})
    until = None if until is None else integer("until", until, 1)
    out = Path(out)
    folder = state_beside(out) if folder is None else Path(folder)
    job = Distillation(pipe, recipe, settings, call, out, folder, log)
    try:
        job.prepare(data, progress)
        return job.run(progress, until)
    finally:
        job.close()


def state_beside(out: Path) -> Path:
    """The folder of samples and checkpoints beside that of an adapter.

    Raises:
        ValueError: a path that ends in no name.
    """
    if out.name in ("", ".."):
        raise ValueError(f"`out` must end in the name of a folder, got {str(out)!r}; say how it is called")
    return out.with_name(f"{out.name}.state")


def precision_of(settings: Settings, device: torch.device, folder: Path) -> str:
    """`"bf16"` or `"fp32"`: what settings say; of `"auto"` what the run in `folder` began with, if any."""
    if settings.precision != "auto":
        return settings.precision
    begun = read_json(path, _SETTINGS) if (path := folder / RUN).is_file() else {}
    kept = begun.get("precision") if isinstance(begun, dict) else None
    own = "bf16" if multiplies_bf16(device) else "fp32"
    return kept if kept in ("bf16", "fp32") else own


class Distillation:
    """One adapter in the making; arguments as of `distill`. All is checked before anything is made."""

    def __init__(
        self,
        pipe: Any,
        recipe: Recipe,
        settings: Settings,
        call: Mapping[str, Any],
        out: Path,
        folder: Path,
        log: str | Path | None,
    ):
        from accelerate import PartialState

        self.pipe, self.recipe, self.settings, self.call = pipe, recipe, settings, call
        self.out, self.folder, self.log = out, folder, log
        transformers = transformers_of(pipe)
        if list(transformers) != ["transformer"] or isinstance(pipe, nn.Module):
            raise UnavailableError(
                f"{type(pipe).__name__} has {' and '.join(transformers)}; distillation takes pipelines with "
                "one transformer"
            )
        self.transformer = transformers["transformer"]
        self.family = family_of(self.transformer)
        recipe.check_family(self.family.name, f"this is a {self.family.name} pipeline")
        self._check_out()
        self.device = pipe._execution_device
        self.state = PartialState(cpu=self.device.type == "cpu")
        if settings.batch % self.state.num_processes:
            raise ValueError(
                f"`batch` must be a multiple of the number of processes, {self.state.num_processes}, got "
                f"{settings.batch}"
            )
        if settings.optimizer == "prodigy":
            required("prodigyopt", "training with Prodigy", "distill")
        if log is not None:
            required("tensorboard", "a log for TensorBoard", "distill")
        self.settings = settings = replace(settings, precision=precision_of(settings, self.device, folder))
        if self.state.is_main_process:
            _log.info("distillation computes in %s on %s", settings.precision, self.device)
        dtype = torch.bfloat16 if settings.precision == "bf16" else self.transformer.dtype
        sparse = trainable(recipe, self.device, dtype)
        self.weights = weights_of({"transformer": self.transformer})
        self._before = _Modes(self.transformer)
        self.transformer.requires_grad_(False).eval()
        draw = Draw(settings.seed, "weights")
        try:
            self.student = Student(self.transformer, sparse, settings.train, settings.rank, draw, out)
            layers = self.student.layers
            taps = settings.taps or default_taps(layers, self.student.changed)
            unknown = [name for name in taps if name not in layers]
            if unknown:
                raise ValueError(
                    f"`taps` names the layer {unknown[0]!r}; layers are {', '.join(layers)!s:.300}"
                )
        except BaseException:
            self.close()
            raise
        self.student.taps.layers = {name: layers[name] for name in taps} if settings.attention else {}

    def _check_out(self) -> None:
        """Refuses a file, and a folder of other things, which the adapter would be mixed with."""
        for name, other in (("folder", self.folder), ("log", self.log)):
            if other is not None and Path(other).resolve().is_relative_to(self.out.resolve()):
                raise ValueError(
                    f"`{name}` {other} is in `out` {self.out}, where nothing but the adapter may be; name "
                    "another folder"
                )
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"`out` must be a folder, got the file {self.out}")
        others = [p.name for p in self.out.iterdir() if p.name not in FILES] if self.out.is_dir() else []
        if others:
            raise ValueError(
                f"`out` {self.out} has {others[0]!r:.200} in it, which is of no adapter; name a new folder"
            )

    def close(self) -> None:
        """Leaves the transformer as it was."""
        self._before.restore()

    # -- samples -------------------------------------------------------------------------------------------

    def prepare(self, data: str | Path | Sequence[Prompt], progress: bool) -> None:
        """Makes the samples that are missing, and the run's folder.

        Raises:
            ValueError: a folder begun with other settings or weights.
        """
        settings, folder = self.settings, self.folder / SAMPLES
        own = (self.pipe, self.family)
        bar = progress and self.state.is_main_process
        options = (settings.empty > 0, folder, self.state, bar)
        if is_folder(data):
            items = read_folder(Path(str(data)), settings.samples)
            held_out = self._begin(len(items))
            samples = encoded(*own, items, self.call, *options)
        else:
            prompts = read_prompts(data, settings.empty > 0)
            count = settings.samples or len(prompts)
            held_out = self._begin(count)
            samples = generated(*own, prompts, count, self.call, settings.seed, *options)
        self.steps = Steps(
            self.student,
            self.family,
            self.recipe,
            settings,
            samples,
            len(samples) - held_out,
            self.state,
            self.device,
        )

    def _begin(self, samples: int) -> int:
        """Writes what the run is, or compares it with what was begun; returns how many are held out.

        More steps than it was begun with are allowed.
        """
        held_out = self.settings.held_out_of(samples)
        recipe = replace(self.recipe, adapter=None).tag
        self.about = {"recipe": recipe, "family": self.family.name, **self.settings.about()}
        self.about |= {"samples": samples, "held_out": held_out, "weights": self.weights}
        path = self.folder / RUN
        begun = read_json(path, _SETTINGS) if path.is_file() else None
        if begun is not None:
            longer = isinstance(begun.get("steps"), int) and begun["steps"] < self.settings.steps
            same = {name: value for name, value in self.about.items() if name != "steps" or not longer}
            check_same(begun, same, f"the distillation in {self.folder} was begun", "give another folder")
        if self.state.is_main_process and begun != plain(self.about):
            write_json(path, self.about)
        self.state.wait_for_everyone()
        return held_out

    # -- training ------------------------------------------------------------------------------------------

    def run(self, progress: bool, until: int | None) -> dict[str, Any]:
        """Trains to the end, or to step `until`; at the end writes the adapter."""
        settings = self.settings
        warmup, decay = settings.schedule
        stage = Stage("distill", settings.steps, settings.learning_rate, warmup, decay, settings.average)
        loop = Loop(
            stage,
            {"student": self.student.weights},
            self.folder / CHECKPOINT,
            settings.seed,
            resume=True,
            optimizers=self._optimizers,
            joined=self._joined,
            writes=self.state.is_main_process,
        )
        if settings.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        main = self.state.is_main_process
        shown = Progress(settings.steps, loop.step, self.log if main else None, progress and main)
        with shown, self.student.enabled():
            loop.run(
                lambda draw, _: self._loss(draw, shown, loop.step + 1),
                until=until,
                save_every=settings.save_every,
                on_step=shown.step,
            )
            if not loop.done:
                return self.about
            if settings.average:
                loop.adopt_average()
            if not all(bool(x.isfinite().all()) for x in self.student.weights.parameters()):
                raise self._diverged("what was trained is not finite")
            said = {**self.about, **self.steps.errors()}
        if main:
            for name in FILES:  # of an earlier adapter
                (self.out / name).unlink(missing_ok=True)
            self.student.save(self.out, said)
        self.state.wait_for_everyone()
        return said

    def _optimizers(self, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        options = {"lr": self.settings.learning_rate, "weight_decay": self.settings.weight_decay}
        if self.settings.optimizer == "adamw":
            adamw: torch.optim.Optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.999), **options)
            return [adamw]
        prodigy = required("prodigyopt", "training with Prodigy", "distill").Prodigy
        options |= {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
        return [prodigy(parameters, betas=(0.9, 0.999), **options)]

    def _joined(self, parameters: list[nn.Parameter]) -> None:
        """Gradients of all processes, added up; 0 where a parameter took no part."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.state.num_processes > 1:
            from accelerate.utils import reduce

            flat = reduce(torch.cat([p.grad.flatten() for p in parameters]), "sum")
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad.copy_(part.view_as(parameter))

    def _loss(self, draw: Draw, shown: Progress, step: int) -> torch.Tensor:
        """The loss of a step, without a graph: its gradients are there already.

        Raises:
            NonFiniteError: it is not finite, nor would what is trained be.
        """
        totals = self.steps.train(draw)
        if not all(map(math.isfinite, totals)):
            raise self._diverged(f"the loss of step {step} is not finite")
        weights = [getattr(self.settings, name) for name in PARTS]
        loss = sum(weight * part for weight, part in zip(weights, totals, strict=True))
        shown.note({"loss": loss, **dict(zip(PARTS, totals, strict=True))})
        return torch.tensor(loss, dtype=torch.float64, device="cpu")

    def _diverged(self, what: str) -> NonFiniteError:
        settings = self.settings
        return NonFiniteError(
            f"{what}: training has diverged; take a lower `rate` than {settings.learning_rate:g}, or another "
            f"`precision` than {settings.precision!r}, and another `folder`, as {self.folder} goes on with "
            "these settings"
        )


class _Modes:
    """What training changes of a transformer beside its processors: kept, and put back."""

    NAMES = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")

    def __init__(self, transformer: nn.Module):
        self.modules = {
            module: {name: vars(module)[name] for name in self.NAMES if name in vars(module)}
            for module in transformer.modules()
        }
        self.wanted = {parameter: parameter.requires_grad for parameter in transformer.parameters()}

    def restore(self) -> None:
        """Puts it back."""
        for module, before in self.modules.items():
            for name in self.NAMES:
                vars(module).pop(name, None)
            vars(module).update(before)
        for parameter, wanted in self.wanted.items():
            parameter.requires_grad_(wanted)
