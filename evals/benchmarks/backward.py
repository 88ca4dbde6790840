"""Times the gradients of block-sparse attention beside attention itself on this CPU, part of `make bench`.

    python -m dit_accel.evals.benchmarks.backward

A B A B: every case computes output and log-sum-exp, then the gradients of q, k and v from them, in turn, and
takes medians of processor time. Gradients are first checked against autograd of plain attention in float64,
on sampled queries (error at most twice that of plain attention in the same dtype, plus eps), and are not
timed if they fail. Rows are appended to `backward_cpu.csv`, the table `backward_cpu.md` is written anew, both
under `evals/results`. Exits with 1 if a check fails or if gradients in float32 take more than 3.6 times as
long as attention.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dit_accel.environment import environment
from dit_accel.kernels import block_sparse_attention
from dit_accel.masks.block_mask import BlockMask
from dit_accel.masks.plot import rows_of
from dit_accel.patterns import Clear, Neighborhood, Radial

from .attention import DTYPES, HEAD_DIM, HEADS, Case, cheapest_mask, interleaved
from .table import RESULTS, append, machine, markdown, row

CSV, PAGE = "backward_cpu.csv", "backward_cpu.md"
MOST = 3.6  # times as long as attention, in float32
CASES = (
    (Case(0.1, Clear(18), (1, 64, 128)), None),
    (Case(0.1, Clear(18), (1, 64, 128)), "pooled"),
    (Case(0.1, Neighborhood(29), (1, 64, 128)), None),
    (Case(0.1, Radial(0.8, block_size=16), (64, 8, 16)), None),
)
HEADINGS = ("pattern", "S", "dtype", "tail", "blocks", "block density", "attention ms", "gradients ms",
            "times", "goal")  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What one case in one dtype measured: milliseconds of processor time, (20%, 50%, 80%)."""

    case: Case
    tail: str | None
    dtype: torch.dtype
    mask: BlockMask
    forward: tuple[float, float, float]
    backward: tuple[float, float, float]

    @property
    def times(self) -> float:
        """How often as long gradients take as attention."""
        return self.backward[1] / self.forward[1]

    @property
    def passed(self) -> bool:
        """In 16 bits attention may have instructions that gradients, computed in fp32, have not."""
        return self.dtype != torch.float32 or self.times <= MOST

    def cells(self) -> list[str]:
        """The row of the table."""
        return [
            self.case.name,
            str(self.mask.seq_len),
            str(self.dtype).removeprefix("torch."),
            self.tail or "none",
            "x".join(map(str, self.mask.block_size)),
            f"{self.mask.block_density:.3f}",
            f"{self.forward[1]:.0f}",
            f"{self.backward[1]:.0f}",
            f"{self.times:.2f}",
            "pass" if self.passed else f"> {MOST}",
        ]


def excess_error(inputs: list[torch.Tensor], mask: BlockMask) -> float:
    """Largest error of gradients as a multiple of what is allowed; more than 1 is wrong.

    The loss reads 128 queries, whose rows are all that plain attention computes.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(mask.seq_len, generator=generator)[:128]
    allowed = rows_of(mask, rows)
    weights = torch.randn(*inputs[0].shape[:2], len(rows), HEAD_DIM, generator=generator)

    def plain(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
        scores = q[:, :, rows] @ k.mT * HEAD_DIM**-0.5
        out = scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v
        return torch.autograd.grad(out, (q, k, v), weights.to(dtype))

    given = [x.detach().requires_grad_() for x in inputs]
    out = block_sparse_attention(*given, mask)
    found = torch.autograd.grad(out[:, :, rows], given, weights.to(out.dtype))
    dtype, worst = inputs[0].dtype, 0.0
    for one, other, exact in zip(found, plain(dtype), plain(torch.float64), strict=True):
        eps = torch.finfo(dtype).eps * exact.abs().max()
        worst = max(worst, float((one - exact).abs().max() / (2 * (other - exact).abs().max() + eps)))
    return worst


def measure(case: Case, tail: str | None, dtype: torch.dtype, mask: BlockMask, repeats: int) -> Result:
    """Check, then time. Raises AssertionError for wrong gradients.

    Those of a tail have no plain attention to be checked against at this length: the tests do that.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, mask.seq_len, HEAD_DIM)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    weights = torch.randn(shape, generator=generator).to(dtype)
    if not (error := excess_error(inputs, mask)) <= 1:
        raise AssertionError(f"{case.name} {dtype}: error {error:.2f} times what is allowed, not timed")
    kept = [x.requires_grad_() for x in inputs]
    result = block_sparse_attention(*kept, mask, tail=tail)

    @torch.no_grad()
    def forward() -> None:
        block_sparse_attention(*inputs, mask, tail=tail, return_lse=True)

    def backward() -> None:
        torch.autograd.grad(result, kept, weights, retain_graph=True)

    taken = interleaved(forward, backward, repeats, clock=time.process_time)
    return Result(case, tail, dtype, mask, *taken)


# -- writing -------------------------------------------------------------------------------------------------


def result_rows(result: Result, here: dict) -> Iterator[dict]:
    """Rows of `backward_cpu.csv`."""
    dtype = str(result.dtype).removeprefix("torch.")
    shape = f"B1-H{HEADS}-N{result.mask.seq_len}-D{HEAD_DIM}-{dtype} {result.case.name}, tail {result.tail}"
    yield row("block_sparse", "auto", "processor_ms", shape, result.forward, here)
    yield row("block_sparse_backward", "auto", "processor_ms", shape, result.backward, here)
    yield row("block_sparse_backward", "auto", "times_forward", shape, result.times, here)


def write_table(out: Path, results: list[Result], here: dict) -> None:
    """Write `backward_cpu.md` anew."""
    intro = (
        f"# Gradients of block-sparse attention on a CPU\n\n{machine(here)}, "
        f"torch {here['packages']['torch']}, commit {here['commit']}; {HEADS} heads x {HEAD_DIM}, "
        f"interleaved medians of processor time. Goal in float32: at most {MOST} times attention on the "
        "same mask. Written by `make bench`.\n\n"
    )
    (out / PAGE).write_text(intro + markdown(HEADINGS, [result.cells() for result in results]))


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints, then appends to the results."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.benchmarks.backward", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each kind")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV and the table")
    options = parser.parse_args(arguments)
    here, results, wrong = environment(), [], 0
    for case, tail in CASES:
        mask = cheapest_mask(case.pattern, case.layout)
        for dtype in DTYPES:
            try:
                results.append(measure(case, tail, dtype, mask, options.repeats))
            except AssertionError as error:
                print(error, file=sys.stderr, flush=True)
                wrong += 1
                continue
            print("  ".join(results[-1].cells()), flush=True)
            append(options.out / CSV, result_rows(results[-1], here))
    write_table(options.out, results, here)
    return int(wrong > 0 or not all(result.passed for result in results))


if __name__ == "__main__":
    sys.exit(main())
