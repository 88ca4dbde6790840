import math

import pytest
import torch
from torch.nn import functional as F

from dit_accel.attention import head_replacements as kinds


def tokens(length: int, seed: int = 0, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, length, 8, generator=generator, dtype=torch.float64)


def gaussian(length: int, sigma: float) -> torch.Tensor:
    """The kernel as SEG's published code makes it."""
    wished = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    size = min(wished, length + 1 if length % 2 == 0 else length)
    places = torch.linspace(-(size // 2), size // 2, size, dtype=torch.float64)
    density = torch.exp(-0.5 * (places / sigma) ** 2)
    return density / density.sum()


@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.3, 4.0, 100.0, 10_000.0])
@pytest.mark.parametrize("grid", [(1, 8, 12), (3, 5, 6), (2, 1, 7), (1, 2, 3)], ids=str)
def test_blur_is_a_convolution_of_each_frame(grid, sigma):
    x = tokens(math.prod(grid))
    frames = x.transpose(2, 3).unflatten(3, grid)  # (B, H, D, F, h, w)
    if sigma > 9999:
        expected = frames.mean(dim=(-2, -1), keepdim=True).expand_as(frames)
    else:
        planes = frames.flatten(0, 3).unsqueeze(1)
        rows, columns = gaussian(grid[1], sigma), gaussian(grid[2], sigma)
        pad = (len(columns) // 2, len(columns) // 2, len(rows) // 2, len(rows) // 2)
        planes = F.conv2d(F.pad(planes, pad, mode="reflect"), rows[None, None, :, None] * columns)
        expected = planes.view(frames.shape)
    actual = kinds.blur_grid(x, grid, sigma)
    torch.testing.assert_close(actual, expected.flatten(3).transpose(2, 3), rtol=0, atol=1e-13)


def test_blur_of_text_leaves_padding_as_it_is():
    x, valid = tokens(6), torch.tensor([4, 0])
    blurred = kinds.blur_text(x, valid, 1.0)
    assert torch.equal(blurred[0, :, 4:], x[0, :, 4:])
    assert torch.equal(blurred[1], x[1])
    torch.testing.assert_close(
        blurred[:1, :, :4], kinds.blur_text(x[:1, :, :4], None, 1.0), rtol=0, atol=1e-13
    )
    assert not torch.allclose(blurred[0, :, :4], x[0, :, :4], atol=1e-2)


def test_blur_in_bf16_is_rounded_once():
    x = tokens(96).bfloat16()
    expected = kinds.blur_grid(x.double(), (1, 8, 12), 1.0)
    assert torch.equal(kinds.blur_grid(x, (1, 8, 12), 1.0), expected.float().bfloat16())


def identity(q, k, v, images: int, *options) -> torch.Tensor:
    """`image_identity` where image tokens come first, then text."""
    image, text = slice(0, images), slice(images, None)
    own = (x[:, :, image] for x in (q, k, v))
    return kinds.image_identity(*own, k[:, :, text], v[:, :, text], *options)


@pytest.mark.parametrize("padded", [False, True])
def test_image_identity(padded, monkeypatch):
    monkeypatch.setattr(kinds, "_QUERIES", 5)
    images, text = 12, 4
    q, k, v = (tokens(images + text, seed) for seed in range(3))
    hidden = torch.zeros(2, images + text, dtype=torch.bool)
    if padded:
        hidden[1, -2:] = True
    logits = q @ k.transpose(2, 3) * 0.3
    allowed = torch.ones(images + text, images + text, dtype=torch.bool)
    allowed[:images, :images] = torch.eye(images, dtype=torch.bool)
    seen = allowed & ~hidden[:, None, None]
    expected = torch.softmax(logits.masked_fill(~seen, -math.inf), -1) @ v
    actual = identity(q, k, v, images, 0.3, hidden[:, images:] if padded else None)
    torch.testing.assert_close(actual, expected[:, :, :images], rtol=0, atol=1e-13)


def test_image_identity_of_bf16_is_computed_in_fp32():
    q, k, v = (tokens(16, seed).bfloat16() for seed in range(3))
    expected = identity(q.double(), k.double(), v.double(), 12, 3.0)
    actual = identity(q, k, v, 12, 3.0)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


def test_image_identity_without_text_is_v():
    q, k, v = (tokens(9, seed) for seed in range(3))
    torch.testing.assert_close(identity(q, k, v, 9, 0.3), v, rtol=0, atol=0)


def test_uniform_leaves_out_padding():
    v, hidden = tokens(9), torch.zeros(2, 9, dtype=torch.bool)
    hidden[0, 7:] = True
    actual = kinds.uniform(v, hidden)
    torch.testing.assert_close(actual[0, :, 3], v[0, :, :7].mean(1), rtol=0, atol=1e-13)
    torch.testing.assert_close(actual[1, :, 3], v[1].mean(1), rtol=0, atol=1e-13)


def test_mix_is_formed_in_fp32():
    out, other = tokens(9).bfloat16(), tokens(9, 1).bfloat16()
    u = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    exact = out.double() + u[:, None, None] * (other.double() - out.double())
    assert torch.equal(kinds.mix(out, other, u)[:, 0], out[:, 0])
    error = (kinds.mix(out, other, u).double() - exact).abs().max()
    assert error <= exact.abs().max() * 2**-8
