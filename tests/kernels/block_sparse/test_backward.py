"""Gradients in compiled code, from the output and the log-sum-exp: autograd's in float64."""

import pytest
import torch
from attention_cases import VARIANTS, Case, check_gradients

from dit_accel import BlockMask, TokenLayout, attention
from dit_accel.kernels import block_sparse_attention
from dit_accel.kernels.block_sparse import native
from dit_accel.patterns import Clear

CASES = [case for case in VARIANTS if case.block_size[1] % native.PANEL == 0]
CASES += [
    Case(100, batch=2, dim=16, text=10, text_valid=(4, 0), density=0.1),
    Case(263, batch=2, dim=16, extra_keys=33, per_head=True, per_sample=True),
    Case(1, dim=16),
    Case(130, dim=1),
    Case(63, dim=20, block_size=(32, 32), strided=True),
    Case(600, dim=24, text=20, text_valid=(7,), density=0.01),  # leaves whole groups to the tail
    Case(200, torch.bfloat16, batch=2, dim=16, text=10, text_valid=(4, 0), density=0.1),
]


@pytest.mark.parametrize("tail", [None, "pooled"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_native(case, tail):
    check_gradients(case.inputs(), case.mask(), case.valid(), "native", tail)


@pytest.mark.parametrize("tail", [None, "pooled"])
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_share_heads(threads, tail):
    """Runs that begin within a head: right, and the same to the bit again."""
    case = Case(300, heads=3, dim=24, per_head=True, text=20, text_valid=(3,))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check_gradients(case.inputs(), case.mask(), case.valid(), "native", tail)
        found = [by_native(case.inputs(), case.mask(), case.valid(), tail) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def by_native(inputs, mask, valid=None, tail=None):
    inputs = [x.requires_grad_() for x in inputs]
    out = block_sparse_attention(*inputs, mask, text_valid=valid, tail=tail, backend="native")
    return torch.autograd.grad(out.square().sum(), inputs)


def test_what_is_not_a_number_stays_visible():
    """A NaN in a query reaches the gradients of its row alone and of the keys that it attends to."""
    case = Case(128, density=0.1)
    (q, k, v), allowed = case.inputs(), case.mask().to_token_mask()
    q[0, 0, 20, 3] = torch.nan
    dq, dk, dv = (x[0].isnan().any(-1) for x in by_native([q, k, v], case.mask()))
    assert dq[0].nonzero().flatten().tolist() == [20]
    for keys in (dk, dv):
        assert keys[0][allowed[20]].all()
        assert not keys[1].any()


def test_any_layout():
    """A gradient that is one number seen everywhere, and inputs that share memory or lie crosswise."""
    mask = BlockMask.from_token_mask(
        torch.rand(70, 70, generator=torch.Generator().manual_seed(0)) < 0.5, (64, 32)
    )
    q = torch.randn(2, 2, 16, 70, generator=torch.Generator().manual_seed(1)).transpose(2, 3)
    kv = torch.randn(1, 2, 70, 16, generator=torch.Generator().manual_seed(2)).expand(2, -1, -1, -1)
    found = []
    for backend in ("native", "reference"):
        inputs = [x.detach().requires_grad_() for x in (q, kv, kv)]
        out = block_sparse_attention(*inputs, mask, backend=backend, scale=-0.3)
        found.append(torch.autograd.grad(out.sum(), inputs))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


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
