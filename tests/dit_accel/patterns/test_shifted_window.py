import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.patterns import ShiftedWindow


def test_rolling_windowing_and_rolling_back():
    """The definition: roll by -shift, cut into windows, roll back by +shift."""
    layout, shift = TokenLayout((1, 7, 10)), (1, 2)
    window = torch.arange(7)[:, None] // 4 * 2 + torch.arange(10) // 5
    ids = torch.roll(window, shift, (0, 1)).flatten()
    assert torch.equal(ShiftedWindow((2, 2), shift).token_mask(layout), ids[:, None] == ids)


def test_odd_sizes_keep_a_shorter_last_window():
    layout = TokenLayout((1, 7, 8))
    assert ShiftedWindow().density(layout) == (4**2 + 3**2) / 7**2 * 0.5


@pytest.mark.parametrize(("name", "value"), [("windows", (0, 2)), ("windows", (2,)), ("shift", (1, 0.5))])
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be two"):
        ShiftedWindow(**{name: value})
