import random

import numpy as np
import pytest

from dit_accel.pipelines.tiny.shapes.captions import caption, vocabulary
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
from dit_accel.pipelines.tiny.word_tokenizers import tokenizer


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
    def combinations(split: str) -> set[tuple]:
        return {(s.colour, s.shape, s.position, s.motion) for s in scenes(2000, split, video)}

    assert not combinations("train") & combinations("held_out")
    share = np.mean([scene.held_out for scene in scenes(4000, "any", video)])
    assert 0.10 <= share <= 0.15


def test_every_attribute_value_occurs_in_both_splits():
    for split in ("train", "held_out"):
        drawn = scenes(1500, split, video=True)
        assert {scene.colour for scene in drawn} == set(COLOURS)
        assert {scene.shape for scene in drawn} == set(SHAPES)
        assert {scene.position for scene in drawn} == set(POSITIONS)
        assert {scene.background for scene in drawn} == set(BACKGROUNDS)
        assert {scene.motion for scene in drawn} == set(MOTIONS)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (96, 48)])
def test_objects_in_images_stay_inside_the_canvas(height, width):
    for scene in scenes(100):
        shown = render(scene, height, width)[0]
        chroma = shown.max(-1) - shown.min(-1)
        assert max(edge.max() for edge in (chroma[0], chroma[-1], chroma[:, 0], chroma[:, -1])) < 0.5


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (96, 48)])
def test_moving_objects_are_never_cut_by_more_than_an_edge(height, width):
    for scene in scenes(100, video=True):
        shown = render(scene, height, width, 5)
        area = (shown.max(-1) - shown.min(-1)).sum((1, 2))
        assert area.min() > 0.85 * area.max()


def test_rendering_is_in_range_and_the_same_scene_at_every_size():
    for scene in scenes(20):
        small, large = render(scene, 64, 64)[0], render(scene, 256, 256)[0]
        assert small.min() >= 0
        assert small.max() <= 1
        averaged = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert abs(averaged - small).mean() < 0.02


def test_a_window_is_the_same_part_of_the_whole():
    (scene,) = scenes(1, video=True)
    whole = render(scene, 64, 80, 9)
    window = (slice(2, 5), slice(10, 40), slice(30, 60))
    assert np.array_equal(render(scene, 64, 80, 9, window), whole[window])


def test_motion_goes_where_the_caption_says():
    for motion, (dx, dy) in MOTIONS.items():
        scene = Scene("red", "circle", "center", "plain", motion)
        (x0, y0), (x1, y1) = scene.centre(0), scene.centre(1)
        assert (np.sign(round(x1 - x0, 6)), np.sign(round(y1 - y0, 6))) == (dx, dy)
        assert scene.centre(0.5) == pytest.approx((0.5, 0.5))


def test_unknown_shape_is_named():
    with pytest.raises(ValueError, match="got 'star'"):
        render(Scene("red", "star", "center", "plain"), 32, 32)


def test_captions_name_every_attribute_in_words_the_tokenizer_knows():
    tokens = tokenizer(vocabulary(), 24)
    rng = random.Random(0)
    for scene in scenes(300, video=True):
        assert all(word in caption(scene) for value in scene.attributes.values() for word in value.split())
        for text in (caption(scene), caption(scene, rng)):
            ids = tokens(text, padding="max_length").input_ids
            assert len(ids) == 24, text
            assert tokens.unk_token_id not in ids, text
            assert ids.count(tokens.eos_token_id) == 1


def test_tokenizer_ignores_case_and_punctuation():
    tokens = tokenizer(vocabulary(), 24)
    assert tokens("A Red, circle!").input_ids == tokens("a red circle").input_ids
    assert tokens("a zebra").input_ids[1] == tokens.unk_token_id
