import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.patterns import LocalGlobal


def brute_force(layout, window, offset, sliding):
    """Token by token, in the model's order: `kinds` says what each token is and where."""
    frames, height, width = layout.grid
    visual = [("visual", y, x) for _ in range(frames) for y in range(height) for x in range(width)]
    anchor, text = [("anchor", 0, 0)] * layout.anchor_len, [("text", 0, 0)] * layout.text_len
    tokens = text + visual + anchor if layout.text_first else visual + anchor + text
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, (query, *q) in enumerate(tokens):
        for j, (key, *k) in enumerate(tokens):
            if query == key == "visual":
                axes = list(zip(q, k, (height, width), window, offset, strict=True))
                if sliding:
                    mask[i, j] = all(abs(a - b) <= w // 2 for a, b, _, w, _ in axes)
                else:
                    mask[i, j] = all((a + o) % n // w == (b + o) % n // w for a, b, n, w, o in axes)
            else:
                mask[i, j] = not (query == "anchor" and key == "visual")
    return mask


LAYOUTS = {
    "text-first": TokenLayout((1, 7, 9), 5, text_first=True, anchor=(1, 2, 3)),
    "text-last": TokenLayout((1, 8, 6), 5, anchor=(1, 2, 2)),
    "video": TokenLayout((2, 5, 4), 3, anchor=(2, 2, 1)),
    "no-anchor": TokenLayout((1, 7, 9), 5),
    "no-text": TokenLayout((1, 7, 9), anchor=(1, 2, 3)),
}
FORMS = {
    "windows": {"window": (3, 4)},
    "unshifted": {"window": (4, 2), "offset": (0, 0)},
    "shifted": {"window": (3, 3), "offset": (2, -1)},
    "sliding": {"window": (4, 3), "sliding": True},
}


@pytest.mark.parametrize("order", ["raster", "auto"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_definition(layout, form, order):
    pattern = LocalGlobal(**form)
    exact = brute_force(layout, pattern.window, pattern.offset, pattern.sliding)
    assert torch.equal(pattern.token_mask(layout), exact)
    mask = pattern.block_mask(layout, (16, 8), order)
    assert torch.equal(mask.to_token_mask(), exact)
    assert mask.density == pytest.approx(exact.double().mean().item(), abs=1e-12)
    assert pattern.density(layout) == pytest.approx(mask.density, abs=1e-12)


def test_four_thousand_pixels():
    """256 x 256 tokens: 256 of a window, 64 x 64 of the anchor and the text, for every visual query."""
    layout = TokenLayout((1, 256, 256), 512, text_first=True, anchor=(1, 64, 64))
    pairs = 65536 * (256 + 4096 + 512) + 4096 * (4096 + 512) + 512 * 70144
    assert LocalGlobal().density(layout) == pytest.approx(pairs / 70144**2, rel=1e-12)


def test_windows_become_whole_blocks():
    """In the order window by window, blocks compute next to nothing that the pattern does not ask for."""
    layout = TokenLayout((1, 64, 96), 128, text_first=True, anchor=(1, 16, 24))
    mask, raster = (LocalGlobal().block_mask(layout, (128, 64), order) for order in ("auto", "raster"))
    assert mask.density <= mask.block_density < 1.01 * mask.density
    assert raster.block_density > 1.4 * mask.block_density


def test_one_number_stands_for_both_axes():
    assert LocalGlobal(8, 0) == LocalGlobal((8, 8), (0, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, r"`window` must be positive, got \(0, 0\)"),
        ({"window": (16, 16, 16)}, r"`window` must be one value or 2 of them"),
        ({"window": 2.5}, r"`window` must be one value or 2 of them"),
        ({"offset": (1, 0.5)}, r"`offset` must be one value or 2 of them"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LocalGlobal(**arguments)
