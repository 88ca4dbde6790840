"""Features of folders: what they depend on, runs that go on, files of statistics, and comparisons."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from dit_accel import media
from dit_accel.evals.metrics import distribution, sets
from dit_accel.evals.metrics.features import Scenes
from dit_accel.evals.metrics.folders import Folder, Store
from dit_accel.pipelines.tiny.scenes import render, sample
from dit_accel.scorers.pretrained import Sources


@pytest.fixture(scope="module")
def extractor():
    return Scenes(Sources(), torch.device("cpu"))


def draw(path, count, seed, damage=0.0):
    """A folder of drawn scenes with noise."""
    rng, generator = random.Random(seed), np.random.default_rng(seed)
    for index in range(count):
        picture = render(sample(rng, "any"), 32, 32)
        noisy = (picture + damage * generator.standard_normal(picture.shape)).clip(0, 1)
        media.save(path / f"{index:03}.png", media.to_uint8(noisy))
    return Folder.open(path)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("clean"), 12, 0)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("noisy"), 10, 1, 0.2)


def test_features_are_those_of_the_files_in_order(clean, extractor):
    found = sets.gather(clean, extractor)
    expected = torch.cat([extractor([media.load(path)[0]]) for path in clean.files])
    assert torch.allclose(found.features, expected, atol=1e-5)
    assert (found.source.files, found.source.extractor, found.source.frames) == (12, "scenes", "middle")
    assert found.source.extractor_sha256 == extractor.fingerprint


def test_frames_of_videos_are_chosen(tmp_path, extractor):
    video = np.stack([media.to_uint8(render(sample(random.Random(i)), 32, 32))[0] for i in range(5)])
    media.save(tmp_path / "a.gif", video)
    media.save(tmp_path / "b.png", video[:1])
    folder = Folder.open(tmp_path)
    frames = media.load(tmp_path / "a.gif")
    assert len(sets.gather(folder, extractor, frames="all").features) == 6
    middle = sets.gather(folder, extractor).features
    assert torch.allclose(middle[0], extractor([frames[2]])[0], atol=1e-5)


def test_an_interrupted_run_goes_on_and_a_finished_one_is_read(clean, extractor, tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "CHUNK", 5)
    monkeypatch.setattr(sets, "BATCH", 2)
    calls, store = [], Store(tmp_path)

    class Counting(Scenes):
        def __call__(self, pictures):
            calls.append(len(pictures))
            if len(calls) == 5:
                raise KeyboardInterrupt
            return super().__call__(pictures)

    counting = Counting(Sources(), torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt):
        sets.gather(clean, counting, store=store)
    assert len(list(tmp_path.rglob("*.npy"))) == 1
    assert calls == [2, 2, 1, 2, 2]
    found = sets.gather(clean, counting, store=store)
    assert calls[5:] == [2, 2, 1, 2], "the first five pictures are not read again"
    assert torch.allclose(found.features, sets.gather(clean, extractor).features, atol=1e-5)
    sets.gather(clean, counting, store=store)
    assert len(calls) == 9


def test_kept_features_depend_on_what_is_in_the_files(clean, extractor, tmp_path):
    copy = draw(tmp_path / "copy", 12, 0)
    first = sets.gather(copy, extractor, store=Store(tmp_path / "cache"))
    assert first.source == sets.gather(clean, extractor).source
    media.save(copy.files[3], media.load(copy.files[4]))
    second = sets.gather(copy, extractor, store=Store(tmp_path / "cache"))
    assert second.source.data_sha256 != first.source.data_sha256
    assert torch.equal(second.features[3], second.features[4])


def test_a_damaged_file_is_named_and_nothing_is_kept(tmp_path, extractor):
    folder = draw(tmp_path / "set", 3, 0)
    folder.files[1].write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"001\.png cannot be read"):
        sets.gather(folder, extractor, store=Store(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


# -- files ---------------------------------------------------------------------------------------------------


def test_statistics_survive_a_file(clean, extractor, tmp_path):
    found = sets.gather(clean, extractor)
    found.save(tmp_path / "clean.npz")
    loaded = sets.Statistics.load(tmp_path / "clean.npz")
    assert torch.equal(loaded.features, found.features)
    assert loaded.source == found.source
    with np.load(tmp_path / "clean.npz") as file:
        assert np.allclose(file["mu"], found.features.double().mean(0).numpy())
        assert np.allclose(file["sigma"], np.cov(found.features.double().numpy(), rowvar=False))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "stats.npz"
    with pytest.raises(ValueError, match="does not hold statistics"):
        sets.Statistics.load(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="does not hold statistics"):
        sets.Statistics.load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="does not hold statistics"):
        sets.Statistics.load(path)


def test_statistics_of_other_frames_are_refused(clean, noisy, extractor):
    made = sets.gather(clean, extractor, frames="first")
    with pytest.raises(ValueError, match="made with frames 'first', and this run has 'middle'"):
        sets.compare(["kid-scenes"], noisy, made, extractor)


# -- comparisons ---------------------------------------------------------------------------------------------


def test_quantities_are_those_of_the_features(clean, noisy, extractor):
    found = sets.compare(["frechet-scenes", "mmd-scenes", "prdc-scenes"], noisy, clean, extractor)
    a, b = (sets.gather(folder, extractor).features for folder in (noisy, clean))
    assert found.metrics["frechet-scenes"] == {"value": distribution.frechet(a, b), "better": "lower"}
    assert found.metrics["mmd-scenes"]["value"] == distribution.mmd(a, b)
    for quantity, value in distribution.prdc(a, b).items():
        assert found.metrics[f"{quantity}-scenes"]["value"] == value
    assert found.features["samples"] == {"test": 10, "reference": 12}
    assert found.features["reference"]["data_sha256"] == found.reference.source.data_sha256


def test_few_samples_bring_a_warning_and_kid(clean, noisy, extractor, monkeypatch):
    found = sets.compare(["frechet-scenes"], noisy, clean, extractor)
    assert list(found.metrics) == ["frechet-scenes", "kid-scenes"]
    (warning,) = found.warnings
    assert "10 samples is biased upward (below 2,048); kid-scenes is not" in warning
    assert not sets.compare(["kid-scenes"], noisy, clean, extractor).warnings
    monkeypatch.setattr(distribution, "FRECHET_SAMPLES", 10)
    enough = sets.compare(["frechet-scenes"], noisy, clean, extractor)
    assert (list(enough.metrics), enough.warnings) == (["frechet-scenes"], [])


def test_one_picture_is_too_few(tmp_path, clean, extractor):
    with pytest.raises(ValueError, match="at least 2 samples are needed, got 1 in the test set"):
        sets.compare(["frechet-scenes"], draw(tmp_path / "one", 1, 0), clean, extractor)


def test_equal_grey_pictures_have_distance_zero(tmp_path, extractor):
    for index in range(3):
        (tmp_path / "grey").mkdir(exist_ok=True)
        Image.fromarray(np.full((32, 32), 128, np.uint8)).save(tmp_path / "grey" / f"{index}.png")
    folder = Folder.open(tmp_path / "grey")
    found = sets.compare(["frechet-scenes"], folder, folder, extractor)
    assert found.metrics["frechet-scenes"]["value"] == pytest.approx(0, abs=1e-9)


def test_jpeg_files_bring_a_warning(clean, tmp_path):
    Image.fromarray(media.load(clean.files[0])[0]).save(tmp_path / "a.jpg")
    (warning,) = sets.jpeg_warnings(clean, Folder.open(tmp_path))
    assert f"1 of 1 files in {tmp_path} are JPEG" in warning
