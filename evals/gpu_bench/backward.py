"""Times one provider's backward pass on one case, if its gradients are right: against float64 autograd.

With a tail, against what plain PyTorch differentiates of it in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from dit_accel.errors import UnavailableError
from dit_accel.masks.block_mask import BlockMask

from ..benchmarks.attention import rows_of
from .attention import CHECKED_HEADS, inputs, tflops
from .cases import BY_NAME
from .job import Row
from .peers import PROVIDERS, Prepare, tailed
from .timing import measure

CHECKED_ROWS = 128  # queries whose output has a gradient while gradients are checked
FLOPS = 2.5  # of the forward pass, as usually counted: five products of matrices, not two

Tensors = tuple[torch.Tensor, ...]
Gradients = Callable[[torch.Tensor], Tensors]


@torch.enable_grad()
def differentiated(prepare: Prepare, q, k, v, mask: BlockMask) -> Gradients:
    """The forward pass, done once; a call gives gradients of q, k and v for that of the output."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch._functorch.config.patch(donated_buffer=False):  # or compiled code could go back only once
        out = prepare(*leaves, mask)()
    return partial(torch.autograd.grad, out, leaves, retain_graph=True)


def wrong(q, k, v, mask: BlockMask, gradients: Gradients) -> float:
    """The largest error of the last heads as a multiple of what is allowed.

    The output has a gradient in sampled queries alone, so that nothing of size S x S is needed: dQ is looked
    at in these, dK and dV of all keys. Allowed is twice the error of autograd in q's dtype, plus eps of the
    largest gradient.
    """
    heads = slice(-CHECKED_HEADS, None)
    rows = torch.randperm(mask.seq_len, generator=torch.Generator().manual_seed(0))[:CHECKED_ROWS]
    allowed = rows_of(mask.to("cpu"), rows).to(q.device)
    rows = rows.to(q.device)
    dout = torch.zeros_like(q)
    dout[:, :, rows] = torch.randn_like(dout[:, :, rows])
    dq, dk, dv = (x[:, heads] for x in gradients(dout))
    found = dq[:, :, rows], dk, dv

    @torch.enable_grad()
    def by_autograd(dtype: torch.dtype) -> Tensors:
        few = (q[:, heads][:, :, rows], k[:, heads], v[:, heads])
        leaves = [x.detach().to(dtype).requires_grad_() for x in few]
        scores = (leaves[0] @ leaves[1].mT * q.shape[3] ** -0.5).masked_fill(~allowed, -math.inf)
        out = scores.softmax(-1) @ leaves[2]
        return torch.autograd.grad(out, leaves, dout[:, heads][:, :, rows].to(dtype))

    return _excess(found, by_autograd(q.dtype), by_autograd(torch.float64))


def wrong_with_tail(q, k, v, mask: BlockMask, gradients: Gradients, tail: str) -> float:
    """The same with a tail: every query's output has a gradient, and plain PyTorch takes autograd's place."""
    heads = slice(-CHECKED_HEADS, None)
    dout = torch.randn_like(q)
    found = tuple(x[:, heads] for x in gradients(dout))

    def by_gather(dtype: torch.dtype) -> Tensors:
        few = (x[:, heads].to(dtype) for x in (q, k, v))
        return differentiated(tailed("gather", tail).prepare, *few, mask)(dout[:, heads].to(dtype))

    return _excess(found, by_gather(q.dtype), by_gather(torch.float64))


def _excess(found: Tensors, plain: Tensors, exact: Tensors) -> float:
    """The largest error of gradients as a multiple of what is allowed, from those of q's dtype, `plain`."""
    worst, eps = 0.0, torch.finfo(plain[0].dtype).eps
    for one, other, truth in zip(found, plain, exact, strict=True):
        allowance = 2 * (other - truth).abs().max() + eps * truth.abs().max()
        error = float((one - truth).abs().max() / allowance)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def run(device: str, case: list[str], provider: str) -> Iterator[Row]:
    """A row with the times of a provider's backward pass, or with the reason why there are none."""
    chosen, what = BY_NAME[tuple(case)], PROVIDERS[provider]
    if (reason := what.missing()) is not None:
        raise UnavailableError(reason)
    q, k, v, mask = inputs(chosen, device, what.block_size())
    gradients = differentiated(what.prepare, q, k, v, mask)
    error = 0.0
    if what.tail is not None:
        error = wrong_with_tail(q, k, v, mask, gradients, what.tail)
    elif what.sparse:
        error = wrong(q, k, v, mask, gradients)
    if not error <= 1:
        yield {"kind": "wrong", "reason": f"gradients: error {error:.2f} times what is allowed, not timed"}
        return
    dout = torch.randn_like(q)
    if what.ours and not all(map(torch.equal, gradients(dout), gradients(dout))):
        yield {"kind": "wrong", "reason": "other gradients the second time, not timed"}
        return
    timed = measure(partial(gradients, dout), device)
    computed = mask.block_density if what.sparse else 1.0
    yield {
        "kind": "backward", "case": case, "provider": provider, "sparse": what.sparse,
        "dtype": str(q.dtype).removeprefix("torch."), "block_density": mask.block_density,
        "tflops": FLOPS * tflops(chosen, computed, timed.ms), **timed.as_row(),
    }  # fmt: skip
