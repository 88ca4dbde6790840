"""Gradients of block-sparse attention by Triton's kernels: each part by the fastest that was measured.

`triton_backward` has the formulas and kernels that address their inputs by pointers, `triton_tma_backward`
those whose tiles the copy engine fetches. dQ is one part, dK and dV are another; nothing is shared by them
but what a first kernel prepares, so that each is computed by either.

With a tail, out and lse are those over all keys, so that blocks follow the same formulas; what goes through
the pooled keys is added by `backward.of_tail`.
"""

from __future__ import annotations

import math

import torch

from dit_accel.masks.block_mask import BlockMask

from . import triton_backward
from .backward import of_tail
from .problem import Lengths
from .tail import Tail
from .triton_backward import Given, preparing
from .triton_configs import backward_config, fastest_kernel, gpu, launch_options
from .triton_forward import INTERPRETED, LAUNCH_OPTIONS, addressable, empty_like
from .tuned import Launch

INTERPRETED_AS = {"pointer": (8, 0), "tma": (9, 0)}  # the GPU whose table the interpreter goes by


def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    *,
    scale: float,
    text_valid: Lengths = None,
    tail: str | None = None,
    kernel: str | None = None,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, in their dtype: as `native.gradients`, which says what is given.

    By one `kernel`, `"pointer"` or `"tma"`, or each part by the fastest; the part of a `launch` by that.
    """
    wanted = q.dtype
    if INTERPRETED and wanted == torch.bfloat16:  # Triton's interpreter would multiply the bit patterns
        q, k, v, out, dout = (x.float() for x in (q, k, v, out, dout))
    pooled = None if tail is None else Tail.of(mask)
    computed = mask if pooled is None else pooled.whole or mask
    given = prepared(q, k, v, computed, out, lse, dout, dlse, scale=scale, text_valid=text_valid)
    exact = None if pooled is None else torch.float32  # the tail's part is added before any rounding
    dq, dk, dv = found = tuple(empty_like(x, exact) for x in (given.q, given.k, given.v))
    compute("dq", given, (dq,), kernel, launch)
    compute("dkv", given, (dk, dv), kernel, launch)
    if pooled is not None:
        q, k, v, dout = (x.float() for x in (given.q, given.k, given.v, given.dout))
        natural = given.top * math.log(2)
        more = of_tail(q, k, v, mask, pooled, natural, dout, given.delta, scale=scale, text_valid=text_valid)
        found = tuple(a + b for a, b in zip(found, more, strict=True))
    dq, dk, dv = (x.to(wanted) for x in found)
    return dq, dk, dv


def prepared(
    q, k, v, mask: BlockMask, out, lse, dout, dlse, *, scale: float, text_valid: Lengths = None
) -> Given:
    """What both parts read, once the first kernel has run."""
    q, k, v, out, dout = map(addressable, (q, k, v, out, dout.to(q.dtype)))
    top, delta = (torch.empty(lse.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    with torch.cuda.device_of(q):
        kernel, grid, args, options = preparing(out, dout, lse, dlse, top, delta)
        kernel[grid](*args, **options, **LAUNCH_OPTIONS)
    return Given(q, k, v, dout, top, delta, mask, scale, text_valid)


def compute(
    part: str,
    given: Given,
    results: tuple[torch.Tensor, ...],
    kernel: str | None = None,
    launch: Launch | None = None,
) -> None:
    """Fills in dQ, or dK and dV; by which kernel and launch, `gradients` says."""
    name, options = way(part, given, kernel, launch)
    if name == "tma":
        from . import triton_tma_backward as module
    else:
        module = triton_backward
    with torch.cuda.device_of(given.q):
        function, grid, args, options = getattr(module, f"{part}_launch")(given, *results, options)
        function[grid](*args, **options, **LAUNCH_OPTIONS)


def way(part: str, given: Given, kernel: str | None, launch: Launch | None) -> tuple[str, dict[str, int]]:
    """The name of the kernel that computes a part, and its tile and launch options."""
    q, size = given.q, given.mask.block_size
    if launch is not None and launch.part == part:
        return launch.kernel, launch_options(launch, size)
    if kernel is None:
        kernel = "pointer" if INTERPRETED else _fastest(part, given)
    device = INTERPRETED_AS[kernel] if INTERPRETED else gpu(q.device)
    return kernel, backward_config(part, kernel, q.shape[3], q.dtype, size, device)


def _fastest(part: str, given: Given) -> str:
    """The fastest kernel measured, or that with pointers where the copy engine would need copies."""
    q, size = given.q, given.mask.block_size
    name = fastest_kernel(q.shape[3], q.dtype, size, gpu(q.device), part=part)
    if name == "tma":
        from .triton_tma import describable

        return name if all(map(describable, (q, given.k, given.v, given.dout))) else "pointer"
    return name
