"""The runs of a sweep: recipes and dense attention on the same prompts from the same noise, in turn.

A folder holds what was generated, without loss, as `media/{setting}/{prompt}`, and `runs.json` with the time,
densities and memory of each run. That file is written after every run, so a sweep that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel import media
from dit_accel.evals.benchmarks import memory
from dit_accel.evals.metrics.folders import Folder, Track, untracked
from dit_accel.files import digest
from dit_accel.generation import DENSE, Request, attempt
from dit_accel.json_files import check_same, plain, read_json, write_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_accel.recipe.recipe import Recipe

SCHEMA = "dit-accel/sweep-runs/1"
RUNS, MEDIA = "runs.json", "media"

Key = tuple[int, int, str]  # of a run: the prompt's index, the repeat, the setting


@dataclass(frozen=True)
class Sweep:
    """What is run, and where it is kept.

    Attributes:
        folder: of the results.
        methods: recipes by setting; the first is dense, None.
        requests: one for each prompt.
        repeats: timed runs of each setting and prompt.
        suffix: of what is generated, `.png` or `.mp4`.
        about: what else runs depend on, in JSON's terms: model, dtype, machine, versions.
        fps: frames per second of a video.
        commit: of the code, which is noted with each run.
    """

    folder: Path
    methods: dict[str, Recipe | None]
    requests: Sequence[Request]
    repeats: int
    suffix: str
    about: dict[str, Any]
    fps: int = 8
    commit: str | None = None

    @property
    def prompts(self) -> list[str]:
        return [request.prompt for request in self.requests]

    @property
    def settings(self) -> dict[str, Any]:
        """All that makes runs of two sweeps comparable, in JSON's terms."""
        shared = asdict(self.requests[0])
        return plain(
            {
                **self.about,
                **{name: value for name, value in shared.items() if name not in ("prompt", "seed")},
                "prompts": self.prompts,
                "seeds": [request.seed for request in self.requests],
                "repeats": self.repeats,
                "recipes": {name: recipe and recipe.to_dict() for name, recipe in self.methods.items()},
            }
        )

    def outputs(self, name: str) -> Folder:
        """What a setting generated, or will."""
        recipe = self.methods[name]
        files = tuple(f"{index:03d}{self.suffix}" for index in range(len(self.requests)))
        return Folder(self.folder / MEDIA / (recipe.tag if recipe else DENSE), files)

    def picture(self) -> tuple[int, int, int]:
        """Frames, height and width of what was generated."""
        return media.load(self.outputs(DENSE).files[0]).shape[:3]

    def kept(self) -> list[dict[str, Any]]:
        """The runs of an earlier process, without those whose output is missing or damaged.

        Raises:
            ValueError: runs with other settings, or a file that does not hold runs.
        """
        path = self.folder / RUNS
        if not path.exists():
            return []
        try:
            found = read_json(path)
            same_kind, settings, runs = found["schema"] == SCHEMA, found["settings"], found["runs"]
        except (ValueError, KeyError, TypeError):
            same_kind = False
        if not same_kind:
            raise ValueError(f"{path} does not hold the runs of a sweep; use another --out")
        check_same(settings, self.settings, f"the runs in {self.folder} were made", "another --out")
        return [run for run in runs if run["sha256"] is None or self._is_whole(run)]

    def _is_whole(self, run: dict[str, Any]) -> bool:
        path = self.outputs(run["setting"]).files[run["prompt"]]
        return path.is_file() and digest(path) == run["sha256"]

    def missing(self, runs: Iterable[dict[str, Any]]) -> list[Key]:
        """What is still to run, settings in turn: A B A B for each prompt."""
        there = {(run["prompt"], run["repeat"], run["setting"]) for run in runs}
        wanted = product(range(len(self.requests)), range(self.repeats), self.methods)
        return [key for key in wanted if key not in there]

    def run(self, pipe: DiffusionPipeline, track: Track = untracked) -> list[dict[str, Any]]:
        """Runs what is missing; returns all runs. The first repeat's output is kept.

        Raises:
            ValueError: see `kept`.
        """
        runs = self.kept()
        for index, repeat, name in track(self.missing(runs), "sweep"):
            work = partial(attempt, pipe, self.requests[index], self.methods[name])
            done, peak = memory.watch(work, pipe._execution_device)
            path = self.outputs(name).files[index]
            if repeat == 0:
                media.save(path, done.run.frames, self.fps, lossless=True)
            runs.append(
                {
                    "prompt": index,
                    "repeat": repeat,
                    "setting": name,
                    "seconds": done.run.seconds,
                    "step_seconds": done.run.step_seconds,
                    "step_seconds_median": done.run.median_step_seconds,
                    "warm_up_seconds": done.warm_up_seconds,
                    "peak_memory_bytes": peak,
                    **done.densities,
                    "sha256": digest(path) if repeat == 0 else None,
                    "commit": self.commit,
                }
            )
            write_json(self.folder / RUNS, {"schema": SCHEMA, "settings": self.settings, "runs": runs})
        return runs
