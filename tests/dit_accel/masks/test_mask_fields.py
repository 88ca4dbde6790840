"""A mask that does not fit itself is refused: its form when it is made, its contents before they are used."""

from dataclasses import replace

import pytest
import torch

from dit_accel import BlockMask, TokenLayout
from dit_accel.kernels import block_sparse_attention
from dit_accel.masks.block_lists import BlockLists
from dit_accel.patterns import Clear, Neighborhood


@pytest.fixture
def mask() -> BlockMask:
    return Clear(4).block_mask(TokenLayout((2, 9, 14), text_len=21, text_first=True), (32, 16), "tile")


def with_list(mask, name, **changed):
    lists = getattr(mask, name)
    return replace(mask, **{name: BlockLists(**{**lists.tensors(), **changed})})


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {"block_size": (30, 16)}, "`block_size` must be"),
        (lambda m: {"seq_len": 0}, "must be positive integers, got 0 and 273"),
        (lambda m: {"kv_len": 273.0}, "must be positive integers, got 273 and 273.0"),
        (lambda m: {"kv_len": 2**31}, "at most 2147483647 queries and keys, got 273 x 2147483648"),
        (lambda m: {"seq_len": 400}, r"`full.start` must be .* of shape \(1, 13\), got .* \(1, 9\)"),
        (lambda m: {"text": (252, 274)}, r"`text` must be .* within the 273 keys, got \(252, 274\)"),
        (lambda m: {"text": (-1, 3)}, "within the 273 keys"),
        (lambda m: {"text": (9, 3)}, "within the 273 keys"),
        (lambda m: {"tiles": m.tiles.int()}, "`tiles` must be torch.uint8, .* got torch.int32"),
        (lambda m: {"tiles": m.tiles[:, :, :1]}, r"`tiles` must be .* of shape \(n, 32, 2\)"),
        (lambda m: {"tiles": m.tiles.mT.contiguous().mT}, "`tiles` must be torch.uint8, contiguous"),
        (lambda m: {"order": m.order[1:]}, r"`order` .* of shape \(273,\) or \(n, n, 273\), got .* \(272,\)"),
        (lambda m: {"order": m.order.int()}, "`order` must be torch.int64"),
        (lambda m: {"key_order": torch.arange(274)}, "`key_order` has 274 entries for 273 keys"),
        (lambda m: {"head_groups": torch.zeros(1, 2, 3).int()}, r"shape \(n,\) or \(n, n\), got .*3\)"),
        (lambda m: {"head_groups": torch.zeros(3).long()}, "`head_groups` must be torch.int32"),
        (lambda m: {"full": m.partial}, "`partial` must have tiles, and `full` none"),
        (lambda m: {"partial": m.full}, "`partial` must have tiles, and `full` none"),
        (lambda m: {"tiles": m.tiles.to("meta")}, r"on one device, got \['cpu', 'meta'\]"),
        (lambda m: {"full": replace(m.full, start=m.full.start[0])}, r"of shape \(groups, query blocks\)"),
    ],
)  # fmt: skip
def test_forms_that_do_not_fit(mask, change, message):
    with pytest.raises(ValueError, match=message):
        replace(mask, **change(mask))


def test_several_groups_need_the_groups_of_heads(mask):
    dense = torch.ones(2, 64, 64, dtype=torch.bool)
    with pytest.raises(ValueError, match="a mask of 2 groups needs `head_groups`"):
        replace(BlockMask.from_token_mask(dense, (32, 16)), head_groups=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: with_list(m, "full", index=m.full.index + 18), r"`full.index` must be in 0 .. 17"),
        (lambda m: with_list(m, "partial", index=m.partial.index - 1), r"`partial.index` must be in 0"),
        (lambda m: with_list(m, "partial", tile=m.partial.tile + 1), r"`partial.tile` must be in 0 .. 73"),
        (lambda m: with_list(m, "partial", count=m.partial.count + 1), "rows of `partial` must lie one"),
        (lambda m: with_list(m, "full", start=m.full.start + 20), "rows of `full` must lie one after"),
        (lambda m: replace(m, order=m.order.clamp(max=9)), "`order` must be a permutation of its 273 tokens"),
        (lambda m: replace(m, key_order=m.key_order + 1), "`key_order` must be a permutation"),
        (lambda m: replace(m, head_groups=ints(0, 1)), r"`head_groups` must be in 0 .. 0, got 0 .. 1"),
        (lambda m: replace(m, head_groups=ints(-1, 0)), r"`head_groups` must be in 0 .. 0, got -1 .. 0"),
        (lambda m: with_list(m, "full", index=torch.full_like(m.full.index, 17)), "must neither touch text"),
        (lambda m: replace(m, text=(0, 273)), "must neither touch text nor reach past `kv_len`"),
        (lambda m: with_list(m, "partial", index=m.partial.index * 0), "lists a key block twice"),
        (lambda m: replace(m, tiles=m.tiles | 255), "tiles must be zero past `seq_len` and `kv_len`"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["auto", "gather", "reference"])
def test_contents_that_lie_reach_no_kernel(mask, change, message, backend):
    mask = change(mask)
    with pytest.raises(ValueError, match=message):
        mask.validate()
    q = torch.zeros(1, 1 if mask.head_groups is None else 2, 273, 8)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(q, q, q, mask, backend=backend)


@pytest.mark.parametrize("order", ["raster", "tile", "hilbert"])
@pytest.mark.parametrize("block_size", [(32, 16), (128, 64), (16, 8)])
def test_what_patterns_make_is_valid(order, block_size):
    for pattern in (Clear(4), Neighborhood((3, 5))):
        for text in (0, 7, 40):
            mask = pattern.block_mask(TokenLayout((2, 9, 14), text, text_first=True), block_size, order)
            assert mask.is_trusted
            replace(mask, text=mask.text).validate()  # a copy, which is not trusted


def test_is_looked_into_once(mask, monkeypatch):
    copy = replace(mask, text=mask.text)
    assert not copy.is_trusted
    copy.validate()
    monkeypatch.setattr(BlockMask, "_validated", None)
    copy.validate()


def test_heads_and_samples_must_be_those_of_the_tensors():
    dense = torch.ones(2, 3, 64, 64, dtype=torch.bool)
    mask = BlockMask.from_token_mask(dense, (32, 16))
    with pytest.raises(ValueError, match="`mask` is for 3 heads, got tensors with 4"):
        mask.group_of_heads(2, 4)
    with pytest.raises(ValueError, match="`mask` is for a batch of 2, got tensors with 1"):
        mask.group_of_heads(1, 3)
