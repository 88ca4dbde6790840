import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.patterns import Clear


@pytest.mark.parametrize(("radius", "keys"), [(8, 193), (16, 793), (32, 3205)])
def test_published_disc_sizes(radius, keys):
    mask = Clear(radius).token_mask(TokenLayout((1, 65, 65)))
    assert mask[32 * 65 + 32].sum() == keys


@pytest.mark.parametrize(("radius", "density"), [(8, 0.243316), (16, 0.332082), (32, 0.590642)])
def test_published_densities(radius, density):
    assert Clear(radius).density(TokenLayout((1, 64, 64), 512, text_first=True)) == pytest.approx(
        density, abs=1e-6
    )


def test_definition():
    layout, radius = TokenLayout((2, 5, 6), 3, text_first=True), 2.5
    mask = Clear(radius).token_mask(layout)
    for q in range(layout.seq_len):
        for k in range(layout.seq_len):
            inside = True
            if q >= 3 and k >= 3:
                dy = (q - 3) % 30 // 6 - (k - 3) % 30 // 6
                inside = dy**2 + ((q - 3) % 6 - (k - 3) % 6) ** 2 < radius**2
            assert mask[q, k] == inside


def test_a_wide_disc_covers_the_grid():
    assert Clear(100).density(TokenLayout((1, 8, 8))) == 1


@pytest.mark.parametrize("radius", [0, -3, "8", float("nan")])
def test_bad_radius(radius):
    with pytest.raises(ValueError, match="`radius` must be a positive number, got"):
        Clear(radius)


def test_pooled_keys_are_not_pretended():
    with pytest.raises(ValueError, match="`downsample`"):
        Clear(8, downsample=4)


def test_order_saves_blocks_at_2048x4096():
    """Tile and curve orders cut the non-empty blocks of CLEAR at this size by 2.3 to 3.1 times."""
    layout = TokenLayout((1, 128, 256), 512, text_first=True)
    savings = []
    for radius in (8, 16, 32):
        raster = Clear(radius).block_mask(layout, (128, 128), "raster")
        best = Clear(radius).block_mask(layout, (128, 128))
        savings.append(raster.block_density / best.block_density)
    assert all(2.3 <= saving <= 3.2 for saving in savings), savings
    assert torch.equal(best.order[-512:], torch.arange(512))
