"""Plans of calibrations: each step and head as the calibration says."""

import calibrations
import pytest

from dit_accel import TokenLayout
from dit_accel.patterns import Calibrated, Dense, Neighborhood
from dit_accel.pipelines import family_of
from dit_accel.planning.model_config import of_model
from dit_accel.planning.plan import plan


def test_of_a_calibration_by_its_steps():
    """Each step by the row of the calibration that it takes; other sizes and numbers of steps are refused."""
    config = of_model("tiny-wan")
    transformer = config.transformer()
    layers = tuple(family_of(transformer).layers(transformer))
    found = calibrations.drawn(
        (2, 8, 8),
        layers=layers,
        heads=transformer.config.num_attention_heads,
        head_dim=transformer.config.attention_head_dim,
        patterns=(Dense(), Neighborhood((2, 3, 3))),
        tails=False,
    )
    pattern = Calibrated(found)
    answer = plan(pattern, model="tiny-wan", size=(64, 64), frames=5, steps=4)
    assert answer.density == pytest.approx(pattern.density(TokenLayout((2, 8, 8))), abs=1e-9)
    told = "calibrated at density 0.4, heads in each of 2 stretches"
    assert any(note.startswith(told) for note in answer.notes)
    assert answer.orders == ()
    with pytest.raises(ValueError, match="made for runs of 4 steps, and this one has 8"):
        plan(pattern, model="tiny-wan", size=(64, 64), frames=5, steps=8)
    with pytest.raises(ValueError, match=r"made for grid \(2, 8, 8\), got \(2, 8, 16\)"):
        plan(pattern, model="tiny-wan", size=(128, 64), frames=5, steps=4)
