"""Low frequencies of latents, by which methods follow a smaller picture of the same scene."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def haar(x: torch.Tensor, level: int = 1) -> torch.Tensor:
    """The Haar approximation: means over 2^level x 2^level latents in place of them, (..., H, W) like x.

    Blocks at the end of an odd side are cut.
    """
    size, flat = 2**level, x.flatten(0, -3)[:, None]
    means = F.avg_pool2d(flat, size, ceil_mode=True, count_include_pad=False)
    whole = means.repeat_interleave(size, -2).repeat_interleave(size, -1)
    return whole[..., : x.shape[-2], : x.shape[-1]].reshape(x.shape)


def butterworth(x: torch.Tensor, ratio: float, order: int = 4) -> torch.Tensor:
    """x (..., H, W) through a Butterworth filter of relative radius `ratio`.

    Its spectrum, centred, times 1 / (1 + (D^2 / ratio^2)^order) with D^2 = (2 y / H - 1)^2 + (2 x / W - 1)^2.
    """
    options = {"dtype": torch.float64, "device": x.device}
    rows, columns = ((2 * torch.arange(n, **options) / n - 1) ** 2 for n in x.shape[-2:])
    weight = 1 / (1 + ((rows[:, None] + columns) / ratio**2) ** order)
    spectrum = torch.fft.fftshift(torch.fft.fft2(x.double()), dim=(-2, -1)) * weight
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real.to(x.dtype)
