"""Compiles the Triton kernels for NVIDIA chips, without a GPU: `python -m dit_accel.evals.compile_report`.

Every configuration that the kernel's `config()` would choose is compiled through Triton's own launch path, so
with the specialisations of a real launch, up to machine code. Registers, stack (where spilled registers go),
shared memory and the kind of tensor-core instruction are read back from it. Exits with 1 if a configuration
breaks a limit: more shared memory than the chip has, tensor-core instructions older than the chip's, or, at
head_dim 64 and 128, more stack than `STACK_LIMIT`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from ..blockmask import BlockMask


@dataclass(frozen=True)
class Chip:
    """What a chip offers: shared memory per program (bytes), and its best tensor-core instruction."""

    capability: tuple[int, int]
    shared: int
    instruction: str


CHIPS = {
    "sm_80": Chip((8, 0), 163 * 1024, "mma.sync"),
    "sm_90": Chip((9, 0), 227 * 1024, "wgmma"),
    "sm_100": Chip((10, 0), 227 * 1024, "tcgen05"),
    "sm_120": Chip((12, 0), 99 * 1024, "mma.sync"),
}
STACK_LIMIT = {"sm_80": 128, "sm_90": 32, "sm_100": 32, "sm_120": 32}  # bytes per thread
GATED_HEAD_DIMS = (64, 128)
MACHINE_CODE = {"wgmma": r"\bHGMMA", "tcgen05": r"\bUTC\w*MMA", "mma.sync": r"\bHMMA"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One compiled configuration; `text` is a launch with a text length per sample."""

    chip: str
    head_dim: int
    dtype: str
    block_size: tuple[int, int] = (128, 64)
    text: bool = False


GATE = tuple(
    Case(chip, head_dim, "bf16", text=text)
    for chip in CHIPS
    for head_dim in GATED_HEAD_DIMS
    for text in (False, True)
) + tuple(Case(chip, head_dim, "fp32") for chip in CHIPS for head_dim in GATED_HEAD_DIMS)
ALL = GATE + tuple(
    case
    for chip in CHIPS
    for case in (
        *(Case(chip, head_dim, "bf16") for head_dim in (16, 32, 72, 96, 256)),
        *(Case(chip, head_dim, "fp16") for head_dim in (64, 128)),
        Case(chip, 256, "fp32"),
        *(Case(chip, 128, "bf16", block_size) for block_size in ((64, 64), (128, 32), (128, 128))),
    )
)


@dataclass(frozen=True)
class Row:
    """What the compiler made of a case: registers and stack bytes per thread, shared bytes per program."""

    case: Case
    options: dict[str, int]
    registers: int
    stack: int
    shared: int
    instructions: tuple[str, ...]

    def problems(self) -> list[str]:
        """Limits that this configuration breaks, in words."""
        case, chip = self.case, CHIPS[self.case.chip]
        found = []
        if self.shared > chip.shared:
            found.append(f"{self.shared} bytes of shared memory, {case.chip} has {chip.shared}")
        # fp32 is computed in IEEE fp32, without tensor cores
        if case.dtype != "fp32" and chip.instruction not in self.instructions:
            found.append(f"no {chip.instruction} in the machine code")
        limit = STACK_LIMIT[case.chip]
        if case.head_dim in GATED_HEAD_DIMS and case.block_size == (128, 64) and self.stack > limit:
            found.append(f"{self.stack} bytes of stack per thread, the limit is {limit}")
        return found


def compile_case(case: Case) -> Row:
    """Compile the kernel as a launch on these inputs would on this chip."""
    from ..kernels.block_sparse import triton as kernel

    chip = CHIPS[case.chip]
    mask = BlockMask.from_token_mask(torch.ones(300, 300, dtype=torch.bool), case.block_size)
    q = torch.empty(2, 300, 3, case.head_dim, dtype=DTYPES[case.dtype]).transpose(1, 2)
    text_valid = torch.zeros(2, dtype=torch.int32) if case.text else None
    order, groups = kernel.launch_order(mask, heads=3)
    grid, args, options = kernel.launch_arguments(
        q, q, q, q, torch.empty(2, 3, 300), order, groups, mask.full_ptr, mask.full_idx,
        mask.part_ptr, mask.part_idx, mask.part_tile, mask.tiles.view(torch.int32), text_valid,
        case.head_dim**-0.5, case.block_size, mask.text, chip.capability,
    )  # fmt: skip
    with pretend_gpu(chip.capability):
        compiled = kernel._forward.warmup(*args, grid=grid, **options)
    usage, sass = _inspect(compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    instructions = tuple(name for name, pattern in MACHINE_CODE.items() if re.search(pattern, sass))
    return Row(case, options, registers, stack, compiled.metadata.shared, instructions)


@contextmanager
def pretend_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """Triton compiles for this compute capability, whatever the machine has; launching is not possible."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    number = capability[0] * 10 + capability[1]

    class PretendedDriver:
        def get_current_device(self):
            return f"pretended sm_{number}"  # Triton's caches are per device

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", number, 32)

    driver.set_active(PretendedDriver())
    try:
        yield
    finally:
        driver.set_active(None)


def _inspect(cubin: bytes) -> tuple[str, str]:
    """Resource usage and disassembly, by the `cuobjdump` that ships with Triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"  # cuobjdump runs nvdisasm
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        commands = ([tools / "cuobjdump", option, file] for option in ("-res-usage", "-sass"))
        usage, sass = (
            subprocess.run(
                c, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
            ).stdout
            for c in commands
        )
    return usage, sass


HEADER = (
    "chip    dtype head_dim  block   text  rows x keys warps stages  registers stack shared  instructions"
)


def line(row: Row) -> str:
    """A row under `HEADER`."""
    case, options = row.case, row.options
    block, tile = (f"{a}x{b}" for a, b in (case.block_size, (options["TQ"], options["TK"])))
    remarks = " ".join([*row.instructions, *(f"<- {problem}" for problem in row.problems())])
    text = "yes" if case.text else "no"
    what = f"{case.chip:7} {case.dtype:5} {case.head_dim:8}  {block:7} {text:5} {tile:11}"
    launch = f"{options['num_warps']:5} {options['num_stages']:6}"
    return f"{what} {launch}  {row.registers:9} {row.stack:5} {row.shared:6}  {remarks}"


def page(version: str, rows: list[Row]) -> str:
    """The report as Markdown."""
    bad = sum(bool(row.problems()) for row in rows)
    report = "\n".join([HEADER, *map(line, rows)])
    return (
        f"# What the Triton kernels compile to\n\nTriton {version}, compiled without a GPU by `python -m "
        f"dit_accel.evals.compile_report`: {len(rows)} configurations, {bad} beyond a limit. Stack and "
        f"shared memory in bytes. Nothing here was run.\n\n```\n{report}\n```\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.compile_report",
        description="Compile the Triton kernels without a GPU; report registers, stack and shared memory.",
    )
    parser.add_argument("--arch", nargs="+", choices=CHIPS, default=list(CHIPS), help="chips (default: all)")
    parser.add_argument("--gate", action="store_true", help="only what the stack limits apply to")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the report to this file")
    options = parser.parse_args(arguments)
    try:
        from ..kernels.block_sparse import triton as kernel
    except ImportError as error:
        print(f"Triton could not be imported ({error}); pip install triton", file=sys.stderr)
        return 3
    if kernel.INTERPRETED:
        print("kernels are interpreted, not compiled: unset TRITON_INTERPRET", file=sys.stderr)
        return 3
    version = metadata.version("triton")
    print(f"triton {version}\n{HEADER}", flush=True)
    rows = []
    for case in GATE if options.gate else ALL:
        if case.chip in options.arch:
            rows.append(compile_case(case))
            print(line(rows[-1]), flush=True)
    if options.json:
        results = [asdict(row) | {"problems": row.problems()} for row in rows]
        options.json.write_text(json.dumps({"triton": version, "rows": results}, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(page(version, rows))
    return int(any(row.problems() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
