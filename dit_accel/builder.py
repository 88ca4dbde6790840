"""From a pattern to a `BlockMask`: choose an order, classify blocks, evaluate only the partial ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from . import orders
from .blockmask import BlockMask, check_block_size, pack_bits, unmaskable
from .layout import TokenLayout
from .rules import Rule, first_of_each, hash_rows

HILBERT_UP_TO = 65_536  # tokens; beyond, the curve takes longer to draw than it has ever saved
_SAMPLED_ROWS = 48
_TILES_TRIED = 3  # of all shapes, judged by their boxes first, which ignores that cut tiles share blocks
_PAIRS_AT_ONCE = 8_192


def build(pattern, layout: TokenLayout, block_size: tuple[int, int], order) -> BlockMask:
    """The `BlockMask` of `pattern` on `layout`; see `Pattern.block_mask`."""
    check_block_size(block_size)
    rule = pattern.rule(layout)
    rules = [variant.rule(layout) for variant in pattern.variants]
    permutation = resolve_order(rules, layout, block_size, order, pattern.natural_orders(layout))
    q, k = (_Blocks.cut(rule, layout, permutation, size, pattern.anchor_sees_visual) for size in block_size)
    text = (layout.visual_len + layout.anchor_len, layout.seq_len)
    never_full = unmaskable(len(k.visual), block_size[1], layout.seq_len, text)
    full, partial = _classify(rule, q, k, never_full)
    tiles, part_tile, keep, whole = _evaluate(rule, q, k, partial)
    if whole.any():
        promote = whole & ~never_full[partial[1]]
        full = torch.cat([full, partial[:, promote]], dim=1)
        full = full[:, torch.argsort(full[0] * len(k.visual) + full[1])]
        keep &= ~promote
    partial, part_tile = partial[:, keep], part_tile[keep]
    used, part_tile = part_tile.unique(return_inverse=True)
    return BlockMask(
        block_size=block_size, seq_len=layout.seq_len, kv_len=layout.seq_len,
        full_ptr=_pointers(full[0], len(q.visual)), full_idx=full[1].int(),
        part_ptr=_pointers(partial[0], len(q.visual)), part_idx=partial[1].int(), part_tile=part_tile.int(),
        tiles=tiles[used], order=_model_order(layout, permutation), text=text,
    )  # fmt: skip


def _pointers(rows: torch.Tensor, count: int) -> torch.Tensor:
    ends = torch.bincount(rows, minlength=count).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends]).int()[None]


def _model_order(layout: TokenLayout, permutation: torch.Tensor) -> torch.Tensor | None:
    """Kernel position -> model token index: visual, then anchor, then text."""
    tokens = torch.arange(layout.seq_len)
    parts = (tokens[layout.visual_slice][permutation], tokens[layout.anchor_slice], tokens[layout.text_slice])
    order = torch.cat(parts)
    return None if torch.equal(order, tokens) else order


# -- blocks ----------


@dataclass(frozen=True, eq=False)
class _Blocks:
    """The sequence cut into blocks of one size, in kernel order. Flags are bool (n,) and (n, b)."""

    side: object  # the rule's view of the visual tokens
    visual: torch.Tensor  # has visual tokens
    pure: torch.Tensor  # has nothing else
    everywhere: torch.Tensor  # (n, b): tokens that all attend to: text, anchor
    unseeing: torch.Tensor  # (n, b): those of them that do not attend to visual tokens; others attend to all
    inside: torch.Tensor  # (n, b): tokens that exist

    @classmethod
    def cut(
        cls,
        rule: Rule,
        layout: TokenLayout,
        permutation: torch.Tensor,
        size: int,
        anchor_sees_visual: bool = True,
    ) -> _Blocks:
        count = -(-layout.seq_len // size)
        position = torch.arange(count * size).view(count, size)
        inside, is_visual = position < layout.seq_len, position < layout.visual_len
        # other positions repeat the last visual token, which changes no box
        tokens = permutation[position.clamp(max=layout.visual_len - 1)]
        everywhere = inside & ~is_visual
        is_anchor = everywhere & (position < layout.visual_len + layout.anchor_len)
        unseeing = is_anchor & (not anchor_sees_visual)
        return cls(rule.side(tokens), is_visual[:, 0], is_visual[:, -1], everywhere, unseeing, inside)


def _classify(
    rule: Rule, q: _Blocks, k: _Blocks, never_full: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, column) of the full blocks and of those to evaluate, each int64 (2, n), sorted."""
    full, partial = [], []
    q_open, k_open = (q.everywhere & ~q.unseeing).any(1), k.everywhere.any(1)
    q_shut = q.unseeing.any(1)
    step = max(1, 2**21 // len(k.visual))
    for start in range(0, len(q.visual), step):
        rows = slice(start, start + step)
        maybe, sure = rule.classify(q.side, k.side, rows)
        both = q.visual[rows, None] & k.visual
        sure = (sure | ~both) & ~never_full & ~(q_shut[rows, None] & k.visual)
        maybe = (maybe & both) | q_open[rows, None] | k_open
        for found, chosen in ((full, sure & maybe), (partial, maybe & ~sure)):
            r, c = chosen.nonzero().unbind(1)
            found.append(torch.stack([r + start, c]))
    return torch.cat(full, 1), torch.cat(partial, 1)


def _evaluate(rule: Rule, q: _Blocks, k: _Blocks, partial: torch.Tensor):
    """Distinct tiles, and for each partial pair of blocks its tile and whether it attends some, and all."""
    tiles, index, count = [], torch.empty(partial.shape[1], dtype=torch.int64), 0
    mixed = ~(q.pure[partial[0]] & k.pure[partial[1]])
    for some_mixed in (False, True):
        chosen = (mixed == some_mixed).nonzero()[:, 0]
        for where in chosen.split(_PAIRS_AT_ONCE) if len(chosen) else ():
            r, c = partial[:, where]
            bits, tile = rule.tiles(q.side, k.side, r, c)
            if some_mixed:
                bits, tile = _open(bits[tile], q, k, r, c), torch.arange(len(r))
            bits, of_bits = _distinct(bits)
            tiles.append(bits)
            index[where] = of_bits[tile] + count
            count += len(bits)
    if not tiles:
        shape = (0, q.inside.shape[1], k.inside.shape[1] // 8)
        none = torch.zeros(0, dtype=torch.bool)
        return torch.zeros(shape, dtype=torch.uint8), index, none, none
    tiles, of_tiles = _distinct(torch.cat(tiles))
    index = of_tiles[index]
    attends = (tiles != 0).flatten(1).any(1)
    whole = (tiles == 255).flatten(1).all(1)
    return tiles, index, attends[index], whole[index]


def _open(bits: torch.Tensor, q: _Blocks, k: _Blocks, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Open text and anchor rows and columns in blocks that are not purely visual; close what lies outside."""
    k_inside, k_open = pack_bits(k.inside[c][:, None]), pack_bits(k.everywhere[c][:, None])
    bits = (bits & (k_inside ^ k_open)) | k_open
    everywhere, unseeing = q.everywhere[r][:, :, None], q.unseeing[r][:, :, None]
    bits = torch.where(everywhere, torch.where(unseeing, k_open, k_inside), bits)
    return torch.where(q.inside[r][:, :, None], bits, 0)


def _distinct(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct tiles and which of them each is; by hash, then checked: sorting kilobyte rows is slow."""
    flat = tiles.flatten(1)
    words = flat.view(torch.int64) if flat.shape[1] % 8 == 0 else flat
    first, where = first_of_each(hash_rows(words))
    if not torch.equal(words[first][where], words):
        distinct, where = flat.unique(dim=0, return_inverse=True)
        return distinct.view(-1, *tiles.shape[1:]), where
    return tiles[first], where


# -- order ----------


def resolve_order(
    rules: Sequence[Rule],
    layout: TokenLayout,
    block_size: tuple[int, int],
    order: str | Sequence[int] | torch.Tensor = "auto",
    natural_orders: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """The permutation of the visual tokens that `order` names: int64 (V,).

    `"auto"` takes the order with the fewest blocks to compute, for all rules together, estimated on a sample
    of query blocks, and the model's own order when nothing beats it by 2%.

    Raises:
        ValueError: an unknown name, or something that is not a permutation of the visual tokens.
    """
    if not isinstance(order, str):
        permutation = torch.as_tensor(order).long().cpu()
        if not torch.equal(permutation.sort().values, torch.arange(layout.visual_len)):
            raise ValueError(f"`order` must be a permutation of the {layout.visual_len} visual tokens")
        return permutation
    if order == "raster":
        return orders.raster(layout.grid)
    if order == "hilbert":
        return orders.hilbert(layout.grid)
    if order not in ("auto", "tile"):
        raise ValueError(
            f"`order` must be 'auto', 'raster', 'tile', 'hilbert' or a permutation, got {order!r}"
        )
    shapes = tile_shapes(layout.grid, block_size[0])
    shapes.sort(key=lambda tile: _tile_cost(rules, layout, tile, block_size))
    candidates = [orders.tiles(layout.grid, tile) for tile in shapes[:_TILES_TRIED]]
    candidates += natural_orders
    if order == "auto" and layout.visual_len <= HILBERT_UP_TO:
        candidates.append(orders.hilbert(layout.grid))
    costs = [_cost(rules, layout, permutation, block_size) for permutation in candidates]
    if order == "auto":
        raster = orders.raster(layout.grid)
        if _cost(rules, layout, raster, block_size) <= 1.02 * min(costs):
            return raster
    return candidates[costs.index(min(costs))]


def tile_shapes(grid: tuple[int, int, int], volume: int) -> list[tuple[int, int, int]]:
    """Boxes of `volume` tokens that are not needlessly longer than the grid."""
    limits = [1 << (n - 1).bit_length() for n in grid]
    sides = [d for d in range(1, volume + 1) if volume % d == 0]
    shapes = [
        (f, h, volume // (f * h)) for f, h in product(sides, sides) if volume % (f * h) == 0
    ]  # fmt: skip
    fitting = [s for s in shapes if all(a <= b for a, b in zip(s, limits, strict=True))]
    return fitting or [(1, 1, volume)]


def _tile_cost(rules: Sequence[Rule], layout: TokenLayout, tile, block_size: tuple[int, int]) -> float:
    """Expected key blocks per query block under tile order, from the tiles' boxes, not the order itself."""
    q, q_weight = _tile_blocks(layout, tile, block_size[0])
    k, k_weight = _tile_blocks(layout, tile, block_size[1])
    rows = torch.linspace(0, len(q) - 1, min(_SAMPLED_ROWS, len(q))).long()
    per_row = sum((_maybe(rule, q[rows], k) * k_weight).sum(1) for rule in rules)
    return float((per_row * q_weight[rows]).sum() / q_weight[rows].sum())


def _tile_blocks(layout: TokenLayout, tile, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (n, size) of the blocks of all tiles, clamped at borders, and the share of each that exists."""
    inner = orders.tiles(tile, tile).view(-1, min(size, tile[0] * tile[1] * tile[2]))
    inner = torch.stack([inner // (tile[1] * tile[2]), inner // tile[2] % tile[1], inner % tile[2]], -1)
    counts = [-(-n // t) for n, t in zip(layout.grid, tile, strict=True)]
    corner = torch.cartesian_prod(*(torch.arange(n) * t for n, t in zip(counts, tile, strict=True))).view(
        -1, 3
    )
    coords = (corner[:, None, None] + inner).flatten(0, 1)
    grid = torch.tensor(layout.grid)
    weight = (coords < grid).all(-1).float().mean(1)
    f, h, w = torch.minimum(coords, grid - 1).unbind(-1)
    tokens, exists = (f * layout.grid[1] + h) * layout.grid[2] + w, weight > 0
    return tokens[exists], weight[exists]


def _cost(
    rules: Sequence[Rule], layout: TokenLayout, permutation: torch.Tensor, block_size: tuple[int, int]
) -> float:
    """Key blocks per query block under any order, from the boxes of its blocks."""
    q, k = (
        permutation[torch.arange(-(-layout.visual_len // n) * n).clamp(max=layout.visual_len - 1)].view(-1, n)
        for n in block_size
    )
    rows = torch.linspace(0, len(q) - 1, min(_SAMPLED_ROWS, len(q))).long()
    return sum(float(_maybe(rule, q[rows], k).sum(1).float().mean()) for rule in rules)


def _maybe(rule: Rule, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Which blocks of query tokens (r, b) may attend to which of key tokens (c, b): bool (r, c)."""
    return rule.classify(rule.side(q), rule.side(k), slice(None))[0]
