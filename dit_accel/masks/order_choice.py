"""Which order of the tokens a pattern is computed in: by name, given, or the one with the fewest blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch

from . import orders
from .pair_rules import Rule

HILBERT_UP_TO = 65_536  # tokens; beyond, the curve takes longer to draw than it has ever saved
_SAMPLED_ROWS, _FEWEST_ROWS, _SAMPLED_PAIRS = 48, 16, 2**20
_TILES_TRIED = 3  # of all shapes, judged by their boxes first, which ignores that cut tiles share blocks

Grid = tuple[int, int, int]
Order = str | Sequence[int] | torch.Tensor


def choose_orders(
    rules: Sequence[Rule],
    grid: Grid,
    queries: torch.Tensor,
    block_size: tuple[int, int],
    order: Order = "auto",
    key_order: Order | None = None,
    natural_orders: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """In which order queries and keys stand: permutations of the visual tokens, int64 (n,) and (V,).

    Queries follow the order of the keys unless they have their own. `"auto"` takes the order with the fewest
    blocks to compute, for all rules together, estimated on a sample of query blocks, and the model's own
    order when nothing beats it by 2%.

    Args:
        rules: all that is to be computed in this order.
        grid: of the keys, V tokens.
        queries: which of them the queries are, int64 (n,), ascending.
        order: of the keys by name, or a permutation of the queries.
        key_order: a permutation of the keys; None: by `order`, if it is a name or queries are all tokens.
        natural_orders: tried beside the general ones.

    Raises:
        ValueError: an unknown name, or something that is not a permutation.
    """
    tokens = grid[0] * grid[1] * grid[2]
    if key_order is not None:
        keys = _permutation("key_order", key_order, tokens)
    elif isinstance(order, str):
        keys = _named(rules, grid, queries, block_size, order, natural_orders)
    elif len(queries) == tokens:
        keys = _permutation("order", order, tokens)
    else:
        raise ValueError("an `order` of queries that are not all tokens of the keys needs a `key_order`")
    if isinstance(order, str):
        return _among(keys, queries), keys
    return _permutation("order", order, len(queries)), keys


def _permutation(name: str, order: Order, tokens: int) -> torch.Tensor:
    refused = ValueError(f"`{name}` must be a permutation of the {tokens} visual tokens")
    try:
        permutation = torch.as_tensor(order, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):  # no numbers, or none that 64 bits hold
        raise refused from None
    if permutation.is_floating_point() or permutation.is_complex():
        raise refused
    permutation = permutation.long()
    if not torch.equal(permutation.sort().values, torch.arange(tokens, device="cpu")):
        raise refused
    return permutation


def _among(permutation: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """In which order `chosen` tokens (n,), ascending, stand in a permutation of all: indices into them."""
    if len(chosen) == len(permutation):
        return permutation
    number = torch.full_like(permutation, -1)
    number[chosen] = torch.arange(len(chosen), device="cpu")
    among = number[permutation]
    return among[among >= 0]


def _named(
    rules: Sequence[Rule],
    grid: Grid,
    queries: torch.Tensor,
    block_size: tuple[int, int],
    order: str,
    natural_orders: Sequence[torch.Tensor],
) -> torch.Tensor:
    raster = orders.raster(grid)
    if order == "raster":
        return raster
    if order == "hilbert":
        return orders.hilbert(grid)
    if order not in ("auto", "tile"):
        raise ValueError(
            f"`order` must be 'auto', 'raster', 'tile', 'hilbert' or a permutation, got {order!r}"
        )
    shapes = tile_shapes(grid, block_size[0])
    shapes.sort(key=lambda tile: _tile_cost(rules, grid, tile, block_size))
    candidates = [orders.tiles(grid, tile) for tile in shapes[:_TILES_TRIED]]
    candidates += natural_orders
    if order == "auto" and len(raster) <= HILBERT_UP_TO:
        candidates.append(orders.hilbert(grid))
    costs = [_cost(rules, queries, candidate, block_size) for candidate in candidates]
    if order == "auto" and _cost(rules, queries, raster, block_size) <= 1.02 * min(costs):
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


def order_of_blocks(grid: Grid, size: int, order: Order = "auto") -> torch.Tensor:
    """The order that is named where blocks of `size` tokens are chosen by content, by no rule: int64 (V,).

    `"auto"` is the model's own, `"tile"` that of the most compact tiles; otherwise as for `choose_orders`.
    """
    if isinstance(order, str) and order == "tile":
        return orders.tiles(grid, most_compact_tile(grid, size))
    tokens = orders.raster(grid)
    named = "raster" if isinstance(order, str) and order == "auto" else order
    return choose_orders([], grid, tokens, (size, size), named)[1]


def most_compact_tile(grid: Grid, volume: int) -> Grid:
    """The box of `volume` tokens with the shortest sides, of equals the one of fewest frames."""
    return min(tile_shapes(grid, volume), key=lambda tile: (sum(tile), tile))


def _tile_cost(rules: Sequence[Rule], grid: Grid, tile: Grid, block_size: tuple[int, int]) -> float:
    """Expected key blocks per query block under tile order, from the tiles' boxes, not the order itself."""
    count = math.prod(-(-n // t) for n, t in zip(grid, tile, strict=True))
    k, k_weight = _tile_blocks(grid, tile, block_size[1], torch.arange(count, device="cpu"))
    # a query block is a whole tile
    q, q_weight = _tile_blocks(grid, tile, block_size[0], _sampled_rows(count, len(k)))
    per_row = sum((_maybe(rule, q, k) * k_weight).sum(1) for rule in rules)
    return float((per_row * q_weight).sum() / q_weight.sum())


def _tile_blocks(
    grid: Grid, tile: Grid, size: int, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (n, size) of the blocks of chosen tiles, clamped at borders, and the share of each that exists.

    Tiles are counted row-major, cut ones among the others.
    """
    inner = orders.inside_tile(tile)
    inner = _cut(inner, min(size, len(inner)))
    counts = [-(-n // t) for n, t in zip(grid, tile, strict=True)]
    places = zip(_axes(chosen[:, None, None], counts), tile, _axes(inner, tile), strict=True)
    f, h, w = (number * side + place for number, side, place in places)
    weight = ((f < grid[0]) & (h < grid[1]) & (w < grid[2])).float().mean(2).flatten()
    f, h, w = (place.clamp(max=n - 1) for place, n in zip((f, h, w), grid, strict=True))
    tokens, exists = ((f * grid[1] + h) * grid[2] + w).flatten(0, 1), weight > 0
    return tokens[exists], weight[exists]


def _axes(index: torch.Tensor, sides: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions along the axes of a box, of row-major indices."""
    return index // (sides[1] * sides[2]), index // sides[2] % sides[1], index % sides[2]


def _cost(
    rules: Sequence[Rule], queries: torch.Tensor, permutation: torch.Tensor, block_size: tuple[int, int]
) -> float:
    """Key blocks per query block under any order, from the boxes of its blocks."""
    q = _cut(queries[_among(permutation, queries)], block_size[0])
    k = _cut(permutation, block_size[1])
    rows = _sampled_rows(len(q), len(k))
    return sum(float(_maybe(rule, q[rows], k).sum(1).float().mean()) for rule in rules)


def _sampled_rows(rows: int, columns: int) -> torch.Tensor:
    """The query blocks that orders are judged by, int64 (n,), evenly spread; fewer where keys are many."""
    count = min(_SAMPLED_ROWS, max(_FEWEST_ROWS, _SAMPLED_PAIRS // columns), rows)
    return torch.linspace(0, rows - 1, count, dtype=torch.float32, device="cpu").long()


def _cut(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """Blocks of tokens, the last one filled up with the last token: int64 (n, size)."""
    places = torch.arange(-(-len(tokens) // size) * size, device="cpu").clamp(max=len(tokens) - 1)
    return tokens[places].view(-1, size)


def _maybe(rule: Rule, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Which blocks of query tokens (r, b) may attend to which of key tokens (c, b): bool (r, c)."""
    return rule.classify(rule.side(q), rule.side(k), slice(None))[0]
