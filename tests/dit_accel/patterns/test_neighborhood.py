import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel import TokenLayout
from dit_accel.patterns import Neighborhood
from dit_accel.patterns.neighborhood import axis_table


def naive_axis(length, window, stride, dilation, causal):
    """The definition, one query at a time, from the text of the GNA paper."""
    table = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        members = [k for k in range(length) if k % dilation == q % dilation]
        here = members.index(q)
        block = here // stride * stride
        if causal:
            leader = min(block + stride - 1, len(members) - 1)
            keys = [i for i in range(leader - window + 1, here + 1) if i >= 0]
        else:
            leader = min(block + stride // 2, len(members) - 1)
            start = max(leader - window // 2, 0)
            start = min(start, len(members) - window)
            keys = range(start, start + window)
        for i in keys:
            table[q, members[i]] = True
    return table


@st.composite
def axes(draw):
    length = draw(st.integers(2, 40))
    window = draw(st.integers(2, length))
    return (
        length,
        window,
        draw(st.integers(1, window)),
        draw(st.integers(1, length // window)),
        draw(st.booleans()),
    )


@given(axes())
def test_axis_follows_the_definition(axis):
    assert torch.equal(axis_table(*axis), naive_axis(*axis))


@given(axes())
def test_windows_never_shrink_unless_causal(axis):
    length, window, stride, dilation, _ = axis
    assert (axis_table(length, window, stride, dilation).sum(1) == window).all()


def test_stride_equal_to_the_window_is_blocked_attention():
    blocks = torch.arange(24) // 6
    assert torch.equal(axis_table(24, 6, 6), blocks[:, None] == blocks)


@pytest.mark.parametrize(
    ("grid", "pattern", "density"),
    [
        ((1, 256, 256), Neighborhood((80, 80), 16), 0.0977),
        ((30, 48, 80), Neighborhood((18, 24, 24), (16, 8, 8)), 0.09),
    ],
    ids=["flux", "hunyuan-video"],
)
def test_published_densities(grid, pattern, density):
    assert pattern.density(TokenLayout(grid)) == pytest.approx(density, abs=5e-5)


def test_tiles_that_divide_everything_are_perfectly_block_sparse():
    """GNA: blocks cost nothing beyond the pattern when tiles divide stride, window and length."""
    mask = Neighborhood((80, 80), 16).block_mask(TokenLayout((1, 256, 256)), (128, 64))
    assert mask.num_partial == 0
    assert mask.block_density == mask.density


def test_axes_without_a_window_are_full():
    table_f, table_h, table_w = Neighborhood((3, 5)).axis_tables(TokenLayout((4, 8, 9)))
    assert table_f.all()
    assert (table_h.sum(1) == 3).all()
    assert (table_w.sum(1) == 5).all()


def test_an_int_window_skips_axes_of_length_one():
    assert Neighborhood(4).density(TokenLayout((1, 8, 8))) == (4 / 8) ** 2
    assert Neighborhood(4).density(TokenLayout((8, 8, 8))) == (4 / 8) ** 3
    assert Neighborhood(4).density(TokenLayout((1, 1, 8))) == 4 / 8


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"window": 0}, "`window` must be positive"),
        ({"window": (4, 4), "stride": 5}, "`stride` must be between 1 and the window"),
        ({"window": 4, "dilation": 0}, "`dilation` must be at least 1"),
        ({"window": (1, 2, 3, 4)}, "`window` must have 1 to 3 entries"),
        ({"window": (4, 4), "stride": (1, 2, 3)}, "`stride` must be one value or 2"),
        ({"window": 2.5}, "`window` must be one value"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        Neighborhood(**arguments)


@pytest.mark.parametrize("pattern", [Neighborhood((9, 4)), Neighborhood((4, 3), dilation=(3, 1))])
def test_a_window_larger_than_its_axis_is_refused(pattern):
    with pytest.raises(ValueError, match=r"exceeds axis H of grid \(1, 8, 8\), which has 8 tokens"):
        pattern.block_mask(TokenLayout((1, 8, 8)))


def test_lists_from_yaml_become_tuples():
    assert Neighborhood([3, 3], stride=[1, 2]) == Neighborhood((3, 3), stride=(1, 2))
