"""Rotary tables for more positions than in training: NTK, YaRN, and DyPE, which follows the noise."""

from __future__ import annotations

import math
from typing import Any

import torch

from dit_accel.arguments import integer, noise_level, positive, shown

METHODS = ("none", "ntk", "yarn", "dype")
_BETAS, _GAMMAS = (1.25, 0.75), (16.0, 2.0)


def rotary(
    positions: torch.Tensor,
    dim: int,
    *,
    method: str,
    scale: float = 1.0,
    original: int | None = None,
    timestep: float | None = None,
    theta: float = 10000.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary embedding of one axis.

    With j = 0 .. dim / 2 - 1 and f = theta^(-2 j / dim): `"none"` is f; `"ntk"` has theta scale^(dim / (dim -
    2)) for theta; `"yarn"` changes from f / scale over that of NTK to f, from low to high frequencies, and
    multiplies the tables by 1 + 0.1 ln scale; `"dype"` moves the borders of YaRN's bands by timestep^2, so
    that it is YaRN in pure noise and, but for the factor, f at the end.

    Args:
        positions: (n,), integers or floats.
        dim: of the axis, even.
        method: one of these.
        scale: how many times more positions there are than in training, from 1.
        original: positions of the axis in training; `"yarn"` and `"dype"` need it. Where `scale` is 1, scale
            is (largest position + 1) / original, at least 1.
        timestep: of the flow, 1 for pure noise; `"dype"` needs it.
        theta: base of the frequencies; NTK by a fixed factor r is method `"none"` with theta r.

    Returns:
        cos, sin (n, dim), fp32 from fp64 frequencies, each value twice in a row (diffusers' real form).

    Raises:
        ValueError: values outside of these.

    Source: bloc97, "NTK-aware scaled RoPE", 2023; Peng et al., "YaRN: Efficient Context Window Extension of
    Large Language Models", 2023; Issachar et al., "DyPE: Dynamic Position Extrapolation for Ultra High
    Resolution Diffusion", 2025, whose authors say that a patent is pending.
    """
    frequencies, factor = frequencies_of(dim, positions, method, scale, original, timestep, theta)
    angles = positions.double()[:, None] * frequencies.to(positions.device)
    cos, sin = ((f(angles) * factor).float().repeat_interleave(2, 1) for f in (torch.cos, torch.sin))
    return cos, sin


def frequencies_of(
    dim: int,
    positions: torch.Tensor,
    method: str,
    scale: float = 1.0,
    original: int | None = None,
    timestep: float | None = None,
    theta: float = 10000.0,
) -> tuple[torch.Tensor, float]:
    """The frequencies of one axis, float64 (dim / 2,), and the factor on its tables; see `rotary`."""
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {shown(method)}")
    if integer("dim", dim, 2) % 2:
        raise ValueError(f"`dim` must be even, got {dim}")
    scale, theta = float(positive("scale", scale)), float(positive("theta", theta))
    if scale < 1:
        raise ValueError(f"`scale` must be at least 1, got {scale}")
    if original is not None and scale == 1:
        scale = max(1.0, (float(positions.max()) + 1) / integer("original", original, 1))
    plain = _powers(theta, dim)
    if method == "none" or scale == 1 or dim == 2:
        return plain, 1.0
    extended = _powers(theta * scale ** (dim / (dim - 2)), dim)
    if method == "ntk":
        return extended, 1.0
    return _yarn(plain, extended, method, scale, original, timestep, theta)


def _powers(theta: float, dim: int) -> torch.Tensor:
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)


def _yarn(
    plain: torch.Tensor,
    extended: torch.Tensor,
    method: str,
    scale: float,
    original: Any,
    timestep: float | None,
    theta: float,
) -> tuple[torch.Tensor, float]:
    if original is None:
        raise ValueError(f'`original` is needed by method "{method}": the positions of the axis in training')
    factor, kappa = 1 + 0.1 * math.log(scale), 1.0
    if method == "dype":
        if timestep is None:
            raise ValueError('`timestep` is needed by method "dype": the noise level, 1 for pure noise')
        kappa = noise_level("timestep", timestep) ** 2
        if kappa == 0:
            return plain, factor
    dim = 2 * len(plain)

    def kept(high: float, low: float) -> torch.Tensor:
        """1 for frequencies of more turns in training than `high`, 0 for those of fewer than `low`."""
        turns = [
            dim * math.log(original / (2 * math.pi * r * kappa)) / (2 * math.log(theta)) for r in (high, low)
        ]
        first, last = max(math.floor(turns[0]), 0), min(math.ceil(turns[1]), dim - 1, dim // 2)
        if first > last:  # near the end of a run, where the published ramp would turn round
            return torch.ones(dim // 2, dtype=torch.float64, device="cpu")
        j = torch.arange(dim // 2, dtype=torch.float64, device="cpu")
        return 1 - ((j - first) / (last - first + 0.001 * (first == last))).clamp(0, 1)

    middle, high = kept(*_BETAS), kept(*_GAMMAS)
    mixed = plain / scale * (1 - middle) + extended * middle
    return mixed * (1 - high) + plain * high, factor
