"""Times the Triton kernel on this GPU: `python -m dit_accel.evals.gpu_bench`, or `make gpu-bench`.

Three parts. `attention`: the shapes of real models, block-sparse attention against PyTorch's (flash and
cuDNN), compiled FlexAttention with the same mask, and xformers and sageattention where installed; kernels are
first checked against float64 (error at most twice that of dense attention in the same dtype, plus eps) and
not timed if they fail. `scaling`: tokens x1, x2, x4, x8 with the pattern held. `steps`: one call of whole
transformers with published configurations and random weights, dense against each recipe. Calls are taken in
turn, medians of CUDA events, a cold L2 cache. Rows are appended to `bench_cuda.csv` and `scaling_cuda.csv`
as they are measured; `bench_cuda.md`, `scaling_cuda.md` and `.png` are written anew, all under
`evals/results`. Exits with 1 if a kernel is wrong; without a GPU it prints what it would run and exits with
3.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..environment import environment
from ..errors import UnavailableError
from ..recipe import presets
from . import gpu_attention, gpu_steps, scaling
from .gpu_attention import CASES, Case
from .gpu_steps import STEPS, Step
from .peers import PROVIDERS, Provider
from .plots import check_plot
from .scaling import GPU, GPU_SERIES, Timer, Times
from .table import RESULTS, append, machine, markdown

UNAVAILABLE = 3
DTYPES = (torch.bfloat16, torch.float16)
PARTS = ("attention", "scaling", "steps")
SECONDS, FEWEST, MOST = 3.0, 5, 50  # how long a comparison should take, and how often each call is timed
L2_BYTES = 2**28  # more than any cache


def interleaved_on_gpu(*runs: Callable[[], object]) -> list[Times]:
    """The 20%, 50% and 80% quantiles, in milliseconds, of calls taken in turn, each with a cold L2 cache."""
    for run in runs:
        run()  # compiles
    torch.cuda.synchronize()
    start = time.perf_counter()
    for run in runs:
        run()
    torch.cuda.synchronize()
    repeats = int(min(max(SECONDS / (time.perf_counter() - start), FEWEST), MOST))
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    events = [
        [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in runs] for _ in range(repeats)
    ]
    for pairs in events:
        for run, (before, after) in zip(runs, pairs, strict=True):
            flush.zero_()
            before.record()
            run()
            after.record()
    torch.cuda.synchronize()
    taken = torch.tensor([[before.elapsed_time(after) for before, after in pairs] for pairs in events])
    return [tuple(column.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()) for column in taken.T]


# -- parts ---------------------------------------------------------------------------------------------------


def run_attention(
    cases: Iterable[Case],
    dtypes: Iterable[torch.dtype],
    device: str,
    providers: Iterable[Provider],
    timer: Timer,
    out: Path,
    here: dict,
) -> tuple[list[gpu_attention.Result], int]:
    """Results of the cases whose kernel is right, and how many are wrong."""
    results, wrong = [], 0
    for case in cases:
        for dtype in dtypes:
            try:
                result = gpu_attention.measure(case, dtype, device, providers, timer)
            except AssertionError as error:
                print(f"WRONG {error}", file=sys.stderr, flush=True)
                wrong += 1
                continue
            except (torch.OutOfMemoryError, UnavailableError) as error:
                print(f"{case.title} {dtype}: left out, {error}", flush=True)
                continue
            results.append(result)
            for cells in result.cells():
                print("  ".join(cells), flush=True)
            for name, reason in result.left_out.items():
                print(f"  {name} left out: {reason}", flush=True)
            append(out / f"bench_{device}.csv", result.rows(here))
    return results, wrong


def run_steps(
    steps: Iterable[Step], device: str, dtype: torch.dtype, timer: Timer, out: Path, here: dict
) -> list[gpu_steps.Result]:
    """Results of every recipe of each model's family."""
    if importlib.util.find_spec("diffusers") is None:
        print("steps of whole transformers left out: diffusers is not installed", flush=True)
        return []
    results = []
    for step in steps:
        try:
            for result in gpu_steps.measure(step, recipes_for(step), device, dtype, timer):
                if isinstance(result, str):
                    print(result, flush=True)
                    continue
                results.append(result)
                print("  ".join(result.cells()), flush=True)
                append(out / f"bench_{device}.csv", result.rows(here, device))
        except torch.OutOfMemoryError as error:
            print(f"{step.name}: left out, {error}", flush=True)
    return results


def recipes_for(step: Step) -> dict:
    """The presets of the model's family, those for the bundled models left out."""
    family = presets(step.blueprint.family)
    return {name: recipe for name, recipe in family.items() if not name.startswith("tiny-")}


def report(
    attention: list[gpu_attention.Result], steps: list[gpu_steps.Result], device: str, here: dict
) -> str:
    """The page `bench_<device>.md`."""
    packages = here["packages"]
    parts = [
        "# Block-sparse attention on a GPU\n\n"
        f"{machine(here, device)}, torch {packages['torch']}, triton {packages['triton']}, CUDA "
        f"{here['cuda']}, commit {here['commit']}; medians of calls taken in turn. TFLOP/s are of the pairs "
        "asked for; dense time is that of the fastest exact dense provider. Written by `make gpu-bench`.\n"
    ]
    if attention:
        cells = [cells for result in attention for cells in result.cells()]
        parts.append("## Attention\n\n" + markdown(gpu_attention.HEADINGS, cells))
        left_out = {
            f"- {name}: {why} ({result.case.name})\n"
            for result in attention for name, why in result.left_out.items()
        }  # fmt: skip
        if left_out:
            parts.append("Left out:\n\n" + "".join(sorted(left_out)))
    if steps:
        cells = [result.cells() for result in steps]
        parts.append("## One step, random weights\n\n" + markdown(gpu_steps.HEADINGS, cells))
    return "\n".join(parts)


# -- command -------------------------------------------------------------------------------------------------


def describe(options: argparse.Namespace) -> None:
    """Prints what would run."""
    print("no CUDA device here; on a machine with one this would")
    if "attention" in options.part:
        print(f"check and time, in {' and '.join(str(dtype) for dtype in DTYPES)}:")
        for case in _chosen(CASES, options.only):
            print(f"  {case.name}: {case.heads} x {case.layout.seq_len} x {case.head_dim}, {case.pattern}")
        print("with:")
        for provider in PROVIDERS:
            print(f"  {provider.name}" + (f" ({reason})" if (reason := provider.missing()) else ""))
    if "scaling" in options.part:
        print(f"time tokens x1, x2, x4, x8 ({GPU}):")
        for series in _chosen(GPU_SERIES, options.only):
            print(f"  {series.name} on " + ", ".join("x".join(map(str, grid)) for grid in series.grids))
    if "steps" in options.part:
        print("time one step of whole transformers with random weights, dense against each recipe:")
        for step in _chosen(STEPS, options.only):
            print(f"  {step.name}: {', '.join(recipes_for(step))}")
    print(f"and write bench_cuda and scaling_cuda (.csv, .md, .png) into {options.out}")


def _chosen(items: Iterable, only: str) -> list:
    return [item for item in items if only in item.name]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.gpu_bench", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS, help="default: all")
    parser.add_argument("--only", default="", help="only cases, series and steps whose name contains this")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder for the files (default {RESULTS})")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        describe(options)
        return UNAVAILABLE
    if "scaling" in options.part:
        check_plot(options.out / f"scaling_{GPU.device}.png")
    here, wrong, attention, steps = environment(), 0, [], []
    timer = interleaved_on_gpu
    with torch.inference_mode():
        if "attention" in options.part:
            cases = _chosen(CASES, options.only)
            attention, wrong = run_attention(cases, DTYPES, "cuda", PROVIDERS, timer, options.out, here)
        if "scaling" in options.part:
            wrong += scaling.run(_chosen(GPU_SERIES, options.only), GPU, timer, options.out, here)
        if "steps" in options.part:
            steps = run_steps(_chosen(STEPS, options.only), "cuda", torch.bfloat16, timer, options.out, here)
    if attention or steps:
        (options.out / "bench_cuda.md").write_text(report(attention, steps, "cuda", here))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
