"""Times one provider on one case, if it is right there: checked against float64 on sampled queries."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from dit_accel.errors import UnavailableError
from dit_accel.kernels import block_sparse_attention
from dit_accel.masks.block_mask import BlockMask

from ..benchmarks.attention import excess_error
from .cases import BY_NAME, Case
from .job import Row
from .peers import PROVIDERS, Provider
from .timing import measure

BLOCK_SIZE = (128, 64)
CHECKED_HEADS = 2  # of a case, the last ones
MATMUL = 8192  # rows and columns of the matrices that show the ceiling

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockMask]


def dtype_on(device: str) -> torch.dtype:
    """What models compute in; a CPU would be slow in it."""
    return torch.bfloat16 if device == "cuda" else torch.float32


@lru_cache(maxsize=1)  # providers take their turns on one case
def inputs(case: Case, device: str, block_size: tuple[int, int] = BLOCK_SIZE) -> Inputs:
    """q, k, v (1, heads, tokens, head_dim), seen in (1, tokens, heads, head_dim) as models have them."""
    if device == "cuda":
        torch.cuda.empty_cache()
    mask = case.pattern.block_mask(case.layout, block_size, device=device)
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, case.layout.seq_len, case.heads, case.head_dim)
    like = {"device": device, "dtype": dtype_on(device), "generator": generator}
    q, k, v = (torch.randn(shape, **like).transpose(1, 2) for _ in range(3))
    return q, k, v, mask


def wrong(q, k, v, mask: BlockMask, out: torch.Tensor, relative: float | None = None) -> float:
    """The error of the last heads on sampled queries as a multiple of what is allowed, `relative` an L1."""
    few = (x[:, -CHECKED_HEADS:] for x in (q, k, v))
    return excess_error(*few, mask, out[:, -CHECKED_HEADS:], relative)


def wrong_with_tail(q, k, v, mask: BlockMask, out: torch.Tensor, what: Provider) -> float:
    """The same with a tail: the relative L1 to what plain PyTorch computes of the last heads, in fp32."""
    few = (x[:, -CHECKED_HEADS:].float() for x in (q, k, v))
    expected = block_sparse_attention(*few, mask, backend="gather", tail=what.tail)
    error = (out[:, -CHECKED_HEADS:] - expected).abs().sum() / expected.abs().sum()
    return float(error / what.error)


def tflops(case: Case, share: float, ms: float) -> float:
    """10^12 operations per second on a share of all pairs of queries and keys."""
    return 4 * case.heads * case.head_dim * case.layout.seq_len**2 * share / ms / 1e9


def run(device: str, case: list[str], provider: str) -> Iterator[Row]:
    """A row with the times of a provider, or with the reason why there are none."""
    chosen, what = BY_NAME[tuple(case)], PROVIDERS[provider]
    if (reason := what.missing()) is not None:
        raise UnavailableError(reason)
    q, k, v, mask = inputs(chosen, device, what.block_size())
    call = what.prepare(q, k, v, mask)
    out = call()
    error = 0.0
    if what.tail is not None:
        error = wrong_with_tail(q, k, v, mask, out, what)
    elif what.sparse:
        error = wrong(q, k, v, mask, out, what.error)
    if not error <= 1:
        yield {"kind": "wrong", "reason": f"error {error:.2f} times what is allowed, not timed"}
        return
    if what.ours and not torch.equal(out, call()):
        yield {"kind": "wrong", "reason": "another result the second time, not timed"}
        return
    del out
    timed = measure(call, device)
    computed = mask.block_density if what.sparse else 1.0
    yield {
        "kind": "time", "case": case, "provider": provider, "sparse": what.sparse, "exact": what.exact,
        "ours": what.ours, "dtype": str(q.dtype).removeprefix("torch."), "density": mask.density,
        "block_density": mask.block_density, "tflops": tflops(chosen, computed, timed.ms), **timed.as_row(),
    }  # fmt: skip


def run_matmul(device: str) -> Iterator[Row]:
    """The ceiling: a product of two square matrices."""
    size = MATMUL if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device).to(dtype_on(device)) for _ in range(2))
    torch.mm(a, b)
    timed = measure(lambda: torch.mm(a, b), device)
    yield {"kind": "matmul", "size": size, "tflops": 2 * size**3 / timed.ms / 1e9, **timed.as_row()}
