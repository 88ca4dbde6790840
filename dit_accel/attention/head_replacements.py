"""What takes the place of a head's attention output, one pure function per kind.

All take and return heads as (B, H, S, D). `hidden`, bool (B, S), marks padded keys.

Sources: PAG (arXiv 2403.17377), SEG (arXiv 2408.00760), HeadHunter and SoftPAG
(arXiv 2506.10978).
"""

from __future__ import annotations

import math

import torch

_MEAN_FROM = 9999.0  # a larger sigma means the mean (SEG's published code)
_QUERIES = 4096  # at a time, where logits are written out


def mix(out: torch.Tensor, other: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """O + u (O_kind - O), formed in at least fp32; strength u (H,)."""
    wide = torch.promote_types(out.dtype, torch.float32)
    u = strength.to(out.device, wide)[:, None, None]
    return (out + u * (other.to(wide) - out.to(wide))).to(out.dtype)


def uniform(v: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """Every key weighs the same: the mean of V over all tokens, text included, for every query."""
    if hidden is None:
        return v.mean(dim=2, keepdim=True).expand_as(v)
    weight = (~hidden).to(v.dtype)[:, None, :, None]
    return ((v * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True)).expand_as(v)


def image_identity(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_k: torch.Tensor,
    text_v: torch.Tensor,
    scale: float,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Image queries see their own key and the text: (B, H, N, D) for N image tokens.

    The logits of all other image keys are minus infinity before the softmax, as in diffusers' PAG for SD3.
    Computed and returned in at least fp32.

    Args:
        q, k, v: of the image tokens, (B, H, N, D).
        text_k, text_v: of the text tokens, (B, H, T, D).
        scale: factor on the logits.
        hidden: which text tokens are padding, bool (B, T); None: none.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, v, text_k, text_v = (x.to(wide) for x in (q, k, v, text_k, text_v))
    parts = []
    for start in range(0, q.shape[2], _QUERIES):
        rows = slice(start, start + _QUERIES)
        own = (q[:, :, rows] * k[:, :, rows]).sum(-1, keepdim=True)
        text = q[:, :, rows] @ text_k.transpose(-1, -2)
        if hidden is not None:
            text = text.masked_fill(hidden[:, None, None], -math.inf)
        weights = torch.softmax(torch.cat([own, text], dim=-1) * scale, dim=-1)
        parts.append(weights[..., :1] * v[:, :, rows] + weights[..., 1:] @ text_v)
    return torch.cat(parts, dim=2)


def blur_matrix(length: int, sigma: float) -> torch.Tensor:
    """A Gaussian blur of `length` places in a row, as a matrix, float64 (length, length).

    Kernel of min(ceil(6 sigma) made odd, length made odd upwards) places, reflected at the ends; a sigma
    above 9999 means the mean.
    """
    if sigma > _MEAN_FROM:
        return torch.full((length, length), 1 / length, dtype=torch.float64, device="cpu")
    wished = math.ceil(6 * sigma)
    size = min(wished + 1 - wished % 2, length + 1 - length % 2)
    offsets = torch.arange(size, device="cpu") - size // 2
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    source = (torch.arange(length, device="cpu")[:, None] + offsets).abs()
    source = torch.where(source < length, source, 2 * (length - 1) - source)
    matrix = torch.zeros(length, length, dtype=torch.float64, device="cpu")
    return matrix.scatter_add_(1, source, (weights / weights.sum()).expand(length, -1).contiguous())


def blur_grid(x: torch.Tensor, grid: tuple[int, int, int], sigma: float) -> torch.Tensor:
    """Tokens (B, H, F * h * w, D) of a grid (F, h, w), row-major, blurred within each frame."""
    rows, columns = (_matrix_like(x, n, sigma) for n in grid[1:])
    frames = x.to(rows.dtype).unflatten(2, grid)
    blurred = torch.einsum("yi,xj,bhfijd->bhfyxd", rows, columns, frames)
    return blurred.flatten(2, 4).to(x.dtype)


def blur_text(x: torch.Tensor, valid: torch.Tensor | None, sigma: float) -> torch.Tensor:
    """Text tokens (B, H, T, D) blurred along the text; padded ones, from `valid` (B,) on, are left as is."""
    lengths = [x.shape[2]] * len(x) if valid is None else valid.tolist()
    blurred = x.clone()
    for sample, length in enumerate(lengths):
        if length:
            matrix = _matrix_like(x, length, sigma)
            blurred[sample, :, :length] = (matrix @ x[sample, :, :length].to(matrix.dtype)).to(x.dtype)
    return blurred


def _matrix_like(x: torch.Tensor, length: int, sigma: float) -> torch.Tensor:
    return blur_matrix(length, sigma).to(x.device, torch.promote_types(x.dtype, torch.float32))
