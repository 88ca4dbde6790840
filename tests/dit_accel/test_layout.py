import pytest
import torch

from dit_accel import TokenLayout


def test_slices_follow_the_families():
    flux = TokenLayout((1, 4, 6), text_len=5, text_first=True)
    assert (flux.text_slice, flux.visual_slice, flux.seq_len) == (slice(0, 5), slice(5, 29), 29)
    hunyuan = TokenLayout((3, 4, 6), text_len=5)
    assert (hunyuan.visual_slice, hunyuan.text_slice, hunyuan.visual_len) == (slice(0, 72), slice(72, 77), 72)
    scale_dit = TokenLayout((1, 4, 4), text_len=3, text_first=True, anchor=(1, 2, 2))
    assert (scale_dit.anchor_slice, scale_dit.seq_len) == (slice(19, 23), 23)


def test_coordinates_are_row_major():
    layout = TokenLayout((2, 3, 4))
    f, h, w = layout.coordinates.unbind(1)
    assert torch.equal((f * 3 + h) * 4 + w, torch.arange(24, dtype=torch.int32))


@pytest.mark.parametrize(
    "arguments", [{"grid": (0, 4, 4)}, {"grid": (4, 4)}, {"grid": (1, 4, 4), "text_len": -1}]
)
def test_impossible_geometry_is_refused(arguments):
    with pytest.raises(ValueError, match=r"`(grid|text_len)` must be"):
        TokenLayout(**arguments)


def test_equal_layouts_are_one_cache_key():
    assert len({TokenLayout((1, 4, 4)), TokenLayout([1, 4, 4])}) == 1
