"""Calibrated and single patterns: `python -m dit_accel.evals.benchmarks.calibrated tiny-wan --work DIR`.

At each density: `Radial` and `Neighborhood` as wide as it allows, PARO (blocks of each head along an order of
the axes) and the choice among everything, the last two calibrated on prompts that are not among those of the
runs. Whole runs are compared with the dense ones of the same seeds by PSNR and SSIM, and with their captions
by the share of attributes that are drawn. What was done is kept in --work, and the same command goes on from
there. Of one layer's size it also says what the gather into the heads' orders takes of dense attention.

Rows are appended to `calibrated_cpu.csv`, and `calibrated_cpu.md` is written anew, both under `--out`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from dit_accel import calibrate
from dit_accel.attention.head_masked import HeadRows
from dit_accel.environment import environment
from dit_accel.generation import load
from dit_accel.json_files import check_same, read_json, write_json
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.orders import AXIS_ORDERS, axes
from dit_accel.patterns import Calibrated, Pattern
from dit_accel.pipelines import family_of
from dit_accel.pipelines.tiny import caption, check, score
from dit_accel.pipelines.tiny.evaluate import generate, held_out_scenes
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated

from ..metrics.fidelity import psnr, ssim
from .attention import interleaved
from .dense_calls import Recorded, call_errors, record
from .methods import METHODS, fitted
from .table import RESULTS, append, machine, markdown, row

DENSITIES = (0.15, 0.25, 0.4)
SINGLE = ("Radial", "Neighborhood")
CALIBRATED = {"PARO": ("reordered",), "mixed": ("reordered", "static")}
HEADINGS = ("method", "wanted", "block density", "PSNR", "SSIM", "attributes")
MOST_PSNR = 100.0  # of equal pictures, whose own is infinite


@dataclass(eq=False)
class Subject:
    """A bundled model with the runs that are compared.

    Attributes:
        model: its name.
        pipe: the pipeline.
        run: options of `generate`, less prompts and seeds.
        scenes: of the runs; their seeds count from 0.
        others: scenes to calibrate on, none of which is among them.
        folder: what is kept.
    """

    model: str
    pipe: Any
    run: dict[str, Any]
    scenes: list
    others: list
    folder: Path

    @classmethod
    def of(cls, model: str, options: argparse.Namespace) -> Subject:
        pipe = load(model, torch.float32, torch.device("cpu"))
        pipe.set_progress_bar_config(disable=True)
        run = {"size": tuple(options.size), "frames": options.frames, "steps": options.steps, "guidance": 3.0}
        count = options.scenes + options.calibrated_on
        scenes = held_out_scenes(count, video=True)
        folder = options.work / model
        settings = {**run, "scenes": options.scenes, "calibrated_on": options.calibrated_on}
        if (folder / "settings.json").is_file():
            check_same(read_json(folder / "settings.json"), settings, f"{folder} was begun", "another --work")
        write_json(folder / "settings.json", settings)
        return cls(model, pipe, run, scenes[: options.scenes], scenes[options.scenes :], folder)

    # -- runs ------------------------------------------------------------------------------------------------

    def output(self, number: int) -> np.ndarray:
        """What the pipeline makes of a scene, as it is: uint8 (frames, height, width, 3)."""
        made = generate(self.pipe, prompts=[caption(self.scenes[number])], seeds=[number], **self.run)[0]
        return (made.reshape(-1, *made.shape[-3:]) * 255).round().astype(np.uint8)

    def dense(self, number: int) -> np.ndarray:
        """The same when dense; made once."""
        path = self.folder / "dense" / f"{number}.npy"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path.with_suffix(".part.npy"), self.output(number))
            path.with_suffix(".part.npy").replace(path)
        return np.load(path)

    def compared(self, name: str, recipe: Recipe | None) -> dict[str, float]:
        """A recipe's runs, None: the dense ones, against the dense ones and the captions; each made once."""
        found = [self._run(name, recipe, number) for number in range(len(self.scenes))]
        seen = [one["seen"] for one in found]
        means = {key: float(np.mean([one[key] for one in found])) for key in ("psnr", "ssim", "density")}
        return {**means, "attributes": score(seen, [scene.attributes for scene in self.scenes])["mean"]}

    def _run(self, name: str, recipe: Recipe | None, number: int) -> dict[str, Any]:
        path = self.folder / "runs" / f"{name} {number}.json"
        if path.is_file():
            return read_json(path)
        dense, density = self.dense(number), 1.0
        output = dense
        if recipe is not None:
            with accelerated(self.pipe, recipe) as handle:
                output = self.output(number)
                density = handle.stats()["block_density"]
        seen = check(output / np.float32(255))
        near = {"psnr": min(MOST_PSNR, psnr(output, dense)), "ssim": ssim(output, dense)}
        write_json(path, {**near, "density": density, "seen": seen})
        return read_json(path)

    # -- recipes ---------------------------------------------------------------------------------------------

    def recipes(self, densities: Sequence[float]) -> Iterator[tuple[str, float, Recipe]]:
        """Method, wanted density and recipe."""
        calls = self._calls()
        transformer = self.pipe.transformer
        layout = family_of(transformer).layout(transformer, calls[0].inputs, {})
        for density in densities:
            for method in METHODS:
                if method.name in SINGLE:
                    pattern = fitted(
                        method,
                        density,
                        layout,
                        lambda one: call_errors(transformer, Recipe(one), calls)[1],
                    )
                    if pattern is not None:
                        yield method.name, density, Recipe(pattern)
            for name in CALIBRATED:
                yield name, density, Recipe(self.calibrated(name, density))

    def _calls(self) -> list[Recorded]:
        """One of a dense run, by which densities are matched."""
        drawn = {"prompts": [caption(self.others[0])], "seeds": [0]}
        return record(self.pipe, [0], {**drawn, **self.run, "steps": 1})[0]

    def calibrated(self, name: str, density: float) -> Pattern:
        """Found on the other scenes; what was measured serves all densities."""
        (height, width), run = self.run["size"], self.run
        found = calibrate(
            self.pipe,
            [caption(scene) for scene in self.others],
            density=density,
            candidates=CALIBRATED[name],
            folder=self.folder / "calibration",
            seed=len(self.scenes),
            height=height,
            width=width,
            num_frames=run["frames"],
            num_inference_steps=run["steps"],
            guidance_scale=run["guidance"],
        )
        found.save(self.folder / f"{name} {density:g}.safetensors")
        return Calibrated(found)


def gather_share(layout: TokenLayout, heads: int, head_dim: int, repeats: int) -> tuple[float, float, float]:
    """Time of the gathers of q, k, v and the output into orders per head, as a share of dense attention's."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, layout.visual_len, heads, head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device="cpu").transpose(1, 2) for _ in range(3))
    known = list(AXIS_ORDERS.values())
    orders = torch.stack([axes(layout.grid, known[head % 6]) for head in range(heads)])
    rows, back = (HeadRows.of(one, range(heads), heads) for one in (orders, torch.argsort(orders)))

    def gathered() -> torch.Tensor:
        moved = [rows.enter(x) for x in (q, k, v)]
        return back.enter(moved[0])

    dense, times = interleaved(lambda: F.scaled_dot_product_attention(q, k, v), gathered, repeats)
    low, middle, high = (time / dense[1] for time in times)
    return low, middle, high


def cells(method: str, wanted: float, found: dict[str, float]) -> list[str]:
    """A row of the table."""
    quality = [f"{found['psnr']:.1f}", f"{found['ssim']:.3f}", f"{found['attributes']:.3f}"]
    return [method, f"{wanted:g}", f"{found['density']:.3f}", *quality]


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", help="bundled models of videos")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), help="height and width")
    parser.add_argument("--frames", type=int, default=29, help="with 256 x 256 pixels, 8,192 tokens")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--scenes", type=int, default=16, help="runs that are compared")
    parser.add_argument("--calibrated-on", type=int, default=2, help="other scenes")
    parser.add_argument("--repeats", type=int, default=3, help="of the timed gather")
    parser.add_argument("--work", type=Path, required=True, help="folder of what was done")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    here = environment()
    text = ["# Calibrated plans\n", __doc__.partition("\n\n")[2], f"{machine(here)}.\n"]
    for model in options.models:
        subject, lines = Subject.of(model, options), []
        lines.append(cells("dense", 1.0, subject.compared("dense", None)))
        for method, wanted, recipe in subject.recipes(options.densities):
            found = subject.compared(f"{method} {wanted:g}", recipe)
            lines.append(cells(method, wanted, found))
            print(model, *lines[-1], sep=" | ", flush=True)
            shape = f"{model} {options.frames}x{options.size[0]}x{options.size[1]} wanted {wanted:g}"
            append(
                options.out / "calibrated_cpu.csv",
                (row("run", method, name, shape, value, here) for name, value in found.items()),
            )
        config = subject.pipe.transformer.config
        layout = TokenLayout(((options.frames - 1) // 4 + 1, options.size[0] // 8, options.size[1] // 8))
        share = gather_share(layout, config.num_attention_heads, config.attention_head_dim, options.repeats)
        text.append(
            f"## {model}, {layout.visual_len:,} visual tokens, runs of {options.steps} steps, "
            f"{options.scenes} prompts, calibrated on {options.calibrated_on} others\n"
        )
        text += [markdown(HEADINGS, lines), f"The gather takes {share[1]:.1%} of dense attention.\n"]
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "calibrated_cpu.md").write_text("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
