"""Sparse-linear attention (SLA): the blocks that matter most exactly, all else by linear attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.arguments import is_number, positive, shown
from dit_accel.attention.block_scores import block_means, largest
from dit_accel.attention.sparse_linear import BIAS, FEATURE_MAPS, WEIGHT, Blocks, SparseLinearAttention
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.tiles import check_block_size

from .block_wise import BlockWise

if TYPE_CHECKING:
    from dit_accel.attention.block_grid import BlockGrid
    from dit_accel.attention.block_routed import BlockRouted
    from dit_accel.attention.call import AttentionCall, LayerSizes
    from dit_accel.attention.layer_masks import LayerMasks
    from dit_accel.masks.block_mask import BlockMask

_FORMS = ("complement", "all")


@dataclass(frozen=True)
class SparseLinear(BlockWise):
    """Each block of queries attends to its strongest blocks of keys; linear attention stands for the rest.

    With mean q_i of a block of queries and mean k_j of a block of keys, less the mean of all keys, the
    int(top_k * blocks) blocks of the largest q_i . k_j, at least one, are critical: the output has softmax
    attention over these alone. To it a learned projection is added, W o + b with W (D, D) and b (D,) of the
    layer and for all heads, of

        o = phi(q) S / (phi(q) . z),  S = sum of phi(k)^T v,  z = sum of phi(k),

    in the form `"complement"` (the paper's) over the keys of all other blocks, o being 0 where there is none,
    and in the form `"all"` (the released checkpoints') over all keys, with 1e-5 more below the fraction. W
    and b are trained (`dit_accel.distill`) from 0 and come with an adapter; without one the critical blocks
    are all there is. Blocks with text or anchor tokens are always computed, rows and columns; the queries in
    them see everything already, and have no linear part.

    Args:
        top_k: share of the blocks of keys that are critical. Published: 0.05, and 0.1 to 0.15 for TurboWan.
        form: `"complement"` or `"all"`.
        block_size: tokens of a block of queries, and of keys: multiples of 16 and of 8.
        feature_map: phi: `"softmax"` over the head dimension, `"elu"` (plus 1) or `"relu"`.
        negligible: share of the blocks, those of the smallest q_i . k_j, that are left out of linear
            attention as well, in the form `"complement"`: int(negligible * blocks) of those that are not
            critical. 0.1 in the paper, 0 in what was released.

    Raises:
        ValueError: values outside these forms.

    Source: Zhang et al., "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear
    Attention", 2025; the form `"all"` is that of TurboDiffusion.
    """

    top_k: float = 0.05
    form: str = "complement"
    block_size: tuple[int, int] = (64, 64)
    feature_map: str = "softmax"
    negligible: float = 0.0
    refresh = 1  # a choice is made in every call
    rest = "linear attention"
    notes = ("linear attention stands for what is left out where an adapter brings its projection",)

    def __post_init__(self):
        if not is_number(self.top_k) or not 0 < self.top_k <= 1:
            raise ValueError(f"`top_k` must be a number above 0 and at most 1, got {shown(self.top_k)}")
        object.__setattr__(self, "top_k", float(positive("top_k", self.top_k)))
        for name, known in (("form", _FORMS), ("feature_map", tuple(FEATURE_MAPS))):
            if getattr(self, name) not in known:
                names = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
                raise ValueError(f"`{name}` must be {names}, got {shown(getattr(self, name))}")
        check_block_size(self.block_size)
        object.__setattr__(self, "block_size", tuple(map(int, self.block_size)))
        if not is_number(self.negligible) or not 0 <= self.negligible < 1:
            raise ValueError(f"`negligible` must be a number from 0 to below 1, got {shown(self.negligible)}")
        object.__setattr__(self, "negligible", float(self.negligible))
        if self.negligible and self.form == "all":
            raise ValueError(
                f"`negligible` is for the form 'complement', got {self.negligible:g} with form='all', which "
                "attends to all keys; use negligible=0"
            )

    def learned(self, sizes: LayerSizes) -> dict[str, torch.Tensor]:
        return {
            WEIGHT: torch.zeros(sizes.head_dim, sizes.head_dim, dtype=torch.float32, device="cpu"),
            BIAS: torch.zeros(sizes.head_dim, dtype=torch.float32, device="cpu"),
        }

    # -- what is chosen --------------------------------------------------------------------------------------

    @torch.no_grad()
    def blocks(self, q: torch.Tensor, k: torch.Tensor) -> Blocks:
        """Critical and marginal blocks, bool (B, H, blocks of queries, blocks of keys).

        Args:
            q, k: (B, H, n, D), in the order of the blocks, the last of which may be shorter.
        """
        (bq, bk), shape = self.block_size, q.shape[:2]
        if not (q.shape[2] and k.shape[2]):  # all blocks hold text
            none = torch.zeros(
                (*shape, -(-q.shape[2] // bq), -(-k.shape[2] // bk)), dtype=torch.bool, device=q.device
            )
            return Blocks(none, none)
        means = block_means(k, bk) - k.mean(
            2, keepdim=True, dtype=torch.promote_types(k.dtype, torch.float32)
        )
        scores = block_means(q, bq) @ means.mT
        count = scores.shape[-1]
        critical = largest(scores, max(1, int(self.top_k * count)))
        marginal = ~critical
        if self.negligible:
            smallest = largest(-scores.masked_fill(critical, torch.inf), int(self.negligible * count))
            marginal = marginal & ~smallest
        return Blocks(critical, marginal)

    def chosen(self, call: AttentionCall, grid: BlockGrid) -> torch.Tensor:
        """The critical blocks of a call in the order of the blocks."""
        return self.blocks(*grid.visual(call.q, call.k)).critical

    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: TokenLayout,
        *,
        block_size: tuple[int, int] | None = None,
        text_valid: torch.Tensor | None = None,
        order: Any = "auto",
    ) -> BlockMask:
        """See `OnlinePattern.select`: the critical blocks; `order` is that of the visual tokens."""
        grid = self.grid(layout, order, q.device)
        return grid.mask(self.blocks(*grid.visual(grid.enter(q), grid.enter(k))).critical, block_size)

    def layer(self, masks: LayerMasks) -> BlockRouted:
        return SparseLinearAttention.of(self, masks)

    def density(self, layout: TokenLayout) -> float:
        """The share of all pairs that softmax attention computes."""
        grid = self.grid(layout)
        columns = grid.chosen[1]
        return grid.density(max(1, int(self.top_k * columns)) / max(1, columns))
