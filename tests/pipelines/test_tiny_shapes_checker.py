import random

import numpy as np
import pytest

from dit_accel.pipelines.tiny.checker import score as score_attributes
from dit_accel.pipelines.tiny.shapes.checker import check
from dit_accel.pipelines.tiny.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    POSITIONS,
    SHAPES,
    Scene,
    render,
    sample,
)

CHANCE = {
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "position": 1 / len(POSITIONS),
    "background": 1 / len(BACKGROUNDS),
    "motion": 1 / len(MOTIONS),
}
SIZES = [
    pytest.param(n, frames, height, width, id=f"{frames}x{height}x{width}")
    for n, frames, height, width in [
        (200, 1, 48, 48),
        (400, 1, 64, 64),
        (100, 1, 64, 96),
        (24, 1, 512, 512),
        (200, 17, 64, 64),
        (100, 17, 96, 64),
        (12, 29, 256, 256),
    ]
]


def score(predictions: list, scenes: list[Scene]) -> dict:
    return score_attributes(predictions, [scene.attributes for scene in scenes])


def held_out(n: int, video: bool) -> list[Scene]:
    rng = random.Random(3)
    return [sample(rng, "held_out", video) for _ in range(n)]


def drawn(scene: Scene, frames: int, height: int, width: int) -> np.ndarray:
    pixels = (render(scene, height, width, frames) * 255).round().astype(np.uint8)
    return pixels if frames > 1 else pixels[0]


@pytest.mark.parametrize(("n", "frames", "height", "width"), SIZES)
def test_reads_ground_truth(n, frames, height, width):
    scenes = held_out(n, frames > 1)
    result = score([check(drawn(scene, frames, height, width)) for scene in scenes], scenes)
    assert result["n"] == n
    assert all(result[name] >= 0.99 for name in scenes[0].attributes), result


@pytest.mark.parametrize("frames", [1, 17], ids=["image", "video"])
def test_shuffled_captions_score_no_better_than_chance(frames):
    rng = random.Random(5)
    scenes = [sample(rng, "any", frames > 1) for _ in range(240)]
    predictions = [check(drawn(scene, frames, 64, 64)) for scene in scenes]
    shuffles = []
    for turn in range(1, 61):
        shuffles.append(score(predictions, scenes[4 * turn :] + scenes[: 4 * turn]))
    for name in scenes[0].attributes:
        assert np.mean([result[name] for result in shuffles]) == pytest.approx(CHANCE[name], abs=0.03)


@pytest.mark.parametrize("frames", [1, 17], ids=["image", "video"])
def test_tolerates_what_generated_pictures_suffer_from(frames):
    noise = np.random.default_rng(0)
    scenes = held_out(60, frames > 1)
    predictions = []
    for scene in scenes:
        pixels = drawn(scene, frames, 64, 64).astype(np.float32) / 255
        blurred = (pixels + np.roll(pixels, 1, -2) + np.roll(pixels, 1, -3)) / 3
        tinted = 0.93 * blurred + np.array([0.02, 0.0, 0.04], np.float32)
        noisy = tinted + 0.02 * noise.standard_normal(tinted.shape)
        predictions.append(check(np.clip(noisy, 0, 1).astype(np.float32)))
    assert score(predictions, scenes)["mean"] >= 0.95


def test_without_an_object_only_the_background_is_seen():
    grey = np.full((64, 64, 3), 0.5, np.float32)
    found = {"colour": None, "shape": None, "position": None, "background": "plain"}
    assert check(grey) == found
    assert check(np.stack([grey] * 5)) == {**found, "motion": None}


def test_an_object_that_stands_still_has_no_motion():
    still = drawn(Scene("red", "circle", "top left", "striped"), 1, 64, 64)
    assert check(np.stack([still] * 9)) == {
        "colour": "red",
        "shape": "circle",
        "position": "top left",
        "background": "striped",
        "motion": None,
    }


def test_pure_noise_scores_like_a_guess():
    noise = np.random.default_rng(0)
    scenes = held_out(50, video=False)
    predictions = [check(noise.random((64, 64, 3)).astype(np.float32)) for _ in scenes]
    assert score(predictions, scenes)["mean"] < 0.45


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"got shape \(64, 64\)"):
        check(np.zeros((64, 64)))
