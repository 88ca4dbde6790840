"""PSNR and SSIM against scikit-image, and what they refuse."""

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dit_accel.evals.metrics.fidelity import psnr, ssim


@pytest.fixture
def pair():
    generator = np.random.default_rng(0)
    reference = generator.integers(0, 256, (3, 32, 40, 3), dtype=np.uint8)
    noise = generator.integers(-20, 21, reference.shape)
    return np.clip(reference + noise, 0, 255).astype(np.uint8), reference


def test_psnr_is_that_of_scikit_image(pair):
    assert psnr(*pair) == pytest.approx(peak_signal_noise_ratio(pair[1], pair[0], data_range=255), rel=1e-12)


def test_ssim_is_the_mean_over_frames_of_scikit_image(pair):
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    frames = [
        structural_similarity(a, b, channel_axis=-1, data_range=255, **options)
        for a, b in zip(*pair, strict=True)
    ]
    assert ssim(*pair) == pytest.approx(np.mean(frames), rel=1e-12)


def test_known_psnr():
    black = np.zeros((1, 16, 16, 3), np.uint8)
    assert psnr(black + 1, black) == pytest.approx(20 * math.log10(255))


def test_equal_pictures(pair):
    assert psnr(pair[1], pair[1]) == math.inf
    assert ssim(pair[1], pair[1]) == pytest.approx(1)


def test_grey_pictures_are_finite():
    grey = np.full((1, 16, 16, 3), 128, np.uint8)
    assert ssim(grey, grey) == pytest.approx(1)
    assert np.isfinite(psnr(grey, grey + 1))


@pytest.mark.parametrize(
    ("test", "reference", "message"),
    [
        (np.zeros((1, 16, 16, 3), np.uint8), np.zeros((1, 16, 20, 3), np.uint8), "sizes differ"),
        (np.zeros((0, 16, 16, 3), np.uint8), np.zeros((0, 16, 16, 3), np.uint8), "must be uint8"),
        (np.zeros((1, 16, 16, 3)), np.zeros((1, 16, 16, 3)), "must be uint8"),
        (np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16, 3), np.uint8), "must be uint8"),
    ],
    ids=["sizes", "empty", "float", "no-frames-axis"],
)
@pytest.mark.parametrize("metric", [psnr, ssim])
def test_refuses(metric, test, reference, message):
    with pytest.raises(ValueError, match=message):
        metric(test, reference)


def test_ssim_refuses_frames_smaller_than_its_window():
    tiny = np.zeros((1, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(tiny, tiny)
