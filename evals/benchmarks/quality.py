"""Quality at a density, of every method: `python -m dit_accel.evals.benchmarks.quality tiny-wan tiny-flux`.

For bundled models the methods of `methods.py`, each where it computes about the wanted shares of the blocks,
and the model's presets without dense steps, all without and with `tail="pooled"`. Errors are those of
`dense_calls`, at calls of a dense run: of the outputs of attention, and of the prediction at several noise
levels. With `--scenes` also whole runs: PSNR and SSIM against the dense runs of the same seeds, and the share
of the captions' attributes that are drawn. A step's time is that of a call, in turn with a dense one. Rows
are appended to `quality_cpu.csv`, and `quality_cpu.md` is written anew, both under `--out`.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel.environment import environment
from dit_accel.generation import load
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Pattern, Rectified, Skipping
from dit_accel.pipelines import family_of
from dit_accel.pipelines.tiny import caption, check, score
from dit_accel.pipelines.tiny.evaluate import generate, held_out_scenes
from dit_accel.planning.model_config import of_model
from dit_accel.recipe.recipe import Recipe, presets
from dit_accel.runtime.switching import accelerated

from ..metrics.fidelity import psnr, ssim
from .dense_calls import Quantiles, Recorded, attention_error, beside_dense, call_errors, record
from .methods import fitted, of_kind
from .table import RESULTS, append, machine, markdown, row

THRESHOLDS = (-10, -6, -3)
DENSITIES = (0.05, 0.1, 0.15, 0.25, 0.4)


@dataclass(frozen=True)
class Runs:
    """What whole runs gave: PSNR and SSIM against dense ones, and the share of attributes that are right."""

    psnr: float
    ssim: float
    attributes: float


@dataclass(frozen=True)
class Row:
    """A recipe on a model.

    Attributes:
        method: its name.
        tail: whether it has one.
        density: pairs in computed blocks and with pooled keys as a share of all.
        time: of a call, as a share of a dense one's.
        attention: error of the outputs of attention.
        calls: errors of the prediction, one for each noise level.
        runs: of whole runs, if any were made.
    """

    method: str
    tail: bool
    density: float
    time: Quantiles
    attention: float
    calls: tuple[float, ...]
    runs: Runs | None = None


@dataclass(eq=False)
class Subject:
    """A model with what its rows are compared with.

    Attributes:
        pipe: the pipeline.
        run: options of `generate`, less prompts and seeds.
        scenes: of whole runs.
        calls: of a dense run.
        twin: the transformer once more, which stays dense.
        dense: outputs of the dense runs, uint8 (frames, height, width, 3).
    """

    pipe: Any
    run: dict[str, Any]
    scenes: list
    calls: list[Recorded]
    twin: torch.nn.Module
    dense: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: str,
        steps: int,
        at: Sequence[int],
        frames: int | None = None,
        scenes: int = 0,
        size: tuple[int, int] | None = None,
    ) -> Subject:
        """A bundled model, at its own size unless another is given."""
        pipe, usual = load(model, torch.float32, torch.device("cpu")), of_model(model).size
        pipe.set_progress_bar_config(disable=True)
        run: dict[str, Any] = {"size": tuple(size or usual[1:]), "steps": steps, "guidance": 3.0}
        run |= {"frames": frames or usual[0]} if usual[0] > 1 else {}
        drawn = held_out_scenes(max(1, scenes), video=usual[0] > 1)
        calls, _ = record(pipe, at, {"prompts": [caption(drawn[0])], "seeds": [0], **run})
        return cls(pipe, run, drawn[:scenes], calls, copy.deepcopy(pipe.transformer))

    @property
    def layout(self) -> TokenLayout:
        transformer = self.pipe.transformer
        return family_of(transformer).layout(transformer, self.calls[0].inputs, {})

    def generated(self) -> list[np.ndarray]:
        """What the pipeline makes of each scene, as it is."""
        outputs = []
        for seed, scene in enumerate(self.scenes):
            pixels = generate(self.pipe, prompts=[caption(scene)], seeds=[seed], **self.run)[0]
            outputs.append((pixels.reshape(-1, *pixels.shape[-3:]) * 255).round().astype(np.uint8))
        return outputs

    def compared(self, outputs: list[np.ndarray]) -> Runs:
        """Outputs against the dense ones and the captions."""
        self.dense = self.dense or outputs
        video = "frames" in self.run
        seen = [check((one if video else one[0]) / np.float32(255)) for one in outputs]
        pairs = list(zip(outputs, self.dense, strict=True))
        return Runs(
            float(np.mean([psnr(*pair) for pair in pairs])),
            float(np.mean([ssim(*pair) for pair in pairs])),
            score(seen, [scene.attributes for scene in self.scenes])["mean"],
        )


def recipes_of(model: str, densities: Sequence[float], subject: Subject) -> Iterator[tuple[str, Recipe]]:
    """Presets of a bundled model without dense steps, and the methods at each density that they can have.

    Presets that are made for a larger size than the subject's are left out. What skip bits leave follows from
    their threshold and from the calls before, of which the first computes all.
    """
    transformer, layout = subject.pipe.transformer, subject.layout
    for name, recipe in presets(of_model(model).family).items():
        if name.startswith(f"{model}-") and fits(recipe.attention, layout):
            yield name, replace(recipe, dense_steps=0, tail=None)
    for method in of_kind(video="frames" in subject.run):
        for density in densities:
            pattern = fitted(
                method,
                density,
                layout,
                lambda pattern: call_errors(transformer, Recipe(pattern), subject.calls[:1])[1],
            )
            if pattern is not None:
                yield method.name, Recipe(pattern)
    for threshold in THRESHOLDS:
        yield f"Skip bits, {threshold}", Recipe(Skipping(threshold, block_size=(64, 32)))


def fits(pattern: Pattern, layout: TokenLayout) -> bool:
    """Whether a pattern can be had on a layout."""
    try:
        return pattern.density(layout) <= 1
    except ValueError:
        return False


def measured(subject: Subject, method: str, recipe: Recipe, repeats: int) -> Row:
    """All that is said of a recipe."""
    transformer = subject.pipe.transformer
    errors, density = call_errors(transformer, recipe, subject.calls)
    attention = attention_error(transformer, recipe, subject.calls)
    runs = None
    if subject.scenes:
        with accelerated(subject.pipe, recipe):
            runs = subject.compared(subject.generated())
    time = step_time(subject, recipe, repeats)
    return Row(method, recipe.tail is not None, density, time, attention, tuple(errors), runs)


def step_time(subject: Subject, recipe: Recipe, repeats: int) -> Quantiles:
    """Of a call under a recipe, as a share of a dense one's; of steps that follow each other."""
    transformer = subject.pipe.transformer
    with accelerated(transformer, recipe):
        return beside_dense(transformer, subject.twin, subject.calls[0].inputs, repeats)


def measure(
    subject: Subject, model: str, densities: Sequence[float], tails: bool, repeats: int
) -> Iterator[Row]:
    """All rows of a model, the dense one first."""
    if subject.scenes:
        runs = subject.compared(subject.generated())
        yield Row("dense", False, 1.0, (1.0,) * 3, 0.0, (0.0,) * len(subject.calls), runs)
    for method, recipe in recipes_of(model, densities, subject):
        rectified = isinstance(recipe.attention, Rectified)
        for tail in (None,) if rectified or not tails else (None, "pooled"):
            yield measured(subject, method, replace(recipe, tail=tail), repeats)


# -- writing -------------------------------------------------------------------------------------------------


def headings(calls: Sequence[Recorded]) -> list[str]:
    """Of the table."""
    at = [f"call at {call.timestep:.0f}" for call in calls]
    return ["method", "tail", "block density", "step / dense", "attention", *at, "PSNR", "SSIM", "attributes"]


def cells(entry: Row) -> list[str]:
    """A row of the table."""
    runs = ["-"] * 3
    if entry.runs is not None:
        runs = [f"{entry.runs.psnr:.1f}", f"{entry.runs.ssim:.3f}", f"{entry.runs.attributes:.3f}"]
    errors = [f"{error:.3f}" for error in (entry.attention, *entry.calls)]
    tail = "yes" if entry.tail else ""
    return [entry.method, tail, f"{entry.density:.3f}", f"{entry.time[1]:.2f}", *errors, *runs]


def csv_rows(entry: Row, model: str, calls: Sequence[Recorded], here: dict) -> Iterator[dict]:
    """Rows of the CSV."""
    provider = entry.method + ("+tail" if entry.tail else "")
    shape = f"{model} block density {entry.density:.3f}"
    yield row("step", provider, "time / dense", shape, entry.time, here)
    yield row("attention", provider, "error", shape, entry.attention, here)
    for call, error in zip(calls, entry.calls, strict=True):
        yield row("prediction", provider, f"error at {call.timestep:.0f}", shape, error, here)
    if entry.runs is not None:
        for metric in ("psnr", "ssim", "attributes"):
            yield row("run", provider, metric, shape, getattr(entry.runs, metric), here)


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--steps", type=int, default=12, help="of runs")
    parser.add_argument(
        "--at", type=int, nargs="+", default=[1, 5, 10], help="steps whose calls are compared"
    )
    parser.add_argument("--frames", type=int, help="of videos; default the model's own")
    parser.add_argument("--size", type=int, nargs=2, help="height and width; default the model's own")
    parser.add_argument("--scenes", type=int, default=0, help="whole runs of each row")
    parser.add_argument("--repeats", type=int, default=3, help="of timed calls")
    parser.add_argument("--no-tail", action="store_true", help="leave out the rows with a tail")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    here = environment()
    text = ["# Quality at a density\n", __doc__.partition("\n\n")[2], f"{machine(here)}.\n"]
    for model in options.models:
        subject = Subject.of(model, options.steps, options.at, options.frames, options.scenes, options.size)
        lines = []
        text.append(f"## {model}, {subject.layout.seq_len:,} tokens, runs of {options.steps} steps\n")
        for entry in measure(subject, model, options.densities, not options.no_tail, options.repeats):
            lines.append(cells(entry))
            print(model, *lines[-1], sep=" | ", flush=True)
            append(options.out / "quality_cpu.csv", csv_rows(entry, model, subject.calls, here))
        text.append(markdown(headings(subject.calls), lines))
        (options.out / "quality_cpu.md").write_text("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
