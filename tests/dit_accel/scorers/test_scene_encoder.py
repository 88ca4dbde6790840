"""The bundled encoder: what it reads, how its distances rank pictures, and that training can be repeated."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_accel.evals.metrics import distribution
from dit_accel.pipelines.tiny.scenes import Placed, render, sample
from dit_accel.scorers import scene_encoder

COUNT = 512
SLIGHT = {"blur": 0.5, "noise": 0.25, "shift": 0.5}
OTHERS = ({"objects": (Placed("fox", "top left"),)}, {"colour": "pink"}, {"background": "striped"})


@pytest.fixture(scope="module")
def encoder():
    return scene_encoder.load()


def scenes(seed, **changes):
    """Pictures of scenes that the encoder was not trained on."""
    rng = random.Random(seed)
    chosen = [replace(sample(rng, "held_out"), **changes) for _ in range(COUNT)]
    return [render(scene, 64, 64)[0] for scene in chosen]


def features(encoder, pictures):
    pixels = torch.from_numpy(np.stack(pictures).astype(np.float32)).permute(0, 3, 1, 2)
    return encoder(pixels * 2 - 1)


def test_weights_are_small_and_half_precision():
    assert scene_encoder.WEIGHTS.stat().st_size < 1_200_000
    assert {value.dtype for value in load_file(scene_encoder.WEIGHTS).values()} == {torch.float16}


def test_it_reads_combinations_that_it_was_not_trained_on(encoder):
    found = scene_encoder.accuracy(encoder, 256)
    assert min(found[name] for name in scene_encoder.CLASSES) >= 0.98
    assert found["all"] >= 0.95


def test_frechet_distance_ranks_clean_then_slightly_damaged_then_other_scenes(encoder):
    """Measured: 54 clean, 66 to 107 slightly damaged, 199 to 1315 others (one object or colour, say)."""
    reference, rng = features(encoder, scenes(0)), random.Random(0)

    def distance(pictures):
        return distribution.frechet(features(encoder, pictures), reference)

    def damaged(kind, amount):
        return distance([scene_encoder.spoil(picture, kind, amount, rng) for picture in scenes(1)])

    clean = distance(scenes(1))
    slightly = {kind: damaged(kind, amount) for kind, amount in SLIGHT.items()}
    others = [distance(scenes(1, **fixed)) for fixed in OTHERS]
    assert 1.15 * clean < min(slightly.values())
    assert 1.5 * max(slightly.values()) < min(others)
    for kind, value in slightly.items():
        assert damaged(kind, 1.0) > 2 * value, kind


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(scene_encoder, "BATCH", 4)
    monkeypatch.setattr(scene_encoder, "SIZES", {(32, 32): 1, (64, 48): 1})
    return replace(scene_encoder.STAGE, steps=3)


def test_training_resumes_to_the_same_weights(tmp_path, small):
    scene_encoder.train(tmp_path / "whole", tmp_path / "whole.safetensors", stage=small)
    interrupted = {"run": tmp_path / "parts", "out": tmp_path / "parts.safetensors", "stage": small}
    scene_encoder.train(**interrupted, until=1)
    loop = scene_encoder.train(**interrupted, resume=True)
    assert loop.step == 3
    whole, parts = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert scene_encoder.load(tmp_path / "parts.safetensors")


def test_training_learns(small, tmp_path):
    loop = scene_encoder.train(tmp_path, tmp_path / "out.safetensors", stage=replace(small, steps=40))
    trained, new = loop.modules["encoder"], scene_encoder.SceneEncoder()
    losses = [
        np.mean([scene_encoder.loss(one, scene_encoder.Draw("test", i)).item() for i in range(4)])
        for one in (trained, new)
    ]
    assert losses[0] < 0.9 * losses[1]


def test_pictures_of_all_kinds_are_drawn():
    drawn = [scene_encoder.draw_picture(random.Random(seed), (24, 32), damaged=True) for seed in range(30)]
    assert {picture.shape for picture, _ in drawn} == {(24, 32, 3)}
    assert all(picture.min() >= 0 and picture.max() <= 1 for picture, _ in drawn)
    for kind in ("blur", "noise", "shift"):
        assert any(label[kind] > 0 for _, label in drawn)


def test_other_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not hold the weights of the scene encoder"):
        scene_encoder.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="does not hold the weights"):
        scene_encoder.load(tmp_path / "bad.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights"):
        scene_encoder.load(tmp_path / "other.safetensors")
