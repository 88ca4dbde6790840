"""Clustered attention (Sparse VideoGen 2): clusters of queries attend to clusters of keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from dit_accel.arguments import integer, integers, is_number, shown
from dit_accel.attention.block_scores import top_blocks
from dit_accel.attention.call import AttentionCall
from dit_accel.attention.clustered import ClusterRouted
from dit_accel.masks.layout import TokenLayout

from .base import OnlinePattern

if TYPE_CHECKING:
    from dit_accel.attention.layer_masks import LayerMasks
    from dit_accel.masks.block_mask import BlockMask

_SEED = 0  # of the tokens that clusters start from


@dataclass(frozen=True)
class Clustered(OnlinePattern):
    """Visual tokens are clustered in every head by content, queries and keys apart; clusters choose clusters.

    k-means by Euclidean distance, from tokens that are drawn once, with replacement, the same for all layers
    and heads; at later steps of a run from the centroids of the previous executed step, in each guidance
    branch by itself (in runs without gradients, as pipelines make them). With mean query q_i and key k_j of
    the clusters and n_j keys in cluster j, p_ij ~ n_j exp(q_i . k_j / sqrt d); the clusters of the largest p
    are kept through the one that takes the sum to `top_p`, and at least int(least * clusters). Heads see
    their tokens cluster by cluster, and a block of the kernel that a kept pair of clusters touches is
    computed whole. Text and anchor tokens are in no cluster and always kept.

    Args:
        query_clusters, key_clusters: at most as many as there are visual tokens are made.
        top_p: share of the weight that is kept.
        least: share of the clusters of keys that is kept at least.
        iterations: of k-means, the first time and later.

    Raises:
        ValueError: numbers or shares outside their range.

    Source: Yang et al., "Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via
    Semantic-Aware Permutation", 2025.
    """

    query_clusters: int = 300
    key_clusters: int = 1000
    top_p: float = 0.9
    least: float = 0.1
    iterations: tuple[int, int] = (50, 2)

    def __post_init__(self):
        for name in ("query_clusters", "key_clusters"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 1))
        for name in ("top_p", "least"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value <= 1:
                raise ValueError(f"`{name}` must be a number above 0 and at most 1, got {shown(value)}")
            object.__setattr__(self, name, float(value))
        object.__setattr__(self, "iterations", integers("iterations", self.iterations, "(first, later)", 1))

    def density(self, layout: TokenLayout) -> float:
        """The share of all pairs that it aims at: about the most that `top_p` and `least` take."""
        visual = layout.visual_len / layout.seq_len
        return visual**2 * max(self.top_p, self.least) + 1 - visual**2

    def drawn(self, layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's tokens that clusters of queries and keys start from: int64 (n,) each."""
        generator = torch.Generator(device="cpu").manual_seed(_SEED)
        return tuple(
            torch.randint(layout.visual_len, (min(n, layout.visual_len),), generator=generator, device="cpu")
            + layout.visual_slice.start
            for n in (self.query_clusters, self.key_clusters)
        )

    def choose(self, queries: torch.Tensor, keys: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Which clusters of keys clusters of queries attend to, bool (B, H, n, m).

        Args:
            queries, keys: centroids (B, H, n, D) and (B, H, m, D).
            sizes: keys of each cluster, int64 (B, H, m).
        """
        scores = queries * queries.shape[3] ** -0.5 @ keys.mT + sizes[:, :, None].to(keys.dtype).log()
        return top_blocks(scores.softmax(-1), top_k=self.least, top_p=self.top_p, crossing=True)

    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: TokenLayout,
        *,
        block_size: tuple[int, int] | None = None,
        text_valid: torch.Tensor | None = None,
    ) -> BlockMask:
        """See `OnlinePattern.select`: of a first step, in blocks of 64 x 16 by default, an order per head."""
        layer = _layer(self, layout, tuple(block_size or (64, 16)), q.device)
        call = AttentionCall(q, k, k, layout, dense=lambda call: call.q)
        return layer.resolved(call).mask

    def layer(self, masks: LayerMasks) -> ClusterRouted:
        return ClusterRouted.of(self, masks)


@lru_cache(maxsize=16)
def _layer(
    pattern: Clustered, layout: TokenLayout, block_size: tuple[int, int], device: torch.device
) -> ClusterRouted:
    with torch.inference_mode(False):  # what stays must be usable under autograd later
        return ClusterRouted.made(pattern, layout, block_size, None, device)
