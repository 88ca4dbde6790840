"""Gradients by Triton's kernels: autograd's of the specification in float64, interpreted or on a GPU."""

import pytest
import torch
from attention_cases import Case, check_gradients

from dit_accel import BlockMask
from dit_accel.kernels import block_sparse_attention, can_run
from dit_accel.kernels.block_sparse.launch_order import transposed_arguments

pytest.importorskip("triton", reason="Triton is not installed")
triton_kernels = pytest.importorskip("dit_accel.kernels.block_sparse.triton_backward")

HALF, BRAIN = torch.float16, torch.bfloat16
CASES = {
    str(case): case
    for case in (
        Case(63, dim=16, heads=1, block_size=(64, 32)),
        Case(130, HALF, batch=2, heads=1, dim=24, block_size=(64, 64), strided=True),
        Case(127, BRAIN, dim=32, per_head=True, text=40, text_valid=(5,), block_size=(128, 64)),
        Case(100, batch=2, dim=16, per_head=True, per_sample=True, extra_keys=50, block_size=(64, 128)),
        Case(130, batch=2, dim=20, heads=1, text=70, text_valid=(0, 33), block_size=(64, 32), strided=True),
        Case(70, HALF, dim=256, heads=1, block_size=(64, 64)),
        Case(1, BRAIN, dim=128, heads=1, block_size=(128, 128)),
    )
}
BY_TMA = {
    str(case): case
    for case in (
        *(case for case in CASES.values() if case.dtype in (HALF, BRAIN)),
        Case(150, HALF, batch=2, dim=20, per_head=True, per_sample=True, extra_keys=50, block_size=(64, 128)),
        Case(130, HALF, batch=2, dim=72, heads=1, text=70, text_valid=(0, 33), block_size=(64, 32)),
        Case(200, HALF, heads=1, dim=16, density=0.0, block_size=(128, 64)),
    )
}
WITH_TAIL = [str(case) for case in CASES.values() if case.text or case.per_sample]


def check(name, tail=None, device="cpu", backend="triton"):
    case = (CASES | BY_TMA)[name]
    valid = None if case.text_valid is None else case.valid().to(device)
    inputs = [x.to(device) for x in case.inputs()]
    check_gradients(inputs, case.mask().to(device), valid, backend, tail, 0.3)


def check_as_the_kernels_with_pointers():
    """In fp32, where both interpret the same products: the same numbers, for any sign of the scale."""
    from dit_accel.kernels.block_sparse import triton_forward
    from dit_accel.kernels.block_sparse.triton_gradients import gradients
    from dit_accel.kernels.block_sparse.tuned import Launch

    mixed = {"launch": Launch(64, 32, 4, 2, "tma", part="dkv")}  # the other part by the kernel with pointers

    for size, scale in (((64, 32), 0.3), ((128, 128), -0.3)):
        case = Case(140, batch=2, heads=1, dim=24, text=40, text_valid=(7, 40), block_size=size)
        q, k, v, mask = *case.inputs(), case.mask()
        options = {"scale": scale, "text_valid": case.valid().int()}
        out, lse = triton_forward.attention(q, k, v, mask, **options)
        given = q, k, v, mask, out, lse, torch.randn_like(out), torch.randn_like(lse)
        expected = gradients(*given, **options)
        for way in ({"kernel": "tma"}, mixed):
            for one, other in zip(gradients(*given, **options, **way), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=f"{size}, {scale}, {way}")


def check_text_first():
    """Text before what is seen, and queries of a block that is full but for the end of the sequence."""
    allowed = torch.ones(150, 150, dtype=torch.bool).tril(20)
    mask = BlockMask.from_token_mask(allowed, (64, 32), (0, 45))
    assert mask.num_full
    check_gradients(list(torch.randn(3, 2, 1, 150, 16)), mask, torch.tensor([45, 9]), "triton", scale=0.3)


def check_layouts():
    """A gradient that is one number seen everywhere, and inputs that share memory or lie crosswise."""
    mask = BlockMask.from_token_mask(torch.rand(70, 70) < 0.5, (64, 32))
    q = torch.randn(2, 2, 16, 70).transpose(2, 3)
    kv = torch.randn(1, 2, 70, 16).expand(2, -1, -1, -1)
    found = []
    for backend in ("triton", "reference"):
        inputs = [x.detach().requires_grad_() for x in (q, kv, kv)]
        out = block_sparse_attention(*inputs, mask, backend=backend, scale=-0.3)
        found.append(torch.autograd.grad(out.sum(), inputs))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def check_compiled():
    """One graph by torch.compile, and calls made again in the backward pass: the same gradients."""
    from torch.utils.checkpoint import checkpoint

    case = Case(70, dim=16, heads=1, text=10, text_valid=(4,), block_size=(64, 32))
    mask, valid = case.mask(), case.valid()

    def attend(*qkv):
        return block_sparse_attention(*qkv, mask, text_valid=valid, backend="triton").square()

    def again(*qkv):
        return checkpoint(attend, *qkv, use_reentrant=False)

    answers = []
    for function in (attend, again, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        inputs = [x.requires_grad_() for x in case.inputs()]
        answers.append(torch.autograd.grad(function(*inputs).sum(), inputs))
    for other in answers[1:]:
        assert all(map(torch.equal, answers[0], other))


@pytest.mark.parametrize("name", CASES)
def test_gradients(interpreter, name):
    interpreter("check", name)


@pytest.mark.parametrize("name", WITH_TAIL)
def test_gradients_with_a_tail(interpreter, name):
    interpreter("check", name, "pooled")


@pytest.mark.parametrize("name", BY_TMA)
def test_gradients_by_the_copy_engine(interpreter, name):
    interpreter("check", name, None, "cpu", "triton-tma")


@pytest.mark.parametrize("check", ["check_text_first", "check_layouts", "check_as_the_kernels_with_pointers"])
def test_other_masks_and_inputs(interpreter, check):
    interpreter(check)


def test_compiled_and_checkpointed(interpreter):
    interpreter("check_compiled")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tail", [None, "pooled"])
@pytest.mark.parametrize("name", CASES)
def test_gpu(name, tail):
    check(name, tail, "cuda")


def test_says_that_it_has_gradients(monkeypatch):
    from dit_accel.kernels.block_sparse import triton_forward

    monkeypatch.setattr(triton_forward, "INTERPRETED", True)
    asked = {"device": "cpu", "dtype": BRAIN, "head_dim": 64, "block_size": (128, 64), "requires_grad": True}
    assert can_run("triton", **asked) is None
    assert can_run("triton", **asked, tail="pooled") is None


def test_keys_that_many_attend_to_go_first():
    allowed = torch.eye(4, dtype=torch.bool).repeat_interleave(64, 0).repeat_interleave(64, 1)
    allowed[:, 128:192] = True
    mask = BlockMask.from_token_mask(torch.stack([allowed, allowed.flip(1)]), (64, 64))
    rows, groups, _, count, *_ = transposed_arguments(mask, batch=3, heads=2)
    assert rows.tolist()[0][:2] == [2, 5]
    assert groups.tolist() == [[0, 1]]
    assert count.tolist() == [[1, 1, 4, 1], [1, 4, 1, 1]]
    assert transposed_arguments(mask, batch=3, heads=2)[0] is rows
