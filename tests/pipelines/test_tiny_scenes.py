import random

import numpy as np
import pytest

from dit_accel.pipelines.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    POSITIONS,
    Placed,
    Scene,
    layers,
    object_side,
    render,
    sample,
)
from dit_accel.pipelines.tiny.sprites import OBJECTS


def scenes(n: int, split: str = "any", video: bool = False, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample(rng, split, video) for _ in range(n)]


@pytest.mark.parametrize("video", [False, True], ids=["image", "video"])
def test_sampling_repeats_with_its_seed_and_leaves_the_global_generators_alone(video):
    random.seed(7)
    np.random.seed(7)
    before = random.getstate(), np.random.get_state()[1].tolist()
    assert scenes(20, video=video) == scenes(20, video=video) != scenes(20, video=video, seed=1)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize("video", [False, True], ids=["image", "video"])
def test_held_out_combinations_never_occur_in_training(video):
    def combinations(drawn: list[Scene]) -> list[set[tuple]]:
        return [{(each.name, each.position, s.motion, s.colour) for each in s.objects} for s in drawn]

    known = set().union(*combinations(scenes(2000, "train", video)))
    assert all(one - known for one in combinations(scenes(2000, "held_out", video)))
    share = np.mean([scene.held_out for scene in scenes(4000, "any", video)])
    assert 0.10 <= share <= (0.15 if video else 0.2)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_attribute_value_occurs_in_both_splits(split):
    drawn = scenes(2500, split, video=True)
    assert {scene.objects[0].name for scene in drawn} == set(OBJECTS)
    assert {scene.objects[0].position for scene in drawn} == set(POSITIONS)
    assert {scene.colour for scene in drawn} == set(COLOURS)
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)
    assert {scene.motion for scene in drawn} == set(MOTIONS)


def test_two_objects_differ_and_stand_apart():
    pairs = [scene.objects for scene in scenes(1000) if len(scene.objects) > 1]
    assert 400 < len(pairs) < 600
    for first, second in pairs:
        assert first.name != second.name
        assert POSITIONS.index(first.position) < POSITIONS.index(second.position)
        (x0, y0), (x1, y1) = first.centre(), second.centre()
        assert max(abs(x0 - x1), abs(y0 - y1)) > 0.43


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (128, 128)])
@pytest.mark.parametrize("video", [False, True], ids=["image", "video"])
def test_objects_are_hardly_cut_by_an_edge(height, width, video):
    side = object_side(height, width)
    for scene in scenes(60, video=video):
        for frame in layers(scene, height, width, 3 if video else 1)[1]:
            edges = (frame[0], frame[-1], frame[:, 0], frame[:, -1])
            assert max(edge.sum() for edge in edges) < 1.5 * side
            assert frame.sum() > 0.2 * side**2


def test_rendering_is_in_range_at_every_size():
    for scene in scenes(10):
        for side in (48, 64, 256):
            picture, cover = layers(scene, side, side)
            assert picture.shape == (1, side, side, 3)
            assert picture.dtype == cover.dtype == np.float32
            assert min(picture.min(), cover.min()) >= 0
            assert max(picture.max(), cover.max()) <= 1


def test_objects_grow_more_slowly_than_the_canvas():
    sides = [object_side(side, side) for side in (64, 128, 384)]
    assert sides == pytest.approx([31, 43.8, 75.9], abs=0.1)
    star = Scene((Placed("star", "center"),), "grey", "plain")
    widths = [layers(star, side, side)[1][0].max(0).sum() for side in (64, 128, 384)]
    assert np.divide(widths, sides) == pytest.approx([0.95] * 3, abs=0.06)


def test_a_window_is_the_same_part_of_the_whole():
    (scene,) = scenes(1, video=True)
    whole = render(scene, 64, 80, 9)
    window = (slice(2, 5), slice(10, 40), slice(30, 60))
    assert np.allclose(render(scene, 64, 80, 9, window), whole[window], atol=1e-6)


def test_motion_goes_where_the_caption_says():
    for motion, (dx, dy) in MOTIONS.items():
        scene = Scene((Placed("fox", "center"),), "grey", "plain", motion)
        assert np.sign(scene.shift(1)).tolist() == [dx, dy]
        assert np.sign(scene.shift(0)).tolist() == [-dx, -dy]
        assert scene.shift(0.5) == pytest.approx((0, 0))
