"""Times attention in int8 against bf16 and fp32 on this CPU, under the same masks: part of `make bench`.

    python -m dit_accel.evals.benchmarks.quantization

The compiled kernel in one run, each way in turn, on one thread, in that thread's CPU time, which the load of
other programs disturbs less than a clock. Each is checked against float64 before it is timed. Rows are
appended to `bench_cpu.csv`, the table goes to `quantization_cpu.md`, both under `evals/results`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from dit_accel.environment import environment
from dit_accel.kernels import block_sparse_attention, can_run
from dit_accel.kernels.block_sparse import native
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Dense, Neighborhood, Pattern

from .attention import cheapest_mask, excess_error
from .table import RESULTS, append, machine, markdown, row

HEADS = 2
LARGEST_ERROR = 0.03  # relative L1 of normal inputs
PATTERNS = (Dense(), Neighborhood((1, 33, 33)), Neighborhood((1, 17, 17)))
WAYS = {  # dtype, numeric format
    "bf16": (torch.bfloat16, None),
    "bf16, int8": (torch.bfloat16, "int8"),
    "fp32": (torch.float32, None),
    "fp32, int8": (torch.float32, "int8"),
}
Quantiles = tuple[float, float, float]


def in_turn(calls: Iterable[Callable], repeats: int) -> list[Quantiles]:
    """20%, 50% and 80% quantiles of this thread's time in each call, in ms, after a warm-up each."""
    calls = list(calls)
    taken: list[list[float]] = [[] for _ in calls]
    for repeat in range(-1, repeats):
        for call, times in zip(calls, taken, strict=True):
            start = time.thread_time()
            call()
            if repeat >= 0:
                times.append((time.thread_time() - start) * 1e3)
    points = torch.tensor([0.2, 0.5, 0.8], device="cpu")
    quantiles = (torch.tensor(times, device="cpu").quantile(points).tolist() for times in taken)
    return [(low, middle, high) for low, middle, high in quantiles]


def measure(pattern: Pattern, side: int, head_dim: int, repeats: int) -> tuple[float, dict[str, Quantiles]]:
    """Block density, and times of each way.

    Raises:
        AssertionError: one that is wrong.
    """
    layout = TokenLayout((1, side, side))
    mask = cheapest_mask(pattern, layout)
    generator = torch.Generator("cpu").manual_seed(0)
    exact = torch.randn(3, 1, HEADS, layout.seq_len, head_dim, generator=generator, device="cpu")
    calls = {}
    for name, (dtype, format) in WAYS.items():
        q, k, v = exact.to(dtype)
        calls[name] = partial(block_sparse_attention, q, k, v, mask, backend="native", quantization=format)
        error = excess_error(q, k, v, mask, calls[name](), LARGEST_ERROR if format else None)
        assert error <= 1, f"{name}, head_dim {head_dim}: error {error:.2f} times what is allowed"
    return mask.block_density, dict(zip(calls, in_turn(calls.values(), repeats), strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints, then appends to the results."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.benchmarks.quantization", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--side", type=int, default=64, help="of a square of tokens (default 64)")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of each way (default 9)")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder for results (default {RESULTS})")
    options = parser.parse_args(arguments)
    asked = {"device": "cpu", "dtype": torch.float32, "head_dim": 64, "block_size": (64, 16)}
    if (reason := can_run("native", **asked)) is not None:
        print(reason, file=sys.stderr)
        return 3
    here, cells, threads = environment(), [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for head_dim in (64, 128):
            for pattern in PATTERNS:
                density, times = measure(pattern, options.side, head_dim, options.repeats)
                shape = f"B1-H{HEADS}-N{options.side**2}-D{head_dim} {pattern}"
                rows = (row("quantized", name, "ms", shape, ms, here) for name, ms in times.items())
                append(options.out / "bench_cpu.csv", rows)
                gains = (times[dtype][1] / times[f"{dtype}, int8"][1] for dtype in ("bf16", "fp32"))
                middle = (f"{times[name][1]:.2f}" for name in WAYS)
                cells.append(
                    [str(pattern), str(head_dim), f"{density:.3f}", *middle, *map("{:.2f}".format, gains)]
                )
                print("  ".join(cells[-1]), flush=True)
    finally:
        torch.set_num_threads(threads)
    headings = ("pattern", "head_dim", "block density", *(f"{name}, ms" for name in WAYS))
    table = markdown((*headings, "int8 over bf16", "int8 over fp32"), cells)
    intro = (
        f"# Attention in int8 on a CPU\n\n{machine(here)}, of which one is used, torch "
        f"{here['packages']['torch']}, commit {here['commit']}; products of int8 by {native.products()}; "
        f"{HEADS} heads, {options.side**2} tokens; medians of the thread's CPU time, each way in turn, "
        "quantizing included. Written by `python -m dit_accel.evals.benchmarks.quantization`.\n\n"
    )
    (options.out / "quantization_cpu.md").write_text(intro + table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
