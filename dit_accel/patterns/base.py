"""What a pattern is: which token pairs are computed, known from the layout alone or chosen by content."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from dit_accel.attention.layer_masks import beside_others
from dit_accel.attention.masked import Masked
from dit_accel.attention.online import Online
from dit_accel.masks import orders
from dit_accel.masks.builder import build
from dit_accel.masks.chunk_layout import ChunkLayout, ChunkRule
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.order_choice import choose_orders
from dit_accel.masks.pair_rules import Factor, FactorRule, Rule
from dit_accel.masks.per_head import join_heads

if TYPE_CHECKING:
    from dit_accel.attention.call import LayerAttention, LayerSizes
    from dit_accel.attention.layer_masks import LayerMasks
    from dit_accel.masks.block_mask import BlockMask

Grid = tuple[int, int, int]


class Pattern:
    """Base of all patterns, static and online: a frozen dataclass, compared, hashed and shown by its fields.

    Text and anchor tokens attend to everything, and everything attends to them; where `anchor_sees_visual` is
    False, anchor tokens attend to anchor and text alone. Every token attends at least to itself: a pattern
    that would leave visual tokens with text alone, or with nothing, refuses the layout.
    """

    anchor_sees_visual = True
    online = False  # whether it is chosen by content
    blocks = True  # whether kernels compute it, in blocks of pairs; if not, numeric formats are refused
    sparse = True  # whether it leaves anything out
    by_noise = False  # whether it is another one at other noise levels
    per_head = False  # whether each head sees its tokens in an order of its own
    file_fields: tuple[str, ...] = ()  # that in files of recipes are paths, relative to theirs
    notes: Sequence[str] = ()  # what summaries and plans say of it
    causal_chunks: int | None = None  # frames of a chunk, of what chooses by content and sees none to come
    rest = ""  # what it has of its own for what it leaves out, in words: then a tail is refused
    own_tail = False  # whether it says itself where there is a tail: then another is refused
    trained: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    )  # of a layer's projections, by distillation
    reads_input = False  # whether it makes something of what a layer's queries are projected from
    pools = 0  # side of the patches of its pooled keys, which stand behind those of the tokens; 0: none

    @property
    def row_reach(self) -> int | None:
        """How many rows above and below a token its keys reach, of whatever grid; None: there is no bound.

        On a part of a grid with so many rows more, above and below, a token then attends to the same keys.
        """
        return None

    def learned(self, sizes: LayerSizes) -> dict[str, torch.Tensor]:
        """Weights that a layer learns beside its projections, as they are before training: fp32, by name.

        Calls bring them (`AttentionCall.learned`) where an adapter has them or distillation trains them.
        """
        return {}

    def of_input(
        self, x: torch.Tensor, learned: Mapping[str, torch.Tensor], heads: int
    ) -> torch.Tensor | None:
        """What one that `reads_input` makes of a layer's input, for its attention (`AttentionCall.beside`).

        Args:
            x: (B, V, C), of the visual tokens in the order of the call, in the dtype of the model.
            learned: weights of the layer as in `AttentionCall`.
            heads: of the layer.

        Returns:
            (B, heads, ...); None where it makes nothing of it without learned weights.
        """
        return None

    @property
    def band_rows(self) -> int:
        """How many rows a part of a grid must have at least for `row_reach` more to be enough."""
        return max(self.row_reach or 0, 1)

    def without_pooled_keys(self) -> Pattern:
        """The same with no key but those of tokens."""
        return self

    @property
    def hides(self) -> bool:
        """Whether what it leaves out must not be seen, rather than saves time: then a tail is refused."""
        return False

    def layer_attention(self, heads: Sequence[Pattern], masks: LayerMasks) -> LayerAttention:
        """What a layer computes whose heads follow these patterns, of which this one decides the kind.

        Args:
            heads: the pattern of each head.
            masks: the layer's geometry, from which masks in its token order can be had.

        Raises:
            ValueError: a layout that a pattern does not suit.
        """
        raise NotImplementedError

    def at_step(self, step: int, sigma: float | None = None, total: int | None = None) -> Pattern:
        """What this pattern is at a sampler step of `total`, which begins at noise level `sigma`.

        None: not known.

        Raises:
            ValueError: a pattern `by_noise`, and a noise level that is not known; or a run of another number
                of steps than a pattern is for.
        """
        return self

    def for_head(self, layer: str | None, head: int) -> Pattern:
        """What this pattern is in a head of a layer; None: of a layer that has no name.

        Raises:
            ValueError: a layer or head that it says nothing of.
        """
        return self

    def check_model(self, family: str, layers: Sequence[str], heads: int, head_dim: int) -> None:
        """Raises ValueError if it is for another model than one with these layers."""

    @property
    def variants(self) -> Sequence[Pattern]:
        """All that it is at some step. They share a token order, which `"auto"` chooses for all of them."""
        return (self,)

    def token_order(
        self,
        layout: TokenLayout,
        block_size: tuple[int, int] = (128, 64),
        order: str | Sequence[int] | torch.Tensor = "auto",
    ) -> torch.Tensor:
        """The order of the visual tokens, int64 (V,), in a recipe without static patterns: the model's own.

        A pattern that chooses by content and says no other sees its tokens there whatever the recipe's order.
        """
        return orders.raster(layout.grid)

    def token_mask(self, layout: TokenLayout, keys: TokenLayout | None = None) -> torch.Tensor:
        """See `StaticPattern.token_mask`; TypeError where the mask depends on queries and keys."""
        raise _no_mask(self)

    def block_mask(self, layout: TokenLayout, *args, **kwargs) -> BlockMask:
        """See `StaticPattern.block_mask`; TypeError where the mask depends on queries and keys."""
        raise _no_mask(self)


def _no_mask(pattern: Pattern) -> TypeError:
    return TypeError(
        f"{pattern} has no mask before it sees queries and keys; use it in a recipe or in "
        "`dit_accel.attention`"
    )


class StaticPattern(Pattern):
    """A pattern that is known from the layout. A new one states its `rule` and counts its `visual_pairs`."""

    def layer_attention(self, heads: Sequence[Pattern], masks: LayerMasks) -> LayerAttention:
        mask = join_heads({pattern: masks.of(pattern) for pattern in dict.fromkeys(heads)}, heads)
        return Masked(mask, masks.from_calls(mask), keys=masks.keys_from_calls(mask))

    def rule(self, layout: TokenLayout) -> Rule:
        """Which visual tokens attend to which, on this layout.

        Raises:
            ValueError: a pattern that does not fit the layout.
        """
        raise NotImplementedError

    def visual_pairs(self, layout: TokenLayout) -> int:
        """Number of attended pairs among the visual tokens, exact."""
        raise NotImplementedError

    def natural_tiles(self, layout: TokenLayout) -> list[Grid]:
        """Tile shapes that suit this pattern in particular, tried beside the general ones."""
        return []

    def natural_orders(self, layout: TokenLayout) -> list[torch.Tensor]:
        """Orders of the visual tokens that suit this pattern, each a permutation, int64 (V,)."""
        fitting = [tuple(map(min, tile, layout.grid)) for tile in self.natural_tiles(layout)]
        return [orders.tiles(layout.grid, tile) for tile in fitting]

    def token_order(
        self,
        layout: TokenLayout,
        block_size: tuple[int, int] = (128, 64),
        order: str | Sequence[int] | torch.Tensor = "auto",
    ) -> torch.Tensor:
        """The order of the visual tokens, int64 (V,), that `order` names; see `block_mask`."""
        rules, natural = [variant.rule(layout) for variant in self.variants], self.natural_orders(layout)
        tokens = orders.raster(layout.grid)
        return choose_orders(rules, layout.grid, tokens, tuple(block_size), order, natural_orders=natural)[1]

    def pooled_keys(self, layout: TokenLayout) -> int:
        """Number of extra key columns at the end, to which visual tokens alone attend, all of them."""
        return 0

    def token_mask(self, layout: TokenLayout, keys: TokenLayout | None = None) -> torch.Tensor:
        """The exact definition: bool (S, K) in the model's token order, True = attend. Small sizes only.

        `layout` is that of the queries and `keys` that of the keys, by default the same, as for `block_mask`;
        pooled keys come last.
        """
        keys = layout if keys is None else keys
        if isinstance(layout, ChunkLayout):
            mask = ChunkRule(self.rule(layout), layout).mask()[layout.tokens - layout.seq_len :]
            return torch.nn.functional.pad(mask, (0, layout.zeros), value=True)
        pooled = self.pooled_keys(keys)
        mask = torch.ones(layout.seq_len, keys.seq_len + pooled, dtype=torch.bool, device="cpu")
        mask[layout.visual_slice, keys.visual_slice] = self.rule(keys).mask()[layout.tokens_in(keys)]
        mask[layout.anchor_slice, keys.visual_slice] = self.anchor_sees_visual
        for others in (layout.anchor_slice, layout.text_slice):
            mask[others, keys.seq_len :] = False
        return mask

    def block_mask(
        self,
        layout: TokenLayout,
        block_size: tuple[int, int] = (128, 64),
        order: str | Sequence[int] | torch.Tensor = "auto",
        device: torch.device | str = "cpu",
        *,
        keys: TokenLayout | None = None,
        key_order: Sequence[int] | torch.Tensor | None = None,
        text: str = "last",
    ) -> BlockMask:
        """The `BlockMask` of this pattern on `layout`, without ever materialising S x S.

        Args:
            layout: token geometry, of the queries and, unless given, of the keys.
            block_size: (query, key) block sizes, multiples of 16 and of 8.
            order: order of the visual tokens: `"auto"` (the cheapest), `"raster"`, `"tile"` (the cheapest
                tile shape), `"hilbert"`, or a permutation of the visual tokens.
            device: where the mask's tensors go.
            keys: layout of the keys where they are other tokens, of whose grid that of `layout` is a part,
                from its `offset` on; the pattern is that on the grid of the keys.
            key_order: a permutation of the visual tokens among the keys; None: as `order` says.
            text: where text stands in the kernel's order: `"last"`, or as in the `"model"`, so that text that
                comes first need not be moved.

        Raises:
            ValueError: a pattern that does not fit the layout, queries that reach out of the keys' grid, or
                an unknown order or unusable block size.
        """
        options = {"block_size": tuple(block_size), "order": order, "key_order": key_order, "text": text}
        with torch.inference_mode(False):  # a mask made while generating may be trained with later
            return build(self, layout, keys, **options).to(device)

    def density(self, layout: TokenLayout, keys: TokenLayout | None = None) -> float:
        """Computed pairs / (queries * keys), exact; `keys` as for `block_mask`."""
        if isinstance(layout, ChunkLayout) or (keys is not None and keys != layout):
            return self.block_mask(layout, order="raster", keys=keys).density
        tokens, pooled = layout.seq_len, self.pooled_keys(layout)
        everywhere = tokens**2 - layout.visual_len**2 + layout.visual_len * pooled
        if not self.anchor_sees_visual:
            everywhere -= layout.anchor_len * layout.visual_len
        return (self.visual_pairs(layout) + everywhere) / (tokens * (tokens + pooled))


class OnlinePattern(Pattern):
    """A pattern that is chosen by content, anew in each call. A new one states its `select`."""

    online = True

    def layer_attention(self, heads: Sequence[Pattern], masks: LayerMasks) -> LayerAttention:
        return beside_others(self.layer(masks), self, heads, masks)

    def layer(self, masks: LayerMasks) -> LayerAttention:
        """What a layer computes all of whose heads follow it."""
        return Online.of(self, masks)

    def density(self, layout: TokenLayout) -> float:
        """The share of all pairs that it aims at."""
        raise NotImplementedError

    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: TokenLayout,
        *,
        block_size: tuple[int, int] | None = None,
        text_valid: torch.Tensor | None = None,
    ) -> BlockMask:
        """The mask of every sample and head, on the device of `q`.

        Args:
            q, k: queries and keys (B, H, S, D), in the model's token order.
            layout: token geometry.
            block_size: (query, key) block sizes of the mask; None takes those of the pattern.
            text_valid: how many text tokens of each sample are real, integers (B,); None: all.

        Raises:
            ValueError: a layout or block size that the pattern does not suit.
        """
        raise NotImplementedError


def whole_axis(n: int) -> torch.Tensor:
    """The table of an axis of n positions that is attended in full: bool (n, n)."""
    return torch.ones(n, n, dtype=torch.bool, device="cpu")


class AxisWise(StaticPattern):
    """A pattern that is an AND over the three axes of the grid, such as a window."""

    def axis_tables(self, layout: TokenLayout) -> list[torch.Tensor]:
        """For each of the axes (F, H, W) a bool table (n, n): may position q attend to position k?

        Raises:
            ValueError: a pattern that does not fit the layout.
        """
        raise NotImplementedError

    def rule(self, layout: TokenLayout) -> Rule:
        labels = layout.coordinates.long().unbind(1)
        return FactorRule([Factor(*pair) for pair in zip(labels, self.axis_tables(layout), strict=True)])

    def visual_pairs(self, layout: TokenLayout) -> int:
        return math.prod(int(table.sum()) for table in self.axis_tables(layout))
