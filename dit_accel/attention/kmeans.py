"""k-means of the tokens of every sample and head at once, on their device and without waiting for it."""

from __future__ import annotations

from typing import NamedTuple

import torch

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


def kmeans(
    x: torch.Tensor, centroids: torch.Tensor, iterations: int, drawn: torch.Tensor | None = None
) -> Clusters:
    """Lloyd's algorithm: tokens go to the nearest centroid, centroids to the mean of their tokens.

    Args:
        x: (B, H, S, D).
        centroids: to start from, (B, H, n, D).
        iterations: of both together, at least one.
        drawn: int64 (n,), the tokens that the centroids are, where some may have been drawn twice: as long
            as they are in one place the first of them gets all tokens, on every machine. Matrix products
            round equal columns differently.
    """
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    start = centroids = centroids.to(x.dtype)
    first = None if drawn is None else (drawn[:, None] == drawn).int().argmax(1)
    for _ in range(iterations):
        labels = nearest(x, centroids)
        if first is not None:
            labels = _first_of_equals(first, centroids == start).gather(2, labels)
        sizes = torch.zeros(centroids.shape[:3], dtype=torch.int64, device=x.device)
        sizes.scatter_add_(2, labels, torch.ones_like(labels))
        sums = torch.zeros_like(centroids).scatter_add_(2, labels[..., None].expand(x.shape), x)
        centroids = torch.where(sizes[..., None] > 0, sums / sizes[..., None].clamp(min=1), centroids)
    return Clusters(centroids, labels, sizes)


def _first_of_equals(first: torch.Tensor, unmoved: torch.Tensor) -> torch.Tensor:
    """By centroid, the first that is in the same place for having been drawn there: int64 (B, H, n).

    Args:
        first: int64 (n,), the first that was drawn as the same token.
        unmoved: bool (B, H, n, D), numbers of the centroids that are still those of that token.
    """
    unmoved, own = unmoved.all(-1), torch.arange(len(first), device=first.device)
    first = first.expand(unmoved.shape)
    places = torch.where(unmoved, own, len(own))
    earliest = torch.full_like(places, len(own)).scatter_reduce(2, first, places, "amin")
    return torch.where(unmoved, earliest.gather(2, first), own)


def nearest(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The nearest centroid of each token, of equals the first: int64 (B, H, S)."""
    half = centroids.square().sum(-1)[:, :, None] / 2
    at_once = max(1, _DISTANCES_AT_ONCE // (half.numel() or 1))
    # |x - c|^2 = |x|^2 - 2 (x . c - |c|^2 / 2)
    return torch.cat([(part @ centroids.mT - half).argmax(-1) for part in x.split(at_once, 2)], 2)
