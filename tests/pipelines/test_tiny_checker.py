import random

import numpy as np
import pytest

from dit_accel.pipelines.tiny.checker import check, score
from dit_accel.pipelines.tiny.scenes import BACKGROUNDS, COLOURS, TWO_OBJECTS, Placed, Scene, render, sample
from dit_accel.pipelines.tiny.sprites import OBJECTS

SIZES = [
    pytest.param(n, frames, height, width, id=f"{frames}x{height}x{width}")
    for n, frames, height, width in [
        (300, 1, 64, 64),
        (100, 1, 64, 96),
        (100, 1, 128, 128),
        (24, 1, 384, 384),
        (120, 17, 64, 64),
        (12, 9, 176, 176),
    ]
]


def held_out(n: int, video: bool) -> list[Scene]:
    rng = random.Random(3)
    return [sample(rng, "held_out", video) for _ in range(n)]


def drawn(scene: Scene, frames: int, height: int, width: int) -> np.ndarray:
    pixels = (render(scene, height, width, frames) * 255).round().astype(np.uint8)
    return pixels if frames > 1 else pixels[0]


def asked(scenes: list[Scene]) -> list[dict[str, str]]:
    return [scene.attributes for scene in scenes]


@pytest.mark.parametrize(("n", "frames", "height", "width"), SIZES)
def test_reads_ground_truth(n, frames, height, width):
    scenes = held_out(n, frames > 1)
    result = score([check(drawn(scene, frames, height, width)) for scene in scenes], asked(scenes))
    assert result["n"] == n
    assert all(result[name] >= 0.985 for name in result if name not in ("n", "all_correct")), result
    assert result["mean"] >= 0.99


def test_shuffled_captions_score_no_better_than_chance():
    rng = random.Random(5)
    scenes = [sample(rng, "any") for _ in range(200)]
    predictions = [check(drawn(scene, 1, 64, 64)) for scene in scenes]
    shuffles = [score(predictions, asked(scenes[4 * turn :] + scenes[: 4 * turn])) for turn in range(1, 49)]
    found = {name: np.mean([result[name] for result in shuffles]) for name in shuffles[0]}
    assert found["object"] == pytest.approx(1 / len(OBJECTS), abs=0.03)
    assert found["colour"] == pytest.approx(1 / len(COLOURS), abs=0.03)
    assert found["background"] == pytest.approx(1 / len(BACKGROUNDS), abs=0.03)
    # The first of two in reading order is more often at the top than a single one.
    assert found["position"] == pytest.approx(0.137, abs=0.03)
    assert found["second object"] == pytest.approx(TWO_OBJECTS / len(OBJECTS), abs=0.03)
    assert found["second position"] == pytest.approx(TWO_OBJECTS * 0.2, abs=0.03)


@pytest.mark.parametrize("frames", [1, 9], ids=["image", "video"])
def test_tolerates_what_generated_pictures_suffer_from(frames):
    noise = np.random.default_rng(0)
    scenes = held_out(60 if frames == 1 else 20, frames > 1)
    predictions = []
    for scene in scenes:
        pixels = drawn(scene, frames, 64, 64).astype(np.float32) / 255
        blurred = (pixels + np.roll(pixels, 1, -2) + np.roll(pixels, 1, -3)) / 3
        tinted = 0.93 * blurred + np.array([0.02, 0.0, 0.04], np.float32)
        noisy = tinted + 0.02 * noise.standard_normal(tinted.shape)
        predictions.append(check(np.clip(noisy, 0, 1).astype(np.float32)))
    assert score(predictions, asked(scenes))["mean"] >= 0.95


def test_without_an_object_only_the_background_is_seen():
    grey = np.full((64, 64, 3), 0.7, np.float32)
    found = {"object": None, "position": None, "colour": "grey", "background": "plain"}
    assert check(grey) == found
    assert check(np.stack([grey] * 5)) == {**found, "motion": None}


def test_an_object_that_stands_still_has_no_motion():
    scene = Scene((Placed("fox", "top left"),), "blue", "striped")
    still = drawn(scene, 1, 64, 64)
    assert check(np.stack([still] * 9)) == {**scene.attributes, "motion": None}


def test_pure_noise_scores_like_a_guess():
    noise = np.random.default_rng(0)
    scenes = held_out(50, video=False)
    predictions = [check(noise.random((64, 64, 3)).astype(np.float32)) for _ in scenes]
    assert score(predictions, asked(scenes))["mean"] < 0.35


def test_score_counts_attributes_and_whole_scenes():
    one = Scene((Placed("fox", "center"),), "grey", "plain")
    two = Scene((Placed("frog", "left"), Placed("pig", "right")), "pink", "striped")
    predictions = [one.attributes, {**two.attributes, "second object": None}]
    assert score(predictions, asked([one, two])) == {
        "object": 1.0,
        "position": 1.0,
        "second object": 0.0,
        "second position": 1.0,
        "colour": 1.0,
        "background": 1.0,
        "mean": 0.9,
        "all_correct": 0.5,
        "n": 2,
    }


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"got shape \(64, 64\)"):
        check(np.zeros((64, 64)))
    with pytest.raises(ValueError, match="got 0 and 1"):
        score([], [{"object": "fox"}])
