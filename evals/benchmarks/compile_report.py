"""Compiles the Triton kernels for NVIDIA chips, without a GPU.

    python -m dit_accel.evals.benchmarks.compile_report

Every configuration that the kernel's `config()` would choose is compiled through Triton's own launch path, so
with the specialisations of a real launch, up to machine code. Registers, stack (where spilled registers go),
shared memory, the kind of tensor-core instruction, and what became of asynchronous multiplications (see
`machine_code`) are read back from it. Exits with 1 if a configuration breaks a limit: more shared memory than
the chip has, tensor-core instructions older than its own or of other numbers than a format has, an operand
overwritten while a multiplication may be reading it, multiplications that wait for each other, or, at
head_dim 64 and 128, more stack than `STACK_LIMIT`.

What comes out depends on Triton's version and the ptxas that it brings. `make old-triton` makes a second
environment with the Triton of torch 2.11; its python runs this report at the root of the checkout.
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
from pathlib import Path
from typing import Any

import torch

from dit_accel.kernels.block_sparse import triton_configs
from dit_accel.kernels.block_sparse.formats import FORMATS, Format, key_group
from dit_accel.kernels.block_sparse.quantized import Quantized
from dit_accel.masks.block_mask import BlockMask

from .machine_code import overwritten_operands, parse, waits, waits_asked_for


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
MACHINE_CODE = {"wgmma": r"\b[HIQ]GMMA", "tcgen05": r"\bUTC\w*MMA", "mma.sync": r"\b[HIQ]MMA"}
PRODUCTS = {  # of what numbers, in PTX
    "s8": r"mma\S*\.s8\.s8|tcgen05\.mma\S*kind::i8",
    "e4m3": r"mma\S*\.e4m3\.e4m3|tcgen05\.mma\S*kind::f8f6f4",
}
PARTS = ("forward", "dq", "dkv")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One compiled configuration.

    Attributes:
        text: a launch with a text length per sample.
        format: quantized.
        part: of attention: the forward pass, or what gives dQ, or dK and dV.
    """

    chip: str
    head_dim: int
    dtype: str
    block_size: tuple[int, int] = (128, 64)
    text: bool = False
    format: str | None = None
    part: str = "forward"

    @property
    def products(self) -> tuple[str, ...]:
        """Of what numbers its tensor-core instructions have to be, beside those of 16 bits."""
        if self.format is None:
            return ()
        return ("s8", "e4m3") if self.format == "int8-fp8" else ("s8",)


def _backward(chip: str, head_dims: tuple[int, ...], *options: Any, text: bool = False) -> Iterator[Case]:
    """A chip's cases of the backward pass."""
    for head_dim in head_dims:
        yield from (Case(chip, head_dim, *options, text=text, part=part) for part in PARTS[1:])


def _quantized(chip: str, head_dims: tuple[int, ...], **options: Any) -> Iterator[Case]:
    """A chip's cases in every format that it computes."""
    for format in FORMATS:
        if format != "int8-fp8" or CHIPS[chip].capability >= (8, 9):
            yield from (Case(chip, d, "bf16", format=format, **options) for d in head_dims)


GATE = tuple(
    Case(chip, head_dim, "bf16", text=text)
    for chip in CHIPS
    for head_dim in GATED_HEAD_DIMS
    for text in (False, True)
) + tuple(
    case
    for chip in CHIPS
    for case in (
        *(Case(chip, d, "fp32") for d in GATED_HEAD_DIMS),
        *_quantized(chip, GATED_HEAD_DIMS),
        *_backward(chip, GATED_HEAD_DIMS, "bf16", text=True),
    )
)
ALL = GATE + tuple(
    case
    for chip in CHIPS
    for case in (
        *(Case(chip, d, "bf16", text=text) for d in (16, 32, 72, 96, 256) for text in (False, True)),
        *(Case(chip, d, "fp16") for d in (16, 32, 64, 72, 96, 128, 256)),
        Case(chip, 256, "fp32"),
        Case(chip, 128, "fp32", text=True),
        *(Case(chip, 128, "bf16", block_size) for block_size in ((64, 64), (128, 32), (128, 128))),
        *_quantized(chip, (72, 256)),
        *_quantized(chip, (128,), text=True),
        *_quantized(chip, (128,), block_size=(64, 32)),
        *_backward(chip, (72, 256), "bf16"),
        *_backward(chip, (128,), "fp16"),
        *_backward(chip, (64, 128, 256), "fp32"),
        *(case for size in ((64, 32), (128, 128)) for case in _backward(chip, (128,), "bf16", size)),
    )
)


@dataclass(frozen=True)
class Row:
    """What the compiler made of a case.

    Attributes:
        registers, stack: per thread, stack in bytes.
        shared: bytes of shared memory per program.
        instructions: the kinds of tensor-core instructions.
        overwritten: operands of asynchronous multiplications that are written to too early, in words.
        waits: for asynchronous multiplications, in PTX and in machine code.
        products: of what numbers of eight bits multiplications are.
    """

    case: Case
    options: dict[str, int]
    registers: int
    stack: int
    shared: int
    instructions: tuple[str, ...]
    overwritten: tuple[str, ...] = ()
    waits: tuple[int, int] = (0, 0)
    products: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """Limits that this configuration breaks, in words."""
        case, chip = self.case, CHIPS[self.case.chip]
        found = []
        if self.shared > chip.shared:
            found.append(f"{self.shared} bytes of shared memory, {case.chip} has {chip.shared}")
        # the newer instructions take 64 rows of the left operand
        held = self.options["TK" if case.part == "dkv" else "TQ"]
        instruction = chip.instruction if held >= 64 else "mma.sync"
        # fp32 is computed in IEEE fp32, without tensor cores
        if case.dtype != "fp32" and instruction not in self.instructions:
            found.append(f"no {instruction} in the machine code")
        found += [f"no products of {kind}" for kind in case.products if kind not in self.products]
        found += self.overwritten
        if self.waits[0] != self.waits[1]:
            asked, made = self.waits
            found.append(f"multiplications are serialised: {asked} waits in PTX, {made} in the machine code")
        limit = STACK_LIMIT[case.chip]
        if case.head_dim in GATED_HEAD_DIMS and case.block_size == (128, 64) and self.stack > limit:
            found.append(f"{self.stack} bytes of stack per thread, the limit is {limit}")
        return found


def compile_case(case: Case) -> Row:
    """Compile a kernel as a launch on these inputs would on this chip."""
    from dit_accel.kernels.block_sparse.triton_forward import LAUNCH_OPTIONS

    gpu = CHIPS[case.chip].capability
    launch = forward_launch if case.part == "forward" else gradients_launch
    kernel, grid, args, options = launch(case, *inputs_of(case), gpu)
    with pretend_gpu(gpu):
        compiled = kernel.warmup(*args, grid=grid, **options, **LAUNCH_OPTIONS)
    usage, sass = _inspect(compiled.asm["cubin"])
    used = dict(re.findall(r"(\w+):(\d+)", usage))
    registers, stack = int(used["REG"]), int(used["STACK"])
    instructions = tuple(name for name, pattern in MACHINE_CODE.items() if re.search(pattern, sass))
    code = parse(sass)
    return Row(
        case,
        options,
        registers,
        stack,
        compiled.metadata.shared,
        instructions,
        tuple(overwritten_operands(code)),
        (waits_asked_for(compiled.asm["ptx"]), waits(code)),
        tuple(name for name, pattern in PRODUCTS.items() if re.search(pattern, compiled.asm["ptx"])),
    )


def inputs_of(case: Case) -> tuple[torch.Tensor, torch.Tensor, BlockMask, torch.Tensor | None]:
    """q, which k and v are like, a log-sum-exp, a mask and text lengths."""
    mask = BlockMask.from_token_mask(torch.ones(300, 300, dtype=torch.bool), case.block_size)
    q = torch.empty(2, 300, 3, case.head_dim, dtype=DTYPES[case.dtype]).transpose(1, 2)
    return q, torch.empty(2, 3, 300), mask, torch.zeros(2, dtype=torch.int32) if case.text else None


def forward_launch(case: Case, q, lse, mask: BlockMask, text_valid, gpu: triton_configs.Gpu) -> tuple:
    """The kernel of the forward pass, and its grid, positional and keyword arguments."""
    from dit_accel.kernels.block_sparse import triton_forward as forward

    if case.format is None:
        config, codes = triton_configs.config(case.head_dim, q.dtype, case.block_size, gpu), ()
    else:
        format = FORMATS[case.format]
        config = triton_configs.quantized_config(case.head_dim, q.dtype, format, case.block_size, gpu)
        dim = triton_configs.padded_head_dim(case.head_dim)
        codes = _codes(q, format, case.block_size[1], dim), format.weights
    return forward._forward, *forward.launch_arguments(
        q, q, q, q, lse, forward.mask_arguments(mask, 2, 3), text_valid, case.head_dim**-0.5,
        case.block_size, mask.text, config, *codes,
    )  # fmt: skip


def gradients_launch(case: Case, q, lse, mask: BlockMask, text_valid, gpu: triton_configs.Gpu) -> tuple:
    """The same of a kernel of the backward pass."""
    from dit_accel.kernels.block_sparse import triton_backward as backward

    _, dq, dkv = backward.launches(
        q, q, q, q, lse, q, None, q, q, q, lse, lse, mask, case.head_dim**-0.5, text_valid, gpu
    )  # fmt: skip
    return dq if case.part == "dq" else dkv


def _codes(x: torch.Tensor, format: Format, block_keys: int, dim: int) -> Quantized:
    """What q, k and v like x become, not filled in."""
    from dit_accel.kernels.block_sparse.triton_quantize import TILE

    batch, heads, tokens, _ = x.shape
    group, padded = key_group(block_keys), -(-tokens // TILE) * TILE
    codes = torch.empty(batch, heads, padded, dim, dtype=torch.int8, device="cpu")
    scales = torch.empty(batch, heads, padded, dtype=torch.float32, device="cpu")
    of_groups, of_channels = scales[..., : padded // group].contiguous(), None
    if format.values is not None:
        x = torch.empty(batch, heads, dim, padded, dtype=format.dtype, device="cpu")
        of_channels = torch.empty(batch, heads, dim, dtype=torch.float32, device="cpu")
    return Quantized(codes, scales, codes, of_groups, x, of_channels, of_channels, scales, group)


@contextmanager
def pretend_gpu(gpu: triton_configs.Gpu, threads: int = 32) -> Iterator[None]:
    """Triton compiles for this GPU, with so many threads in step, whatever the machine has.

    Launching is not possible.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    number = gpu if isinstance(gpu, str) else gpu[0] * 10 + gpu[1]

    class PretendedDriver:
        def get_current_device(self):
            return f"pretended {number}"  # Triton's caches are per device

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("hip" if isinstance(gpu, str) else "cuda", number, threads)

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
    "chip    dtype head_dim  block   text  format     part    rows x keys warps stages  registers stack "
    "shared waits  instructions"
)


def line(row: Row) -> str:
    """A row under `HEADER`."""
    case, options = row.case, row.options
    block, tile = (f"{a}x{b}" for a, b in (case.block_size, (options["TQ"], options["TK"])))
    remarks = " ".join([*row.instructions, *row.products, *(f"<- {problem}" for problem in row.problems())])
    text = "yes" if case.text else "no"
    what = (
        f"{case.chip:7} {case.dtype:5} {case.head_dim:8}  {block:7} {text:5} {case.format or '':10} "
        f"{case.part:7} {tile:11}"
    )
    launch = f"{options['num_warps']:5} {options['num_stages']:6}"
    return f"{what} {launch}  {row.registers:9} {row.stack:5} {row.shared:6} {row.waits[1]:5}  {remarks}"


def page(version: str, rows: list[Row]) -> str:
    """The report as Markdown."""
    bad = sum(bool(row.problems()) for row in rows)
    overwritten = sum(bool(row.overwritten) for row in rows)
    serialised = sum(row.waits[0] != row.waits[1] for row in rows)
    report = "\n".join([HEADER, *map(line, rows)])
    return (
        f"# What the Triton kernels compile to\n\nTriton {version}, compiled without a GPU by `python -m "
        f"dit_accel.evals.benchmarks.compile_report`: {len(rows)} configurations, {bad} beyond a limit; "
        f"{overwritten} with an operand overwritten too early, {serialised} serialised. Stack and shared "
        f"memory in bytes. Nothing here was run.\n\n```\n{report}\n```\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Compiles every variant of the Triton kernels and reports registers and spills."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.benchmarks.compile_report",
        description="Compile the Triton kernels without a GPU; report registers, stack and shared memory.",
    )
    parser.add_argument("--arch", nargs="+", choices=CHIPS, default=list(CHIPS), help="chips (default: all)")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="passes (default: all)")
    parser.add_argument("--gate", action="store_true", help="only what the stack limits apply to")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the report to this file")
    options = parser.parse_args(arguments)
    try:
        from dit_accel.kernels.block_sparse.triton_forward import INTERPRETED
    except ImportError as error:
        print(f"Triton could not be imported ({error}); pip install triton", file=sys.stderr)
        return 3
    if INTERPRETED:
        print("kernels are interpreted, not compiled: unset TRITON_INTERPRET", file=sys.stderr)
        return 3
    import triton

    version = triton.__version__
    print(f"triton {version}\n{HEADER}", flush=True)
    rows = []
    for case in GATE if options.gate else ALL:
        if case.chip in options.arch and case.part in options.part:
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
