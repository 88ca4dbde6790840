"""Heads that differ in work are dealt out so that processes have about as much to do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.attention.head_balance import Balance


def test_dense_heads_that_are_neighbours_are_parted():
    balance = Balance.of((1.0, 1.0, 0.1, 0.1), (2, 2), "cpu")
    assert balance.groups == ((0, 2), (1, 3))
    assert (balance.neighbours, balance.balanced) == (pytest.approx(2 / 1.1), pytest.approx(1))
    assert balance.order.tolist() == [0, 2, 1, 3]
    assert balance.order[balance.inverse].tolist() == [0, 1, 2, 3]


def test_heads_that_do_alike_stay_neighbours():
    assert Balance.of((0.5,) * 4, (2, 2), "cpu") is None
    assert Balance.of((1.0, 0.1, 1.0, 0.1), (2, 2), "cpu").groups == ((0, 1), (2, 3))


def test_groups_that_dealing_would_make_worse_stay_neighbours():
    """Largest first is no optimum: here it gives one process 7 of 12, neighbours 6."""
    balance = Balance.of((1.0, 1.0, 4.0, 2.0, 2.0, 2.0), (3, 3), "cpu")
    assert balance.groups == ((0, 1, 2), (3, 4, 5))
    assert balance.balanced == balance.neighbours == pytest.approx(12 / 12)


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=30), st.integers(2, 8))
def test_every_head_is_in_one_group_of_its_size_and_no_process_has_more_than_before(work, count):
    count = min(count, len(work))
    sizes = [len(part) for part in torch.arange(len(work)).tensor_split(count)]
    balance = Balance.of(work, sizes, "cpu")
    if balance is None:
        assert len(set(work)) == 1
        return
    assert [len(group) for group in balance.groups] == sizes
    assert sorted(head for group in balance.groups for head in group) == list(range(len(work)))
    assert 1 - 1e-9 <= balance.balanced <= balance.neighbours
    loads = [sum(work[head] for head in group) for group in balance.groups]
    assert max(loads) * count / sum(work) == pytest.approx(balance.balanced)
