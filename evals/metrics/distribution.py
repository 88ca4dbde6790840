"""Distances between two sets of feature vectors, in float64: Fréchet, KID, RBF-MMD and PRDC.

Features are (n, d) tensors; the first argument is the test set, the second the reference.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

FRECHET_SAMPLES = 2048  # below, the bias of the Fréchet distance is not small against differences of interest
KID = {"degree": 3, "coef": 1.0, "subsets": 100, "subset_size": 1000, "seed": 0}
MMD = {"sigma": 10.0, "scale": 1000.0, "features": "unit length"}
PRDC = {"nearest": 5}
ROWS = 1024  # of a matrix of pairs that are held at once


def _pair(test: torch.Tensor, reference: torch.Tensor, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sets in float64, checked."""
    for name, features in (("test", test), ("reference", reference)):
        if features.ndim != 2:
            raise ValueError(f"`{name}` features must be (samples, d), got shape {tuple(features.shape)}")
        if len(features) < least:
            raise ValueError(f"at least {least} samples are needed, got {len(features)} in the {name} set")
        if not features.isfinite().all():
            raise ValueError(f"the features of the {name} set are not all finite")
    if test.shape[1] != reference.shape[1]:
        raise ValueError(f"features differ in length: test {test.shape[1]}, reference {reference.shape[1]}")
    return test.double(), reference.double()


def gaussian(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (d,) and unbiased covariance (d, d) of features (n, d), in float64."""
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """(d, rank) matrix R with R R^T the covariance; eigenvalues that are rounding errors are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    positive = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, positive] * values[positive].sqrt()


def frechet_gaussians(
    mean: torch.Tensor, covariance: torch.Tensor, other_mean: torch.Tensor, other_covariance: torch.Tensor
) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians, float64 (Dowson and Landau 1982).

    ``|m - m'|^2 + tr C + tr C' - 2 tr (C^1/2 C' C^1/2)^1/2``; the last trace is the sum of the singular
    values of ``R^T R'`` where ``C = R R^T``, which needs no inverse and no root of a matrix that is not
    symmetric, so that singular covariances (fewer samples than features) do no harm.
    """
    shared = torch.linalg.svdvals(_root(covariance).T @ _root(other_covariance)).sum()
    distance = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * shared
    return max(0.0, distance.item())


def frechet(test: torch.Tensor, reference: torch.Tensor) -> float:
    """Squared Fréchet distance of the Gaussians that fit both sets; with InceptionV3's features, FID.

    Heusel et al. 2017, "GANs trained by a two time-scale update rule".
    """
    test, reference = _pair(test, reference, 2)
    return frechet_gaussians(*gaussian(test), *gaussian(reference))


def _polynomial(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b.T / a.shape[1] + KID["coef"]) ** KID["degree"]


def _unbiased_mmd(test: torch.Tensor, reference: torch.Tensor) -> float:
    """Unbiased squared MMD of two sets of n samples under the polynomial kernel."""
    n = len(test)
    within = sum(k.sum() - k.trace() for k in (_polynomial(test, test), _polynomial(reference, reference)))
    return (within / (n * (n - 1)) - 2 * _polynomial(test, reference).mean()).item()


def kid(test: torch.Tensor, reference: torch.Tensor) -> tuple[float, float, int]:
    """Kernel distance: mean and deviation over random subsets, and their size.

    Bińkowski et al. 2018, "Demystifying MMD GANs": squared MMD under ``(x.y / d + 1)^3``, unbiased, so it may
    be below 0; 100 subsets of 1,000 samples, or of the smaller set's number.
    """
    test, reference = _pair(test, reference, 2)
    size = min(KID["subset_size"], len(test), len(reference))
    generator = torch.Generator().manual_seed(KID["seed"])

    def subset(features: torch.Tensor) -> torch.Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size]]

    everything = len(test) == len(reference) == size  # then all subsets are the same
    values = [
        _unbiased_mmd(subset(test), subset(reference)) for _ in range(1 if everything else KID["subsets"])
    ]
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)), size


def mmd(test: torch.Tensor, reference: torch.Tensor) -> float:
    """1,000 times the squared MMD under ``exp(-|x - y|^2 / (2 * 10^2))``, with features scaled to length 1.

    The biased estimate; with CLIP's features, CMMD (Jayasumana et al. 2024, "Rethinking FID").
    """
    test, reference = _pair(test, reference, 2)
    test, reference = F.normalize(test), F.normalize(reference)

    def mean_kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        sums = [_squared_distances(part, b).div(-2 * MMD["sigma"] ** 2).exp().sum() for part in a.split(ROWS)]
        return sum(sums).item() / (len(a) * len(b))

    return MMD["scale"] * (
        mean_kernel(test, test) + mean_kernel(reference, reference) - 2 * mean_kernel(test, reference)
    )


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(len(a), len(b))."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)


def _radii(features: torch.Tensor) -> torch.Tensor:
    """(n,) squared distance of every sample to its k-th nearest other one."""
    k = PRDC["nearest"] + 1  # the nearest is the sample itself
    return torch.cat([_squared_distances(part, features).kthvalue(k).values for part in features.split(ROWS)])


def prdc(test: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Precision, recall, density and coverage, with balls that reach the 5th nearest neighbour.

    Kynkäänniemi et al. 2019 (precision: share of test samples in a ball around a reference sample; recall:
    the reverse) and Naeem et al. 2020 (density: in how many reference balls a test sample is, relative to 5;
    coverage: share of reference balls that hold a test sample).
    """
    test, reference = _pair(test, reference, PRDC["nearest"] + 1)
    centre = reference.mean(0)  # distances are differences of squares: large means would cost digits
    test, reference = test - centre, reference - centre
    balls, own_balls = _radii(reference), _radii(test)
    held = torch.zeros(len(test), dtype=torch.float64)  # reference balls that hold each test sample
    recalled, covered = [], []
    for part, radii in zip(reference.split(ROWS), balls.split(ROWS), strict=True):
        distances = _squared_distances(part, test)
        inside = distances < radii[:, None]
        held += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((distances < own_balls).any(1))
    return {
        "precision": (held > 0).double().mean().item(),
        "recall": torch.cat(recalled).double().mean().item(),
        "density": (held / PRDC["nearest"]).mean().item(),
        "coverage": torch.cat(covered).double().mean().item(),
    }
