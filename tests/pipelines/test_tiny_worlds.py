"""Two worlds of scenes, told apart by their captions and by what models know."""

import random

import pytest

from dit_accel.pipelines.tiny import INFO, caption, read_caption, render, world_of, world_of_caption
from dit_accel.pipelines.tiny.worlds import EMOJI, SHAPES


@pytest.mark.parametrize("world", [EMOJI, SHAPES], ids=lambda world: world.name)
def test_scenes_and_captions_are_of_one_world(world):
    rng = random.Random(0)
    for video in (False, True):
        scene = world.sample(rng, "any", video)
        text = caption(scene)
        assert text == world.caption(scene)
        assert world_of_caption(text) is world
        assert read_caption(text) == scene.attributes
        assert world.check(render(scene, 64, 64)[0])["position"] == scene.attributes["position"]


@pytest.mark.parametrize("world", [EMOJI, SHAPES], ids=lambda world: world.name)
def test_a_pipeline_is_of_the_world_whose_words_it_knows(world):
    assert world_of(INFO["tiny-flux"].build(world)) is world


def test_other_texts_are_of_none():
    with pytest.raises(ValueError, match="got 'a zebra'"):
        world_of_caption("a zebra")
