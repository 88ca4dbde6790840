"""A kernel of the backward pass under a launch of one's own: are gradients right, and how fast is it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from dit_accel.kernels import block_sparse_attention
from dit_accel.kernels.block_sparse.problem import Problem
from dit_accel.kernels.block_sparse.tuned import Launch
from dit_accel.masks.block_mask import BlockMask

from .attention import inputs
from .backward import differentiated, wrong
from .cases import BY_NAME
from .checks import DTYPES, GEOMETRIES, REHEARSAL, check_gradients
from .job import Row
from .launches import block_size, check_available, timed_row
from .peers import kernel

PRODUCTS = {"dq": 3, "dkv": 4}  # of matrices in a part; the forward pass has two


class _Attention(torch.autograd.Function):
    """Attention by the kernel that is ours, a part of its gradients by a launch."""

    @staticmethod
    def forward(ctx: Any, launch: Launch, mask: BlockMask, text_valid, q, k, v) -> tuple:
        ctx.set_materialize_grads(False)
        out, lse = block_sparse_attention(
            q, k, v, mask, text_valid=text_valid, return_lse=True, backend="triton"
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = launch, mask, text_valid
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor | None) -> tuple:
        from dit_accel.kernels.block_sparse.triton_gradients import gradients

        (q, k, v, out, lse), (launch, mask, text_valid) = ctx.saved_tensors, ctx.rest
        options = {"scale": q.shape[3] ** -0.5, "text_valid": text_valid, "launch": launch}
        return None, None, None, *gradients(q, k, v, mask, out, lse, dout, dlse, **options)


def attend(
    launch: Launch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, text_valid=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and log-sum-exp, with gradients by a launch; by plain PyTorch where no kernel can run.

    Raises:
        UnavailableError: a kernel that this GPU or Triton does not have.
    """
    if kernel(q.device.type) != "triton":
        out, lse = block_sparse_attention(
            q, k, v, mask, text_valid=text_valid, return_lse=True, backend="gather"
        )
        return out, lse
    check_available(launch, Problem.of(q, k, v, mask))
    text_valid = None if text_valid is None else text_valid.int().contiguous()
    return _Attention.apply(launch, mask, text_valid, q, k, v)


def run_check(device: str, launch: list[Any], dtype: str, head_dims: list[int]) -> Iterator[Row]:
    """Gradients with one part by a launch."""
    run = partial(attend, Launch(*launch))
    for head_dim in head_dims:
        for geometry in GEOMETRIES if device == "cuda" else REHEARSAL:
            row = check_gradients(run, geometry, head_dim, DTYPES[dtype], device)
            yield {"launch": launch, **row}


def run(device: str, case: list[str], launch: list[Any]) -> Iterator[Row]:
    """A row with the times of a launch on a case: of its kernel alone, if all gradients are right."""
    chosen, which = BY_NAME[tuple(case)], Launch(*launch)
    q, k, v, mask = inputs(chosen, device, block_size(which))

    def prepare(*given: Any) -> Callable[[], torch.Tensor]:
        return lambda: attend(which, *given)[0]

    gradients = differentiated(prepare, q, k, v, mask)
    if not (error := wrong(q, k, v, mask, gradients)) <= 1:
        yield {"kind": "wrong", "reason": f"gradients: error {error:.2f} times what is allowed, not timed"}
        return
    dout = torch.randn_like(q)
    call = partial(gradients, dout)
    if kernel(device) == "triton":
        call = _alone(which, q, k, v, mask, dout)
        call()
    yield timed_row(device, case, launch, mask, call, PRODUCTS[which.part] / 2)


def _alone(launch: Launch, q, k, v, mask: BlockMask, dout: torch.Tensor) -> Callable[[], None]:
    """The kernel of a launch, with what it needs."""
    from dit_accel.kernels.block_sparse import triton_gradients

    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="triton")
    given = triton_gradients.prepared(q, k, v, mask, out, lse, dout, None, scale=q.shape[3] ** -0.5)
    results = tuple(map(torch.empty_like, (q,) if launch.part == "dq" else (k, v)))
    return partial(triton_gradients.compute, launch.part, given, results, launch=launch)
