"""Speed-ups from block densities alone agree with those of a plan that builds the masks."""

import dataclasses

import pytest

from dit_accel import patterns
from dit_accel.planning.model_config import of_model
from dit_accel.planning.plan import plan
from dit_accel.planning.uniform import uniform_speedups


@pytest.mark.parametrize("model", ["tiny-flux", "tiny-wan"])
def test_the_same_as_a_plan_with_the_pattern_everywhere(model):
    pattern = patterns.Clear(6) if model == "tiny-flux" else patterns.Radial(decay_factor=0.2, block_size=32)
    whole = plan(pattern, model=model)
    found = uniform_speedups(pattern, of_model(model), whole.grid, whole.density, whole.block_density)
    for name in ("attention", "step"):
        expected = dataclasses.asdict(getattr(whole, name))
        assert dataclasses.asdict(found[name]) == pytest.approx(expected, rel=1e-6)


def test_dense_saves_nothing():
    config = of_model("tiny-flux")
    grid = config.grid(config.transformer(), config.size)
    found = uniform_speedups(patterns.Dense(), config, grid, 1.0, 1.0)
    assert found["step"].ideal == found["attention"].ideal == 1
