"""Attention with the compensated tail: its definition, and every backend against it."""

import math
from dataclasses import replace

import pytest
import torch
from attention_cases import Case, check_tail
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel import BlockMask, kernels
from dit_accel.errors import UnavailableError
from dit_accel.kernels import block_sparse_attention, merge
from dit_accel.kernels.block_sparse import reference, tail

BACKENDS = ("gather", "native", "triton")
CASES = [
    Case(1),
    Case(300, torch.float16),
    Case(300, torch.bfloat16, strided=True, batch=2, block_size=(64, 64)),
    Case(300, dim=8, block_size=(16, 8)),
    Case(300, torch.bfloat16, dim=40, heads=3, per_head=True, text=40, text_valid=(5,)),
    Case(300, batch=3, heads=2, per_head=True, per_sample=True, text=40, text_valid=(5, 40, 0)),
    Case(300, extra_keys=77, block_size=(128, 64)),
    Case(300, batch=2, text=40, text_valid=(3, 0), density=0.0),
    Case(1027, heads=1),
]


def by_hand(q, k, v, listed, case: Case, queries, valid=None):
    """Some queries, one at a time, as the words of `tail.py` say it; out and lse, float64.

    `listed` is bool (query blocks, key blocks), of one head.
    """
    (bq, bk), start = case.block_size, case.seq - case.text
    keys = torch.arange(len(k))
    exists = (keys < start + (case.text if valid is None else valid)) | (keys >= case.seq)
    part = bk * max(1, 64 // bk)
    group = part * max(1, 256 // part)
    out, lse = torch.zeros_like(q), torch.full((len(q),), -math.inf, dtype=q.dtype)
    for i in queries:
        computed = listed[i // bq][keys // bk] & exists
        scores, values = [q[i] @ k[computed].T * case.dim**-0.5], [v[computed]]
        pools = []
        for first in range(0, len(k), group):
            inside = listed[i // bq][first // bk : (first + group) // bk].any()
            step = part if inside else group
            pools += [(keys >= at) & (keys < at + step) for at in range(first, first + group, step)]
        for pool in pools:
            left = pool & exists & ~computed
            if left.any():
                score = q[i] @ k[left].mean(0) * case.dim**-0.5 + math.log(left.sum())
                scores.append(score[None])
                values.append(v[left].mean(0, keepdim=True))
        scores = torch.cat(scores)
        lse[i] = scores.logsumexp(0)
        out[i] = scores.softmax(0) @ torch.cat(values)
    return out[queries], lse[queries]


@pytest.mark.parametrize(
    "case",
    [
        Case(150, torch.float64, dim=8, block_size=(32, 16), heads=2, per_head=True),
        Case(300, torch.float64, dim=8, batch=2, text=40, text_valid=(5, 0), density=0.0),
        Case(270, torch.float64, dim=8, extra_keys=77, block_size=(64, 64)),
        Case(300, torch.float64, dim=8, batch=2, block_size=(64, 8), per_head=True, per_sample=True),
    ],
    ids=str,
)
def test_reference_is_what_the_words_say(case):
    q, k, v = case.inputs()
    mask = case.mask()
    out, lse = block_sparse_attention(
        q, k, v, mask, text_valid=case.valid(), backend="reference", return_lse=True, tail="pooled"
    )
    listed = mask.block_tiles() != -1
    queries = torch.randperm(case.seq, generator=torch.Generator().manual_seed(0))[:12]
    groups = mask.group_of_heads(case.batch, case.heads).expand(case.batch, -1)
    for b in range(case.batch):
        for h in range(case.heads):
            valid = None if case.text_valid is None else case.text_valid[b % len(case.text_valid)]
            expected = by_hand(q[b, h], k[b, h], v[b, h], listed[groups[b, h]], case, queries, valid)
            torch.testing.assert_close(out[b, h, queries], expected[0], atol=1e-12, rtol=0)
            torch.testing.assert_close(lse[b, h, queries], expected[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_are_the_reference(backend, case):
    mask = case.mask()
    reason = kernels.can_run(
        backend, device="cpu", dtype=case.dtype, head_dim=case.dim, block_size=mask.block_size, tail="pooled"
    )
    if reason is not None:
        pytest.skip(reason)
    check_tail(case, backend)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 300),
    st.sampled_from([(16, 8), (32, 16), (64, 16), (64, 64), (128, 64), (64, 256)]),
    st.integers(0, 60),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
@pytest.mark.parametrize("backend", ["gather", "native"])
def test_random_selections_of_blocks(backend, seq, size, text, share, seed):
    text = min(text, seq)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = -(-seq // size[0]), -(-seq // size[1])
    selected = torch.rand(2, 2, rows, columns, generator=generator) < share
    mask = BlockMask.from_blocks(selected, block_size=size, seq_len=seq, kv_len=seq, text=(seq - text, seq))
    q, k, v = (torch.randn(2, 2, seq, 16, generator=generator) for _ in range(3))
    valid = torch.tensor([text // 3, text]) if text else None
    if backend == "native" and kernels.can_run(
        backend, device="cpu", dtype=q.dtype, head_dim=16, block_size=size, tail="pooled"
    ):
        backend = "gather"
    expected = reference.attention(
        *(x.double() for x in (q, k, v)), mask, scale=0.25, text_valid=valid, tail="pooled"
    )
    result = block_sparse_attention(
        q, k, v, mask, scale=0.25, text_valid=valid, backend=backend, tail="pooled", return_lse=True
    )
    for got, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(got, wanted.to(got.dtype), atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_all_blocks_kept_is_dense_and_none_is_pooled_attention(backend):
    if reason := kernels.can_run(
        backend, device="cpu", dtype=torch.float32, head_dim=32, block_size=(64, 32), tail="pooled"
    ):
        pytest.skip(reason)
    q, k, v = (torch.randn(2, 3, 512, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    sizes = {"block_size": (64, 32), "seq_len": 512, "kv_len": 512}
    every, none = (
        BlockMask.from_blocks(x(8, 16, dtype=torch.bool), **sizes) for x in (torch.ones, torch.zeros)
    )
    out = block_sparse_attention(q, k, v, every, backend=backend, tail="pooled")
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=0)
    pooled = [x.unflatten(2, (2, 256)).mean(3) for x in (k, v)]
    out, lse = block_sparse_attention(q, k, v, none, backend=backend, tail="pooled", return_lse=True)
    torch.testing.assert_close(
        out, torch.nn.functional.scaled_dot_product_attention(q, *pooled), atol=1e-5, rtol=0
    )
    expected = (q @ pooled[0].mT * 32**-0.5).logsumexp(-1) + math.log(256)
    torch.testing.assert_close(lse, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_padded_text_is_not_pooled_whatever_it_holds(backend):
    case = Case(300, batch=2, text=100, text_valid=(30, 100))
    mask = case.mask()
    listed = mask.listed_blocks()
    listed[:, :, -6:] = False
    mask = BlockMask.from_blocks(
        listed[0], block_size=mask.block_size, seq_len=300, kv_len=300, text=mask.text
    )
    if reason := kernels.can_run(
        backend, device="cpu", dtype=torch.float32, head_dim=64, block_size=(64, 16), tail="pooled"
    ):
        pytest.skip(reason)
    q, k, v = case.inputs()
    options = {"text_valid": case.valid(), "backend": backend, "tail": "pooled"}
    before = block_sparse_attention(q, k, v, mask, **options)
    k[0, :, 230:], v[0, :, 230:] = 30.0, 1e6
    torch.testing.assert_close(block_sparse_attention(q, k, v, mask, **options)[0], before[0])


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_gradients(backend):
    case = Case(100, torch.float64, dim=4, block_size=(16, 8), batch=2, text=20, text_valid=(7, 20))
    mask, valid = case.mask(), case.valid()
    q, k, v = (x.requires_grad_() for x in case.inputs())

    def run(q, k, v):
        return block_sparse_attention(
            q, k, v, mask, text_valid=valid, backend=backend, tail="pooled", return_lse=True
        )

    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)


def test_whole_blocks_of_a_mask():
    mask = Case(300, heads=3, per_head=True, text=40).mask()
    whole = mask.with_whole_blocks()
    whole.to("cpu")._validated()
    assert whole.with_whole_blocks() is whole
    assert not mask.has_whole_blocks
    assert torch.equal(whole.block_tiles() != -1, mask.block_tiles() != -1)
    assert torch.equal(mask.listed_blocks(), mask.block_tiles() != -1)
    rows, columns = torch.arange(300) // 64, torch.arange(300) // 16
    assert torch.equal(whole.to_kernel_mask(), mask.listed_blocks()[:, rows][:, :, columns])


def test_launch_data_is_made_once():
    mask = Case(300).mask()
    assert tail.Tail.of(mask) is tail.Tail.of(mask)


def test_merge_joins_parts_of_the_keys_to_all_of_them():
    q, k, v = Case(65, torch.float64).inputs()
    parts = [slice(0, 9), slice(9, 65)]
    scores = q @ k.mT
    outs = [scores[..., p].softmax(-1) @ v[:, :, p] for p in parts]
    lses = [scores[..., p].logsumexp(-1) for p in parts]
    out, lse = merge(outs, lses)
    torch.testing.assert_close(out, scores.softmax(-1) @ v)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_merge_of_rows_without_keys():
    out = torch.ones(1, 1, 2, 4, requires_grad=True)
    lse = torch.tensor([[[-math.inf, 0.0]]], requires_grad=True)
    nothing = torch.full_like(lse, -math.inf)
    joined, joined_lse = merge([out, out], [lse, nothing])
    joined_lse = joined_lse.masked_fill(joined_lse == -math.inf, 0)
    assert joined[0, 0, 0].tolist() == [0.0] * 4
    assert joined[0, 0, 1].tolist() == [1.0] * 4
    (joined.sum() + joined_lse.sum()).backward()
    assert out.grad.isfinite().all()
    assert lse.grad.isfinite().all()


def test_merge_refuses_what_does_not_fit():
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="of the same parts, got 2 and 1"):
        merge([out, out], [lse])
    with pytest.raises(ValueError, match="an lse for each row"):
        merge([out], [lse[..., :2]])


def test_unknown_tails_and_backends_that_cannot():
    case = Case(64)
    with pytest.raises(ValueError, match="`tail` must be 'pooled' or None, got 'linear'"):
        block_sparse_attention(*case.inputs(), case.mask(), tail="linear")
    with pytest.raises(UnavailableError, match="does not return lse, by which a tail would be merged"):
        block_sparse_attention(*case.inputs(), case.mask(), tail="pooled", backend="flex")


def test_gather_and_auto_agree_on_cross_shapes():
    case = replace(Case(300, extra_keys=77), heads=1)
    results = [
        block_sparse_attention(*case.inputs(), case.mask(), backend=name, tail="pooled")
        for name in ("auto", "gather")
    ]
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)
