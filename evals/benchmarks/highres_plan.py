"""The plan of a high-resolution run against the run: `python -m dit_accel.evals.benchmarks.highres_plan`.

Peak memory of each stage, predicted by `dit_accel.planning.highres` and then measured on this CPU between
steps; enlarging and the pass above native size, between which there is no mark, are taken together. Memory is
the process's largest resident set above what it held before, weights apart; for that the C library gives
freed tensors back at once (`mallopt`), as otherwise its heap is measured. That takes time, so times are not
compared here. The table goes to `highres_plan_cpu.md` under `--out`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import sys
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch

from dit_accel import highres
from dit_accel.environment import environment
from dit_accel.generation import Request, load
from dit_accel.planning.highres import plan_highres

from . import memory
from .table import RESULTS, machine, markdown

CPU = torch.device("cpu")
PROMPT = "a fox at the top left on a blue striped background"
ALLOWED = 0.1
HEADINGS = ("size", "method", "stage", "peak planned", "measured", "error")
_MMAP_THRESHOLD, _BYTES = -3, 65536  # of mallopt(3)


@dataclass(frozen=True)
class Row:
    """A stage; peaks in bytes."""

    method: str
    stage: str
    planned: int
    measured: int

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        peaks = (f"{count / 1e6:.1f} MB" for count in (self.planned, self.measured))
        return (self.method, self.stage, *peaks, f"{self.planned / self.measured - 1:+.1%}")


def resident() -> int:
    """Bytes that the process holds."""
    gc.collect()  # what earlier runs kept is in circles
    memory.reset(CPU)
    return int(re.findall(r"VmRSS:\s+(\d+) kB", memory.STATUS.read_text())[0]) * 1024


def compared(model: str, method: str, size: tuple[int, int], steps: int, strength: float) -> list[Row]:
    """A plan of two passes and its run.

    Raises:
        ValueError: a method with another number of passes.
    """
    pipe = load(model, torch.float32, CPU)
    pipe.set_progress_bar_config(disable=True)
    request = Request(PROMPT, *size, steps=steps).with_defaults(model, "native")
    plan = plan_highres(method, size=size, model=model, steps=steps, strength=strength)
    if len(plan.stages) != 4:
        raise ValueError(f'method "{method}" has {len(plan.stages)} stages, and only two passes are compared')
    peaks: list[int] = []

    def ended(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        mark()
        return values

    def mark() -> None:
        peaks.append(memory.peak(CPU))
        memory.reset(CPU)

    def run(number: int) -> None:
        peaks.clear()
        memory.reset(CPU)
        arguments = request.arguments(pipe) | {"num_inference_steps": number}
        highres.generate(pipe, **arguments, method=method, strength=strength, callback_on_step_end=ended)
        mark()

    run(2)  # which loads and keeps what later runs use
    before = resident()
    run(steps)
    native, above = (stage.steps for stage in (plan.stages[0], plan.stages[2]))
    cuts = (0, native, native + above, native + above + 1)
    first, enlarging, second, last = (stage.peak or 0 for stage in plan.stages)
    names = (plan.stages[0].name, f"enlarging, {plan.stages[2].name}", plan.stages[3].name)
    return [
        Row(method, name, planned, max(peaks[a:b]) - before + plan.weights)
        for name, planned, (a, b) in zip(
            names, (first, max(enlarging, second), last), pairwise(cuts), strict=True
        )
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; 1 where the peak of a run is off by more than a tenth."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny-flux")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--strength", type=float, default=0.5)
    parser.add_argument("--methods", nargs="+", default=["swim", "naive"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    unavailable = memory.reset(CPU)
    if unavailable:
        parser.error(unavailable)
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _BYTES)
    rows, right = [], True
    for side, method in product(options.sides, options.methods):
        found = compared(options.model, method, (side, side), options.steps, options.strength)
        most = max(row.planned for row in found) / max(row.measured for row in found) - 1
        right &= abs(most) <= ALLOWED
        for row in found:
            rows.append((f"{side} x {side}", *row.cells()))
            print(*rows[-1], sep=" | ", flush=True)
    text = ["# Plans of high-resolution runs\n", __doc__.partition("\n\n")[2], f"{machine(environment())}.\n"]
    text.append(f"{options.model}, {options.steps} steps, strength {options.strength}.\n")
    (options.out / "highres_plan_cpu.md").write_text("\n".join([*text, markdown(HEADINGS, rows)]))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
