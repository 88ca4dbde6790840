"""Distances between sets against closed forms, torchmetrics, SciPy and plain loops."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from dit_accel.evals.metrics import distribution


def features(n, d, seed=0, shift=0.0):
    """Correlated, not centred, like those of a net."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + shift


class Given(nn.Module):
    """The extractor of a torchmetrics metric that is given features instead of pictures."""

    def __init__(self, d):
        super().__init__()
        self.num_features = d

    def forward(self, given):
        return given


def numpy_formula(a, b):
    """The formula of the first FID code: a root of the product of covariances."""
    (mean, cov), (other_mean, other_cov) = (
        (x.mean(0), np.cov(x, rowvar=False)) for x in (a.numpy(), b.numpy())
    )
    root = scipy.linalg.sqrtm(cov @ other_cov).real
    return ((mean - other_mean) ** 2).sum() + np.trace(cov + other_cov - 2 * root)


# -- Fréchet -------------------------------------------------------------------------------------------------


def test_frechet_of_diagonal_gaussians():
    generator = torch.Generator().manual_seed(0)
    mean, other_mean = torch.randn(2, 32, generator=generator, dtype=torch.float64)
    a, b = torch.rand(2, 32, generator=generator, dtype=torch.float64) + 0.01
    expected = ((mean - other_mean) ** 2).sum() + ((a.sqrt() - b.sqrt()) ** 2).sum()
    found = distribution.frechet_gaussians(mean, a.diag(), other_mean, b.diag())
    assert found == pytest.approx(expected.item(), rel=1e-12)


def test_frechet_of_full_covariances_that_commute():
    generator = torch.Generator().manual_seed(1)
    rotation, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))
    a, b = torch.rand(2, 24, generator=generator, dtype=torch.float64) * 10
    zero = torch.zeros(24, dtype=torch.float64)
    covariances = [rotation @ values.diag() @ rotation.T for values in (a, b)]
    found = distribution.frechet_gaussians(zero, covariances[0], zero + 1, covariances[1])
    assert found == pytest.approx((24 + ((a.sqrt() - b.sqrt()) ** 2).sum()).item(), rel=1e-12)


def test_frechet_of_full_covariances_that_do_not_commute():
    """Two dimensions: the trace of a root of M is sqrt(tr M + 2 sqrt(det M))."""
    a = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.5], [-0.5, 4.0]], dtype=torch.float64)
    shared = math.sqrt((a @ b).trace() + 2 * math.sqrt(a.det() * b.det()))
    zero = torch.zeros(2, dtype=torch.float64)
    expected = (a.trace() + b.trace()).item() - 2 * shared
    assert distribution.frechet_gaussians(zero, a, zero, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_is_that_of_torchmetrics_and_scipy():
    test, reference = features(300, 40), features(200, 40, seed=1, shift=0.3)
    theirs = FrechetInceptionDistance(feature=Given(40))
    theirs.update(test, real=False)
    theirs.update(reference, real=True)
    found = distribution.frechet(test, reference)
    assert found == pytest.approx(theirs.compute().item(), rel=1e-6)
    assert found == pytest.approx(numpy_formula(test, reference), rel=1e-6)  # its root costs digits


@pytest.mark.parametrize("n", [2, 7, 30])
def test_frechet_of_singular_covariances(n):
    """Fewer samples than features: then the shared trace is the nuclear norm of a small Gram matrix."""
    test, reference = features(n, 64), features(n + 3, 64, seed=1)
    gram = (test - test.mean(0)) @ (reference - reference.mean(0)).T / math.sqrt((n - 1) * (n + 2))
    expected = (
        (test.mean(0) - reference.mean(0)).square().sum()
        + test.var(0).sum()
        + reference.var(0).sum()
        - 2 * torch.linalg.svdvals(gram).sum()
    )
    assert distribution.frechet(test, reference) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_of_a_set_with_itself_and_of_constant_sets():
    test = features(50, 64)
    assert distribution.frechet(test, test) == pytest.approx(0, abs=1e-9 * test.var(0).sum().item())
    ones = torch.ones(5, 8)
    assert distribution.frechet(ones, ones) == 0
    assert distribution.frechet(ones, 3 * ones) == 32
    assert distribution.frechet(ones, test[:, :8]) > 0


# -- KID, MMD ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Metric `Kernel")
def test_kid_is_that_of_torchmetrics():
    test, reference = features(60, 24), features(60, 24, seed=1, shift=0.2)
    theirs = KernelInceptionDistance(feature=Given(24), subsets=1, subset_size=60)
    theirs.update(test, real=False)
    theirs.update(reference, real=True)
    value, deviation, size = distribution.kid(test, reference)
    assert value == pytest.approx(theirs.compute()[0].item(), rel=1e-9)
    assert (deviation, size) == (0, 60)


def test_kid_of_subsets_is_reproducible_and_leaves_the_global_generator_alone():
    test, reference = features(90, 16), features(60, 16, seed=1)
    state = torch.get_rng_state()
    value, deviation, size = distribution.kid(test, reference)
    assert torch.equal(state, torch.get_rng_state())
    assert distribution.kid(test, reference) == (value, deviation, size)
    assert size == 60
    assert deviation > 0
    whole, _, _ = distribution.kid(test[:60], reference)
    assert abs(value - whole) < 5 * deviation


def test_kid_of_two_halves_is_around_zero():
    """Unbiased: over many draws of one distribution the mean vanishes against a single draw's size."""
    values = [
        distribution.kid(features(20, 8, seed=2 * i), features(20, 8, seed=2 * i + 1))[0] for i in range(60)
    ]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))


def test_mmd_is_its_definition(monkeypatch):
    monkeypatch.setattr(distribution, "ROWS", 7)
    test, reference = features(30, 12), features(20, 12, seed=1, shift=1.0)
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (test, reference))

    def mean_kernel(x, y):
        return np.mean([math.exp(-((p - q) ** 2).sum() / 200) for p in x for q in y])

    expected = 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
    assert distribution.mmd(test, reference) == pytest.approx(expected, rel=1e-8)
    assert distribution.mmd(test, test) == pytest.approx(0, abs=1e-10)


# -- PRDC ----------------------------------------------------------------------------------------------------


def plain_prdc(test, reference, k=5):
    """The definitions, point by point."""

    def radius(x, points):
        return sorted(np.linalg.norm(x - y) for y in points)[k]

    test, reference = test.numpy(), reference.numpy()
    balls, own = [radius(x, reference) for x in reference], [radius(x, test) for x in test]
    inside = np.array(
        [[np.linalg.norm(x - y) < r for x in test] for y, r in zip(reference, balls, strict=True)]
    )
    recalled = [any(np.linalg.norm(x - y) < r for x, r in zip(test, own, strict=True)) for y in reference]
    return {
        "precision": inside.any(0).mean(),
        "recall": np.mean(recalled),
        "density": inside.sum(0).mean() / k,
        "coverage": inside.any(1).mean(),
    }


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_prdc_is_its_definition(monkeypatch, shift):
    monkeypatch.setattr(distribution, "ROWS", 16)
    test, reference = features(40, 6, shift=shift), features(50, 6, seed=1)
    found = distribution.prdc(test, reference)
    assert found == pytest.approx(plain_prdc(test, reference), rel=1e-12)
    assert 0 < found["precision"] < 1


def test_prdc_of_equal_and_of_distant_sets():
    test = features(30, 8)
    same = distribution.prdc(test, test)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert set(distribution.prdc(test, test + 1000).values()) == {0}


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["frechet", "kid", "mmd", "prdc"])
def test_refuses(metric):
    compute, good = getattr(distribution, metric), features(10, 4)
    with pytest.raises(ValueError, match="samples are needed, got 1 in the test set"):
        compute(good[:1], good)
    with pytest.raises(ValueError, match="differ in length: test 4, reference 3"):
        compute(good, good[:, :3])
    with pytest.raises(ValueError, match="not all finite"):
        compute(good, torch.full_like(good, math.nan))
    with pytest.raises(ValueError, match=r"must be \(samples, d\)"):
        compute(good[0], good)
