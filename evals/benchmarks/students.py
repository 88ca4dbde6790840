"""Distilled students side by side: `python -m dit_accel.evals.benchmarks.students tiny-flux --work DIR`.

Each pattern of `IMAGE` or `VIDEO` is distilled from the model for as many steps, on the same drawn scenes, by
`dit_accel.distill`; then it draws held-out captions, before and after, and the untouched model does too.
Said of each: the time of a step, the share of the captions' attributes that are drawn, and the Fréchet
distance to the captions' own scenes by the features of the bundled encoder. `--transfer-size`: the same
adapters at a size that they were not trained on; `--tuned`: on a pipeline folder, a fine-tuned copy of the
model. What was done is kept in --work, and the same command goes on from there.

Rows are appended to `students_cpu.csv`, `students_cpu.md` is written anew, and pictures and curves of the
loss go to `students/`, all under `--out`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel import distill, media
from dit_accel.environment import environment
from dit_accel.files import atomic
from dit_accel.generation import load
from dit_accel.json_files import check_same, read_json, write_json
from dit_accel.patterns import Agent, Clear, InLine, SparseLinear, VideoSparse
from dit_accel.pipelines.tiny import caption, world_of
from dit_accel.pipelines.tiny.checker import score
from dit_accel.pipelines.tiny.evaluate import generate, held_out_scenes
from dit_accel.pipelines.tiny.scene_folder import write_scenes
from dit_accel.plots import check_plot
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated
from dit_accel.scorers.pretrained import Sources

from ..metrics.distribution import frechet
from ..metrics.features import Scenes
from .attention import interleaved
from .dense_calls import call_errors, called, record
from .table import RESULTS, append, machine, markdown, row

IMAGE = {
    "CLEAR": Recipe(Clear(6)),
    "CLEAR with pooled keys": Recipe(Clear(4, downsample=4)),
    "sparse-linear": Recipe(SparseLinear(top_k=0.1, block_size=(16, 16))),
    "VSA": Recipe(VideoSparse(top_k=0.1, cube=(1, 4, 4))),
    "agents": Recipe(Agent((1, 4, 4))),
    "InLine": Recipe(InLine()),
}
VIDEO = {
    "sparse-linear": Recipe(SparseLinear(top_k=0.1, block_size=(16, 16))),
    "VSA": Recipe(VideoSparse(top_k=0.1)),
    "agents": Recipe(Agent((2, 4, 4))),
    "InLine": Recipe(InLine()),
}
TRAINED = {"rank": None, "rate": 1e-3, "save_every": 50}
HEADINGS = ("student", "block density", "step / dense", "error before", "error after", "attributes before",
            "attributes after", "Fréchet before", "Fréchet after")  # fmt: skip
SMOOTH = 20  # steps that a point of a curve is the mean of
SHOWN = 6  # pictures in a row of the sheet


@dataclass(eq=False)
class Bench:
    """A bundled model, what its students are trained on and what they are measured by.

    Attributes:
        model: its name.
        pipe: the pipeline.
        run: options of `generate`, less prompts, seeds and size.
        size: frames, height, width in pixels.
        scenes: whose captions are drawn; their seeds count from 0.
        steps: of training.
        batch: samples of a step of it.
        folder: what is kept.
    """

    model: str
    pipe: Any
    run: dict[str, Any]
    size: tuple[int, int, int]
    scenes: list
    steps: int
    batch: int
    folder: Path

    @classmethod
    def of(cls, model: str, options: argparse.Namespace) -> Bench:
        pipe = _pipe(model)
        size, run = tuple(options.size), {"steps": options.sampling_steps, "guidance": 3.0}
        folder = options.work / model
        settings = {"size": list(size), "sampling_steps": run["steps"], "guidance": run["guidance"]}
        settings |= {"steps": options.steps, "batch": options.batch, "drawn": options.drawn}
        if (folder / "settings.json").is_file():
            check_same(read_json(folder / "settings.json"), settings, f"{folder} was begun", "another --work")
        write_json(folder / "settings.json", settings)
        scenes = held_out_scenes(options.scenes, video=size[0] > 1, world=world_of(pipe))
        if not (folder / "drawn" / "metadata.jsonl").is_file():
            write_scenes(model, folder / "drawn", options.drawn, size)
        return cls(model, pipe, run, size, scenes, options.steps, options.batch, folder)

    @property
    def students(self) -> Mapping[str, Recipe]:
        return VIDEO if self.size[0] > 1 else IMAGE

    # -- training --------------------------------------------------------------------------------------------

    def distilled(self, name: str, recipe: Recipe) -> tuple[Recipe, dict[str, Any]]:
        """The recipe with its adapter, and what was said of it; trained once."""
        out = self.folder / name
        frames, height, width = self.size
        call = {"height": height, "width": width, "num_inference_steps": self.run["steps"]}
        call |= {"num_frames": frames} if frames > 1 else {}
        said = distill(
            self.pipe,
            recipe,
            self.folder / "drawn",
            out,
            call=call,
            log=self.folder / f"{name} log",
            progress=True,
            steps=self.steps,
            batch=self.batch,
            at_once=self.batch,
            **TRAINED,
        )
        return replace(recipe, adapter=str(out)), said

    def losses(self, name: str) -> np.ndarray:
        """Of a training, (steps,)."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        log = EventAccumulator(str(self.folder / f"{name} log"), {"scalars": 0})
        log.Reload()
        last = {event.step: event.value for event in log.Scalars("loss")}  # going on says them anew
        return np.array([last[step] for step in sorted(last)])

    # -- drawing ---------------------------------------------------------------------------------------------

    def drawn(
        self,
        name: str,
        recipe: Recipe | None,
        size: tuple[int, int, int] | None = None,
        pipe: Any = None,
        count: int | None = None,
    ) -> np.ndarray:
        """Held-out scenes as a pipeline draws them, uint8 (scenes, frames, height, width, 3); made once."""
        size, scenes = size or self.size, self.scenes[:count]
        path = self.folder / "pictures" / f"{name} {'x'.join(map(str, size))}.npy"
        if path.is_file() and len(found := np.load(path)) == len(scenes):
            return found
        made = []
        with nullcontext() if recipe is None else accelerated(pipe or self.pipe, recipe):
            for start in range(0, len(scenes), 8):
                numbers = range(start, min(start + 8, len(scenes)))
                pixels = generate(
                    pipe or self.pipe,
                    [caption(scenes[number]) for number in numbers],
                    list(numbers),
                    size=size[1:],
                    frames=size[0],
                    **self.run,
                )
                made.append((pixels.reshape(len(numbers), *size, 3) * 255).round().astype(np.uint8))
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(made))
        return np.load(path)

    def attributes(self, pictures: np.ndarray) -> float:
        """The share of the captions' attributes that are in them."""
        world = world_of(self.pipe)
        seen = [world.check((one if len(one) > 1 else one[0]) / np.float32(255)) for one in pictures]
        return score(seen, [scene.attributes for scene in self.scenes[: len(pictures)]])["mean"]

    def distance(self, pictures: np.ndarray) -> float:
        """The Fréchet distance of their middle frames to the scenes of the captions."""
        frames, height, width = pictures.shape[1:4]
        world = world_of(self.pipe)
        true = [
            media.to_uint8(world.render(scene, height, width, frames)).reshape(frames, height, width, 3)
            for scene in self.scenes[: len(pictures)]
        ]
        extractor = _extractor()
        return frechet(*(extractor([one[frames // 2] for one in some]) for some in (pictures, true)))


@dataclass(frozen=True)
class Result:
    """A student, or the untouched model; errors and distances before and after training.

    Attributes:
        density: pairs in computed blocks, as a share of all.
        time: of a call, as a share of a dense one's.
        errors: of the prediction on held-out samples, mean squared distance to the teacher's.
        attributes, distances: of what is drawn, before and after.
    """

    name: str
    density: float = 1.0
    time: tuple[float, float, float] = (1.0, 1.0, 1.0)
    errors: tuple[float, float] = (0.0, 0.0)
    attributes: tuple[float, float] = (0.0, 0.0)
    distances: tuple[float, float] = (0.0, 0.0)
    others: dict[str, float] = field(default_factory=dict)

    @property
    def cells(self) -> list[str]:
        errors = [f"{value:.4f}" for value in self.errors]
        drawn = [f"{value:.3f}" for value in self.attributes] + [f"{value:.2f}" for value in self.distances]
        return [self.name, f"{self.density:.3f}", f"{self.time[1]:.2f}", *errors, *drawn,
                *(f"{value:.3f}" for value in self.others.values())]  # fmt: skip


def _pipe(model: str | Path) -> Any:
    pipe = load(str(model), torch.float32, torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def _extractor() -> Scenes:
    return Scenes(Sources(), torch.device("cpu"))


def step_time(bench: Bench, recipe: Recipe, repeats: int) -> tuple[float, tuple[float, float, float]]:
    """Block density of a call under a recipe, and its time as a share of a dense one's."""
    frames, *size = bench.size
    run = {**bench.run, "size": tuple(size), "frames": frames, "steps": 2}
    calls, _ = record(bench.pipe, [0], {"prompts": [caption(bench.scenes[0])], "seeds": [0], **run})
    inputs, later = calls[0].inputs, itertools.count()
    twin = copy.deepcopy(bench.pipe.transformer)
    density = call_errors(bench.pipe.transformer, recipe, calls)[1]
    with accelerated(bench.pipe.transformer, recipe):
        dense, times = interleaved(
            lambda: called(twin, inputs),
            lambda: called(bench.pipe.transformer, {**inputs, "timestep": inputs["timestep"] - next(later)}),
            repeats,
        )
    low, middle, high = (time / dense[1] for time in times)
    return density, (low, middle, high)


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
            *step_time(bench, recipe, repeats),
            (said["error_without"], said["error"]),
            tuple(map(bench.attributes, both)),
            tuple(map(bench.distance, both)),
            others(bench, name, tuned),
        )


@dataclass(frozen=True)
class Others:
    """Attributes elsewhere: at sizes that were not trained on, and of a fine-tuned copy of the model.

    Attributes:
        sizes: frames, height, width in pixels.
        tuned: pipeline folder of a copy.
        count: scenes of each.
    """

    sizes: tuple[tuple[int, int, int], ...] = ()
    tuned: Path | None = None
    count: int = 16

    def __call__(self, bench: Bench, name: str, recipe: Recipe | None) -> dict[str, float]:
        found = {}
        for size in self.sizes:
            pictures = bench.drawn(name, recipe, size, count=self.count)
            found[f"at {'x'.join(map(str, size[size[0] == 1 :]))}"] = bench.attributes(pictures)
        if self.tuned is not None:
            pictures = bench.drawn(f"{name} tuned", recipe, pipe=_pipe(self.tuned), count=self.count)
            found["on a tuned copy"] = bench.attributes(pictures)
        return found


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
    return np.concatenate(rows)


def main(arguments: list[str] | None = None) -> int:
    """Trains, measures and writes; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a bundled model")
    parser.add_argument("--size", type=int, nargs=3, default=(1, 256, 256), help="frames, height and width")
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--batch", type=int, default=4, help="samples of a step")
    parser.add_argument("--drawn", type=int, default=512, help="scenes to train on")
    parser.add_argument("--scenes", type=int, default=48, help="captions that are drawn")
    parser.add_argument("--sampling-steps", type=int, default=8)
    parser.add_argument(
        "--transfer-size", type=int, nargs=3, action="append", default=[], help="another size to draw at"
    )
    parser.add_argument("--tuned", type=Path, help="pipeline folder of a fine-tuned copy of the model")
    parser.add_argument("--transfer-scenes", type=int, default=16, help="captions of these")
    parser.add_argument("--repeats", type=int, default=3, help="of timed calls")
    parser.add_argument("--work", type=Path, required=True, help="folder of what was done")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    pictures = options.out / "students"
    check_plot(pictures / f"{options.model}-loss.png")
    here, bench = environment(), Bench.of(options.model, options)
    others = Others(tuple(map(tuple, options.transfer_size)), options.tuned, options.transfer_scenes)
    lines, shape = [], f"{options.model} {'x'.join(map(str, bench.size))}"
    for one in results(bench, others, options.repeats):
        lines.append(one.cells)
        print(*lines[-1], sep=" | ", flush=True)
        values = {"block density": one.density, "step / dense": one.time, "error": one.errors[1],
                  "attributes before": one.attributes[0], "attributes": one.attributes[1],
                  "Frechet distance before": one.distances[0], "Frechet distance": one.distances[1],
                  **{f"attributes {name}": value for name, value in one.others.items()}}  # fmt: skip
        append(
            options.out / "students_cpu.csv",
            (row("student", one.name, metric, shape, value, here) for metric, value in values.items()),
        )
    title = f"{shape}, {options.steps} steps of {options.batch} samples"
    pictures.mkdir(parents=True, exist_ok=True)
    plot({name: bench.losses(name) for name in bench.students}, pictures / f"{options.model}-loss.png", title)
    media.save(pictures / f"{options.model}.png", sheet(bench)[None])
    text = [
        "# Students side by side\n", __doc__.partition("\n\n")[2], f"{machine(here)}.\n",
        f"## {title}; {options.scenes} captions, {options.sampling_steps} sampling steps\n",
        markdown([*HEADINGS, *(f"attributes {name}" for name in one.others)], lines),
        f"![loss](students/{options.model}-loss.png)\n",
        "Rows: the untouched model, then each student before and after.\n",
        f"![pictures](students/{options.model}.png)\n",
    ]  # fmt: skip
    (options.out / "students_cpu.md").write_text("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
