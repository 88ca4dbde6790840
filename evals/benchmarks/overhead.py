"""What acceleration costs beside what it saves: `python -m dit_accel.evals.benchmarks.overhead`.

Three measurements on this CPU, calls taken in turn, medians. *Dense*: what `Dense()` adds to one call of a
bundled model, whatever its size; measured at the smallest, where it shows, and at most 1% of a step at the
demo's size is the goal. *Layer*: what a sparse layer
takes beside its kernel (hooks, reordering, processor), from a pattern that covers everything at the smallest
size, where it computes the same pairs as dense attention; what the kernels themselves differ by is taken off.
*Break-even*: for densities of 0.1, 0.25 and 0.5, the number of tokens from which block-sparse attention is
faster than SDPA, with what a layer takes beside it counted. Rows are appended to
`overhead_cpu.csv` and `overhead_cpu.md` is written anew, both under `evals/results`. Exits with 1 if the goal
is missed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.environment import environment
from dit_accel.generation import load
from dit_accel.kernels import block_sparse_attention
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Clear, Dense, Pattern
from dit_accel.planning.model_config import Size, of_model
from dit_accel.runtime import switching as switch

from ..gpu_bench.steps import share
from .attention import interleaved
from .scaling import CPU, Curve, Point, Series, Setting, Timer, Times, measure
from .table import RESULTS, append, machine, markdown, row

MODEL = "tiny-flux"
SMALLEST: Size = (1, 64, 64)  # frames, height, width in pixels
ALLOWED = 0.01  # of a step
EVERYTHING = Clear(1000)
SIDES = (8, 12, 16, 24, 32, 48, 64)  # of square images in tokens
DENSITIES = (0.1, 0.25, 0.5)
POINTS = ("density", "tokens", "block density", "SDPA ms", "sparse ms", "kernel speed-up", "layer speed-up")


@dataclass(frozen=True)
class Calls:
    """One call of a model, untouched and with a pattern switched on; `layers` is how many are sparse.

    `kernels` are milliseconds of attention alone, SDPA and block-sparse, in one of them.
    """

    name: str
    layers: int
    untouched: Times
    enabled: Times
    kernels: tuple[Times, Times] | None = None

    @property
    def added(self) -> float:
        """Milliseconds that being on adds."""
        return self.enabled[1] - self.untouched[1]

    @property
    def per_layer(self) -> float:
        """The same for each sparse layer, without what its kernel takes more than SDPA."""
        if self.kernels is None:
            raise ValueError("the kernels of the layers were not measured")
        dense, sparse = self.kernels
        return self.added / self.layers - (sparse[1] - dense[1])


@dataclass(frozen=True)
class BreakEven:
    """Lengths at one density; `tokens` is None where sparse attention is not faster at the longest.

    `beside` is what a sparse layer takes beside its kernel, in milliseconds.
    """

    density: float
    curve: Curve
    beside: float

    @property
    def tokens(self) -> float | None:
        points = self.curve.points
        return crossing([p.tokens for p in points], [self.speedup(p) for p in points])

    def speedup(self, point: Point) -> float:
        """Of a layer's attention, with all it takes; less than nothing beside its kernel is noise."""
        return point.dense[1] / (point.sparse[1] + max(0.0, self.beside))

    @property
    def layer_ms(self) -> float | None:
        """SDPA's time for the smallest useful layer: the shortest measured length beyond break-even."""
        beyond = (p.dense[1] for p in self.curve.points if self.tokens and p.tokens >= self.tokens)
        return next(beyond, None)


def crossing(tokens: list[int], speedups: list[float]) -> float | None:
    """The length beyond which every speed-up is more than 1, interpolated between logarithms.

    The first length where all are faster, None where the last is not.
    """
    if speedups[-1] <= 1:
        return None
    slower = [i for i, speedup in enumerate(speedups) if speedup <= 1]
    if not slower:
        return float(tokens[0])
    last = slower[-1]
    (x0, x1), (y0, y1) = (map(math.log, values[last : last + 2]) for values in (tokens, speedups))
    return math.exp(x0 - y0 * (x1 - x0) / (y1 - y0))


# -- measuring -----------------------------------------------------------------------------------------------


def calls(pattern: Pattern, size: Size | None, timer: Timer, model: str = MODEL) -> Calls:
    """Times a bundled model against a copy that shares its weights and has a pattern switched on.

    Args:
        size: frames, height, width in pixels; None for that of the model's demo.
    """
    model_config = of_model(model)
    untouched = load(model, torch.float32, torch.device("cpu")).transformer.eval()
    enabled = share(untouched)
    generator = torch.Generator().manual_seed(0)
    grid = model_config.grid(untouched, size or model_config.size)
    inputs = model_config.inputs(untouched, grid, partial(torch.randn, generator=generator))
    with switch.accelerated(enabled, pattern) as handle:
        (binding,) = handle.bindings.values()
        times = timer(partial(untouched, **inputs), partial(enabled, **inputs))
        frames, height, width = size or model_config.size
        name = f"{model} {width}x{height}" + (f"x{frames}" if model_config.video else "")
        if not binding.sparse_layers:
            return Calls(name, 0, *times)
        mask = next(own.mask for own in binding.geometry.attentions if own is not None)
        shape = (1, binding.heads, mask.seq_len, binding.head_dim)
        q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
        kernels = timer(
            partial(scaled_dot_product_attention, q, k, v), partial(block_sparse_attention, q, k, v, mask)
        )
        return Calls(name, len(binding.sparse_layers), *times, tuple(kernels))


@cache
def disc(density: float, side: int) -> Clear:
    """A disc whose density on a square of `side` tokens is the nearest to `density` of all whole radii."""
    layout = TokenLayout((1, side, side))
    discs = (Clear(radius) for radius in range(1, 2 * side))
    return min(discs, key=lambda pattern: abs(pattern.density(layout) - density))


def break_even(
    density: float, sides: Iterable[int], setting: Setting, timer: Timer, beside: float
) -> BreakEven:
    """Times discs of one density on squares of growing size. Raises AssertionError for a wrong kernel."""
    points = []
    for side in sides:
        grids = ((1, side, side),)
        points += measure(Series(f"density {density}", disc(density, side), grids), setting, timer).points
    return BreakEven(density, Curve(Series(f"density {density}", Clear(1), ()), tuple(points)), beside)


# -- writing -------------------------------------------------------------------------------------------------


def rows(dense: Calls, layer: Calls, found: list[BreakEven], setting: Setting, here: dict) -> Iterator[dict]:
    """Rows of `overhead_cpu.csv`."""
    for kernel, of, metric in (("dense_recipe", dense, "added"), ("sparse_layer", layer, "per_layer")):
        yield row(kernel, "untouched", "ms", of.name, of.untouched, here)
        yield row(kernel, "enabled", "ms", of.name, of.enabled, here)
        yield row(kernel, "enabled", metric, of.name, getattr(of, metric), here)
    for one in found:
        for point in one.curve.points:
            shape = f"{setting.shape(point.tokens)} density {one.density}"
            yield row("break_even", "sdpa", "ms", shape, point.dense, here)
            yield row("break_even", "auto", "ms", shape, point.sparse, here)
        if one.tokens is not None:
            dtype = str(setting.dtype).removeprefix("torch.")
            shape = f"D{setting.head_dim}-{dtype} density {one.density}"
            yield row("break_even", "auto", "tokens", shape, one.tokens, here)


def report(
    dense: Calls, step: Calls, layer: Calls, found: list[BreakEven], setting: Setting, here: dict
) -> str:
    """The page `overhead_cpu.md`."""
    sizes = [
        [
            one.name,
            f"{one.untouched[1]:.2f}",
            f"{one.enabled[1]:.2f}",
            f"{dense.added / one.untouched[1]:.2%}",
        ]
        for one in (dense, step)
    ]
    goal = "met" if dense.added <= ALLOWED * step.untouched[1] else "missed"
    lengths = []
    for one in found:
        if one.tokens is None or one.layer_ms is None:
            longest = one.curve.points[-1].tokens
            lengths.append([f"{one.density}", f"more than {longest}", "", ""])
        else:
            share_of_layer = f"{layer.per_layer / one.layer_ms:.0%}"
            lengths.append(
                [f"{one.density}", f"{one.tokens:.0f}", f"{one.layer_ms:.3f}", share_of_layer],
            )
    points = [
        [f"{one.density}", str(p.tokens), f"{p.block_density:.3f}", f"{p.dense[1]:.3f}",
         f"{p.sparse[1]:.3f}", f"{p.speedup:.2f}", f"{one.speedup(p):.2f}"]
        for one in found for p in one.curve.points
    ]  # fmt: skip
    return (
        f"# The cost of being on\n\n{machine(here)}, torch {here['packages']['torch']}, commit "
        f"{here['commit']}; interleaved medians.\n\n## `Dense()` switched on\n\n"
        + markdown(("model", "untouched ms", "enabled ms", f"{dense.added:.3f} ms are"), sizes)
        + f"\nHooks do the same at every size: {dense.added:.3f} ms, measured at the smallest. The goal, "
        f"at most {ALLOWED:.0%} of a step of {step.name}, is {goal}.\n"
        f"\n## A sparse layer\n\nA pattern that covers everything adds {layer.added / layer.layers:.3f} ms "
        f"to each of the {layer.layers} layers of {layer.name}, {layer.per_layer:.3f} ms of them beside its "
        "kernel: hooks, reordering, processor.\n\n"
        f"## Break-even\n\n{setting}, discs on squares, what a layer takes beside its kernel included. Below "
        "this length dense attention is faster; the layer is the shortest measured beyond it.\n\n"
        + markdown(("density", "tokens", "SDPA ms of the layer", "what is beside the kernel"), lengths)
        + "\n"
        + markdown(POINTS, points)
    )


def main(arguments: list[str] | None = None) -> int:
    """Measures what being on costs and from which length it pays, and writes both."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.benchmarks.overhead", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--repeats", type=int, default=101, help="timed calls of each kind (default 101)")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder for the files (default {RESULTS})")
    options = parser.parse_args(arguments)
    here = environment()

    def timer(*pair: Callable) -> list[Times]:
        return interleaved(*pair, options.repeats)

    with torch.inference_mode():
        dense = calls(Dense(), SMALLEST, partial(interleaved, repeats=5 * options.repeats))
        step = calls(Dense(), None, timer)
        layer = calls(EVERYTHING, SMALLEST, timer)
        found = [break_even(density, SIDES, CPU, timer, layer.per_layer) for density in DENSITIES]
    append(options.out / "overhead_cpu.csv", rows(dense, layer, found, CPU, here))
    page = report(dense, step, layer, found, CPU, here)
    (options.out / "overhead_cpu.md").write_text(page)
    print(page)
    return int(dense.added > ALLOWED * step.untouched[1])


if __name__ == "__main__":
    sys.exit(main())
