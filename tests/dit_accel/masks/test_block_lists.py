import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.masks.block_lists import BlockLists


def dense(lists: BlockLists, columns: int) -> torch.Tensor:
    """What is listed, by hand: the tile of each (group, row, column), or -1."""
    groups, rows = lists.start.shape
    result = torch.full((groups, rows, columns), -1)
    for g in range(groups):
        for r in range(rows):
            first = int(lists.start[g, r])
            for at in range(first, first + int(lists.count[g, r])):
                assert result[g, r, lists.index[at]] == -1
                result[g, r, lists.index[at]] = 0 if lists.tile is None else lists.tile[at]
    return result


@st.composite
def choices(draw):
    groups, rows, columns = (draw(st.integers(1, n)) for n in (3, 5, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    chosen = torch.rand(groups, rows, columns, generator=generator) < draw(st.sampled_from([0, 0.1, 0.5, 1]))
    return chosen, torch.randint(9, (rows, columns), generator=generator, dtype=torch.int32)


@given(choices(), st.booleans())
@settings(deadline=None)
def test_both_forms_list_what_was_chosen(case, with_tiles):
    chosen, tile = case
    columns = chosen.shape[2]
    expected = torch.where(chosen, tile if with_tiles else 0, -1)
    tiles = tile.expand(chosen.shape)[chosen] if with_tiles else None
    blocks = torch.arange(columns, dtype=torch.int32)
    for lists in (
        BlockLists.packed(chosen, tiles),
        BlockLists.with_room(chosen, blocks, tile if with_tiles else None),
    ):
        assert torch.equal(dense(lists, columns), expected)
        assert lists.listed == int(chosen.sum())
        lists.check_form("lists", *chosen.shape[:2])
        lists.check_contents("lists", columns, 9)


@given(choices(), st.booleans())
@settings(deadline=None)
def test_transposed(case, with_room):
    chosen, tile = case
    columns = chosen.shape[2]
    lists = BlockLists.packed(chosen, tile.expand(chosen.shape)[chosen])
    if with_room:
        lists = BlockLists.with_room(chosen, torch.arange(columns, dtype=torch.int32), tile)
    by_column = lists.transposed(columns)
    by_column.check_form("lists", chosen.shape[0], columns)
    by_column.check_contents("lists", chosen.shape[1], 9)
    assert torch.equal(dense(by_column, chosen.shape[1]), dense(lists, columns).mT)


def test_entries_and_rows_skip_room_to_spare():
    chosen = torch.tensor([[[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]]]).bool()
    lists = BlockLists.with_room(chosen, torch.tensor([10, 11, 12, 13], dtype=torch.int32))
    row, where = lists.entries()
    assert row.tolist() == [0, 0, 2, 2]
    assert lists.index[where].tolist() == [11, 12, 10, 13]
    assert lists.row(0, 2)[0].tolist() == [10, 13]
    assert lists.row(0, 1)[0].tolist() == []


def test_joined_counts_tiles_of_each_part_from_its_own():
    chosen = torch.tensor([[[1, 0], [1, 1]]]).bool()
    part = BlockLists.packed(chosen, torch.tensor([0, 1, 0], dtype=torch.int32))
    joined = BlockLists.joined([part, part], [0, 5])
    assert torch.equal(dense(joined, 2), torch.tensor([[[0, -1], [1, 0]], [[5, -1], [6, 5]]]))


@pytest.mark.parametrize(
    ("start", "count", "index", "tile", "message"),
    [
        ([0, 2], [2, 2], [0, 1, 2], [0, 0, 0], "rows of `lists` must lie one after another"),
        ([0, 1], [2, 1], [0, 1, 2], [0, 0, 0], "rows of `lists` must lie one after another"),
        ([1, 0], [0, 1], [0, 1, 2], [0, 0, 0], "rows of `lists` must lie one after another"),
        ([-1, 1], [1, 1], [0, 1, 2], [0, 0, 0], "rows of `lists` must lie one after another"),
        ([0, 1], [1, -1], [0, 1, 2], [0, 0, 0], "rows of `lists` must lie one after another"),
        ([0, 2**31 - 1], [1, 2**31 - 1], [0, 1, 2], [0, 0, 0], "rows of `lists` must lie one after another"),
        ([0, 1], [1, 1], [0, 3, 2], [0, 0, 0], r"`lists.index` must be in 0 .. 2, got 0 .. 3"),
        ([0, 1], [1, 1], [0, 1, -1], [0, 0, 0], r"`lists.index` must be in 0 .. 2, got -1 .. 1"),
        ([0, 1], [1, 1], [0, 1, 2], [0, 0, 1], r"`lists.tile` must be in 0 .. 0, got 0 .. 1"),
    ],
)  # fmt: skip
def test_contents_that_lie(start, count, index, tile, message):
    rows = (torch.tensor([x], dtype=torch.int32) for x in (start, count))
    lists = BlockLists(*rows, *(torch.tensor(x, dtype=torch.int32) for x in (index, tile)))
    lists.check_form("lists", 1, 2)
    with pytest.raises(ValueError, match=message):
        lists.check_contents("lists", 3, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": torch.zeros(1, 3, dtype=torch.int32)}, r"`lists.start` must be torch.int32, .* \(1, 2\)"),
        ({"count": torch.zeros(1, 2)}, "`lists.count` must be torch.int32, .* got torch.float32"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, "`lists.index` must be torch.int32"),
        ({"index": torch.zeros(3, 1, dtype=torch.int32)}, r"`lists.index` must be .* of shape \(3,\)"),
        ({"index": torch.zeros(6, dtype=torch.int32)[::2]}, "`lists.index` must be torch.int32, contiguous"),
        ({"tile": torch.zeros(2, dtype=torch.int32)}, r"`lists.tile` must be .* of shape \(3,\)"),
    ],
)
def test_forms_that_do_not_fit(change, message):
    zeros = {"start": torch.zeros(1, 2, dtype=torch.int32), "count": torch.zeros(1, 2, dtype=torch.int32)}
    lists = BlockLists(**{**zeros, "index": torch.zeros(3, dtype=torch.int32), **change})
    with pytest.raises(ValueError, match=message):
        lists.check_form("lists", 1, 2)
