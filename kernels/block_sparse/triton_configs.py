"""Launch configurations of the Triton kernels: measured on the GPU in use, else of the tables here."""

from __future__ import annotations

import torch

from . import tuned
from .formats import Format, key_group

# (chip, bytes per element, largest padded head_dim): query rows and keys per step, warps, stages. Chosen by
# the registers, spills and shared memory that `python -m dit_accel.evals.benchmarks.compile_report` prints. A
# key block comes through two dependent loads (its index, itself), so 5 stages fetch two blocks ahead and 3
# stages one.
CONFIGS = {
    ("sm_80", 2, 64): (128, 64, 4, 5),
    ("sm_80", 2, 128): (128, 64, 8, 5),
    ("sm_80", 2, 256): (64, 32, 8, 5),
    ("sm_90", 2, 64): (128, 64, 8, 5),
    ("sm_90", 2, 128): (128, 64, 8, 5),
    ("sm_90", 2, 256): (128, 32, 8, 5),
    ("sm_100", 2, 64): (128, 64, 8, 5),
    ("sm_100", 2, 128): (128, 64, 8, 5),
    ("sm_100", 2, 256): (128, 32, 8, 5),
    ("sm_120", 2, 64): (128, 64, 8, 3),
    ("sm_120", 2, 128): (128, 64, 8, 3),
    ("sm_120", 2, 256): (64, 32, 8, 3),
    ("any", 4, 64): (64, 32, 8, 2),
    ("any", 4, 128): (32, 32, 8, 1),
    ("any", 4, 256): (32, 32, 8, 1),
}

QUANTIZED_CONFIGS = {  # (chip, largest padded head_dim), of formats in which P and V have eight bits
    ("sm_80", 64): (128, 64, 4, 4),
    ("sm_80", 128): (128, 64, 8, 4),
    ("sm_80", 256): (64, 64, 8, 3),
    ("sm_90", 64): (128, 64, 8, 5),
    ("sm_90", 128): (128, 64, 8, 5),
    ("sm_90", 256): (128, 64, 8, 3),
    ("sm_100", 64): (128, 64, 8, 5),
    ("sm_100", 128): (128, 64, 8, 5),
    ("sm_100", 256): (128, 64, 8, 3),
    ("sm_120", 64): (128, 64, 8, 3),
    ("sm_120", 128): (64, 64, 8, 3),
    ("sm_120", 256): (64, 64, 8, 2),
}


# (chip, bytes per element, largest padded head_dim): query rows and keys per step, warps, stages, of the
# backward pass: of dQ, which holds query rows, then of dK and dV, which hold keys
BACKWARD_CONFIGS = {
    ("sm_80", 2, 64): ((128, 64, 8, 3), (64, 64, 4, 3)),
    ("sm_80", 2, 128): ((64, 64, 4, 2), (64, 64, 8, 2)),
    ("sm_80", 2, 256): ((64, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_90", 2, 64): ((128, 64, 8, 3), (64, 64, 4, 3)),
    ("sm_90", 2, 128): ((128, 64, 8, 2), (32, 64, 4, 3)),
    ("sm_90", 2, 256): ((64, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_100", 2, 64): ((128, 64, 8, 3), (64, 64, 4, 3)),
    ("sm_100", 2, 128): ((128, 64, 8, 2), (64, 64, 8, 2)),
    ("sm_100", 2, 256): ((64, 32, 8, 2), (64, 64, 8, 1)),
    ("sm_120", 2, 64): ((128, 64, 8, 2), (64, 64, 4, 2)),
    ("sm_120", 2, 128): ((64, 64, 8, 2), (32, 64, 8, 2)),
    ("sm_120", 2, 256): ((64, 32, 8, 1), (32, 32, 8, 1)),
    ("any", 4, 64): ((32, 32, 4, 2), (32, 32, 4, 2)),
    ("any", 4, 128): ((32, 32, 8, 1), (32, 32, 8, 1)),
    ("any", 4, 256): ((32, 32, 8, 1), (32, 32, 8, 1)),
}


def chip(capability: tuple[int, int]) -> str:
    """The row of `CONFIGS` for a compute capability; 8.6 and 8.9 have as little shared memory as 12.0."""
    major, minor = capability
    if major == 8:
        return "sm_80" if minor in (0, 7) else "sm_120"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")


def config(
    head_dim: int, dtype: torch.dtype, block_size: tuple[int, int], capability: tuple[int, int]
) -> dict[str, int]:
    """Tile and launch options of the kernel, as measured on this GPU (`tuned`), else those of `CONFIGS`."""
    launch = tuned.find(capability, dtype.itemsize, max(padded_head_dim(head_dim), 64))
    return launch_options(launch or untuned(head_dim, dtype, capability), block_size)


def quantized_config(
    head_dim: int,
    dtype: torch.dtype,
    format: Format,
    block_size: tuple[int, int],
    capability: tuple[int, int],
) -> dict[str, int]:
    """The same in a numeric format; where P is rounded, a step takes the keys of a group."""
    largest = max(padded_head_dim(head_dim), 64)
    if format.weights is None:
        launch = untuned(head_dim, dtype, capability)
        return launch_options(launch, (block_size[0], key_group(block_size[1])))
    launch = tuned.Launch(*QUANTIZED_CONFIGS[chip(capability), largest])
    options = launch_options(launch, block_size)
    return options | {"TK": key_group(block_size[1])}


def untuned(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> tuned.Launch:
    """The launch that `CONFIGS` has for a GPU on which nothing was measured."""
    row = "any" if dtype.itemsize == 4 else chip(capability)
    return tuned.Launch(*CONFIGS[row, dtype.itemsize, max(padded_head_dim(head_dim), 64)])


def launch_options(launch: tuned.Launch, block_size: tuple[int, int]) -> dict[str, int]:
    """`TQ`, `TK`, `num_warps` and `num_stages` of a launch on a mask's blocks, which may be smaller."""
    rows, keys, warps, stages = launch
    tq, tk = min(rows, block_size[0]), min(keys, block_size[1])
    return {"TQ": tq, "TK": tk, "num_warps": max(4, warps * tq // rows), "num_stages": stages}


def backward_configs(
    head_dim: int, dtype: torch.dtype, block_size: tuple[int, int], capability: tuple[int, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """The same of the kernel of dQ, and of that of dK and dV, on a mask's blocks."""
    row = "any" if dtype.itemsize == 4 else chip(capability)
    of_queries, of_keys = BACKWARD_CONFIGS[row, dtype.itemsize, max(padded_head_dim(head_dim), 64)]
    return (
        launch_options(tuned.Launch(*of_queries), block_size),
        launch_options(tuned.Launch(*of_keys), block_size),
    )


def padded_head_dim(head_dim: int) -> int:
    """head_dim as the kernel holds it: a power of two that the tensor cores take."""
    return max(16, 1 << (head_dim - 1).bit_length())
