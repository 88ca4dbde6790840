"""Compiles the Triton kernels for NVIDIA chips, without a GPU.

    python -m dit_accel.evals.benchmarks.compile_report

Every configuration that the kernel's `config()` would choose is compiled through Triton's own launch path, so
with the specialisations of a real launch, up to machine code. Registers, stack (where spilled registers go),
shared memory, the kind of tensor-core instruction, and what became of asynchronous multiplications (see
`machine_code`) are read back from it. Exits with 1 if a configuration breaks a limit: more shared memory than
the chip has, tensor-core instructions older than its own (but where this Triton has no others, which the
report then says) or of other numbers than a format has, an operand overwritten while a multiplication may be
reading it, multiplications that wait for each other, fences on sm_90 in the loops of a kernel whose copies
need none, or, at head_dim 64 and 128, more stack than `STACK_LIMIT`.

What comes out depends on Triton's version and the ptxas that it brings. `make old-triton` makes a second
environment with the Triton of torch 2.11; its python runs this report at the root of the checkout.
"""

from __future__ import annotations

import argparse
import importlib
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

import torch

from dit_accel.kernels.block_sparse import triton_configs
from dit_accel.kernels.block_sparse.formats import FORMATS, Format, key_group
from dit_accel.kernels.block_sparse.integer_products import older_instructions
from dit_accel.kernels.block_sparse.launch_order import mask_arguments
from dit_accel.kernels.block_sparse.quantized import Quantized
from dit_accel.masks.block_mask import BlockMask

from .compile_cases import ALL, CHIPS, GATE, GATED_HEAD_DIMS, KERNELS, PARTS, Case
from .machine_code import Loop, loops, overwritten_operands, parse, per_turn, waits, waits_asked_for

STACK_LIMIT = {"sm_80": 128, "sm_90": 32, "sm_100": 32, "sm_120": 32}  # bytes per thread
MACHINE_CODE = {"wgmma": r"\b[HIQ]GMMA", "tcgen05": r"\bUTC\w*MMA", "mma.sync": r"\b[HIQ]MMA"}
PRODUCTS = {  # of what numbers, in PTX
    "s8": r"mma\S*\.s8\.s8|tcgen05\.mma\S*kind::i8",
    "e4m3": r"mma\S*\.e4m3\.e4m3|tcgen05\.mma\S*kind::f8f6f4",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
        loops: over full and over partial blocks.
        older: why integers are left to `mma.sync` (`integer_products.older_instructions`), or None.
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
    loops: tuple[Loop, ...] = ()
    older: str | None = None

    def expected(self) -> set[str]:
        """The kinds of tensor-core instructions that it must have, and no others: the best there are."""
        case, chip = self.case, CHIPS[self.case.chip]
        if case.dtype == "fp32":  # computed in IEEE fp32, without tensor cores
            return set()
        # the newer instructions take 64 rows of the left operand
        held = self.options["TK" if case.part == "dkv" else "TQ"]
        best = {chip.instruction if held >= 64 else "mma.sync"}
        if self.older is None or case.format is None:
            return best
        return {"mma.sync"} if case.all_integers else best | {"mma.sync"}

    def problems(self) -> list[str]:
        """Limits that this configuration breaks, in words."""
        case, chip = self.case, CHIPS[self.case.chip]
        found = []
        if self.shared > chip.shared:
            found.append(f"{self.shared} bytes of shared memory, {case.chip} has {chip.shared}")
        expected, made = self.expected(), set(self.instructions)
        found += [f"no {kind} in the machine code" for kind in sorted(expected - made)]
        found += [f"{kind} in the machine code" for kind in sorted(made - expected)]
        found += [f"no products of {kind}" for kind in case.products if kind not in self.products]
        found += self.overwritten
        if self.waits[0] != self.waits[1]:
            asked, made = self.waits
            found.append(f"multiplications are serialised: {asked} waits in PTX, {made} in the machine code")
        if case.kernel != "pointer" and case.chip == "sm_90" and any(loop.fences for loop in self.loops):
            found.append("fences in a loop whose copies need none")
        limit, gated = STACK_LIMIT[case.chip], case.block_size == (128, 64) or case.kernel != "pointer"
        if case.head_dim in GATED_HEAD_DIMS and gated and self.stack > limit:
            found.append(f"{self.stack} bytes of stack per thread, the limit is {limit}")
        return found


def compile_case(case: Case) -> Row:
    """Compile a kernel as a launch on these inputs would on this chip."""
    import triton

    from dit_accel.kernels.block_sparse.triton_forward import LAUNCH_OPTIONS

    gpu = CHIPS[case.chip].capability
    launch = forward_launch if case.part == "forward" else gradients_launch
    kernel, grid, args, options = launch(case, *inputs_of(case), gpu)
    with pretend_gpu(gpu):
        compiled = kernel.warmup(*args, grid=grid, **options, **LAUNCH_OPTIONS)
    older = None if case.format is None else older_instructions(gpu, triton.__version__)
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
        tuple(loops(code)),
        older,
    )


def inputs_of(case: Case) -> tuple[torch.Tensor, torch.Tensor, BlockMask, torch.Tensor | None]:
    """q, which k and v are like, a log-sum-exp, a mask and text lengths."""
    mask = BlockMask.from_token_mask(torch.ones(300, 300, dtype=torch.bool), case.block_size)
    q = torch.empty(2, 300, 3, case.head_dim, dtype=DTYPES[case.dtype]).transpose(1, 2)
    return q, torch.empty(2, 3, 300), mask, torch.zeros(2, dtype=torch.int32) if case.text else None


def forward_launch(case: Case, q, lse, mask: BlockMask, text_valid, gpu: triton_configs.Gpu) -> tuple:
    """The kernel of the forward pass, and its grid, positional and keyword arguments."""
    from dit_accel.kernels.block_sparse import triton_forward as forward

    if case.kernel != "pointer":
        other = importlib.import_module(f"dit_accel.kernels.block_sparse.triton_{case.kernel}")
        format = None if case.format is None else FORMATS[case.format]
        config = getattr(triton_configs, f"{case.kernel}_config")(case.head_dim, case.block_size, gpu, format)
        config |= {"PING_PONG": True} if case.ping_pong else {}
        codes = ()
        if format is not None:
            dim = other.held_head_dim(case.head_dim)
            codes = (_codes(q, format, case.block_size[1], dim),)
            codes += (format.weights,) if case.kernel == "tma" else ()
        return other._forward, *other.launch_arguments(
            q, q, q, q, lse, mask_arguments(mask, 2, 3), text_valid, case.head_dim**-0.5,
            case.block_size, mask.text, config, *codes,
        )  # fmt: skip
    if case.format is None:
        config, codes = triton_configs.config(case.head_dim, q.dtype, case.block_size, gpu), ()
    else:
        format = FORMATS[case.format]
        config = triton_configs.quantized_config(case.head_dim, q.dtype, format, case.block_size, gpu)
        dim = triton_configs.padded_head_dim(case.head_dim)
        codes = _codes(q, format, case.block_size[1], dim), format.weights
    return forward._forward, *forward.launch_arguments(
        q, q, q, q, lse, mask_arguments(mask, 2, 3), text_valid, case.head_dim**-0.5,
        case.block_size, mask.text, config, *codes,
    )  # fmt: skip


def gradients_launch(case: Case, q, lse, mask: BlockMask, text_valid, gpu: triton_configs.Gpu) -> tuple:
    """The same of a kernel of the backward pass."""
    from dit_accel.kernels.block_sparse import triton_backward, triton_tma_backward

    module = triton_tma_backward if case.kernel == "tma" else triton_backward
    options = triton_configs.backward_config(
        case.part, case.kernel, case.head_dim, q.dtype, case.block_size, gpu
    )
    given = triton_backward.Given(q, q, q, q, lse, lse, mask, case.head_dim**-0.5, text_valid)
    if case.part == "dq":
        return module.dq_launch(given, q, options)
    return module.dkv_launch(given, q, q, options)


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
    "chip    dtype head_dim  block   text  format     part    kernel  rows x keys warps stages  registers "
    "stack shared waits  per 64 keys  barriers fences  instructions"
)


def line(row: Row) -> str:
    """A row under `HEADER`."""
    case, options = row.case, row.options
    block, tile = (f"{a}x{b}" for a, b in (case.block_size, (options["TQ"], options["TK"])))
    remarks = [*row.instructions, *row.products, *["ping-pong"] * case.ping_pong]
    remarks = " ".join([*remarks, *(f"<- {problem}" for problem in row.problems())])
    text = "yes" if case.text else "no"
    what = (
        f"{case.chip:7} {case.dtype:5} {case.head_dim:8}  {block:7} {text:5} {case.format or '':10} "
        f"{case.part:7} {case.kernel:7} {tile:11}"
    )
    turns = per_turn(row.loops, options["TK"])
    in_loops = " ".join(f"{'/'.join(map(str, turns[name])):{len(name)}}" for name in turns)
    launch = f"{options['num_warps']:5} {options['num_stages']:6}  {row.registers:9} {row.stack:5}"
    return f"{what} {launch} {row.shared:6} {row.waits[1]:5}  {in_loops}  {remarks}"


def notes(rows: list[Row]) -> list[str]:
    """What is asked of some rows in place of their chip's best instructions, and why."""
    return [
        f"On {chip} integers of 8 bits are multiplied by mma.sync, and no limit is broken by it: {why}."
        for chip, why in dict.fromkeys((row.case.chip, row.older) for row in rows if row.older is not None)
    ]


def page(version: str, rows: list[Row]) -> str:
    """The report as Markdown."""
    bad = sum(bool(row.problems()) for row in rows)
    overwritten = sum(bool(row.overwritten) for row in rows)
    serialised = sum(row.waits[0] != row.waits[1] for row in rows)
    report = "\n".join([HEADER, *map(line, rows)])
    said = "".join(note + "\n\n" for note in notes(rows))
    return (
        f"# What the Triton kernels compile to\n\nTriton {version}, compiled without a GPU by `python -m "
        f"dit_accel.evals.benchmarks.compile_report`: {len(rows)} configurations, {bad} beyond a limit; "
        f"{overwritten} with an operand overwritten too early, {serialised} serialised. Stack and shared "
        "memory in bytes. Instructions of a warp for 64 keys, barriers of the whole program and fences are "
        "those of the loops over full / partial blocks, of each group of warps where they differ. Nothing "
        f"here was run.\n\n{said}```\n{report}\n```\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Compiles every variant of the Triton kernels and reports registers and spills."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.benchmarks.compile_report",
        description="Compile the Triton kernels without a GPU; report registers, stack and shared memory.",
    )
    parser.add_argument("--arch", nargs="+", choices=CHIPS, default=list(CHIPS), help="chips (default: all)")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="passes (default: all)")
    parser.add_argument(
        "--kernel",
        nargs="+",
        choices=KERNELS,
        default=list(KERNELS),
        help="of the forward pass (default: all)",
    )
    parser.add_argument("--plain", action="store_true", help="only 16 bits, nothing quantized")
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
        asked = case.chip in options.arch and case.part in options.part and case.kernel in options.kernel
        if asked and not (options.plain and (case.dtype == "fp32" or case.format is not None)):
            rows.append(compile_case(case))
            print(line(rows[-1]), flush=True)
    print(*notes(rows), sep="\n", flush=True)
    if options.json:
        results = [asdict(row) | {"problems": row.problems()} for row in rows]
        options.json.write_text(json.dumps({"triton": version, "rows": results}, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(page(version, rows))
    return int(any(row.problems() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
