"""Gradients from the output and the log-sum-exp: autograd's of the specification in float64."""

import pytest
import torch
from attention_cases import Case

from dit_accel import TokenLayout, attention
from dit_accel.kernels import block_sparse_attention
from dit_accel.kernels.block_sparse import reference
from dit_accel.kernels.block_sparse.backward import gradients
from dit_accel.patterns import Clear

DOUBLE = torch.float64
CASES = [
    Case(100, DOUBLE, batch=2, dim=16, text=10, text_valid=(4, 0), density=0.1),
    Case(263, DOUBLE, batch=2, dim=16, extra_keys=33, per_head=True, per_sample=True),
    Case(1, DOUBLE, dim=16),
    Case(63, DOUBLE, dim=20, block_size=(32, 32), strided=True),
    Case(600, DOUBLE, dim=24, text=20, text_valid=(7,), density=0.01),  # leaves whole groups to the tail
]


def cotangents(out, lse):
    """Of out, and of lse where it is finite."""
    generator = torch.Generator().manual_seed(3)
    dout, dlse = (torch.randn(x.shape, generator=generator, dtype=DOUBLE).to(x.dtype) for x in (out, lse))
    return dout, dlse.masked_fill(~lse.isfinite(), 0.0)


def by_autograd(case, tail, with_lse=True):
    """Output, lse, what they are multiplied by, and gradients, all by the specification."""
    inputs = [x.to(DOUBLE).requires_grad_() for x in case.inputs()]
    options = {"scale": 0.3, "text_valid": case.valid(), "tail": tail}
    out, lse = reference.attention(*inputs, case.mask(), **options)
    dout, dlse = cotangents(out, lse)
    loss = (out * dout).sum() + ((lse.masked_fill(~lse.isfinite(), 0.0) * dlse).sum() if with_lse else 0.0)
    return out.detach(), lse.detach(), dout, dlse, torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("tail", [None, "pooled"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_formulas(case, tail):
    out, lse, dout, dlse, expected = by_autograd(case, tail)
    options = {"scale": 0.3, "text_valid": case.valid(), "tail": tail}
    found = gradients(*case.inputs(), case.mask(), out, lse, dout, dlse, **options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tail", [None, "pooled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_has_gradients(dtype, tail):
    """At most twice the error of plain attention's in that dtype, plus eps."""
    case = Case(200, dtype, batch=2, dim=16, text=10, text_valid=(4, 0), density=0.1)
    _, _, dout, _, expected = by_autograd(case, tail, with_lse=False)
    dout = dout.to(dtype)
    errors = {}
    for backend in ("native", "reference"):
        inputs = [x.requires_grad_() for x in case.inputs()]
        options = {"text_valid": case.valid(), "backend": backend, "scale": 0.3, "tail": tail}
        out = block_sparse_attention(*inputs, case.mask(), **options)
        found = torch.autograd.grad(out, inputs, dout)
        assert all(x.dtype == dtype for x in found)
        errors[backend] = [(x - y).abs().max() for x, y in zip(found, expected, strict=True)]
    for one, other, truth in zip(errors["native"], errors["reference"], expected, strict=True):
        assert one <= 2 * other + torch.finfo(dtype).eps * truth.abs().max()


def test_compiled_code_has_them_without_a_graph_break():
    case = Case(100, dim=16, text=10, batch=2, text_valid=(4, 0))
    mask, options = case.mask(), {"text_valid": case.valid(), "backend": "native"}

    def attend(*qkv):
        return block_sparse_attention(*qkv, mask, **options)

    answers = []
    torch.compiler.reset()
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        inputs = [x.requires_grad_() for x in case.inputs()]
        answers.append(torch.autograd.grad(function(*inputs).square().sum(), inputs))
    torch.compiler.reset()
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_gradients_are_refused():
    case = Case(64, dim=16)
    inputs = [x.requires_grad_() for x in case.inputs()]
    out = block_sparse_attention(*inputs, case.mask(), backend="native")
    (dq,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_by_the_function_that_other_frameworks_call():
    layout = TokenLayout((1, 8, 12), text_len=7)
    inputs = torch.randn(3, 1, 2, layout.seq_len, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for backend in ("native", "gather", "reference"):
        qkv = [x.clone().requires_grad_() for x in inputs]
        loss = attention(*qkv, Clear(3), layout, backend=backend).square().sum()
        found.append(torch.autograd.grad(loss, qkv))
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
