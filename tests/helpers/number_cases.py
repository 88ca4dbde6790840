"""What becomes of NaN and infinity in block-sparse attention, for tests of every backend."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel import BlockMask
from dit_accel.kernels import block_sparse_attention

TOKENS, KEYS, CHANNELS = 70, 90, 24
WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}


def small_mask(block_size: tuple[int, int] = (32, 16)) -> BlockMask:
    """Full, partial and absent blocks, and rows that attend nothing among others; text in the last keys."""
    generator = torch.Generator().manual_seed(0)
    allowed = torch.rand(TOKENS, KEYS, generator=generator) < 0.4
    allowed[: TOKENS // 2, :32] = True
    allowed[:, 32:48] = False
    allowed[[0, 17, 40, TOKENS - 1]] = False
    return BlockMask.from_token_mask(allowed, block_size, (KEYS - 10, KEYS))


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"q": TOKENS, "k": KEYS, "v": KEYS}
    return {name: torch.randn(1, 2, n, CHANNELS, generator=generator).to(dtype) for name, n in shapes.items()}


def nan(dtype: torch.dtype, payload: int, negative: bool) -> torch.Tensor:
    """A NaN with these bits of mantissa."""
    bits, mantissa = torch.finfo(dtype).bits, MANTISSA[dtype]
    word = (1 << (bits - 1)) - (1 << mantissa) | (payload % (1 << mantissa) or 1)
    value = torch.tensor([word - (negative << (bits - 1))], dtype=WORDS[dtype]).view(dtype)
    assert value.isnan()
    return value


def check_nan(
    backend: str,
    dtype: torch.dtype,
    payload: int,
    negative: bool,
    which: str,
    token: int,
    channel: int,
    block_size: tuple[int, int] = (32, 16),
) -> None:
    """A NaN in q, k or v is in the results of the rows that attend to it, and those alone."""
    mask, given = small_mask(block_size), inputs(dtype)
    given[which][0, 0, token, channel] = nan(dtype, payload, negative)
    out, lse = block_sparse_attention(**given, mask=mask, return_lse=True, backend=backend)
    allowed = mask.to_kernel_mask()[0]
    some = allowed.any(-1)
    hit = some & (torch.arange(TOKENS) == token) if which == "q" else allowed[:, token]
    if which == "v":  # elsewhere in its column there may be 0 * NaN, as in any product of matrices
        assert out[0, 0, hit, channel].isnan().all()
        assert out[0, 0, :, [c for c in range(CHANNELS) if c != channel]].isfinite().all()
        assert torch.equal(lse.isfinite(), some.expand(1, 2, -1))
    else:
        assert torch.equal(out[0, 0].isnan(), hit[:, None].expand(-1, CHANNELS))
        assert torch.equal(lse[0, 0].isnan(), hit)
    assert (out[:, :, ~some] == 0).all()
    assert (lse[:, :, ~some] == -math.inf).all()
    assert out[0, 1].isfinite().all()


def as_sdpa(
    backend: str,
    dtype: torch.dtype,
    value: float,
    which: str,
    token: int,
    channel: int,
    block_size: tuple[int, int] = (32, 16),
) -> None:
    """With an extreme number in q, k or v every row is what plain attention to its keys alone gives."""
    mask, given = small_mask(block_size), inputs(dtype)
    given[which][0, 0, token, channel] = value
    q, k, v = given.values()
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend=backend)
    allowed = mask.to_kernel_mask()[0]
    for row in range(TOKENS):
        keys = allowed[row].nonzero()[:, 0]
        if not len(keys):
            assert (out[:, :, row] == 0).all()
            assert (lse[:, :, row] == -math.inf).all()
            continue
        one = q[:, :, row : row + 1].float(), k[:, :, keys].float(), v[:, :, keys].float()
        expected = scaled_dot_product_attention(*one).to(dtype)[:, :, 0]
        scores = one[0] @ one[1].mT * CHANNELS**-0.5
        expected_lse = scores.logsumexp(-1)[:, :, 0]
        expected_lse[expected_lse == math.inf] = math.nan
        compared = torch.ones_like(expected, dtype=torch.bool)
        if which == "v" and token not in keys:  # 0 * infinity, as in any product of matrices
            compared[0, 0, channel] = False
        result = out[:, :, row]
        assert torch.equal(result[compared].isnan(), expected[compared].isnan()), f"NaN in row {row}"
        rounding = scores.nan_to_num(0, 0, 0).abs().max() * torch.finfo(torch.float32).eps
        largest = one[2].nan_to_num(0, 0, 0).abs().amax(2)  # of each channel
        allowed_error = largest * (2 * torch.finfo(dtype).eps + 8 * rounding.clamp(max=0.01))
        wrong = (result.float() - expected.float()).abs() > allowed_error  # False for NaN and inf - inf
        assert not wrong[compared].any(), f"row {row}: {result} instead of {expected}"
        torch.testing.assert_close(lse[:, :, row], expected_lse, equal_nan=True, msg=f"lse, row {row}")


def check_nothing(backend: str, dtype: torch.dtype, block_size: tuple[int, int] = (32, 16)) -> None:
    """Rows that attend nothing are zero among rows that are not numbers, because nothing is one."""
    mask, with_lse = small_mask(block_size), backend != "flex"
    some = mask.to_kernel_mask()[0].any(-1)
    assert some.any()
    assert not some.all()
    for value in (math.nan, math.inf, -math.inf):
        given = {name: torch.full_like(x, value) for name, x in inputs(dtype).items()}
        result = block_sparse_attention(**given, mask=mask, return_lse=with_lse, backend=backend)
        out, lse = result if with_lse else (result, None)
        assert (out[:, :, ~some] == 0).all()
        assert out[:, :, some].isnan().all()
        if with_lse:
            assert (lse[:, :, ~some] == -math.inf).all()
            assert lse[:, :, some].isnan().all()
