"""Compiles the Triton kernels for AMD chips, without a GPU: registers, and how many of them are spilled.

    python -m dit_accel.evals.benchmarks.compile_report_amd

As `compile_report` does it for NVIDIA's; what was spilled is what the assembler says of each kernel. Nothing
was run on such a GPU. At head_dim 64 and 128 no configuration may spill.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from dit_accel.kernels.block_sparse import triton_configs

from .compile_cases import GATED_HEAD_DIMS, Case
from .compile_report import forward_launch, gradients_launch, inputs_of, pretend_gpu
from .table import markdown

WAVE = {"gfx942": 64, "gfx1100": 32, "gfx1201": 32}  # threads that run in step
SHARED = 64 * 1024  # bytes of local memory that a program may use
FIELDS = {
    "registers": "vgpr_count",
    "spilled": "vgpr_spill_count",
    "scratch": "private_segment_fixed_size",
}


def _cases(chip: str) -> list[Case]:
    """What the kernels can be asked for on a chip."""
    parts = ["forward"]
    if chip.startswith(triton_configs.AMD_WITH_GRADIENTS):
        parts += ["dq", "dkv"]
    return [
        *(Case(chip, head_dim, "bf16", text=True, part=part) for part in parts for head_dim in (64, 128)),
        Case(chip, 256, "bf16"),
        *(Case(chip, head_dim, "fp32") for head_dim in GATED_HEAD_DIMS),
    ]


CASES = tuple(case for chip in WAVE for case in _cases(chip))


@dataclass(frozen=True)
class Row:
    """What the compiler made of a case.

    Attributes:
        registers, spilled: vector registers of a thread; those it keeps in memory beside them.
        scratch: bytes per thread in memory.
        shared: bytes of local memory per program.
        instructions: for products of matrices.
    """

    case: Case
    options: dict[str, int]
    registers: int
    spilled: int
    scratch: int
    shared: int
    instructions: tuple[str, ...]

    def problems(self) -> list[str]:
        """Limits that this configuration breaks, in words."""
        case, found = self.case, []
        if self.shared > SHARED:
            found.append(f"{self.shared} bytes of local memory, {case.chip} has {SHARED}")
        if case.dtype != "fp32" and not self.instructions:
            found.append("no products of matrices in the machine code")
        if case.head_dim in GATED_HEAD_DIMS and self.spilled:
            found.append(f"{self.spilled} registers spilled, none may be at this head_dim")
        return found


def compile_case(case: Case) -> Row:
    """Compile a kernel as a launch on these inputs would on this chip."""
    from dit_accel.kernels.block_sparse.triton_forward import LAUNCH_OPTIONS

    launch = forward_launch if case.part == "forward" else gradients_launch
    kernel, grid, args, options = launch(case, *inputs_of(case), case.chip)
    with pretend_gpu(case.chip, WAVE[case.chip]):
        compiled = kernel.warmup(*args, grid=grid, **options, **LAUNCH_OPTIONS)
    code = compiled.asm["amdgcn"]
    numbers = {name: int(re.findall(rf"\.{field}:\s+(\d+)", code)[0]) for name, field in FIELDS.items()}
    instructions = tuple(sorted(set(re.findall(r"\bv_(?:mfma|wmma)\w+", code))))
    return Row(case, options, **numbers, shared=compiled.metadata.shared, instructions=instructions)


def page(version: str, rows: list[Row]) -> str:
    """The report as Markdown."""
    headings = (
        "chip", "dtype", "head_dim", "part", "rows x keys", "warps", "registers", "spilled", "scratch bytes",
        "shared bytes", "instructions",
    )  # fmt: skip
    cells = [
        [
            row.case.chip, row.case.dtype, str(row.case.head_dim), row.case.part,
            f"{row.options['TQ']}x{row.options['TK']}", str(row.options["num_warps"]), str(row.registers),
            str(row.spilled), str(row.scratch), str(row.shared), " ".join(row.instructions),
        ]
        for row in rows
    ]  # fmt: skip
    return (
        f"# What the Triton kernels compile to on AMD chips\n\nTriton {version}, compiled without a GPU by "
        "`python -m dit_accel.evals.benchmarks.compile_report_amd`. Nothing here was run.\n\n"
        + markdown(headings, cells)
    )


def main(arguments: list[str] | None = None) -> None:
    """Compiles the Triton kernels for AMD chips and reports registers and spills."""
    import triton

    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.benchmarks.compile_report_amd", description=main.__doc__
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the report to this file")
    options = parser.parse_args(arguments)
    text = page(triton.__version__, [compile_case(case) for case in CASES])
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
