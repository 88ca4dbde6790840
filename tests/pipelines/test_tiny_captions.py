"""Captions of the bundled scenes, read back."""

import random
import re

import pytest

from dit_accel.pipelines.tiny.captions import caption, read_caption, vocabulary
from dit_accel.pipelines.tiny.scenes import Placed, Scene, sample
from dit_accel.pipelines.tiny.word_tokenizers import tokenizer


def test_captions_name_what_is_drawn():
    fox, frog = Placed("fox", "top left"), Placed("umbrella", "right")
    assert caption(Scene((fox,), "blue", "striped")) == "a fox at the top left on a blue striped background"
    both = "a fox at the top left and an umbrella at the right on a grey plain background"
    assert caption(Scene((fox, frog), "grey", "plain")) == both
    moving = "a fox moving up at the top left on a pink gradient background"
    assert caption(Scene((fox,), "pink", "gradient", "up")) == moving


@pytest.mark.parametrize("video", [False, True], ids=["image", "video"])
def test_every_wording_is_read_back(video):
    rng = random.Random(0)
    for _ in range(500):
        scene = sample(rng, "any", video)
        assert read_caption(caption(scene)) == scene.attributes
        assert read_caption(caption(scene, rng).upper()) == scene.attributes


@pytest.mark.parametrize("prompt", ["", "a fox", "a red circle at the top on a plain background"])
def test_other_texts_are_refused(prompt):
    with pytest.raises(ValueError, match=f"got {re.escape(repr(prompt))}"):
        read_caption(prompt)


@pytest.mark.parametrize("video", [False, True], ids=["image", "video"])
def test_captions_are_made_of_words_the_tokenizer_knows(video):
    tokens = tokenizer(vocabulary(), 24)
    rng = random.Random(0)
    for _ in range(500):
        text = caption(sample(rng, "any", video), rng)
        ids = tokens(text, padding="max_length").input_ids
        assert len(ids) == 24, text
        assert tokens.unk_token_id not in ids, text
        assert ids.count(tokens.eos_token_id) == 1
