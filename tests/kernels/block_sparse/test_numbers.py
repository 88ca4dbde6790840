"""Numbers that are none, infinite or out of range: every backend as `scaled_dot_product_attention`."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import SHORT, error
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from number_cases import CHANNELS, TOKENS, as_sdpa, check_nan, check_nothing, small_mask
from torch.nn.functional import scaled_dot_product_attention

from dit_accel import BlockMask
from dit_accel.kernels import block_sparse_attention, can_run
from dit_accel.kernels.block_sparse import reference

BACKENDS = ("native", "gather", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLACES = {
    "which": st.sampled_from("qkv"),
    "token": st.integers(0, TOKENS - 1),
    "channel": st.integers(0, CHANNELS - 1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@settings(max_examples=25, deadline=None)
@given(
    payload=st.integers(1, 2**23 - 1) | st.sampled_from([1, 2, 1 << 6, 1 << 9, 1 << 22, (1 << 23) - 1]),
    negative=st.booleans(),
    **PLACES,
)
def test_a_nan_reaches_every_row_that_attends_to_it(backend, dtype, payload, negative, which, token, channel):
    check_nan(backend, dtype, payload, negative, which, token, channel)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@settings(max_examples=25, deadline=None)
@given(value=st.sampled_from([math.inf, -math.inf, 1e34, -1e34, 65000.0, 1e-40]), **PLACES)
def test_numbers_at_the_limits_do_what_they_do_in_plain_attention(
    backend, dtype, value, which, token, channel
):
    assume(which != "q" or abs(value) != 1e34)  # keys that differ in other channels alone are equal there
    as_sdpa(backend, dtype, value, which, token, channel)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_attend_nothing_are_zero_whatever_there_is(backend, dtype):
    check_nothing(backend, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=SHORT.get)
def test_rows_that_attend_nothing_are_zero_in_compiled_flex(dtype):
    """It compiles for many seconds."""
    check_nothing_in_flex(dtype)


@pytest.mark.usefixtures("uncompiled_flex")
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_rows_that_attend_nothing_are_zero_in_flex(dtype):
    check_nothing_in_flex(dtype)


def check_nothing_in_flex(dtype):
    asked = {"device": "cpu", "dtype": dtype, "head_dim": CHANNELS, "block_size": (32, 16)}
    reason = can_run("flex", **asked)
    if reason:
        pytest.skip(reason)
    check_nothing("flex", dtype)
    mask = small_mask()  # whose only keys are text, for some rows and in one sample of two
    allowed = mask.to_kernel_mask()[0]
    allowed[5:9, :-10] = False
    mask = BlockMask.from_token_mask(allowed, (32, 16), mask.text)
    q, k, v = (torch.full((2, 2, n, CHANNELS), math.nan, dtype=dtype) for n in (TOKENS, 90, 90))
    valid = torch.tensor([0, 10])
    out = block_sparse_attention(q, k, v, mask, text_valid=valid, backend="flex")
    expected = reference.attention(q, k, v, mask, scale=1.0, text_valid=valid)[0]
    assert (expected[0, 0, 5:9] == 0).all()
    assert expected[1, 0, 5:9].isnan().any()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out == 0, expected == 0)


# -- rounding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.3, 1.0, 2.0, 4.0, 8.0], ids=str)
@pytest.mark.parametrize("density", [0.3, 1.0], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=SHORT.get)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_at_most_twice_as_far_from_float64_as_plain_attention(
    backend, dtype, density, size
):
    """Rounded scores, the largest error of all, would be the farther off the larger they are."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 256, 64, generator=generator) * s for s in (size, size, 1))
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    allowed = torch.rand(256, 256, generator=generator) < density
    allowed[:, 0] = True
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=allowed)
    plain = error(scaled_dot_product_attention(q, k, v, attn_mask=allowed), exact)
    mask = BlockMask.from_token_mask(allowed, (64, 16))
    assert error(block_sparse_attention(q, k, v, mask, backend=backend), exact) <= 2 * plain


# -- sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "heads"), [(0, 2), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_samples_and_no_heads(backend, dtype, batch, heads):
    inputs = [torch.randn(batch, heads, n, CHANNELS, dtype=dtype) for n in (TOKENS, 90, 90)]
    options = {"return_lse": True, "backend": backend}
    valid = torch.zeros(batch, dtype=torch.int64)
    for text_valid in (None, valid):
        out, lse = block_sparse_attention(*inputs, small_mask(), text_valid=text_valid, **options)
        assert (out.shape, out.dtype) == (inputs[0].shape, dtype)
        assert (lse.shape, lse.dtype) == (inputs[0].shape[:3], torch.float32)


@pytest.mark.parametrize("sizes", [(0, 2, 70), (2, 2, 70)], ids=["no-samples", "nothing-attended"])
@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_gradients_where_nothing_is_attended(backend, sizes):
    mask = BlockMask.from_token_mask(torch.zeros(70, 70, dtype=torch.bool), (32, 16))
    inputs = [torch.randn(*sizes, 8, requires_grad=True) for _ in range(3)]
    out, lse = block_sparse_attention(*inputs, mask, return_lse=True, backend=backend)
    (out.sum() + lse.exp().sum()).backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in inputs)


# -- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale", [math.nan, math.inf, -math.inf, "0.5", [0.5], 1j, torch.tensor(0.5)], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_that_is_no_finite_number_is_refused(backend, scale):
    q, k, v = torch.randn(3, 1, 1, 70, 8)
    mask = BlockMask.from_token_mask(torch.ones(70, 70, dtype=torch.bool), (32, 16))
    with pytest.raises(ValueError, match="`scale` must be a finite number or None, got"):
        block_sparse_attention(q, k, v, mask, scale=scale, backend=backend)


@pytest.mark.parametrize(
    "wrong", [[-1, 3], [3, 11], [11, 11], [2**40, 0], [-(2**31), 0], [10, 2**32 + 1]], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_text_lengths_out_of_range_are_refused(backend, wrong):
    q, k, v = (torch.randn(2, 1, n, 8) for n in (TOKENS, 90, 90))
    with pytest.raises(
        ValueError, match=r"`text_valid` must be between 0 and the 10 text tokens of the mask, got"
    ):
        block_sparse_attention(q, k, v, small_mask(), text_valid=torch.tensor(wrong), backend=backend)


def test_the_limits_of_text_lengths_are_taken():
    q, k, v = (torch.randn(2, 1, n, 8) for n in (TOKENS, 90, 90))
    results = [
        block_sparse_attention(q, k, v, small_mask(), text_valid=torch.tensor([0, 10]), backend=backend)
        for backend in BACKENDS
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
