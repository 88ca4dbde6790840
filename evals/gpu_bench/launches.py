"""The kernel under a launch configuration of one's own: its grid of candidates, and how fast each is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from dit_accel.errors import UnavailableError
from dit_accel.kernels import block_sparse_attention, can_run
from dit_accel.kernels.block_sparse.formats import FORMATS, key_group
from dit_accel.kernels.block_sparse.launch_order import mask_arguments
from dit_accel.kernels.block_sparse.problem import Problem
from dit_accel.kernels.block_sparse.triton_configs import launch_options
from dit_accel.kernels.block_sparse.tuned import Launch
from dit_accel.masks.block_mask import BlockMask

from .attention import BLOCK_SIZE, dtype_on, inputs, tflops, wrong
from .cases import BY_NAME
from .job import Row
from .peers import ERRORS, kernel
from .timing import measure

GRID = (
    *(Launch(*launch) for launch in product((128, 64), (64, 32), (8, 4), (5, 4, 3, 2))),
    *(Launch(128, 64, 8, stages, "tma") for stages in (2, 3, 4)),
    Launch(64, 64, 4, 3, "tma"),
    *(Launch(128, 64, 8, stages, "gluon") for stages in (2, 3)),
    *(Launch(128, 64, 8, 3, "gluon", 64, "none", *how) for how in ((True, False), (False, True))),
    *(Launch(128, 64, 8, stages, "gluon", 64, "none", True, True) for stages in (2, 3)),
    *(Launch(128, 64, 8, stages, "pointer", 128) for stages in (5, 3)),
    *(Launch(128, keys, 8, stages, "tma", 128) for keys, stages in ((128, 2), (128, 3), (64, 3))),
    *(Launch(128, 64, 8, stages, "pointer", 64, "int8") for stages in (5, 3)),
    *(Launch(128, 64, 8, stages, "tma", 64, "int8") for stages in (2, 3)),
    Launch(128, 64, 8, 2, "tma", 128, "int8"),
    *(Launch(128, 64, 8, 3, "gluon", 64, "int8", both, both) for both in (False, True)),
    Launch(128, 64, 8, 5, "pointer", 64, "int8-fp8"),
    *(Launch(128, 64, 8, stages, "tma", 64, "int8-fp8") for stages in (2, 3)),
)
BACKWARD_GRID = (
    *(Launch(128, 64, 8, stages, part="dq") for stages in (3, 2)),
    *(Launch(64, 64, warps, 2, part="dq") for warps in (8, 4)),
    *(Launch(128, 64, 8, stages, "tma", part="dq") for stages in (2, 3)),
    Launch(64, 64, 4, 2, "tma", part="dq"),
    *(Launch(64, 64, warps, stages, part="dkv") for warps, stages in ((4, 3), (4, 2), (8, 2))),
    *(Launch(32, 64, warps, stages, part="dkv") for warps, stages in ((4, 3), (8, 2))),
    *(Launch(64, 64, warps, 2, "tma", part="dkv") for warps in (4, 8)),
    Launch(32, 64, 4, 3, "tma", part="dkv"),
)
REHEARSAL_BACKWARD_GRID = (
    Launch(64, 64, 4, 3, part="dq"), Launch(64, 64, 4, 2, "tma", part="dq"), Launch(64, 64, 4, 3, part="dkv"),
)  # fmt: skip
REHEARSAL_GRID = (Launch(64, 64, 4, 3), Launch(64, 32, 4, 2), Launch(64, 64, 4, 3, "pointer", 64, "int8"))


def describe(launch: Launch) -> str:
    """A launch in a few characters, such as `128x64 w8 s2`."""
    what = f"{launch.rows}x{launch.keys} w{launch.warps} s{launch.stages}"
    what += "" if launch.kernel == "pointer" else f" {launch.kernel}"
    what += "" if launch.format == "none" else f" {launch.format}"
    what += "" if launch.part == "forward" else f" {launch.part}"
    what += " ping-pong" * launch.ping_pong + " persistent" * launch.persistent
    return what + ("" if launch.block_keys == 64 else f", blocks of {launch.block_keys} keys")


def block_size(launch: Launch) -> tuple[int, int]:
    """Of the masks that a launch is for."""
    return BLOCK_SIZE[0], launch.block_keys


def attend(
    launch: Launch,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    text_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and log-sum-exp of a Triton kernel, launched so; of plain PyTorch where none can run.

    Raises:
        UnavailableError: a kernel that this GPU or Triton does not have.
    """
    if kernel(q.device.type) != "triton":
        options = {"text_valid": text_valid, "return_lse": True, "backend": "gather"}
        options["quantization"] = format_of(launch)
        out, lse = block_sparse_attention(q, k, v, mask, **options)
        return out, lse
    from dit_accel.kernels.block_sparse import triton_forward as forward

    text_valid = None if text_valid is None else text_valid.int().contiguous()
    options = launch_options(launch, mask.block_size)
    if launch.kernel != "pointer" or launch.format != "none":
        return _by_another(launch, q, k, v, mask, text_valid)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    grid, arguments, options = forward.launch_arguments(
        q, k, v, out, lse, mask_arguments(mask, *q.shape[:2]), text_valid, q.shape[3] ** -0.5,
        mask.block_size, mask.text, options,
    )  # fmt: skip
    forward._forward[grid](*arguments, **options, **forward.LAUNCH_OPTIONS)
    return out, lse


def _by_another(launch: Launch, q, k, v, mask: BlockMask, text_valid):
    """By another kernel than that with pointers, or in a numeric format."""
    check_available(launch, Problem.of(q, k, v, mask, quantization=format_of(launch)))
    given = {"scale": q.shape[3] ** -0.5, "text_valid": text_valid}
    if launch.format != "none":
        from dit_accel.kernels.block_sparse.triton_quantized import quantized_attention

        format, (rows, keys) = FORMATS[launch.format], mask.block_size
        given["options"] = launch_options(launch, (rows, key_group(keys)))
        return quantized_attention(q, k, v, mask, format, kernel=launch.kernel, **given)
    given["options"] = launch_options(launch, mask.block_size)
    module = importlib.import_module(f"dit_accel.kernels.block_sparse.triton_{launch.kernel}")
    return module.attention(q, k, v, mask, **given)


def check_available(launch: Launch, problem: Problem) -> None:
    """Whether a launch's kernel can compute a problem here.

    Raises:
        UnavailableError: it cannot.
    """
    name = "triton" if launch.kernel == "pointer" else f"triton-{launch.kernel}"
    if (reason := can_run(name, **vars(problem))) is not None:
        raise UnavailableError(reason)


def format_of(launch: Launch) -> str | None:
    """The value of `quantization` that a launch is for."""
    return None if launch.format == "none" else launch.format


def allowed(launch: Launch) -> float | None:
    """The error that a launch may have, relative L1 of normal inputs, if it is in a numeric format."""
    return ERRORS.get(launch.format)


def run(device: str, case: list[str], launch: list[int]) -> Iterator[Row]:
    """A row with the times of a launch on a case."""
    chosen, which = BY_NAME[tuple(case)], Launch(*launch)
    q, k, v, mask = inputs(chosen, device, block_size(which))
    call = partial(attend, which, q, k, v, mask)
    out, _ = call()
    if not (error := wrong(q, k, v, mask, out, allowed(which))) <= 1:
        yield {"kind": "wrong", "reason": f"error {error:.2f} times what is allowed, not timed"}
        return
    yield timed_row(device, case, launch, mask, call)


def timed_row(
    device: str, case: list[str], launch: list[Any], mask: BlockMask, call: Callable[[], Any], work: float = 1
) -> Row:
    """The row of a launch, whose call is timed and does so many times the work of a forward pass."""
    chosen, timed = BY_NAME[tuple(case)], measure(call, device)
    return {
        "kind": "launch", "case": case, "launch": list(launch), "head_dim": chosen.head_dim,
        "element_bytes": dtype_on(device).itemsize,
        "tflops": work * tflops(chosen, mask.block_density, timed.ms), **timed.as_row(),
    }  # fmt: skip
