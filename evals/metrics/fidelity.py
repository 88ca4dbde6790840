"""How close a result is to a reference: PSNR (error pooled over frames) and SSIM (mean over frames).

SSIM is Wang et al. 2004 as scikit-image computes it: Gaussian window of sigma 1.5, population covariances,
8-bit range.
"""

from __future__ import annotations

import math

import numpy as np

from dit_accel.optional import required

DATA_RANGE = 255
SSIM_SIGMA = 1.5
SSIM_WINDOW = 11  # pixels: scikit-image's Gaussian of sigma 1.5 is cut at 3.5 sigma
SETTINGS = {"data_range": DATA_RANGE, "ssim_window": "gaussian", "ssim_sigma": SSIM_SIGMA}


def _check(test: np.ndarray, reference: np.ndarray) -> None:
    for name, array in (("test", test), ("reference", reference)):
        if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or not len(array):
            raise ValueError(
                f"`{name}` must be uint8 of shape (frames, height, width, 3), got {array.dtype} {array.shape}"
            )
    if test.shape != reference.shape:
        raise ValueError(f"sizes differ: test {test.shape}, reference {reference.shape}")


def psnr(test: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB from the mean squared error over all frames; infinite if equal."""
    _check(test, reference)
    error = np.mean((test.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return math.inf if error == 0 else float(10 * np.log10(DATA_RANGE**2 / error))


def ssim(test: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity, the mean over frames; 1 if equal.

    Raises:
        ValueError: frames smaller than the window.
    """
    structural_similarity = required("skimage.metrics", "SSIM", "cli").structural_similarity
    _check(test, reference)
    if min(test.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of at least {SSIM_WINDOW} pixels a side, got {test.shape[1:3]}")
    options = {"gaussian_weights": True, "sigma": SSIM_SIGMA, "use_sample_covariance": False}
    scores = [
        structural_similarity(a, b, data_range=DATA_RANGE, channel_axis=-1, **options)
        for a, b in zip(test, reference, strict=True)
    ]
    return float(np.mean(scores))
