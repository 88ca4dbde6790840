"""Is the kernel right: against float64 on small geometries, in every element, and equal the second time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.kernels import block_sparse_attention
from dit_accel.kernels.block_sparse import reference
from dit_accel.kernels.block_sparse.tuned import Launch
from dit_accel.masks.block_mask import BlockMask
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Clear, Dense, Neighborhood, Pattern

from .attention import BLOCK_SIZE
from .job import Row
from .launches import allowed, attend, block_size
from .peers import PROVIDERS, kernel

Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Problem = tuple[BlockMask, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]
BATCH, HEADS = 2, 2  # strides divide by 16 as those of models do, so that timings find what was compiled here
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Geometry:
    """A layout and a pattern on which the kernel is checked."""

    name: str
    layout: TokenLayout
    pattern: Pattern


GEOMETRIES = (
    Geometry("text first", TokenLayout((1, 24, 40), text_len=77, text_first=True), Clear(6)),
    Geometry("text last", TokenLayout((7, 12, 20), text_len=100), Neighborhood((3, 5, 7))),
    Geometry("ragged", TokenLayout((1, 19, 37)), Dense()),
)
REHEARSAL = (Geometry("text first", TokenLayout((1, 8, 12), text_len=7, text_first=True), Clear(3)),)


def text_lengths(mask: BlockMask, device: str) -> torch.Tensor | None:
    """A length for each sample, every second element of a tensor: as callers may well pass them."""
    length = mask.text[1] - mask.text[0]
    if not length:
        return None
    lengths = [length // 3 + 5 * (sample % 2) for sample in range(BATCH)]
    return torch.tensor([[n, length] for n in lengths], dtype=torch.int32, device=device)[:, 0]


def problem(
    geometry: Geometry,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    size: tuple[int, int] = BLOCK_SIZE,
) -> Problem:
    """A mask of blocks of a size, text lengths, and q, k and v."""
    mask = geometry.pattern.block_mask(geometry.layout, size, device=device)
    generator = torch.Generator(device).manual_seed(0)
    shape = (BATCH, mask.seq_len, HEADS, head_dim)
    q, k, v = (
        torch.randn(shape, device=device, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)
    )
    return mask, text_lengths(mask, device), q, k, v


def check(
    run: Attend,
    geometry: Geometry,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    size: tuple[int, int] = BLOCK_SIZE,
    relative: float | None = None,
) -> Row:
    """Errors of output and log-sum-exp as multiples of what is allowed, and whether it repeats to the bit.

    Allowed is twice the error of dense attention under the same mask in the same dtype, plus eps; of
    quantized attention a `relative` L1 error, and as much on average of the log-sum-exp.
    """
    mask, lengths, q, k, v = problem(geometry, head_dim, dtype, device, size)
    scale = head_dim**-0.5
    exact, exact_lse = reference.attention(
        q.double(), k.double(), v.double(), mask, scale=scale, text_valid=lengths
    )
    allowed = reference.dense_mask(mask, BATCH, HEADS, lengths)
    plain = scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    plain_lse = (q @ k.mT * scale).float().masked_fill(~allowed, -torch.inf).logsumexp(-1)
    poison = [torch.full_like(q, torch.nan) for _ in range(2)]
    del poison  # the allocator hands this memory to the outputs
    out, lse = run(q, k, v, mask, text_valid=lengths)
    again, lse_again = run(q, k, v, mask, text_valid=lengths)
    eps = torch.finfo(dtype).eps
    error = (out - exact).abs().max() / (2 * (plain - exact).abs().max() + eps)
    lse_error = (lse - exact_lse).abs().max() / (2 * (plain_lse - exact_lse).abs().max() + eps)
    if relative is not None:
        error = (out - exact).abs().sum() / exact.abs().sum() / relative
        lse_error = (lse - exact_lse).abs().mean() / relative
    repeats = torch.equal(out, again) and torch.equal(lse, lse_again)
    return {
        "kind": "check", "geometry": geometry.name, "head_dim": head_dim,
        "dtype": str(dtype).removeprefix("torch."), "error": float(error), "lse_error": float(lse_error),
        "repeats": repeats, "right": bool(error <= 1 and lse_error <= 1 and repeats),
    }  # fmt: skip


@torch.enable_grad()
def check_gradients(run: Attend, geometry: Geometry, head_dim: int, dtype: torch.dtype, device: str) -> Row:
    """The largest error of dQ, dK and dV as a multiple of what is allowed, and whether they repeat.

    Of gradients of the output and of the log-sum-exp. Allowed is twice the error of autograd through the
    specification in the same dtype, plus eps of the largest gradient.
    """
    mask, lengths, *inputs = problem(geometry, head_dim, dtype, device)
    generator = torch.Generator(device).manual_seed(1)
    dout, dlse = (
        torch.randn(shape, device=device, generator=generator)
        for shape in (inputs[0].shape, inputs[0].shape[:3])
    )

    def gradients(attend: Attend, kind: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
        out, lse = attend(*leaves, mask, text_valid=lengths)
        loss = (out * dout.to(out.dtype)).sum() + (lse * dlse.to(lse.dtype)).sum()
        return torch.autograd.grad(loss, leaves)

    specification = partial(block_sparse_attention, backend="reference", return_lse=True)
    exact, plain = gradients(specification, torch.float64), gradients(specification, dtype)
    found, again = gradients(run, dtype), gradients(run, dtype)
    eps, error = torch.finfo(dtype).eps, 0.0
    for one, other, truth in zip(found, plain, exact, strict=True):
        allowed = 2 * (other - truth).abs().max() + eps * truth.abs().max()
        worst = float((one - truth).abs().max() / allowed)
        error = max(error, worst if math.isfinite(worst) else math.inf)
    repeats = all(map(torch.equal, found, again))
    return {
        "kind": "check", "geometry": geometry.name, "head_dim": head_dim,
        "dtype": str(dtype).removeprefix("torch."), "error": error, "repeats": repeats,
        "right": bool(error <= 1 and repeats),
    }  # fmt: skip


def run_gradients(device: str, dtype: str, head_dims: list[int], backend: str | None = None) -> Iterator[Row]:
    """Those of a backend, ours unless named, through the public function."""
    run = partial(block_sparse_attention, backend=backend or kernel(device), return_lse=True)
    for head_dim in head_dims:
        for geometry in GEOMETRIES if device == "cuda" else REHEARSAL:
            yield {"launch": None, **check_gradients(run, geometry, head_dim, DTYPES[dtype], device)}


def run(device: str, dtype: str, head_dims: list[int]) -> Iterator[Row]:
    """The kernel through the public function, as it launches by itself."""
    run = partial(block_sparse_attention, backend=PROVIDERS[kernel(device)].name, return_lse=True)
    for head_dim in head_dims:
        for geometry in GEOMETRIES if device == "cuda" else REHEARSAL:
            yield {"launch": None, **check(run, geometry, head_dim, DTYPES[dtype], device)}


def run_launch(device: str, launch: list[int], dtype: str, head_dims: list[int]) -> Iterator[Row]:
    """A kernel under one launch configuration, on blocks as it is for."""
    chosen = Launch(*launch)
    run, size, relative = partial(attend, chosen), block_size(chosen), allowed(chosen)
    for head_dim in head_dims:
        for geometry in GEOMETRIES if device == "cuda" else REHEARSAL:
            yield {"launch": launch, **check(run, geometry, head_dim, DTYPES[dtype], device, size, relative)}
