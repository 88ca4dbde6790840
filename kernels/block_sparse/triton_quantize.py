"""Q, K and V in eight bits for the Triton kernel: `quantized.Quantized.of` without copies in fp32.

Each tensor is read twice. The first pass sums up and bounds the finite numbers of each channel, some tokens a
program; means, the balance of keys and queries and the scales of values follow from that in small tensors.
The second writes codes and scales. Codes of q and k are (B, H, tokens, DP), those of v transposed, (B, H, DP,
tokens), as tensor cores want operands of eight bits; tokens are padded to whole tiles, and DP is head_dim as
the kernel holds it, with zeros, so that loops over codes need no bounds.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .formats import Format
from .problem import Lengths
from .quantized import LEAST, LEVELS, LOG2_E, Quantized, balance

TILE = 128  # tokens that codes are padded to a multiple of
CHUNK = 16  # as many that a program of the first pass takes
_SIZES = ["tokens", "hidden_from", "hidden_stop", "heads", "chunks"]


@triton.jit(do_not_specialize=_SIZES)
def _channels(
    x_ptr, out_ptr, x_b, x_h, x_s, tokens, text_valid_ptr, hidden_from, hidden_stop, heads, chunks,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sum, count, least and largest of the finite numbers of each channel: out (B, H, chunks, 4, DP)."""
    plane = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    b, h = plane // heads, plane % heads
    hidden_start = hidden_stop
    if text_valid_ptr is not None:
        hidden_start = hidden_from + tl.load(text_valid_ptr + b).to(tl.int32)
    d = tl.arange(0, DP)
    x_ptr += b * x_b + h * x_h
    total = tl.zeros([DP], tl.float32)
    number = tl.zeros([DP], tl.float32)
    least = tl.full([DP], float("inf"), tl.float32)
    most = tl.full([DP], float("-inf"), tl.float32)
    for i in range(0, tl.minimum(CHUNK, tl.cdiv(tokens, T) - chunk * CHUNK)):
        token = (chunk * CHUNK + i) * T + tl.arange(0, T)
        real = (token < tokens) & ((token < hidden_start) | (token >= hidden_stop))
        inside = real[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + token.to(tl.int64)[:, None] * x_s + d[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        finite = inside & (tl.abs(x) < float("inf"))
        total += tl.sum(tl.where(finite, x, 0.0), 0)
        number += tl.sum(finite.to(tl.float32), 0)
        least = tl.minimum(least, tl.min(tl.where(finite, x, float("inf")), 0))
        most = tl.maximum(most, tl.max(tl.where(finite, x, float("-inf")), 0))
    out_ptr += (plane * chunks + chunk) * 4 * DP + d
    tl.store(out_ptr, total)
    tl.store(out_ptr + DP, number)
    tl.store(out_ptr + 2 * DP, least)
    tl.store(out_ptr + 3 * DP, most)


@triton.jit(do_not_specialize=_SIZES[:-1])
def _codes(
    x_ptr, codes_ptr, scale_ptr, shift_ptr, mean_ptr, factor_ptr, other_ptr,
    x_b, x_h, x_s, tokens, padded, text_valid_ptr, hidden_from, hidden_stop, heads,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    """Codes of (x - mean) * factor.

    With a GROUP, int8 at a scale for each group of tokens, (B, H, padded / GROUP); without, transposed and at
    the factor's. `shift_ptr`, where given, takes each token's product with the channels of `other_ptr`.
    """
    plane = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * T + tl.arange(0, T)
    d = tl.arange(0, DP)
    b, h = plane // heads, plane % heads
    hidden_start = hidden_stop
    if text_valid_ptr is not None:
        hidden_start = hidden_from + tl.load(text_valid_ptr + b).to(tl.int32)
    real = (token < tokens) & ((token < hidden_start) | (token >= hidden_stop))
    inside = real[:, None] & (d < D)[None, :]
    x_ptr += b * x_b + h * x_h
    x = tl.load(x_ptr + token.to(tl.int64)[:, None] * x_s + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        other = tl.load(other_ptr + plane * DP + d)
        shift = tl.sum(tl.where(inside, x * other[None, :], 0.0), 1)
        tl.store(shift_ptr + plane * tokens + token, shift, mask=token < tokens)
    if mean_ptr is not None:
        x -= tl.load(mean_ptr + plane * DP + d)[None, :]
    x = tl.where(inside, x * tl.load(factor_ptr + plane * DP + d)[None, :], 0.0)
    if GROUP is None:
        x = tl.where(x == x, x, 0.0)
        if codes_ptr.dtype.element_ty == tl.int8:
            x = x + 12582912.0 - 12582912.0  # 1.5 * 2^23: rounds to a whole number
        at = codes_ptr + (plane * DP + d)[None, :] * padded + token[:, None]
        tl.store(at, x.to(codes_ptr.dtype.element_ty))
    else:
        # what is not a number is to be the largest, though a maximum leaves it out
        size = tl.where(x == x, tl.abs(x), float("inf"))
        largest = tl.max(tl.reshape(tl.max(size, 1), (T // GROUP, GROUP)), 1)
        scale = tl.maximum(largest, LEAST) / LEVELS
        each = tl.reshape(tl.broadcast_to(scale[:, None], (T // GROUP, GROUP)), (T,))
        code = tl.where(each[:, None] < float("inf"), tl.div_rn(x, each[:, None]), 0.0)
        code += tl.where(code < 0, -0.5, 0.5)
        tl.store(codes_ptr + (plane * padded + token)[:, None] * DP + d[None, :], code.to(tl.int8))
        group = tl.program_id(1) * (T // GROUP) + tl.arange(0, T // GROUP)
        tl.store(scale_ptr + plane * (padded // GROUP) + group, scale)


# -- launch --------------------------------------------------------------------------------------------------


def quantize(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    format: Format,
    *,
    group: int,
    dim: int,
    scale: float,
    text: tuple[int, int],
    text_valid: Lengths,
) -> Quantized:
    """As `Quantized.of`, with codes laid out for the kernel of head_dim `dim`; `group` divides `TILE`."""
    hidden, factor = (text_valid, *text), scale * LOG2_E
    (k_mean, k_largest, _), (_, q_largest, _) = _of_channels(k, hidden, dim), _of_channels(q, None, dim)
    moved = balance(k_largest, q_largest)
    q_codes, q_scale, shift = _quantized(q, None, moved * factor, k_mean * factor, None, 1)
    k_codes, k_scale, _ = _quantized(k, k_mean, 1 / moved, None, hidden, group)
    v_scale = v_mean = None
    if format.values is not None:
        v_mean, v_largest, sound = _of_channels(v, hidden, dim)
        v_scale = v_largest.clamp(min=LEAST) / format.values
        v = _quantized(v, v_mean, 1 / v_scale, None, hidden, None, format.dtype)[0]
        v_scale = v_scale.masked_fill(~sound, float("nan"))
    return Quantized(q_codes, q_scale, k_codes, k_scale, v, v_scale, v_mean, shift, group)


def _hidden(hidden: tuple | None) -> tuple:
    """Text lengths and the text's place as the kernels take them; with no lengths nothing is hidden."""
    return (None, 0, 0) if hidden is None or hidden[0] is None else hidden


def _of_channels(x: torch.Tensor, hidden: tuple | None, dim: int) -> tuple[torch.Tensor, ...]:
    """Mean of each channel's finite numbers, the largest of them less it, and whether all are finite.

    Each is (B, H, dim). Queries, of which nothing is hidden, keep their mean.
    """
    batch, heads, tokens, given = x.shape
    chunks = triton.cdiv(tokens, TILE * CHUNK)
    out = torch.empty(batch, heads, chunks, 4, dim, dtype=torch.float32, device=x.device)
    lengths, start, stop = _hidden(hidden)
    with torch.cuda.device_of(x):
        _channels[batch * heads, chunks](
            x, out, *x.stride()[:3], tokens, lengths, start, stop, heads, chunks,
            D=given, DP=dim, T=32, CHUNK=CHUNK * TILE // 32,
        )  # fmt: skip
    total, number, least, most = out.unbind(3)
    number, least, most = number.sum(2), least.amin(2), most.amax(2)
    mean = total.sum(2) / number.clamp(min=1) if hidden is not None else torch.zeros_like(number)
    largest = torch.maximum(most - mean, mean - least).clamp(min=0.0)
    real = tokens if lengths is None else (tokens - (stop - start) + lengths).view(-1, 1, 1)
    return mean, largest, number == real


def _quantized(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    factor: torch.Tensor,
    other: torch.Tensor | None,
    hidden: tuple | None,
    group: int | None,
    dtype: torch.dtype = torch.int8,
) -> tuple[torch.Tensor, Any, Any]:
    """Codes of (x - mean) * factor, their scales and each token's product with `other`, as `_codes` says."""
    batch, heads, tokens, given = x.shape
    dim, padded = factor.shape[2], triton.cdiv(tokens, TILE) * TILE
    shape = (padded, dim) if group else (dim, padded)
    codes = torch.empty(batch, heads, *shape, dtype=dtype, device=x.device)
    scales = shift = None
    if group:
        scales = torch.empty(batch, heads, padded // group, dtype=torch.float32, device=x.device)
    if other is not None:
        shift = torch.empty(batch, heads, tokens, dtype=torch.float32, device=x.device)
    rows = max(group or 0, 32)
    with torch.cuda.device_of(x):
        _codes[batch * heads, padded // rows](
            x, codes, scales, shift, mean, factor, other, *x.stride()[:3], tokens, padded, *_hidden(hidden),
            heads, D=given, DP=dim, T=rows, GROUP=group, LEVELS=LEVELS, LEAST=LEAST,
        )  # fmt: skip
    return codes, scales, shift
