"""How time grows with the number of tokens: `python -m dit_accel.evals.benchmarks.scaling`, or `make bench`.

Every series holds a pattern (a window or a disc of fixed size, radial attention, dense) on 1, 2, 4 and 8
times as many tokens and times block-sparse attention against SDPA, A B A B, medians. The exponent of a
series is the slope of the least-squares line through (log tokens, log milliseconds): about 1 where every
token has as many keys as before, 2 for dense attention, between them for radial attention. The exponent of
the pattern's own pairs is given beside it. The kernel is checked at the shortest length and not timed if it
is wrong. Rows are appended to `scaling_cpu.csv`; `scaling_cpu.md` and `scaling_cpu.png` are written anew,
all under `evals/results`. Exits with 1 if a kernel is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import linear_regression

import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.environment import environment
from dit_accel.kernels import block_sparse_attention
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Clear, Dense, Neighborhood, Pattern, Radial
from dit_accel.plots import check_plot

from .attention import cheapest_mask, excess_error, interleaved
from .table import RESULTS, append, machine, markdown, row

Times = tuple[float, float, float]  # milliseconds: the 20%, 50% and 80% quantiles
Timer = Callable[..., list[Times]]  # of calls that are taken in turn
POINTS = ("pattern", "tokens", "density", "block density", "SDPA ms", "sparse ms", "speed-up")
EXPONENTS = ("pattern", "time", "pairs", "SDPA time")


@dataclass(frozen=True)
class Series:
    """A pattern on grids (F, H, W) of 1, 2, 4 and 8 times as many tokens."""

    name: str
    pattern: Pattern
    grids: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Setting:
    """What all series of a device have in common."""

    device: str
    dtype: torch.dtype
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.heads} heads x {self.head_dim}, {str(self.dtype).removeprefix('torch.')}"

    def shape(self, tokens: int) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"B1-H{self.heads}-N{tokens}-D{self.head_dim}-{dtype}"


CPU = Setting("cpu", torch.float32, 4, 64)
_CPU_IMAGES = ((1, 32, 64), (1, 64, 64), (1, 64, 128), (1, 128, 128))
CPU_SERIES = (
    Series("neighborhood 15x15", Neighborhood(15), _CPU_IMAGES),
    Series("CLEAR r=8", Clear(8), _CPU_IMAGES),
    Series("radial", Radial(0.95, block_size=16), tuple((frames, 16, 16) for frames in (8, 16, 32, 64))),
    Series("dense", Dense(), _CPU_IMAGES),
)


@dataclass(frozen=True)
class Point:
    """One length of a series."""

    tokens: int
    density: float
    block_density: float
    dense: Times
    sparse: Times

    @property
    def speedup(self) -> float:
        return self.dense[1] / self.sparse[1]


@dataclass(frozen=True)
class Curve:
    """What a series measured."""

    series: Series
    points: tuple[Point, ...]

    @property
    def exponents(self) -> tuple[float, float, float]:
        """Of the time of block-sparse attention, of the pattern's pairs, and of SDPA's time."""
        tokens = [point.tokens for point in self.points]
        return (
            exponent(tokens, [point.sparse[1] for point in self.points]),
            exponent(tokens, [point.density * point.tokens**2 for point in self.points]),
            exponent(tokens, [point.dense[1] for point in self.points]),
        )


def exponent(tokens: list[int], values: list[float]) -> float:
    """p of the least-squares fit log(value) = p log(tokens) + c."""
    return linear_regression([math.log(n) for n in tokens], [math.log(value) for value in values]).slope


# -- measuring -----------------------------------------------------------------------------------------------


def measure(series: Series, setting: Setting, timer: Timer) -> Curve:
    """Check at the shortest length, then time every length. Raises AssertionError for a wrong kernel."""
    points = []
    for grid in series.grids:
        mask = cheapest_mask(series.pattern, TokenLayout(grid), setting.device)
        generator = torch.Generator(setting.device).manual_seed(0)
        shape = (1, setting.heads, mask.seq_len, setting.head_dim)
        like = {"device": setting.device, "dtype": setting.dtype, "generator": generator}
        q, k, v = (torch.randn(shape, **like) for _ in range(3))
        if not points and not (error := excess_error(q, k, v, mask)) <= 1:
            raise AssertionError(f"{series.name}: error {error:.2f} times what is allowed, not timed")
        times = timer(
            partial(scaled_dot_product_attention, q, k, v), partial(block_sparse_attention, q, k, v, mask)
        )
        points.append(Point(mask.seq_len, mask.density, mask.block_density, *times))
    return Curve(series, tuple(points))


def run(all_series: tuple[Series, ...], setting: Setting, timer: Timer, out: Path, here: dict) -> int:
    """Measures and publishes; the number of series whose kernel is wrong."""
    curves, wrong = [], 0
    for series in all_series:
        try:
            curves.append(measure(series, setting, timer))
        except AssertionError as error:
            print(error, file=sys.stderr, flush=True)
            wrong += 1
            continue
        append(out / f"scaling_{setting.device}.csv", rows(curves[-1], setting, here))
        time, pairs, dense = curves[-1].exponents
        print(f"{series.name}: time ~ n^{time:.2f}, pairs ~ n^{pairs:.2f}, SDPA ~ n^{dense:.2f}", flush=True)
    if curves:
        (out / f"scaling_{setting.device}.md").write_text(report(curves, setting, here))
        plot(curves, setting, out / f"scaling_{setting.device}.png", machine(here, setting.device))
    return wrong


# -- writing -------------------------------------------------------------------------------------------------


def rows(curve: Curve, setting: Setting, here: dict) -> Iterator[dict[str, str]]:
    """Rows of the CSV: per length and, of the fit, per series."""
    write = partial(row, "scaling", here=here, device=setting.device)
    for point in curve.points:
        shape = f"{setting.shape(point.tokens)} {curve.series.name}"
        yield write("sdpa", "ms", shape, point.dense)
        yield write("auto", "ms", shape, point.sparse)
        for metric in ("density", "block_density", "speedup"):
            yield write("auto", metric, shape, getattr(point, metric))
    time, pairs, dense = curve.exponents
    yield write("auto", "exponent", curve.series.name, time)
    yield write("auto", "pairs_exponent", curve.series.name, pairs)
    yield write("sdpa", "exponent", curve.series.name, dense)


def report(curves: list[Curve], setting: Setting, here: dict) -> str:
    """The Markdown page: exponents, picture, every length."""
    name = f"scaling_{setting.device}"
    fits = [[curve.series.name, *(f"{value:.2f}" for value in curve.exponents)] for curve in curves]
    cells = [
        [curve.series.name, str(p.tokens), f"{p.density:.3f}", f"{p.block_density:.3f}", f"{p.dense[1]:.3g}",
         f"{p.sparse[1]:.3g}", f"{p.speedup:.2f}"]
        for curve in curves for p in curve.points
    ]  # fmt: skip
    return (
        "# Attention time against the number of tokens\n\n"
        f"{machine(here, setting.device)}, torch {here['packages']['torch']}, commit {here['commit']}; "
        f"{setting}, interleaved medians.\n\nFitted exponents p of n^p, n the number of tokens:\n\n"
        f"{markdown(EXPONENTS, fits)}\n![time against tokens]({name}.png)\n\n{markdown(POINTS, cells)}"
    )


def plot(curves: list[Curve], setting: Setting, path: Path, title: str) -> None:
    """Time against tokens, both logarithmic: a line per pattern, SDPA's dashed, bars from 20% to 80%."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    lines = [(c.series.name, c, "sparse", c.exponents[0], "-") for c in curves]
    lines.append(("SDPA", curves[-1], "dense", curves[-1].exponents[2], "--"))
    for (name, curve, which, power, style), marker in zip(lines, "osD^vPX*", strict=False):
        tokens = [point.tokens for point in curve.points]
        low, middle, high = zip(*(getattr(point, which) for point in curve.points), strict=True)
        spread = [[m - x for m, x in zip(middle, low, strict=True)],
                  [x - m for m, x in zip(middle, high, strict=True)]]  # fmt: skip
        label = f"{name}: $n^{{{power:.2f}}}$"
        axes.errorbar(tokens, middle, spread, ls=style, marker=marker, ms=6, capsize=3, label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens n", ylabel="milliseconds")
    ticks = sorted({point.tokens for point in curves[0].points})
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(title="time of one layer's attention", frameon=False)
    axes.set_title(f"{setting}\n{title}", fontsize=10)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    """Times attention at growing lengths and writes the results."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.benchmarks.scaling", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each kind (default 5)")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder for the files (default {RESULTS})")
    options = parser.parse_args(arguments)

    check_plot(options.out / f"scaling_{CPU.device}.png")

    def timer(*pair: Callable) -> list[Times]:
        return interleaved(*pair, options.repeats)

    with torch.inference_mode():
        return int(run(CPU_SERIES, CPU, timer, options.out, environment()) > 0)


if __name__ == "__main__":
    sys.exit(main())
