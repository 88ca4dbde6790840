"""Quantized attention: codes and scales, the formats' errors against float64, and backends that agree."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import QUANTIZED, Case, check_quantized, error, relative_l1
from hypothesis import given
from hypothesis import strategies as st

from dit_accel import BlockMask
from dit_accel.errors import UnavailableError
from dit_accel.kernels import (
    block_sparse_attention,
    can_run,
    merge,
    quantizations,
    quantize_int8,
)
from dit_accel.kernels.block_sparse import native, quantized, reference
from dit_accel.kernels.block_sparse.formats import FORMATS, key_group

ON_A_CPU = ("gather",)  # beside the reference, which defines the formats
WORST = {"int8": 0.02, "int8-fp8": 0.04, "int8-int8": 0.03, "int8-int4": 0.2}  # relative L1, normal inputs


# -- codes and scales ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_codes_and_scales_of_groups(dtype):
    x = torch.randn(2, 3, 75, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scales = quantize_int8(x, 32, scale=0.3)
    assert codes.dtype == torch.int8
    assert codes.shape == x.shape
    assert scales.dtype == torch.float32
    assert scales.shape == (2, 3, 3)
    for first in range(0, 75, 32):
        group, scale = x[:, :, first : first + 32].float() * 0.3, scales[:, :, first // 32]
        torch.testing.assert_close(scale, group.abs().amax((2, 3)) / 127, rtol=1e-6, atol=0)
        of_group = codes[:, :, first : first + 32]
        assert (of_group.abs().amax((2, 3)) == 127).all()
        step = scale[..., None, None]
        assert ((of_group * step - group).abs() <= step * 0.5001).all()


def test_halves_are_rounded_away_from_zero():
    x = torch.tensor([127.0, 0.5, -0.5, 1.5, -1.5, 2.5, 0.49, -0.49]).view(1, 1, 1, 8)
    assert quantize_int8(x, 1)[0].flatten().tolist() == [127, 1, -1, 2, -2, 3, 0, 0]


def test_what_is_nothing_or_no_number():
    x = torch.ones(1, 1, 4, 8)
    x[0, 0, 0] = 0
    x[0, 0, 1] = 1e-40
    x[0, 0, 2, 3] = math.nan
    x[0, 0, 3, 5] = -math.inf
    codes, scales = quantize_int8(x, 1)
    assert (codes[0, 0, :2] == 0).all()
    assert scales[0, 0, :2].isfinite().all()
    assert (scales[0, 0, :2] > 0).all()
    assert (codes[0, 0, 2:] == 0).all()
    assert not scales[0, 0, 2:].isfinite().any()


@pytest.mark.parametrize(
    ("x", "group", "error", "message"),
    [
        (torch.ones(1, 1, 2, 2, dtype=torch.int8), 1, TypeError, "floating dtype, got torch.int8"),
        (torch.ones(2, 2), 1, ValueError, r"\(batch, heads, tokens, head_dim\), got \(2, 2\)"),
        (torch.ones(1, 1, 2, 2), 0, ValueError, "`group` must be a number of tokens from 1, got 0"),
        (torch.ones(1, 1, 2, 2), 1.5, ValueError, "got 1.5"),
    ],
)
def test_quantize_int8_refuses(x, group, error, message):
    with pytest.raises(error, match=message):
        quantize_int8(x, group)


@given(keys=st.integers(1, 64).map(lambda n: 8 * n))
def test_groups_of_keys_lie_in_blocks(keys):
    group = key_group(keys)
    assert keys % group == 0
    assert 8 <= group <= 64


# -- the formats against float64 -----------------------------------------------------------------------------


def normal(*offsets: float, tokens: int = 512, dim: int = 64) -> list[torch.Tensor]:
    """q, k and v, normal, with some channels that are larger."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, tokens, dim, generator=generator) for _ in range(3))
    k[..., ::20] *= 6
    q[..., 7] *= 3
    v[..., ::16] *= 8
    return [q, k, v]


def everything(tokens: int = 512, block_size=(64, 64)) -> BlockMask:
    return BlockMask.from_token_mask(torch.ones(tokens, tokens, dtype=torch.bool), block_size)


def exactly(q, k, v, mask) -> torch.Tensor:
    return reference.attention(*(x.double() for x in (q, k, v)), mask, scale=q.shape[3] ** -0.5)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_error_with_outlying_channels(format, dtype):
    q, k, v = (x.to(dtype) for x in normal())
    expected = exactly(q, k, v, everything())
    out = block_sparse_attention(q, k, v, everything(), backend="reference", quantization=format)
    assert relative_l1(out, expected) < WORST[format]
    cosine = torch.cosine_similarity(out.double().flatten(), expected.flatten(), 0)
    assert cosine > (0.9995 if format in ("int8", "int8-int8") else 1 - WORST[format] ** 2)
    assert relative_l1(out, expected) > (1e-3 if format == "int8" else WORST["int8"] / 2)  # it is coarse


@pytest.mark.parametrize("format", FORMATS)
def test_keys_with_an_offset_need_smoothing(format):
    q, k, v = normal()
    sign = torch.where(torch.arange(64) % 3 == 0, -1, 1)
    k = k + 8 * sign
    expected = exactly(q, k, v, everything())
    smooth, rough = (
        reference.quantized_attention(q, k, v, everything(), FORMATS[format], scale=0.125, smooth=smooth)[0]
        for smooth in (True, False)
    )
    assert relative_l1(smooth, expected) < WORST[format]
    if format == "int8":
        assert relative_l1(rough, expected) > 1.5 * WORST[format]
    assert relative_l1(rough, expected) > relative_l1(smooth, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_an_offset_of_values_costs_nothing(format):
    """Weights add up to 1, and what is left of the values when their mean is gone is all that is rounded."""
    q, k, v = normal()
    plain, moved = (
        block_sparse_attention(q, k, x, everything(), backend="reference", quantization=format)
        for x in (v, v + 100)
    )
    assert relative_l1(moved - 100, plain) < (1e-4 if format == "int8" else 0.02)  # some round the other way


@pytest.mark.parametrize("backend", ["reference", *ON_A_CPU])
@pytest.mark.parametrize("format", FORMATS)
def test_large_values_stay_finite(format, backend):
    """V of 60000 overflows where products of fp16 are added up in fp16."""
    q, k, v = (x.half() for x in normal())
    v = torch.full_like(v, 60000.0)
    out = block_sparse_attention(q, k, v, everything(), backend=backend, quantization=format)
    torch.testing.assert_close(out, v, rtol=1e-3, atol=0)
    v[..., ::2, :] = -60000.0
    out = block_sparse_attention(q, k, v, everything(), backend=backend, quantization=format)
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", *ON_A_CPU])
@pytest.mark.parametrize("format", FORMATS)
def test_nothing_but_zeros(format, backend):
    zeros = torch.zeros(1, 2, 512, 64)
    out, lse = block_sparse_attention(
        *[zeros] * 3, everything(), backend=backend, quantization=format, return_lse=True
    )
    assert (out == 0).all()
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(512)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", ["reference", *ON_A_CPU])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_no_number_stays_in_its_query_group_or_channel(format, backend, value):
    allowed = torch.ones(512, 512, dtype=torch.bool)
    allowed[:256, 256:] = False  # the first half does not attend to the second
    mask = BlockMask.from_token_mask(allowed, (64, 64))
    options = {"backend": backend, "quantization": format, "return_lse": True}
    for name in "qkv":
        given = dict(zip("qkv", normal(), strict=True))
        before = block_sparse_attention(**given, mask=mask, **options)[0]
        given[name][0, 0, 300, 5] = value
        out, lse = block_sparse_attention(**given, mask=mask, **options)
        torch.testing.assert_close(out[0, 1], before[0, 1])
        if name == "q":
            assert out[0, 0, 300].isnan().all()
            assert out[0, 0, [i for i in range(512) if i != 300]].isfinite().all()
        elif name == "k":
            assert out[0, 0, 256:].isnan().all()
            assert out[0, 0, :256].isfinite().all()
            assert lse[0, 0, :256].isfinite().all()
        else:
            assert not out[0, 0, 256:, 5].isfinite().any()
            assert out[0, 0, :, [c for c in range(64) if c != 5]].isfinite().all()


# -- backends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", QUANTIZED, ids=str)
@pytest.mark.parametrize("backend", ON_A_CPU)
def test_backends_compute_what_the_reference_does(backend, case, format):
    check_quantized(case, backend, format)


@pytest.mark.parametrize("products", native.PRODUCTS)
@pytest.mark.parametrize("case", QUANTIZED, ids=str)
def test_compiled_code_computes_what_the_reference_does(monkeypatch, case, products):
    """By all instructions for int8 that this processor has."""
    if can_run("native", device="cpu", dtype=case.dtype, head_dim=case.dim, block_size=case.block_size):
        pytest.skip("native does not run here")
    if native.PRODUCTS.index(products) > native.PRODUCTS.index(native.products()):
        pytest.skip(f"this processor has no {products}")
    monkeypatch.setattr(native, "products", lambda: products)
    check_quantized(case, "native", "int8")


@pytest.mark.parametrize("format", FORMATS)
def test_any_block_size_has_groups(format):
    check_quantized(Case(300, dim=8, block_size=(16, 8)), "gather", format)


@pytest.mark.parametrize("format", FORMATS)
def test_float64_and_a_negative_scale(format):
    case = Case(130, torch.float64, batch=2)
    check_quantized(case, "gather", format)
    q, k, v = case.inputs()
    options = {"quantization": format, "backend": "reference"}
    one = block_sparse_attention(q, k, v, case.mask(), scale=-0.25, **options)
    torch.testing.assert_close(one, block_sparse_attention(-q, k, v, case.mask(), scale=0.25, **options))
    even = block_sparse_attention(q, k, v, everything(130), scale=0.0, **options)
    torch.testing.assert_close(even, v.mean(2, keepdim=True).expand_as(v), atol=0.05, rtol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_padded_text_may_hold_anything(format):
    """It takes part in no mean and in no scale."""
    case = Case(300, batch=2, text=40, text_valid=(17, 0))
    q, k, v = case.inputs()
    options = {"text_valid": case.valid(), "quantization": format, "return_lse": True}
    for backend in ("reference", *ON_A_CPU):
        expected = block_sparse_attention(q, k, v, case.mask(), backend=backend, **options)
        k[0, :, 277:], k[1, :, 260:], v[0, :, 277:], v[1, :, 260:] = 1e4, -math.inf, 3e5, -7e6
        for result, before in zip(
            block_sparse_attention(q, k, v, case.mask(), backend=backend, **options), expected, strict=True
        ):
            assert torch.equal(result, before) or error(result, before) < 1e-4


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", ["reference", *ON_A_CPU])
def test_a_tail_is_merged_of_the_numbers_as_they_are(backend, format):
    case = Case(1027, heads=1)
    q, k, v = case.inputs()
    mask = case.mask()
    options = {"tail": "pooled", "return_lse": True, "backend": backend}
    exact, exact_lse = reference.attention(
        q.double(), k.double(), v.double(), mask, scale=0.125, tail="pooled"
    )
    out, lse = block_sparse_attention(q, k, v, mask, quantization=format, **options)
    assert relative_l1(out, exact) < 2 * WORST[format]
    assert error(lse, exact_lse) < 0.2
    assert not torch.equal(out, block_sparse_attention(q, k, v, mask, **options)[0])


@pytest.mark.parametrize("format", FORMATS)
def test_parts_of_the_keys_merge_to_the_whole(format):
    """The sum below the fraction is of rounded weights, as the one above it is."""
    q, k, v = normal()
    first = torch.arange(512) < 128
    masks = [BlockMask.from_token_mask(keys.expand(512, -1), (64, 64)) for keys in (first, ~first)]
    options = {"backend": "reference", "quantization": format, "return_lse": True}
    parts = [block_sparse_attention(q, k, v, mask, **options) for mask in masks]
    out, lse = merge(*map(list, zip(*parts, strict=True)))
    expected, expected_lse = block_sparse_attention(q, k, v, everything(), **options)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=0)


def test_formats_and_who_computes_them():
    assert quantizations() == tuple(FORMATS)
    asked = {"device": "cpu", "dtype": torch.float32, "head_dim": 64, "block_size": (64, 16)}
    for format in FORMATS:
        for backend in ("reference", "gather", "auto"):
            assert can_run(backend, **asked, quantization=format) is None
        assert can_run("flex", **asked, quantization=format) == (
            f"flex does not compute quantization='{format}', nor any other"
        )
    assert "no gradient" in (can_run("auto", **asked, quantization="int8", requires_grad=True) or "")
    case = Case(64)
    q, k, v = case.inputs()
    with pytest.raises(UnavailableError, match="gather does not compute quantization='int3', only 'int8'"):
        block_sparse_attention(q, k, v, case.mask(), quantization="int3")
    with pytest.raises(UnavailableError, match="numbers rounded to a few bits have no gradient"):
        block_sparse_attention(q.requires_grad_(), k, v, case.mask(), quantization="int8")


def test_balance_moves_outliers_between_queries_and_keys():
    keys, queries = torch.tensor([[[[16.0, 1.0, 0.0]]]]), torch.tensor([[[[1.0, 4.0, 2.0]]]])
    torch.testing.assert_close(quantized.balance(keys, queries).flatten(), torch.tensor([4.0, 0.5, 1.0]))
