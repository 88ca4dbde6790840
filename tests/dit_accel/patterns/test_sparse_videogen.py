import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.patterns import SpatialHead, TemporalHead


@pytest.mark.parametrize(
    ("layout", "frames"),
    [(TokenLayout((21, 30, 52)), 2.81347), (TokenLayout((33, 45, 80), 256), 4.34869)],
    ids=["wan", "hunyuan-video"],
)
def test_published_band_widths(layout, frames):
    assert SpatialHead(0.25).frames(layout) == pytest.approx(frames, abs=1e-5)


@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("inclusive", [False, True], ids=["strict", "inclusive"])
def test_definition(sink, inclusive):
    frames, height, width = 6, 8, 12
    layout = TokenLayout((frames, height, width), 5)
    spatial, temporal = (kind(0.6, sink, inclusive) for kind in (SpatialHead, TemporalHead))
    reach = spatial.reach(layout)
    assert 0 < reach < layout.visual_len
    place = torch.arange(layout.visual_len)
    band = (place[:, None] - place).abs() <= reach
    if sink:
        band |= place < height * width
    assert torch.equal(spatial.rule(layout).mask(), band)
    by_place = place.view(frames, height, width).permute(1, 2, 0).flatten()  # place-major order of the tokens
    permuted = temporal.rule(layout).mask()[by_place][:, by_place]
    assert torch.equal(permuted, band)


@pytest.mark.parametrize("kind", [SpatialHead, TemporalHead])
@pytest.mark.parametrize("order", ["raster", "auto"])
def test_block_mask_is_exact(kind, order):
    layout, pattern = TokenLayout((6, 8, 12), 5), kind(0.6, True, True)
    mask = pattern.block_mask(layout, (32, 16), order)
    assert torch.equal(mask.to_token_mask(), pattern.token_mask(layout))
    assert pattern.density(layout) == pytest.approx(mask.density, abs=1e-12)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`keep` must be a number above 0"):
        SpatialHead(0)
    with pytest.raises(ValueError, match="less than the 100 text tokens alone take"):
        TemporalHead(0.2).rule(TokenLayout((2, 4, 4), 100))
