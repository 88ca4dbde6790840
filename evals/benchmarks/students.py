"""Distilled students side by side: `python -m dit_accel.evals.benchmarks.students tiny-flux --work DIR`.

Each pattern of a kind is distilled from the model for as many steps, on the same drawn scenes, by
`dit_accel.distill`; then it draws held-out captions, before and after, and the untouched model does too.
`--kind longer`: not students of the model but of the scenes alone, for videos longer than it knows.
Said of each: the time of a call and of one with gradients, beside dense ones; the share of the captions'
attributes that are drawn, and the Fréchet distance to the captions' own scenes by the features of the bundled
encoder. `--transfer-size`: the same adapters at a size that they were not trained on; `--recoloured`: on a
copy of the model that is fine-tuned to draw in exchanged colours. What was done is kept in --work, and the
same command goes on from there.

Rows are appended to `students_cpu.csv` under `--out`; a page, pictures and curves of the loss of the model
are written anew, in `students/`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel import media
from dit_accel.environment import environment
from dit_accel.files import atomic
from dit_accel.pipelines.tiny import caption
from dit_accel.plots import check_plot
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated

from .dense_calls import Quantiles, beside_dense, call_errors, record
from .student_runs import KINDS, Bench, Others
from .table import RESULTS, append, machine, markdown, row

HEADINGS = ("student", "block density", "step / dense", "with gradients / dense", "error before",
            "error after", "attributes before", "attributes after", "Fréchet before",
            "Fréchet after")  # fmt: skip
SMOOTH = 20  # steps that a point of a curve is the mean of
SHOWN = 6  # pictures in a row of the sheet
SIDE = 128  # pixels of one, or a little more


@dataclass(frozen=True)
class Result:
    """A student, or the untouched model; errors and distances before and after training.

    Attributes:
        density: pairs in computed blocks, as a share of all.
        time, gradients: of a call, and of one with gradients, as shares of a dense one's.
        errors: of the prediction on held-out samples, mean squared distance to the teacher's.
        attributes, distances: of what is drawn, before and after.
    """

    name: str
    density: float = 1.0
    time: Quantiles = (1.0, 1.0, 1.0)
    gradients: Quantiles = (1.0, 1.0, 1.0)
    errors: tuple[float, float] = (0.0, 0.0)
    attributes: tuple[float, float] = (0.0, 0.0)
    distances: tuple[float, float] = (0.0, 0.0)
    others: dict[str, float] = field(default_factory=dict)

    @property
    def cells(self) -> list[str]:
        errors = [f"{value:.4f}" for value in self.errors]
        drawn = [f"{value:.3f}" for value in self.attributes] + [f"{value:.2f}" for value in self.distances]
        times = [f"{self.time[1]:.2f}", f"{self.gradients[1]:.2f}"]
        return [self.name, f"{self.density:.3f}", *times, *errors, *drawn,
                *(f"{value:.3f}" for value in self.others.values())]  # fmt: skip


def step_times(bench: Bench, recipe: Recipe, repeats: int) -> tuple[float, Quantiles, Quantiles]:
    """Block density of a call under a recipe, and its time without and with gradients, beside dense ones."""
    frames, *size = bench.size
    run = {**bench.run, "size": tuple(size), "frames": frames, "steps": 2}
    calls, _ = record(bench.pipe, [0], {"prompts": [caption(bench.scenes[0])], "seeds": [0], **run})
    inputs, own, twin = calls[0].inputs, bench.pipe.transformer, copy.deepcopy(bench.pipe.transformer)
    density = call_errors(own, recipe, calls)[1]
    with accelerated(own, recipe):
        plain = beside_dense(own, twin, inputs, repeats)
        return density, plain, beside_dense(own, twin, inputs, repeats, with_gradients)


def with_gradients(transformer: torch.nn.Module, inputs: dict[str, Any]) -> None:
    """A call, and gradients of all weights."""
    with torch.enable_grad():
        transformer(**inputs)[0].square().mean().backward()
    transformer.zero_grad(set_to_none=True)


def results(bench: Bench, others: Others, repeats: int) -> Iterator[Result]:
    """The untouched model first, then each student."""
    teacher = bench.drawn("teacher", None)
    own = {"attributes": (bench.attributes(teacher),) * 2, "distances": (bench.distance(teacher),) * 2}
    yield Result("dense", **own, others=others(bench, "teacher", None))
    for name, recipe in bench.students.items():
        tuned, said = bench.distilled(name, recipe)
        both = [bench.drawn(f"{name} before", recipe), bench.drawn(name, tuned)]
        yield Result(
            name,
            *step_times(bench, recipe, repeats),
            (said["error_without"], said["error"]),
            tuple(map(bench.attributes, both)),
            tuple(map(bench.distance, both)),
            others(bench, name, tuned),
        )


# -- writing -------------------------------------------------------------------------------------------------


def plot(curves: Mapping[str, np.ndarray], path: Path, title: str) -> None:
    """The loss of each training against its steps, means of `SMOOTH` of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        whole = max(1, len(curve) // SMOOTH)
        parts = np.array_split(curve, whole)
        ends = np.cumsum([len(part) for part in parts])
        axes.plot(ends, [part.mean() for part in parts], label=name)
    axes.set(xlabel="steps", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    axes.set_title(title, fontsize=10)
    with atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])


def sheet(bench: Bench) -> np.ndarray:
    """Rows of pictures, middle frames of videos: the untouched model, then each student before and after."""
    names = ["teacher", *itertools.chain(*((f"{name} before", name) for name in bench.students))]
    middle = bench.size[0] // 2
    rows = [np.concatenate(bench.drawn(name, None)[:SHOWN, middle], axis=1) for name in names]
    every = np.concatenate(rows)
    side = max(1, bench.size[1] // SIDE)
    height, width = (n // side for n in every.shape[:2])
    return (
        every[: side * height, : side * width]
        .reshape(height, side, width, side, 3)
        .mean((1, 3))
        .astype(np.uint8)
    )


def main(arguments: list[str] | None = None) -> int:
    """Trains, measures and writes; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a bundled model")
    parser.add_argument("--size", type=int, nargs=3, default=(1, 256, 256), help="frames, height and width")
    parser.add_argument("--kind", choices=KINDS, help="default: image or video, as the size is")
    parser.add_argument(
        "--student", dest="students", action="append", default=[], help="one of them alone; repeat"
    )
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--batch", type=int, default=4, help="samples of a step")
    parser.add_argument("--drawn", type=int, default=512, help="scenes to train on")
    parser.add_argument("--scenes", type=int, default=48, help="captions that are drawn")
    parser.add_argument("--sampling-steps", type=int, default=8)
    parser.add_argument(
        "--transfer-size", type=int, nargs=3, action="append", default=[], help="another size to draw at"
    )
    parser.add_argument(
        "--recoloured", type=int, default=0, metavar="STEPS", help="of training of a copy to draw with, too"
    )
    parser.add_argument("--transfer-scenes", type=int, default=16, help="captions of these")
    parser.add_argument("--repeats", type=int, default=3, help="of timed calls")
    parser.add_argument("--work", type=Path, required=True, help="folder of what was done")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    here, bench = environment(), Bench.of(options.model, options)
    pictures = options.out / "students"
    check_plot(loss := pictures / f"{bench.label}-loss.png")
    others = Others(tuple(map(tuple, options.transfer_size)), options.recoloured, options.transfer_scenes)
    lines, shape = [], f"{bench.label} {'x'.join(map(str, bench.size))}"
    for one in results(bench, others, options.repeats):
        lines.append(one.cells)
        print(*lines[-1], sep=" | ", flush=True)
        values = {"block density": one.density, "step / dense": one.time,
                  "with gradients / dense": one.gradients, "error": one.errors[1],
                  "attributes before": one.attributes[0], "attributes": one.attributes[1],
                  "Frechet distance before": one.distances[0], "Frechet distance": one.distances[1],
                  **{f"attributes {name}": value for name, value in one.others.items()}}  # fmt: skip
        append(
            options.out / "students_cpu.csv",
            (row("student", one.name, metric, shape, value, here) for metric, value in values.items()),
        )
    title = f"{shape}, {options.steps} steps of {options.batch} samples"
    pictures.mkdir(parents=True, exist_ok=True)
    plot({name: bench.losses(name) for name in bench.students}, loss, title)
    media.save(pictures / f"{bench.label}.png", sheet(bench)[None])
    text = [
        "# Students side by side\n", __doc__.split("\n\n")[1] + "\n", f"{machine(here)}.\n",
        f"## {title}; {options.scenes} captions, {options.sampling_steps} sampling steps\n",
        markdown([*HEADINGS, *(f"attributes {name}" for name in one.others)], lines),
        f"![loss]({loss.name})\n",
        "Rows: the untouched model, then each student before and after.\n",
        f"![pictures]({bench.label}.png)\n",
    ]  # fmt: skip
    (pictures / f"{bench.label}.md").write_text("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
