"""Captions of scenes of shapes, read back."""

import random
import re

import pytest

from dit_accel.pipelines.tiny.shapes.captions import caption, read_caption
from dit_accel.pipelines.tiny.shapes.scenes import sample


class TestCaptions:
    @pytest.mark.parametrize("video", [False, True], ids=["image", "video"])
    def test_every_wording_is_read_back(self, video):
        rng = random.Random(0)
        for _ in range(300):
            scene = sample(rng, "any", video)
            assert read_caption(caption(scene)) == scene.attributes
            assert read_caption(caption(scene, rng).upper()) == scene.attributes

    @pytest.mark.parametrize("prompt", ["", "a red circle", "a pink circle at the top on a plain background"])
    def test_other_texts_are_refused(self, prompt):
        with pytest.raises(ValueError, match=f"got {re.escape(repr(prompt))}"):
            read_caption(prompt)
