"""Holds predictions of `dit-accel plan` against this CPU: `python -m dit_accel.evals.benchmarks.plan_check`.

First it calibrates: on sizes of every bundled model that no case has, it measures how efficient sparse
attention is and how fast the rest of a step runs beside dense attention. Then every case is predicted from
these rates and measured, A B A B, medians: attention of one layer alone, and one call of the transformer,
dense against sparse. Rates and results go to `plan_cpu.csv`, of which `speed_tables.py` makes what
`dit-accel plan` reads, and the table to `plan_cpu.md`, both under `evals/results`. Exits with 1 if a
prediction is off by more than 25%.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel import kernels, pipelines
from dit_accel.environment import environment
from dit_accel.planning.model_config import of_model
from dit_accel.planning.plan import Plan, plan
from dit_accel.recipe.recipe import resolve
from dit_accel.runtime import switching as switch
from dit_accel.runtime.measured_speed import MeasuredSpeed, measured_speed

from .attention import interleaved
from .speed_tables import table_of_results
from .table import RESULTS, append, markdown, row

ALLOWED = 0.25
TELLING = 1.5  # the least speed-up of attention that tells it from the rest of a step
HEADINGS = ("model", "size", "recipe", "tokens", "block density", "attention predicted", "measured", "error",
            "step predicted", "measured", "error", "within 25%")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A recipe on a bundled model at a size in pixels."""

    model: str
    width: int
    height: int
    frames: int | None
    recipe: str

    def plan(self, rates: MeasuredSpeed | None = None) -> Plan:
        """Of steps that are not dense."""
        recipe = dataclasses.replace(resolve(self.recipe), dense_steps=0)
        size = (self.width, self.height)
        return plan(recipe, model=self.model, size=size, frames=self.frames, rates=rates)

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}" + (f"x{self.frames}" if self.frames else "")


CALIBRATION = (
    Case("tiny-flux", 352, 352, None, "tiny-flux-clear"),
    Case("tiny-flux", 576, 576, None, "tiny-flux-neighborhood"),
    Case("tiny-sd3", 352, 352, None, "tiny-sd3-neighborhood"),
    Case("tiny-sd3", 480, 480, None, "tiny-sd3-clear"),
    Case("tiny-wan", 176, 176, 49, "tiny-wan-neighborhood"),
    Case("tiny-wan", 176, 176, 85, "tiny-wan-radial"),
    Case("tiny-hunyuan-video", 176, 176, 49, "tiny-hunyuan-video-neighborhood"),
    Case("tiny-hunyuan-video", 176, 176, 85, "tiny-hunyuan-video-radial"),
)
CASES = (
    Case("tiny-flux", 384, 384, None, "tiny-flux-clear"),
    Case("tiny-flux", 384, 384, None, "tiny-flux-neighborhood"),
    Case("tiny-flux", 640, 512, None, "tiny-flux-clear"),
    Case("tiny-sd3", 384, 384, None, "tiny-sd3-neighborhood"),
    Case("tiny-sd3", 512, 512, None, "tiny-sd3-clear"),
    Case("tiny-wan", 176, 176, 65, "tiny-wan-neighborhood"),
    Case("tiny-wan", 176, 176, 65, "tiny-wan-radial"),
    Case("tiny-wan", 192, 176, 77, "tiny-wan-neighborhood"),
    Case("tiny-hunyuan-video", 176, 176, 65, "tiny-hunyuan-video-neighborhood"),
    Case("tiny-hunyuan-video", 176, 176, 65, "tiny-hunyuan-video-radial"),
)


@dataclass(frozen=True)
class Times:
    """Median milliseconds of one layer's attention and of one call of the transformer, dense and sparse."""

    attention: tuple[float, float]
    step: tuple[float, float]

    @property
    def speedups(self) -> tuple[float, float]:
        return self.attention[0] / self.attention[1], self.step[0] / self.step[1]


@dataclass(frozen=True)
class Result:
    """What a case predicted and what it measured."""

    case: Case
    plan: Plan
    times: Times

    @property
    def pairs(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(predicted, measured) speed-up of attention and of a step."""
        attention, step = self.plan.attention.predicted, self.plan.step.predicted
        if attention is None or step is None:
            raise ValueError(f"{self.case.model}: nothing is measured from which to predict")
        measured = self.times.speedups
        return (attention, measured[0]), (step, measured[1])

    @property
    def errors(self) -> tuple[float, float]:
        attention, step = (predicted / found - 1 for predicted, found in self.pairs)
        return attention, step

    @property
    def passed(self) -> bool:
        return all(abs(error) <= ALLOWED for error in self.errors)

    def cells(self) -> list[str]:
        numbers = []
        for (predicted, found), error in zip(self.pairs, self.errors, strict=True):
            numbers += [f"{predicted:.2f}", f"{found:.2f}", f"{error:+.0%}"]
        density = f"{self.plan.block_density:.3f}"
        name = [self.case.model, self.case.size, self.case.recipe, str(self.plan.tokens), density]
        return [*name, *numbers, "yes" if self.passed else "NO"]


# -- measuring -----------------------------------------------------------------------------------------------


def measure(case: Case, planned: Plan, repeats: int) -> Times:
    """Times attention of the first sparse layer and a call of the transformer."""
    model_config = of_model(case.model)
    generator = torch.Generator().manual_seed(0)

    def fill(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shape = (1, planned.heads, planned.layout.seq_len, planned.head_dim)
    q, k, v = (fill(*shape) for _ in range(3))
    attention = interleaved(
        lambda: scaled_dot_product_attention(q, k, v),
        lambda: kernels.block_sparse_attention(q, k, v, planned.mask),
        repeats,
    )
    dense = pipelines.load(case.model).transformer.eval()
    sparse = copy.deepcopy(dense)
    inputs = model_config.inputs(dense, planned.grid, fill)
    with switch.accelerated(sparse, dataclasses.replace(resolve(case.recipe), dense_steps=0)):
        step = interleaved(lambda: dense(**inputs), lambda: sparse(**inputs), repeats)
    return Times(*((first[1], second[1]) for first, second in (attention, step)))


def calibrate(case: Case, repeats: int, here: dict) -> Iterator[dict]:
    """Rows of the rates that a case shows.

    The rest of a step is told from how much faster sparse attention makes it: where attention alone, timed by
    itself, gets faster by a factor, the part of the step that does not is the rest.
    """
    planned = case.plan()
    times = measure(case, planned, repeats)
    dense, sparse = times.step
    attention = (dense - sparse) / (1 - 1 / times.speedups[0])
    density = planned.mask.block_density
    shape = f"B1-H{planned.heads}-N{planned.layout.seq_len}-D{planned.head_dim}-{planned.dtype} {case.recipe}"
    yield row("block_sparse", "auto", "block_density", shape, density, here)
    yield row("block_sparse", "auto", "efficiency", shape, times.speedups[0] * density, here)
    if times.speedups[0] > TELLING and attention < dense:
        rest = planned.flops.rest / (dense - attention) / (planned.flops.attention / attention)
        yield row("step", case.model, "rest_rate", f"{case.model}-{planned.dtype}", rest, here)


def check(case: Case, folder: Path, repeats: int) -> Result:
    """Predicts from the rates in a folder, then measures."""
    model_config = of_model(case.model)
    head_dim = model_config.config["attention_head_dim"]
    table = table_of_results(folder)
    planned = case.plan(measured_speed("cpu", "float32", head_dim, case.model, [table]))
    return Result(case, planned, measure(case, planned, repeats))


# -- writing -------------------------------------------------------------------------------------------------


def result_rows(result: Result, here: dict) -> Iterator[dict]:
    """Rows of the results file for one case: predicted and measured speed-ups."""
    shape = f"{result.case.model} {result.case.size} {result.case.recipe} {result.plan.dtype}"
    for what, pair in zip(("attention", "step"), result.pairs, strict=True):
        for provider, value in zip(("plan", "measured"), pair, strict=True):
            yield row("plan", provider, f"{what}_speedup", shape, value, here)


def run(calibration: tuple[Case, ...], cases: tuple[Case, ...], out: Path, repeats: int) -> list[Result]:
    """Writes `plan_cpu.csv` and `plan_cpu.md` anew into a folder."""
    here = environment()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "plan_cpu.csv"
    path.unlink(missing_ok=True)
    results = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        rates = Path(folder) / path.name  # those of this run alone
        for case in calibration:
            rows = list(calibrate(case, repeats, here))
            print(*(f"{case.model} {r['metric']} {r['median']}" for r in rows), sep="\n", flush=True)
            append(rates, rows)
            append(path, rows)
        for case in cases:
            results.append(check(case, rates.parent, repeats))
            print("  ".join(results[-1].cells()), flush=True)
            append(path, list(result_rows(results[-1], here)))
    title = (
        f"# Predicted and measured speed-ups on a CPU\n\n{here['cpu']['name']}, {torch.get_num_threads()} "
        f"threads, torch {here['packages']['torch']}, commit {here['commit']}; float32, interleaved medians "
        "of times, predictions from rates measured in the same run on other sizes. Written by `python -m "
        "dit_accel.evals.benchmarks.plan_check`.\n\n"
    )
    (out / "plan_cpu.md").write_text(title + markdown(HEADINGS, [r.cells() for r in results]))
    return results


def main(arguments: list[str] | None = None) -> int:
    """Measures all cases beside their predictions and writes both."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.benchmarks.plan_check", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="one case, once; written only with --out")
    parser.add_argument("--repeats", type=int, help="timed calls of each kind (default 7, quick 1)")
    parser.add_argument("--out", type=Path, help=f"folder for plan_cpu.csv and .md (default {RESULTS})")
    options = parser.parse_args(arguments)
    repeats = options.repeats or (1 if options.quick else 7)
    calibration, cases = (CALIBRATION[:1], CASES[:1]) if options.quick else (CALIBRATION, CASES)
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or (Path(folder) if options.quick else RESULTS)
        results = run(calibration, cases, out, repeats)
    return int(not all(result.passed for result in results))


if __name__ == "__main__":
    sys.exit(main())
