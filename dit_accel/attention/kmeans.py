"""k-means of the tokens of every sample and head at once, on their device and without waiting for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

_DISTANCES_AT_ONCE = 2**26  # that are in memory at a time


class Clusters(NamedTuple):
    """Tokens in clusters, each cluster's centroid being the mean of its tokens.

    Attributes:
        centroids: (B, H, n, D), at least fp32; an empty cluster keeps the one that it had before.
        labels: the cluster of each token, int64 (B, H, S).
        sizes: tokens of each cluster, int64 (B, H, n).
    """

    centroids: torch.Tensor
    labels: torch.Tensor
    sizes: torch.Tensor


def kmeans(x: torch.Tensor, centroids: torch.Tensor, iterations: int) -> Clusters:
    """Lloyd's algorithm: tokens go to the nearest centroid, centroids to the mean of their tokens.

    Args:
        x: (B, H, S, D).
        centroids: to start from, (B, H, n, D).
        iterations: of both together, at least one.
    """
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    centroids = centroids.to(x.dtype)
    for _ in range(iterations):
        labels = first_equal(centroids).gather(2, nearest(x, centroids))
        sizes = torch.zeros(centroids.shape[:3], dtype=torch.int64, device=x.device)
        sizes.scatter_add_(2, labels, torch.ones_like(labels))
        sums = torch.zeros_like(centroids).scatter_add_(2, labels[..., None].expand(x.shape), x)
        centroids = torch.where(sizes[..., None] > 0, sums / sizes[..., None].clamp(min=1), centroids)
    return Clusters(centroids, labels, sizes)


def first_equal(centroids: torch.Tensor) -> torch.Tensor:
    """For each centroid the first that is equal to it, mostly itself: int64 (B, H, n).

    A token drawn twice starts two equal clusters, and stays in both while one is empty and the other is that
    token alone. Matrix products round equal columns differently, each machine in its way.
    """
    bits = (centroids + 0.0).view(torch.int32 if centroids.dtype == torch.float32 else torch.int64)
    # a hash of 64 bits: equal centroids have equal numbers, others by a chance of one in 2^64
    factors = torch.arange(1, centroids.shape[3] + 1, device=centroids.device) * 0x1E3779B97F4A7C15 | 1
    number, at = (bits * factors).sum(-1).sort(dim=-1, stable=True)
    index = torch.arange(number.shape[2], device=number.device).expand_as(number)
    same = F.pad(number[:, :, 1:] == number[:, :, :-1], (1, 0))
    start = index.masked_fill(same, 0).cummax(-1).values
    return torch.empty_like(at).scatter_(2, at, at.gather(2, start))


def nearest(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The nearest centroid of each token: int64 (B, H, S)."""
    half = centroids.square().sum(-1)[:, :, None] / 2
    at_once = max(1, _DISTANCES_AT_ONCE // (half.numel() or 1))
    # |x - c|^2 = |x|^2 - 2 (x . c - |c|^2 / 2)
    return torch.cat([(part @ centroids.mT - half).argmax(-1) for part in x.split(at_once, 2)], 2)
