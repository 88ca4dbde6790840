"""From a pattern to a `BlockMask`: choose an order, classify blocks, evaluate only the partial ones."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .block_lists import BlockLists
from .block_mask import BlockMask
from .chunk_layout import ChunkLayout, ChunkRule
from .layout import TokenLayout
from .order_choice import Order, choose_orders
from .pair_rules import Rule, first_of_each, hash_rows
from .tiles import check_block_size, pack_bits, unmaskable

_PAIRS_AT_ONCE = 8_192


def build(
    pattern,
    queries: TokenLayout,
    keys: TokenLayout | None = None,
    *,
    block_size: tuple[int, int],
    order: Order = "auto",
    key_order: Order | None = None,
    text: str = "last",
) -> BlockMask:
    """The `BlockMask` of `pattern`; see `StaticPattern.block_mask`."""
    keys = queries if keys is None else keys
    check_block_size(block_size)
    if isinstance(queries, ChunkLayout) and (keys != queries or key_order is not None):
        raise ValueError(f"a ChunkLayout says itself what the keys are; use keys=None, got {keys}")
    if text not in ("last", "model"):
        raise ValueError(f"`text` must be 'last' or 'model', got {text!r}")
    with on_the_cpu():
        if isinstance(queries, ChunkLayout):
            return _build_of_chunks(pattern, queries, block_size, order)
        return _build(pattern, queries, keys, block_size, order, key_order, text == "last")


def on_the_cpu() -> AbstractContextManager[Any]:
    """Makes tensors that name no device, as patterns of users may, on the CPU, whatever the default device.

    Where that is the CPU already, nothing is done: the context costs every operation a call.
    """
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _build(
    pattern,
    queries: TokenLayout,
    keys: TokenLayout,
    block_size: tuple[int, int],
    order: Order,
    key_order: Order | None,
    text_last: bool,
) -> BlockMask:
    rule, inside, pooled = pattern.rule(keys), queries.tokens_in(keys), pattern.pooled_keys(keys)
    orders = choose_orders(
        [variant.rule(keys) for variant in pattern.variants],
        keys.grid,
        inside,
        block_size,
        order,
        key_order,
        pattern.natural_orders(keys),
    )
    sees = pattern.anchor_sees_visual
    q = _Blocks.cut(rule, queries, inside[orders[0]], block_size[0], text_last, anchor_sees_visual=sees)
    k = _Blocks.cut(rule, keys, orders[1], block_size[1], text_last, pooled=pooled)
    start = 0 if keys.text_first and not text_last else keys.visual_len + keys.anchor_len
    places, same = _model_order(queries, orders[0], text_last), keys == queries and torch.equal(*orders)
    return _mask(
        rule,
        q,
        k,
        block_size=block_size,
        seq_len=queries.seq_len,
        kv_len=keys.seq_len + pooled,
        order=places,
        key_order=places if same else _model_order(keys, orders[1], text_last),
        text=(start, start + keys.text_len),
    )


def _build_of_chunks(pattern, layout: ChunkLayout, block_size: tuple[int, int], order: Order) -> BlockMask:
    """That of a call with a cache of keys; `order` is of the tokens of the video's whole grid."""
    rules, natural = [variant.rule(layout) for variant in pattern.variants], pattern.natural_orders(layout)
    every = torch.arange(layout.visual_len, device="cpu")
    keys = layout.in_order(choose_orders(rules, layout.grid, every, block_size, order, None, natural)[1])
    rule, first = ChunkRule(pattern.rule(layout), layout), layout.tokens - layout.seq_len
    queries, in_a_row = keys[keys >= first], [TokenLayout((1, 1, n)) for n in (layout.seq_len, layout.tokens)]
    return _mask(
        rule,
        _Blocks.cut(rule, in_a_row[0], queries, block_size[0], True),
        _Blocks.cut(rule, in_a_row[1], keys, block_size[1], True, pooled=layout.zeros),
        block_size=block_size,
        seq_len=layout.seq_len,
        kv_len=layout.kv_len,
        order=_model_order(in_a_row[0], queries - first, True),
        key_order=_model_order(in_a_row[1], keys, True),
        text=(layout.tokens, layout.tokens),
    )


def _mask(
    rule: Rule,
    q: _Blocks,
    k: _Blocks,
    *,
    block_size: tuple[int, int],
    seq_len: int,
    kv_len: int,
    order: torch.Tensor | None,
    key_order: torch.Tensor | None,
    text: tuple[int, int],
) -> BlockMask:
    """The mask of a rule between queries and keys that are cut into blocks."""
    never_full = torch.zeros(len(k.visual), dtype=torch.bool, device="cpu")
    never_full[unmaskable(kv_len, block_size[1], text)] = True
    full, partial = _classify(rule, q, k, never_full)
    tiles, tile, keep, whole = _evaluate(rule, q, k, partial)
    if whole.any():
        promote = whole & ~never_full[partial[1]]
        full = torch.cat([full, partial[:, promote]], dim=1)
        full = full[:, torch.argsort(full[0] * len(k.visual) + full[1])]
        keep &= ~promote
    partial, tile = partial[:, keep], tile[keep]
    used, tile = tile.unique(return_inverse=True)
    return BlockMask(
        block_size=block_size,
        seq_len=seq_len,
        kv_len=kv_len,
        full=BlockLists.of_pairs(*full, len(q.visual)),
        partial=BlockLists.of_pairs(*partial, len(q.visual), tile.int()),
        tiles=tiles[used],
        order=order,
        key_order=key_order,
        text=text,
    ).trusted()


def _model_order(layout: TokenLayout, permutation: torch.Tensor, text_last: bool) -> torch.Tensor | None:
    """Kernel position -> model token index: visual, then anchor, and text last or in the model's place."""
    tokens = torch.arange(layout.seq_len, device="cpu")
    parts = [tokens[layout.visual_slice][permutation], tokens[layout.anchor_slice]]
    parts.insert(2 if text_last or not layout.text_first else 0, tokens[layout.text_slice])
    order = torch.cat(parts)
    return None if torch.equal(order, tokens) else order


# -- blocks ----------


@dataclass(frozen=True, eq=False)
class _Blocks:
    """A sequence cut into blocks of one size, in kernel order: kinds of tokens, bool (n, b) each."""

    side: object  # the rule's view of the visual tokens
    visual: torch.Tensor
    everywhere: torch.Tensor  # text and anchor: attended by all, attending to all but pooled keys
    unseeing: torch.Tensor  # those of them that do not attend to visual tokens
    pooled: torch.Tensor  # keys that visual tokens alone attend to

    @classmethod
    def cut(
        cls,
        rule: Rule,
        layout: TokenLayout,
        tokens: torch.Tensor,
        size: int,
        text_last: bool,
        *,
        anchor_sees_visual: bool = True,
        pooled: int = 0,
    ) -> _Blocks:
        """From visual tokens in kernel order, int64 (V,), as the rule counts them."""
        position = torch.arange(-(-(layout.seq_len + pooled) // size) * size, device="cpu").view(-1, size)
        first = layout.text_len if layout.text_first and not text_last else 0
        stop = first + layout.visual_len
        is_visual, inside = (position >= first) & (position < stop), position < layout.seq_len
        is_anchor = (position >= stop) & (position < stop + layout.anchor_len)
        return cls(
            # other positions repeat the nearest visual token, which changes no box
            side=rule.side(tokens[(position - first).clamp(0, layout.visual_len - 1)]),
            visual=is_visual,
            everywhere=inside & ~is_visual,
            unseeing=is_anchor & (not anchor_sees_visual),
            pooled=(position >= layout.seq_len) & (position < layout.seq_len + pooled),
        )


def _classify(
    rule: Rule, q: _Blocks, k: _Blocks, never_full: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, column) of the full blocks and of those to evaluate, each int64 (2, n), sorted."""
    full, partial = [], []
    k_visual, k_everywhere, k_pooled = (x.any(1) for x in (k.visual, k.everywhere, k.pooled))
    step = max(1, 2**21 // len(k_visual))
    for start in range(0, len(q.visual), step):
        rows = slice(start, start + step)
        q_visual, q_everywhere, q_unseeing, q_seeing = (
            x[rows].any(1)[:, None] for x in (q.visual, q.everywhere, q.unseeing, q.everywhere & ~q.unseeing)
        )
        maybe, sure = rule.classify(q.side, k.side, rows)
        both = q_visual & k_visual
        maybe = (maybe & both) | (q_seeing & k_visual) | k_everywhere | (q_visual & k_pooled)
        sure = (sure | ~both) & ~(q_unseeing & k_visual) & ~(q_everywhere & k_pooled) & ~never_full
        for found, chosen in ((full, sure & maybe), (partial, maybe & ~sure)):
            r, c = chosen.nonzero().unbind(1)
            found.append(torch.stack([r + start, c]))
    return torch.cat(full, 1), torch.cat(partial, 1)


def _evaluate(rule: Rule, q: _Blocks, k: _Blocks, partial: torch.Tensor):
    """Distinct tiles, and for each partial pair of blocks its tile and whether it attends some, and all."""
    tiles, index, count = [], torch.empty(partial.shape[1], dtype=torch.int64, device="cpu"), 0
    mixed = ~(q.visual.all(1)[partial[0]] & k.visual.all(1)[partial[1]])
    for some_mixed in (False, True):
        chosen = (mixed == some_mixed).nonzero()[:, 0]
        for where in chosen.split(_PAIRS_AT_ONCE) if len(chosen) else ():
            r, c = partial[:, where]
            bits, tile = rule.tiles(q.side, k.side, r, c)
            if some_mixed:
                bits, tile = _open(bits[tile], q, k, r, c), torch.arange(len(r), device="cpu")
            bits, of_bits = _distinct(bits)
            tiles.append(bits)
            index[where] = of_bits[tile] + count
            count += len(bits)
    if not tiles:
        shape = (0, q.visual.shape[1], k.visual.shape[1] // 8)
        none = torch.zeros(0, dtype=torch.bool, device="cpu")
        return torch.zeros(shape, dtype=torch.uint8, device="cpu"), index, none, none
    tiles, of_tiles = _distinct(torch.cat(tiles))
    index = of_tiles[index]
    attends = (tiles != 0).flatten(1).any(1)
    whole = (tiles == 255).flatten(1).all(1)
    return tiles, index, attends[index], whole[index]


def _open(bits: torch.Tensor, q: _Blocks, k: _Blocks, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Tiles in which not only visual tokens attend to visual ones: bits are of those, the rest is opened."""
    visual, everywhere, pooled = (pack_bits(x[c][:, None]) for x in (k.visual, k.everywhere, k.pooled))
    open_rows = torch.where(q.unseeing[r][:, :, None], everywhere, visual | everywhere)
    bits = torch.where(q.visual[r][:, :, None], (bits & visual) | everywhere | pooled, open_rows)
    return torch.where((q.visual | q.everywhere)[r][:, :, None], bits, 0)


def _distinct(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct tiles and which of them each is; by hash, then checked: sorting kilobyte rows is slow."""
    flat = tiles.flatten(1)
    words = flat.view(torch.int64) if flat.shape[1] % 8 == 0 else flat
    first, where = first_of_each(hash_rows(words))
    if not torch.equal(words[first][where], words):
        distinct, where = flat.unique(dim=0, return_inverse=True)
        return distinct.view(-1, *tiles.shape[1:]), where
    return tiles[first], where
