"""Nine minutes on a GPU: checks the kernel, times it beside others, chooses its launches; `make gpu-bench`.

Ends by itself when the minutes are over, and says what did not fit. Every measurement is a line on the
screen, a line of `measurements.jsonl` and rows of `bench_cuda.csv` as soon as it is made; `bench_cuda.md` is
the page with all of them, and `tuned.json` the table of the fastest launches, which the kernel reads once it
lies beside it (`--apply` puts it there). `worker.log` has what else was printed. A variant that hangs or
loses the GPU costs itself. Exits with 1 if anything is wrong or nothing was checked; without a GPU it prints
what it would do and exits with 3.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dit_accel.kernels.block_sparse import tuned

from ..benchmarks.table import RESULTS
from . import schedule
from .driver import Bench, available

UNAVAILABLE = 3


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0.2 <= minutes <= 600:
        raise argparse.ArgumentTypeError(f"must be from 0.2 to 600, got {text}")
    return minutes


def main(arguments: list[str] | None = None) -> int:
    """Runs the schedule on this machine's GPU; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.gpu_bench", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--minutes", type=_minutes, default=9, help="all the time it may take once it has begun (default 9)"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "gpu", help=f"folder for the files (default {RESULTS / 'gpu'})"
    )
    parser.add_argument("--apply", action="store_true", help="also put the table where the kernel reads it")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, on next to nothing"
    )
    parser.add_argument("--commit", help="what to record as the commit where this is no clone")
    options = parser.parse_args(arguments)
    if options.apply and options.device == "cpu":
        parser.error("--apply is for what was measured on a GPU; a rehearsal on a CPU measures nothing")
    if not available(options.device):
        print(f"no CUDA device here; one would do, in this order:\n{schedule.describe()}")
        return UNAVAILABLE
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bench = Bench(options.device, options.minutes, options.out, cores, options.commit)
    right = bench.run()
    print((options.out / f"bench_{options.device}.md").read_text())
    if options.apply and bench.entries:
        tuned.save(tuned.PATH, bench.entries)
        print(f"launches written to {tuned.PATH}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
