"""Times block-sparse attention against SDPA on this CPU: `make bench`.

    python -m dit_accel.evals.benchmarks.attention

One run, A B A B: every case calls the two in turn and takes medians. A kernel is first checked against
float64 on sampled queries (error at most twice that of plain attention in the same dtype, plus eps) and
is not timed if it fails. Rows are appended to `bench_cpu.csv` as they are measured, the table goes to
`bench_cpu.md` at the end, both under `evals/results`; `--quick` runs the shorter sequence only, a few
times, and writes nothing without `--out`. Exits with 1 if a check or a goal fails.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.environment import environment
from dit_accel.kernels import block_sizes, block_sparse_attention
from dit_accel.masks.block_mask import BlockMask
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.plot import rows_of
from dit_accel.patterns import Clear, Neighborhood, Pattern, Radial

from .mask_building import GIBIBYTES, SECONDS, measure_masks
from .table import RESULTS, append, markdown, row

CSV = "bench_cpu.csv"
HEADS, HEAD_DIM = 4, 64
DTYPES = (torch.float32, torch.bfloat16)
EFFICIENCY = 0.7  # least speed-up x block density
PADDING = {0.1: 2.2, 0.25: 1.6, 0.5: 1.3}  # most block density / density
SPEEDUP = {0.1: 3.5, 0.25: 2.0}  # least speed-up at LONG tokens
LONG = 16_384


@dataclass(frozen=True)
class Case:
    """A pattern on a grid; `near` is the nominal density its goals go by."""

    near: float
    pattern: Pattern
    grid: tuple[int, int, int]

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.grid)

    @property
    def name(self) -> str:
        pattern = self.pattern
        if isinstance(pattern, Clear):
            detail = f"CLEAR r={pattern.radius}"
        elif isinstance(pattern, Neighborhood):
            detail = f"neighborhood {pattern.window}".replace(", ", "x")
        else:
            detail = f"radial decay={pattern.decay_factor} cell={pattern.block_size}"
        return f"{detail} on {'x'.join(map(str, self.grid))}"


CASES = (
    Case(0.1, Clear(18), (1, 64, 128)),
    Case(0.25, Clear(30), (1, 64, 128)),
    Case(0.5, Clear(47), (1, 64, 128)),
    Case(0.1, Neighborhood(29), (1, 64, 128)),
    Case(0.25, Neighborhood(45), (1, 64, 128)),
    Case(0.5, Neighborhood(63), (1, 64, 128)),
    Case(0.1, Radial(0.8, block_size=16), (64, 8, 16)),
    Case(0.25, Radial(0.8, block_size=32), (32, 16, 16)),
    Case(0.5, Radial(0.95, block_size=32), (16, 16, 32)),
    Case(0.1, Clear(25), (1, 128, 128)),
    Case(0.25, Clear(42), (1, 128, 128)),
    Case(0.5, Clear(65), (1, 128, 128)),
    Case(0.1, Neighborhood((7, 15, 15)), (16, 32, 32)),
    Case(0.25, Neighborhood((9, 21, 21)), (16, 32, 32)),
    Case(0.5, Neighborhood((11, 27, 27)), (16, 32, 32)),
    Case(0.1, Radial(0.5, block_size=16), (64, 16, 16)),
    Case(0.25, Radial(0.6, block_size=32), (32, 16, 32)),
    Case(0.5, Radial(0.8, block_size=64), (16, 32, 32)),
)


@dataclass(frozen=True)
class Result:
    """What one case in one dtype measured: times in milliseconds, (20%, 50%, 80%)."""

    case: Case
    dtype: torch.dtype
    block_size: tuple[int, int]
    density: float
    block_density: float
    dense: tuple[float, float, float]
    sparse: tuple[float, float, float]

    @property
    def speedup(self) -> float:
        return self.dense[1] / self.sparse[1]

    @property
    def efficiency(self) -> float:
        """Speed-up x block density: 1 if a computed block costs what it costs in dense attention."""
        return self.speedup * self.block_density

    @property
    def padding(self) -> float:
        """Block density / density: computed pairs per wanted pair."""
        return self.block_density / self.density

    def missed(self) -> list[str]:
        """The goals this result does not reach."""
        missed = []
        if self.efficiency < EFFICIENCY:
            missed.append(f"speed-up x block density < {EFFICIENCY}")
        if self.padding > PADDING[self.case.near]:
            missed.append(f"block density > {PADDING[self.case.near]} x density")
        if self.case.layout.seq_len >= LONG and self.speedup < SPEEDUP.get(self.case.near, 0):
            missed.append(f"speed-up < {SPEEDUP[self.case.near]}")
        return missed

    def cells(self) -> list[str]:
        """The row of the table."""
        return [
            self.case.name,
            str(self.case.layout.seq_len),
            str(self.dtype).removeprefix("torch."),
            "x".join(map(str, self.block_size)),
            f"{self.density:.3f}",
            f"{self.block_density:.3f}",
            f"{self.padding:.2f}",
            f"{self.dense[1]:.0f}",
            f"{self.sparse[1]:.0f}",
            f"{self.speedup:.2f}",
            f"{self.efficiency:.2f}",
            ", ".join(self.missed()) or "pass",
        ]


HEADINGS = ("pattern", "S", "dtype", "blocks", "density", "block density", "ratio", "SDPA ms", "sparse ms",
            "speed-up", "speed-up x block density", "goals")  # fmt: skip
MASK_HEADINGS = ("mask", "pattern", "block size", "density", "block density", "seconds", "GiB", "goals")


# -- measuring -----------------------------------------------------------------------------------------------


def excess_error(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    out: torch.Tensor | None = None,
    relative: float | None = None,
) -> float:
    """Largest error on sampled queries as a multiple of what is allowed; more than 1 is wrong.

    Of `out`, or of what `block_sparse_attention` gives; nothing of size S x S is made. Of quantized
    attention, the sum of errors over the sum of magnitudes as a multiple of `relative`.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(mask.seq_len, generator=generator)[:128]
    allowed = rows_of(mask.to("cpu"), rows).to(q.device)
    computed: Any = block_sparse_attention(q, k, v, mask) if out is None else out

    def attend(dtype: torch.dtype) -> torch.Tensor:
        scores = q[:, :, rows].to(dtype) @ k.to(dtype).mT * q.shape[3] ** -0.5
        return scores.masked_fill_(~allowed, -math.inf).softmax(-1) @ v.to(dtype)

    exact = attend(torch.float64)
    if relative is not None:
        return float((computed[:, :, rows] - exact).abs().sum() / exact.abs().sum() / relative)
    allowance = 2 * (attend(q.dtype) - exact).abs().max() + torch.finfo(q.dtype).eps
    return float((computed[:, :, rows] - exact).abs().max() / allowance)


def interleaved(
    first: Callable, second: Callable, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> list[tuple[float, float, float]]:
    """The 20%, 50% and 80% quantiles, in milliseconds, of two calls taken in turn after a warm-up each."""
    taken = ([], [])
    for repeat in range(-1, repeats):
        for run, times in zip((first, second), taken, strict=True):
            start = clock()
            run()
            if repeat >= 0:
                times.append((clock() - start) * 1e3)
    return [tuple(torch.tensor(t).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()) for t in taken]


def cheapest_mask(pattern: Pattern, layout: TokenLayout, device: str = "cpu") -> BlockMask:
    """The mask that a layer with this pattern would have on a device."""
    sizes = block_sizes(device)
    masks = (pattern.block_mask(layout, size, device=device) for size in sizes)
    return min(masks, key=lambda mask: mask.block_density * sizes[mask.block_size])


def measure(
    case: Case,
    dtype: torch.dtype,
    mask: BlockMask,
    repeats: int,
    quantization: str | None = None,
    relative: float | None = None,
) -> Result:
    """Check, then time. Raises AssertionError for a wrong kernel or a mask of the wrong density.

    With a `quantization` of attention in that format, whose error is at most `relative`; see `excess_error`.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, mask.seq_len, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    density = case.pattern.density(case.layout)
    if not math.isclose(mask.density, density):
        raise AssertionError(f"{case.name}: the mask's density is {mask.density}, the pattern's {density}")
    attend = partial(block_sparse_attention, q, k, v, mask, quantization=quantization)
    if not (error := excess_error(q, k, v, mask, attend(), relative)) <= 1:
        raise AssertionError(f"{case.name} {dtype}: error {error:.2f} times what is allowed, not timed")
    dense, sparse = interleaved(lambda: scaled_dot_product_attention(q, k, v), attend, repeats)
    return Result(case, dtype, mask.block_size, density, mask.block_density, dense, sparse)


# -- writing -------------------------------------------------------------------------------------------------


def result_rows(result: Result, here: dict) -> Iterator[dict]:
    """Rows of `bench_cpu.csv`."""
    dtype = str(result.dtype).removeprefix("torch.")
    shape = f"B1-H{HEADS}-N{result.case.layout.seq_len}-D{HEAD_DIM}-{dtype} {result.case.name}"
    yield row("block_sparse", "sdpa", "ms", shape, result.dense, here)
    yield row("block_sparse", "auto", "ms", shape, result.sparse, here)
    for metric in ("density", "block_density", "speedup", "efficiency"):
        yield row("block_sparse", "auto", metric, shape, getattr(result, metric), here)


def mask_rows(mask: dict, here: dict) -> Iterator[dict]:
    """Rows of `bench_cpu.csv`; a metric measured once has equal quantiles."""
    shape = f"{mask['case'].name} {'x'.join(map(str, mask['block_size']))} {mask['case'].pattern}"
    for metric in ("seconds", "gib"):
        yield row("block_mask", "builder", metric, shape, mask[metric], here)


def mask_cells(mask: dict) -> list[str]:
    """The row of the table of masks."""
    return [
        f"{mask['case'].name}, {mask['case'].layout.seq_len} tokens",
        str(mask["case"].pattern),
        "x".join(map(str, mask["block_size"])),
        f"{mask['density']:.4f}",
        f"{mask['block_density']:.4f}",
        f"{mask['seconds']:.2f}",
        f"{mask['gib']:.2f}",
        "pass" if mask["passed"] else f"> {SECONDS:g} s or {GIBIBYTES:g} GiB",
    ]


def write_table(out: Path, results: list[Result], masks: list[dict], here: dict) -> None:
    """Write `bench_cpu.md` anew."""
    intro = (
        f"# Block-sparse attention on a CPU\n\n{here['cpu']['name']}, {torch.get_num_threads()} threads, "
        f"torch {here['packages']['torch']}, commit {here['commit']}; "
        f"{HEADS} heads x {HEAD_DIM}, interleaved medians. Written by `make bench`.\n\n"
    )
    tables = markdown(HEADINGS, [r.cells() for r in results])
    tables += "\n" + markdown(MASK_HEADINGS, [mask_cells(m) for m in masks]) if masks else ""
    (out / "bench_cpu.md").write_text(intro + tables)


def show(title: str, headings: tuple[str, ...], rows: list[list[str]]) -> None:
    """Prints a table; rows whose last cell is not `pass` are red."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings, title=title)
    for cells in rows:
        table.add_row(*cells, style=None if cells[-1] == "pass" else "red")
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints, then appends to the results."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.benchmarks.attention", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--quick", action="store_true", help="8,192 tokens only, few repeats, nothing written"
    )
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--repeats", type=int, help="timed calls of each kind (default 7, quick 3)")
    parser.add_argument("--out", type=Path, help=f"folder for bench_cpu.csv and .md (default {RESULTS})")
    parser.add_argument("--no-masks", action="store_true", help="leave out building time and memory")
    options = parser.parse_args(arguments)
    repeats = options.repeats or (3 if options.quick else 7)
    cases = [c for c in CASES if options.only in c.name and (not options.quick or c.layout.seq_len < LONG)]
    out = options.out or (None if options.quick or options.only else RESULTS)
    here = environment()
    results, wrong = [], 0
    with torch.inference_mode():
        for case in cases:
            mask = cheapest_mask(case.pattern, case.layout)
            for dtype in DTYPES:
                try:
                    results.append(measure(case, dtype, mask, repeats))
                except AssertionError as error:
                    print(error, file=sys.stderr, flush=True)
                    wrong += 1
                    continue
                print("  ".join(results[-1].cells()), flush=True)
                if out is not None:
                    append(out / CSV, result_rows(results[-1], here))
    masks = [] if options.no_masks or options.quick else measure_masks()
    show(
        f"{HEADS} heads x {HEAD_DIM}, {torch.get_num_threads()} threads",
        HEADINGS,
        [r.cells() for r in results],
    )
    if masks:
        show("Building masks, order='auto'", MASK_HEADINGS, [mask_cells(m) for m in masks])
    if out is not None:
        append(out / CSV, (line for mask in masks for line in mask_rows(mask, here)))
        write_table(out, results, masks, here)
    return int(wrong > 0 or any(r.missed() for r in results) or not all(m["passed"] for m in masks))


if __name__ == "__main__":
    sys.exit(main())
