"""Rules: what they say of whole blocks is what their elements say."""

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.masks.pair_rules import Factor, FactorRule
from dit_accel.patterns import Neighborhood, Radial

GRID = (3, 10, 12)
EVERYTHING = torch.ones(3, 3, dtype=torch.bool)


def random_tables(seed, share=0.3):
    """One table for each axis; every second time that of frames allows everything."""
    generator = torch.Generator().manual_seed(seed)
    frames, rows, columns = (torch.rand(n, n, generator=generator) for n in GRID)
    return (EVERYTHING if seed % 2 else frames < 0.5), rows < share, columns < share


def rule_of(tables):
    labels = TokenLayout(GRID).coordinates.long().unbind(1)
    return FactorRule([Factor(*pair) for pair in zip(labels, tables, strict=True)])


@pytest.mark.parametrize("seed", range(4))
def test_blocks_attend_if_any_of_their_tokens_does(seed):
    """Of blocks in a drawn order, which fill no box."""
    rule, tokens = rule_of(random_tables(seed, 0.08)), torch.randperm(360)
    q, k = tokens.view(-1, 8), tokens.flip(0).view(-1, 24)
    pairs = torch.cartesian_prod(torch.arange(len(q)), torch.arange(len(k))).repeat(8, 1)  # several parts
    r, c = pairs[torch.randperm(len(pairs))].unbind(1)
    expected = rule.mask()[q[r][:, :, None], k[c][:, None]].flatten(1).any(1)
    assert 0 < expected.sum() < len(expected)
    assert torch.equal(rule.attends(rule.side(q), rule.side(k), r, c), expected)


@pytest.mark.parametrize("pattern", [Neighborhood((5, 5)), Radial(0.2, block_size=16)], ids=repr)
def test_attends_is_what_tiles_say(pattern):
    rule = pattern.rule(TokenLayout(GRID))
    q, k = (torch.arange(360).view(-1, n) for n in (40, 8))
    r, c = torch.cartesian_prod(torch.arange(len(q)), torch.arange(len(k))).unbind(1)
    sides = rule.side(q), rule.side(k)
    bits, tile = rule.tiles(*sides, r, c)
    assert torch.equal(rule.attends(*sides, r, c), (bits != 0).flatten(1).any(1)[tile])


@pytest.mark.parametrize("seed", range(4))
def test_tables_that_allow_everything_change_nothing(seed):
    tables = random_tables(seed)
    mask = torch.ones(360, 360, dtype=torch.bool)
    for table, label in zip(tables, TokenLayout(GRID).coordinates.long().unbind(1), strict=True):
        mask &= table[label[:, None], label]
    rule = rule_of(tables)
    assert len(rule.factors) == (2 if seed % 2 else 3)
    assert torch.equal(rule.mask(), mask)
    everything = rule_of([torch.ones(n, n, dtype=torch.bool) for n in GRID])
    assert len(everything.factors) == 1
    assert everything.mask().all()
