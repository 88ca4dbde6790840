"""Above native size, every method: `python -m dit_accel.evals.benchmarks.highres tiny-flux tiny-wan`.

Bundled models draw held-out scenes of one object at 2 and 3 times their native sides (4 and 9 times the area)
by every method, each prompt from one native pass. The rule-based checker counts objects, of which exactly one
is right, and reads the captioned attributes; the first row of a table is the native size itself. Methods have
their defaults; guidance is the model's. Rows are appended to `highres_cpu.csv`; `highres_cpu.md` and, for
each model and size, a sheet of pictures, a row a method, are written anew, all under `--out`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dit_accel import highres
from dit_accel.environment import environment
from dit_accel.generation import Request, is_video, load
from dit_accel.media import to_uint8
from dit_accel.pipelines.tiny import INFO, caption, check
from dit_accel.pipelines.tiny.checker import count_objects, score
from dit_accel.pipelines.tiny.evaluate import held_out_scenes

from .table import RESULTS, append, machine, markdown, row

NATIVE = "native size"
METHODS = tuple(name for name in highres.METHODS if name != "windows")  # which is for longer videos
HEADINGS = ("method", "exactly one object", "objects", "attributes", "all of a scene", "s per scene")
_SHOWN = 4  # scenes of a sheet


@dataclass(frozen=True)
class Outcome:
    """What a method drew of all scenes.

    Attributes:
        one: share of scenes with exactly one object.
        objects: their mean number.
        attributes, scenes: share of attributes, and of scenes with all of them, that are right.
        seconds: of a scene.
        pictures: the first ones, uint8 (H, W, 3), of videos the middle frame.
    """

    method: str
    one: float
    objects: float
    attributes: float
    scenes: float
    seconds: float
    pictures: list[np.ndarray]


def scenes_of_one_object(pipe: Any, count: int) -> list[Any]:
    """Held-out scenes with one object."""
    drawn = held_out_scenes(4 * count, video=is_video(pipe))
    return [scene for scene in drawn if len(scene.objects) == 1][:count]


def measured(
    pipe: Any, model: str, method: str, scenes: Sequence[Any], sides: int, steps: int | None, keep: Path
) -> Outcome:
    """A method's outcome at so many times the native sides; `NATIVE` is the pipeline at native size."""
    frames, height, width = INFO[model].native
    pictures, seconds, video = [], 0.0, is_video(pipe)
    for index, scene in enumerate(scenes):
        request = Request(caption(scene), steps=steps, seed=index, frames=frames if video else None)
        arguments = request.with_defaults(model, "native").arguments(pipe)
        started = time.perf_counter()
        if method == NATIVE:
            result = pipe(**arguments)
        else:
            arguments |= {"width": width * sides, "height": height * sides}
            own = {"flow": "-steps", "regional": "-read"}.get(method, "")  # what they keep beside the result
            base = None if method == "direct" else keep / f"{model}-{index}{own}.safetensors"
            if method == "growing":  # whose native pass ends early
                base = None
            result = highres.generate(pipe, **arguments, method=method, keep=base)
        seconds += time.perf_counter() - started
        pictures.append(np.asarray(result.frames if video else result.images)[0])
    counts = [count_objects(picture) for picture in pictures]
    right = score([check(picture) for picture in pictures], [scene.attributes for scene in scenes])
    shown = [to_uint8(x if x.ndim == 3 else x[len(x) // 2]) for x in pictures[:_SHOWN]]
    return Outcome(
        method,
        float(np.mean([n == 1 for n in counts])),
        float(np.mean(counts)),
        float(right["mean"]),
        float(right["all_correct"]),
        seconds / len(scenes),
        shown,
    )


def cells(outcome: Outcome) -> list[str]:
    """A row of the table."""
    shares = (outcome.one, outcome.attributes, outcome.scenes)
    one, attributes, scenes = (f"{share:.0%}" for share in shares)
    return [outcome.method, one, f"{outcome.objects:.2f}", attributes, scenes, f"{outcome.seconds:.1f}"]


def csv_rows(outcome: Outcome, shape: str, here: dict) -> Iterator[dict[str, str]]:
    """Rows of the CSV."""
    for name in ("one", "objects", "attributes", "scenes", "seconds"):
        yield row("highres", outcome.method, name, shape, getattr(outcome, name), here)


def sheet(outcomes: Sequence[Outcome], side: int = 160) -> Image.Image:
    """The first scenes of each method, a row a method."""
    rows = []
    for outcome in outcomes:
        tiles = [Image.fromarray(x).resize((side, side), Image.Resampling.LANCZOS) for x in outcome.pictures]
        rows.append(np.concatenate([np.asarray(tile) for tile in tiles], axis=1))
    return Image.fromarray(np.concatenate(rows))


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", choices=INFO)
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--sides", type=int, nargs="+", default=[2, 3], help="times the native sides")
    parser.add_argument("--steps", type=int, help="of each pass; default the model's own")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--keep", type=Path, default=Path("outputs/highres"), help="folder of native results")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    here = environment()
    text = ["# Above native size\n", __doc__.partition("\n\n")[2], f"{machine(here)}.\n"]
    for model in options.models:
        pipe = load(model, torch.float32, torch.device("cpu"))
        pipe.set_progress_bar_config(disable=True)
        scenes = scenes_of_one_object(pipe, options.scenes)
        methods = [m for m in options.methods if m != "anchor" or INFO[model].family == "flux"]
        for sides in options.sides:
            outcomes = []
            shape = f"{model} x{sides}"
            for method in (NATIVE, *methods):
                found = measured(pipe, model, method, scenes, sides, options.steps, options.keep)
                outcomes.append(found)
                print(shape, *cells(found), sep=" | ", flush=True)
                append(options.out / "highres_cpu.csv", csv_rows(found, shape, here))
            text.append(f"## {model} at {sides**2} times its area, {len(scenes)} scenes\n")
            text.append(markdown(HEADINGS, map(cells, outcomes)))
            name = f"highres-{model}-x{sides}.png"
            sheet(outcomes).save(options.out / name)
            text.append(f"![From top to bottom the rows of the table]({name})\n")
            (options.out / "highres_cpu.md").write_text("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
