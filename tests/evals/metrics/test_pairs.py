"""Metrics of pairs: matching, values, what results say about them, and runs that go on."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dit_accel import media
from dit_accel.evals.metrics import catalogue as metrics
from dit_accel.evals.metrics import pairs
from dit_accel.evals.metrics.folders import Folder, Store
from dit_accel.scorers.pretrained import Sources, WeightsFile

CPU = torch.device("cpu")


def noisy(array, amount, seed=0):
    noise = np.random.default_rng(seed).normal(0, amount, array.shape)
    return np.clip(array + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def folders(tmp_path):
    """Two images and a video of five frames, and noisy copies."""
    ramp = np.linspace(0, 255, 48 * 40 * 3).reshape(48, 40, 3).astype(np.uint8)
    sets = {
        "a.png": ramp[None],
        "b.png": ramp[None, ::-1],
        "c.gif": np.stack([np.roll(ramp, 8 * i, 1) for i in range(5)]),
    }
    for name, frames in sets.items():
        media.save(tmp_path / "ref" / name, frames)
        media.save(tmp_path / "test" / name, noisy(frames, 20))
    return Folder.open(tmp_path / "test"), Folder.open(tmp_path / "ref")


def prepared(*names):
    return pairs.prepare(names, Sources(), CPU)


def test_values_are_those_of_scikit_image(folders):
    test, reference = folders
    rows = pairs.measure(test, reference, prepared("psnr", "ssim"))
    assert [row["name"] for row in rows] == ["a.png", "b.png", "c.gif"]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for row in rows:
        a, b = (media.load(folder.path / row["name"]) for folder in folders)
        assert row["psnr"] == pytest.approx(peak_signal_noise_ratio(b, a, data_range=255), rel=1e-12)
        scores = [
            structural_similarity(x, y, channel_axis=-1, data_range=255, **options)
            for x, y in zip(a, b, strict=True)
        ]
        assert row["ssim"] == pytest.approx(np.mean(scores), rel=1e-12)


@pytest.mark.parametrize("blank", ["test", "ref"])
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (9, 200, 3)])
def test_pairs_of_one_colour_are_told(folders, tmp_path, blank, colour):
    assert not pairs.one_colour_warnings(pairs.measure(*folders, prepared("psnr")))
    media.save(tmp_path / blank / "b.png", np.full((1, 48, 40, 3), colour, np.uint8))
    store = Store(tmp_path / "store")
    for _ in range(2):
        rows = pairs.measure(*folders, prepared("psnr"), store=store)
        assert [row["one_colour"] for row in rows] == [False, True, False]
        (line,) = pairs.one_colour_warnings(rows)
        assert line.startswith("1 of 3 pairs have a side of one colour")
        assert line.endswith("b.png")


def plain_ms_ssim(a, b):
    """Wang et al. 2003: contrast and structure on five scales, luminance on the last.

    Borders are torchmetrics' choice: mirrored on the last scale, left out on the others.
    """
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    kernel = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()

    def smooth(x):
        return correlate1d(correlate1d(x, kernel, axis=0, mode="mirror"), kernel, axis=1, mode="mirror")

    product, (c1, c2) = 1.0, ((0.01 * 255) ** 2, (0.03 * 255) ** 2)
    for scale, weight in enumerate(weights):
        mean_a, mean_b = smooth(a), smooth(b)
        var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
        structure = (2 * (smooth(a * b) - mean_a * mean_b) + c2) / (var_a + var_b + c2)
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        product *= (structure * luminance if scale == 4 else structure[5:-5, 5:-5]).mean() ** weight
        a, b = (
            x[: len(x) // 2 * 2, : x.shape[1] // 2 * 2]
            .reshape(len(x) // 2, 2, x.shape[1] // 2, 2, 3)
            .mean((1, 3))
            for x in (a, b)
        )
    return product


def test_ms_ssim_is_its_definition():
    reference = np.random.default_rng(0).integers(0, 256, (1, 12, 12, 3)).repeat(16, 1).repeat(16, 2)
    reference = reference.astype(np.uint8)
    (score,) = (ready.score for ready in prepared("ms_ssim").values())
    test = noisy(reference, 40)
    assert score(test, reference) == pytest.approx(plain_ms_ssim(test[0] / 1.0, reference[0] / 1.0), rel=1e-6)
    assert score(reference, reference) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 176 pixels a side, got 160x192"):
        score(test[:, :, :160], reference[:, :, :160])


def test_frames_of_videos_are_chosen(folders):
    test, reference = folders
    first = pairs.measure(test, reference, prepared("psnr"), frames="first")[-1]["psnr"]
    a, b = (media.load(folder.path / "c.gif")[:1] for folder in folders)
    assert first == pytest.approx(peak_signal_noise_ratio(b, a, data_range=255))
    assert pairs.measure(test, reference, prepared("psnr"))[-1]["psnr"] != first


def test_settings_and_means_are_recorded(folders):
    test, reference = folders
    media.save(test.path / "a.png", media.load(reference.path / "a.png"))
    ready = prepared("psnr", "ssim")
    rows = pairs.measure(test, reference, ready)
    assert rows[0]["psnr"] == math.inf
    summary = pairs.summarise(rows, ready)
    psnr, ssim = summary["psnr"], summary["ssim"]
    assert (psnr["identical"], psnr["pairs"], ssim["pairs"]) == (1, 2, 3)
    assert psnr["value"] == pytest.approx((rows[1]["psnr"] + rows[2]["psnr"]) / 2)
    assert ssim["lowest"] <= ssim["value"] <= ssim["highest"] == pytest.approx(1)
    assert ssim["settings"] == {
        "backbone": None,
        "input_range": [0, 255],
        "window": "Gaussian, sigma 1.5, 11 pixels",
        "over_frames": "mean",
    }
    same = pairs.summarise(pairs.measure(reference, reference, ready), ready)["psnr"]
    assert (same["value"], same["identical"]) == (None, 3)


@pytest.mark.parametrize("side", [0, 1], ids=["test", "reference"])
def test_files_without_a_partner_are_named(folders, side):
    (folders[side].path / "b.png").unlink()
    changed = [Folder.open(folder.path) for folder in folders]
    with pytest.raises(ValueError, match=r"1 of 3 files in .* have no partner .*: b\.png"):
        pairs.match(*changed)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("a.png", (1, 48, 44, 3), r"a\.png: sizes differ: 44x48 and 40x48"),
        ("c.gif", (4, 48, 40, 3), r"c\.gif: sizes differ: 40x48, 4 frames and 40x48, 5 frames"),
        ("b.png", (1, 8, 8, 3), r"b\.png: sizes differ"),
    ],
    ids=["width", "frames", "small"],
)
def test_pairs_of_different_sizes_are_named(folders, name, shape, message):
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    media.save(folders[0].path / name, frames)
    with pytest.raises(ValueError, match=message):
        pairs.measure(*folders, prepared("psnr"))


def test_an_interrupted_run_goes_on(folders, tmp_path):
    calls = []

    def score(test, reference):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 0.5

    metric, store = {"psnr": pairs.PairMetric(score, {})}, Store(tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        pairs.measure(*folders, metric, store=store)
    rows = pairs.measure(*folders, metric, store=store)
    assert [row["psnr"] for row in rows] == [0.5] * 3
    assert len(calls) == 4, "a.png was not measured again"
    media.save(folders[0].path / "a.png", media.load(folders[1].path / "a.png"))
    pairs.measure(*folders, metric, store=store)
    assert len(calls) == 5, "a.png has changed"


@pytest.mark.skipif(
    metrics.METRICS["lpips"].missing_package() is not None,
    reason="torchvision for this torch is not installed",
)
def test_lpips_with_untrained_weights(folders, tmp_path, monkeypatch):
    import torchvision

    from dit_accel.files import digest

    torch.manual_seed(0)
    path = tmp_path / "alexnet.pth"
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    monkeypatch.setattr("dit_accel.scorers.pretrained.ALEXNET", WeightsFile(path.name, digest(path), ""))
    (ready,) = pairs.prepare(["lpips"], Sources(tmp_path), CPU).values()
    reference = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    assert ready.score(reference, reference) == 0
    assert 0 < ready.score(noisy(reference, 10), reference) < ready.score(noisy(reference, 60), reference)
    assert ready.settings["backbone"] == "AlexNet"
    assert len(ready.settings["weights_sha256"]) == 64
