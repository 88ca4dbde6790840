"""Students of a bundled model: which there are, and their training and drawing, each done once."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel import distill, media
from dit_accel.distillation.run import SAMPLES, state_beside
from dit_accel.files import atomic
from dit_accel.generation import load
from dit_accel.json_files import check_same, read_json, write_json
from dit_accel.patterns import Agent, Clear, InLine, Radial, SparseLinear, VideoSparse
from dit_accel.pipelines.tiny import caption, check, render, score
from dit_accel.pipelines.tiny.evaluate import generate, held_out_scenes
from dit_accel.pipelines.tiny.scene_folder import write_scenes
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated
from dit_accel.scorers.pretrained import Sources

from ..metrics.distribution import frechet
from ..metrics.features import Scenes
from .recoloured import exchanged, recoloured

KINDS: dict[str, tuple[dict[str, Recipe], dict[str, Any]]] = {  # with options of training
    "image": (
        {
            "CLEAR": Recipe(Clear(6)),
            "CLEAR with pooled keys": Recipe(Clear(4, downsample=4)),
            "sparse-linear": Recipe(SparseLinear(top_k=0.1, block_size=(16, 16))),
            "VSA": Recipe(VideoSparse(top_k=0.1, cube=(1, 4, 4))),
            "agents": Recipe(Agent((1, 4, 4))),
            "InLine": Recipe(InLine()),
        },
        {"rank": None},
    ),
    "video": (
        {
            "sparse-linear": Recipe(SparseLinear(top_k=0.2, block_size=(16, 16))),
            "VSA": Recipe(VideoSparse(top_k=0.1, cube=(2, 4, 4))),
            "agents": Recipe(Agent((2, 4, 4))),
            "InLine": Recipe(InLine()),
        },
        # the teacher's prediction has no noise, and true scenes all the more
        {"rank": None, "flow": 0.1, "prediction": 1.0, "attention": 0.0},
    ),
    "longer": (
        {
            "radial": Recipe(Radial(0.2, block_size=16, first_frame_sink=True)),
            "all pairs": Recipe(Clear(1000)),
        },
        {"rank": 16, "prediction": 0.0, "attention": 0.0},  # the model itself is no teacher there
    ),
}
TRAINED = {"rate": 1e-3, "save_every": 50}


@dataclass(eq=False)
class Bench:
    """A bundled model, what its students are trained on and what they are measured by.

    Attributes:
        model: its name.
        kind: of `KINDS`.
        pipe: the pipeline.
        run: options of `generate`, less prompts, seeds and size.
        size: frames, height, width in pixels.
        scenes: whose captions are drawn; their seeds count from 0.
        steps: of training.
        batch: samples of a step of it.
        folder: what is kept.
        chosen: names of students; empty: all of the kind.
    """

    model: str
    kind: str
    pipe: Any
    run: dict[str, Any]
    size: tuple[int, int, int]
    scenes: list
    steps: int
    batch: int
    folder: Path
    chosen: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: str, options: argparse.Namespace) -> Bench:
        pipe = _pipe(model)
        size, run = tuple(options.size), {"steps": options.sampling_steps, "guidance": 3.0}
        kind = options.kind or ("video" if size[0] > 1 else "image")
        chosen = tuple(options.students)
        if unknown := [name for name in chosen if name not in KINDS[kind][0]]:
            raise ValueError(
                f"students of the kind {kind!r} are {', '.join(KINDS[kind][0])}, got {unknown[0]!r}"
            )
        folder = options.work / (f"{model}-longer" if kind == "longer" else model)
        settings = {
            "kind": kind,
            "size": list(size),
            "sampling_steps": run["steps"],
            "guidance": run["guidance"],
        }
        settings |= {"steps": options.steps, "batch": options.batch, "drawn": options.drawn}
        if (folder / "settings.json").is_file():
            check_same(read_json(folder / "settings.json"), settings, f"{folder} was begun", "another --work")
        write_json(folder / "settings.json", settings)
        scenes = held_out_scenes(options.scenes, video=size[0] > 1)
        if not (folder / "drawn" / "metadata.jsonl").is_file():
            write_scenes(model, folder / "drawn", options.drawn, size)
        return cls(model, kind, pipe, run, size, scenes, options.steps, options.batch, folder, chosen)

    @property
    def students(self) -> Mapping[str, Recipe]:
        every = KINDS[self.kind][0]
        return {name: every[name] for name in self.chosen or every}

    @property
    def label(self) -> str:
        return self.folder.name

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        frames, height, width = self.size
        call = {"height": height, "width": width, "num_inference_steps": self.run["steps"]}
        return call | ({"num_frames": frames} if frames > 1 else {})

    # -- training --------------------------------------------------------------------------------------------

    def distilled(self, name: str, recipe: Recipe) -> tuple[Recipe, dict[str, Any]]:
        """The recipe with its adapter, and what was said of it; trained once."""
        out, kept = self.folder / name, self.folder / "samples"
        own = state_beside(out) / SAMPLES
        if kept.is_dir() and not own.exists():
            shutil.copytree(kept, own)
        said = distill(
            self.pipe,
            recipe,
            self.folder / "drawn",
            out,
            call=self.call,
            log=self.folder / f"{name} log",
            progress=True,
            steps=self.steps,
            batch=self.batch,
            at_once=self.batch,
            **TRAINED,
            **KINDS[self.kind][1],
        )
        if not kept.exists():
            shutil.copytree(own, kept)
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

    def recoloured(self, steps: int) -> Any:
        """A copy of the pipeline that is fine-tuned to draw in exchanged colours."""
        drawn, out = self.folder / "drawn", self.folder / "recoloured"
        return _pipe(recoloured(_pipe(self.model), drawn, out, self.call, steps, self.batch))

    def attributes(self, pictures: np.ndarray) -> float:
        """The share of the captions' attributes that are in them."""
        seen = [check((one if len(one) > 1 else one[0]) / np.float32(255)) for one in pictures]
        return score(seen, [scene.attributes for scene in self.scenes[: len(pictures)]])["mean"]

    def distance(self, pictures: np.ndarray) -> float:
        """The Fréchet distance of their middle frames to the scenes of the captions."""
        frames, height, width = pictures.shape[1:4]
        true = [
            media.to_uint8(render(scene, height, width, frames)).reshape(frames, height, width, 3)
            for scene in self.scenes[: len(pictures)]
        ]
        extractor = _extractor()
        return frechet(*(extractor([one[frames // 2] for one in some]) for some in (pictures, true)))


@dataclass(frozen=True)
class Others:
    """Attributes elsewhere: at sizes that were not trained on, and of a fine-tuned copy of the model.

    Attributes:
        sizes: frames, height, width in pixels.
        recoloured: steps of the copy's training; 0: there is none.
        count: scenes of each.
    """

    sizes: tuple[tuple[int, int, int], ...] = ()
    recoloured: int = 0
    count: int = 16

    def __call__(self, bench: Bench, name: str, recipe: Recipe | None) -> dict[str, float]:
        found = {}
        for size in self.sizes:
            pictures = bench.drawn(name, recipe, size, count=self.count)
            found[f"at {'x'.join(map(str, size[size[0] == 1 :]))}"] = bench.attributes(pictures)
        if self.recoloured:
            copy = bench.recoloured(self.recoloured)
            pictures = bench.drawn(f"{name} recoloured", recipe, pipe=copy, count=self.count)
            found["of a tuned copy"] = bench.attributes(exchanged(pictures, back=True))
        return found


def _pipe(model: str | Path) -> Any:
    pipe = load(str(model), torch.float32, torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def _extractor() -> Scenes:
    return Scenes(Sources(), torch.device("cpu"))
