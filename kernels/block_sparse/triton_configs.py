"""Launch configurations of the Triton kernels: measured on the GPU in use, else of the tables here."""

from __future__ import annotations

import torch

from . import tuned
from .formats import Format, key_group

Gpu = tuple[int, int] | str  # an NVIDIA GPU's compute capability, the name of an AMD GPU's architecture
AMD = ("gfx942", "gfx110", "gfx120")  # families that the kernels were compiled for
AMD_WITH_GRADIENTS = ("gfx942",)  # in whose registers those of the backward pass fit
WORD = 32  # keys whose bits are a word of a mask's tile: kernels read whole words

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
    ("gfx942", 2, 64): (128, 64, 4, 1),
    ("gfx942", 2, 128): (128, 64, 8, 1),
    ("gfx942", 2, 256): (64, 32, 4, 1),
    ("gfx110", 2, 64): (64, 64, 4, 1),
    ("gfx110", 2, 128): (64, 32, 16, 1),
    ("gfx110", 2, 256): (32, 32, 8, 1),
    ("gfx120", 2, 64): (64, 64, 4, 1),
    ("gfx120", 2, 128): (64, 64, 4, 1),
    ("gfx120", 2, 256): (32, 32, 8, 1),
    ("gfx110", 4, 64): (16, 32, 16, 1),
    ("gfx110", 4, 128): (16, 32, 16, 1),
    ("gfx120", 4, 64): (16, 32, 16, 1),
    ("gfx120", 4, 128): (16, 32, 16, 1),
    ("any", 4, 64): (64, 32, 8, 2),
    ("any", 4, 128): (32, 32, 8, 1),
    ("any", 4, 256): (32, 32, 8, 1),
}

# (chip, largest padded head_dim), of the kernel whose keys the copy engine fetches (`triton_tma`)
TMA_CONFIGS = {
    ("sm_90", 64): (128, 128, 8, 2),
    ("sm_90", 128): (128, 128, 8, 2),
    ("sm_90", 256): (128, 64, 8, 2),
    ("sm_100", 64): (128, 128, 8, 2),
    ("sm_100", 128): (128, 128, 8, 2),
    ("sm_100", 256): (128, 64, 8, 2),
}

# (largest padded head_dim), of the kernel for Hopper in Gluon: stages are the blocks of keys and values held
GLUON_BLOCKS = (128, 64)  # the only ones that it takes
GLUON_CONFIGS = dict.fromkeys((64, 128), tuned.Launch(128, 64, 8, 3, "gluon"))

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
    ("gfx942", 2, 64): ((64, 64, 4, 1), (64, 64, 4, 1)),
    ("gfx942", 2, 128): ((64, 64, 4, 1), (64, 64, 4, 1)),
    ("gfx942", 2, 256): ((64, 32, 4, 1), (32, 32, 4, 1)),
    ("any", 4, 64): ((16, 32, 8, 1), (16, 32, 8, 1)),
    ("any", 4, 128): ((16, 32, 8, 1), (16, 32, 8, 1)),
    ("any", 4, 256): ((16, 32, 8, 1), (16, 32, 8, 1)),  # all the shared memory of sm_120
}

# (chip, largest padded head_dim), of the backward pass whose tiles the copy engine fetches
TMA_BACKWARD_CONFIGS = {
    ("sm_90", 64): ((128, 64, 8, 2), (64, 64, 4, 2)),
    ("sm_90", 128): ((128, 64, 8, 2), (32, 64, 4, 3)),  # 64 queries spill under Triton 3.6
    ("sm_90", 256): ((64, 32, 8, 2), (32, 64, 8, 2)),
    ("sm_100", 64): ((128, 64, 8, 2), (64, 64, 4, 2)),
    ("sm_100", 128): ((128, 64, 8, 2), (64, 64, 8, 2)),
    ("sm_100", 256): ((64, 32, 8, 2), (64, 64, 8, 1)),
}


def gpu(device: torch.device) -> Gpu:
    """What a device is."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return torch.cuda.get_device_capability(device)


def chip(gpu: Gpu) -> str:
    """The row of `CONFIGS` for a GPU; 8.6 and 8.9 have as little shared memory as 12.0."""
    if isinstance(gpu, str):
        return next(family for family in AMD if gpu.startswith(family))
    major, minor = gpu
    if major == 8:
        return "sm_80" if minor in (0, 7) else "sm_120"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")


def config(head_dim: int, dtype: torch.dtype, block_size: tuple[int, int], gpu: Gpu) -> dict[str, int]:
    """Tile and launch options of the kernel, as measured on this GPU (`tuned`), else those of `CONFIGS`."""
    launch = None  # the table of what was measured knows compute capabilities alone
    if not isinstance(gpu, str):
        largest = max(padded_head_dim(head_dim), 64)
        launch = tuned.find(gpu, dtype.itemsize, largest, "pointer", block_size[1])
    return launch_options(launch or untuned(head_dim, dtype, gpu), block_size)


def tma_config(
    head_dim: int, block_size: tuple[int, int], gpu: Gpu, format: Format | None = None
) -> dict[str, int]:
    """The same of the kernel whose keys the copy engine fetches, in 16 bits or a format: a group a step."""
    launch = _measured(head_dim, block_size, gpu, "tma", format)
    launch = launch or tuned.Launch(*TMA_CONFIGS[chip(gpu), max(padded_head_dim(head_dim), 64)])
    if format is None:
        return launch_options(launch, block_size)
    return launch_options(launch, block_size) | {"TK": key_group(block_size[1])}


def gluon_config(
    head_dim: int, block_size: tuple[int, int], gpu: Gpu, format: Format | None = None
) -> dict[str, int]:
    """The same of the kernel for Hopper in Gluon, up to head_dim 128."""
    launch = _measured(head_dim, block_size, gpu, "gluon", format)
    return launch_options(launch or GLUON_CONFIGS[max(padded_head_dim(head_dim), 64)], block_size)


def _measured(
    head_dim: int, block_size: tuple[int, int], gpu: Gpu, kernel: str, format: Format | None
) -> tuned.Launch | None:
    """The launch of a kernel that was measured on a GPU, of inputs in 16 bits."""
    if isinstance(gpu, str):  # the table of what was measured knows compute capabilities alone
        return None
    largest, name = max(padded_head_dim(head_dim), 64), "none" if format is None else format.name
    return tuned.find(gpu, 2, largest, kernel, block_size[1], name)


def fastest_kernel(
    head_dim: int,
    dtype: torch.dtype,
    block_size: tuple[int, int],
    gpu: Gpu,
    format: str | None = None,
    part: str = "forward",
) -> str:
    """Which kernel of a part of attention was measured to be the fastest on a GPU (`tuned.KERNELS`)."""
    if isinstance(gpu, str):
        return "pointer"
    largest = max(padded_head_dim(head_dim), 64)
    name = tuned.fastest_kernel(gpu, dtype.itemsize, largest, block_size[1], format or "none", part)
    return "tma" if name == "gluon" and block_size != GLUON_BLOCKS else name


def quantized_config(
    head_dim: int,
    dtype: torch.dtype,
    format: Format,
    block_size: tuple[int, int],
    capability: tuple[int, int],
) -> dict[str, int]:
    """The same in a numeric format; where P is rounded, a step takes the keys of a group."""
    if format.weights is None:
        measured = dtype.itemsize == 2 and _measured(head_dim, block_size, capability, "pointer", format)
        launch = measured or untuned(head_dim, dtype, capability)
        return launch_options(launch, (block_size[0], key_group(block_size[1])))
    measured = dtype.itemsize == 2 and _measured(head_dim, block_size, capability, "pointer", format)
    own = QUANTIZED_CONFIGS[chip(capability), max(padded_head_dim(head_dim), 64)]
    launch = measured or tuned.Launch(*own)
    options = launch_options(launch, block_size)
    return options | {"TK": key_group(block_size[1])}


def untuned(head_dim: int, dtype: torch.dtype, gpu: Gpu) -> tuned.Launch:
    """The launch that `CONFIGS` has for a GPU on which nothing was measured."""
    return _launch(_row(CONFIGS, head_dim, dtype, gpu), gpu)


def _row(table: dict[tuple, tuple], head_dim: int, dtype: torch.dtype, gpu: Gpu) -> tuple:
    rest = dtype.itemsize, max(padded_head_dim(head_dim), 64)
    return table.get((chip(gpu), *rest)) or table[("any", *rest)]


def _launch(options: tuple[int, int, int, int], gpu: Gpu) -> tuned.Launch:
    """On AMD's GPUs without a pipeline, whose buffers would take registers."""
    launch = tuned.Launch(*options)
    return launch._replace(stages=1) if isinstance(gpu, str) else launch


def launch_options(launch: tuned.Launch, block_size: tuple[int, int]) -> dict[str, int]:
    """`TQ`, `TK`, `num_warps` and `num_stages` of a launch on a mask's blocks, which may be smaller.

    And, of the kernel in Gluon, `PING_PONG` and `PERSISTENT`.

    Raises:
        ValueError: rows or keys that do not divide the blocks, or keys that are no whole words of bits.
    """
    rows, keys, warps, stages, *_ = launch
    tq, tk = min(rows, block_size[0]), min(keys, block_size[1])
    if tq < 16 or block_size[0] % tq:
        raise ValueError(
            f"`rows` of a launch must be 16 at least and divide blocks of {block_size[0]} queries, "
            f"got {rows}; take 16, 32, 64 or 128"
        )
    if tk < WORD or tk % WORD or block_size[1] % tk:
        raise ValueError(
            f"`keys` of a launch must be whole words of {WORD} bits of a mask's tile and divide blocks of "
            f"{block_size[1]} keys, got {keys}; take 32, 64 or 128"
        )
    options = {"TQ": tq, "TK": tk, "num_warps": max(4, warps * tq // rows), "num_stages": stages}
    if launch.kernel == "gluon":
        options |= {"PING_PONG": launch.ping_pong, "PERSISTENT": launch.persistent}
    return options


def backward_config(
    part: str, kernel: str, head_dim: int, dtype: torch.dtype, block_size: tuple[int, int], gpu: Gpu
) -> dict[str, int]:
    """The same of a part of the backward pass, `"dq"` or `"dkv"`, by a kernel, `"pointer"` or `"tma"`."""
    launch = None
    if not isinstance(gpu, str):
        largest = max(padded_head_dim(head_dim), 64)
        launch = tuned.find(gpu, dtype.itemsize, largest, kernel, block_size[1], part=part)
    return launch_options(launch or untuned_backward(part, kernel, head_dim, dtype, gpu), block_size)


def untuned_backward(part: str, kernel: str, head_dim: int, dtype: torch.dtype, gpu: Gpu) -> tuned.Launch:
    """The launch that the tables here have for a part of the backward pass."""
    if kernel == "tma":
        both = TMA_BACKWARD_CONFIGS[chip(gpu), max(padded_head_dim(head_dim), 64)]
    else:
        both = _row(BACKWARD_CONFIGS, head_dim, dtype, gpu)
    return _launch(both[tuned.BACKWARD_PARTS.index(part)], gpu)._replace(kernel=kernel, part=part)


def padded_head_dim(head_dim: int) -> int:
    """head_dim as the kernel holds it: a power of two that the tensor cores take."""
    return max(16, 1 << (head_dim - 1).bit_length())
