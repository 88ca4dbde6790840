import torch
from torch.utils.flop_counter import FlopCounterMode

from dit_accel.planning.meta_values import EveryConditionHolds


def valid_first(x, mask):
    """As HunyuanVideo 1.5 moves text."""
    mask = mask.bool()
    if torch.all(x == 0):
        x = x * 2
    return torch.cat([x[mask], x[~mask]]) @ x.T


def test_masks_select_everything_and_their_negations_nothing():
    x, mask = torch.empty(5, 3, device="meta"), torch.empty(5, device="meta")
    with FlopCounterMode(display=False) as counter, EveryConditionHolds():
        assert valid_first(x, mask).shape == (5, 5)
    with FlopCounterMode(display=False) as real:
        valid_first(torch.zeros(5, 3), torch.ones(5))
    assert counter.get_total_flops() == real.get_total_flops() == 2 * 5 * 3 * 5
