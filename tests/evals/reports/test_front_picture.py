"""The picture of the README."""

import numpy as np

from dit_accel import TokenLayout
from dit_accel.evals.reports import front_picture
from dit_accel.evals.reports.pattern_pictures import KEY, QUERY
from dit_accel.patterns import Clear, Dense
from dit_accel.pipelines.tiny import NAMES
from dit_accel.recipe.recipe import presets


def test_keys_are_those_of_the_pattern():
    layout = TokenLayout((1, 26, 26), text_len=4, text_first=True)
    for pattern, count in ((Dense(), 26 * 26), (Clear(radius=8), 193)):  # 193: CLEAR's paper
        pixels = np.asarray(front_picture.keys(pattern, layout))[4::8, 4::8]
        blue, red = ((pixels == colour).all(-1).sum() for colour in (KEY, QUERY))
        assert (blue + red, red) == (count, 1)


def test_what_it_draws_is_bundled():
    assert front_picture.MODEL in NAMES
    assert set(front_picture.RECIPES) <= set(presets())
