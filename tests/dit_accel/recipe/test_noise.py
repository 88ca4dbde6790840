import pytest

from dit_accel.patterns import ByNoise, Clear, Dense, Radial
from dit_accel.recipe import NoiseRange, Recipe

SIGMA = {"sigma": (0.9, 1.0)}


def test_a_range_has_both_its_ends():
    levels = NoiseRange(0.25, 0.75)
    assert [s in levels for s in (0.0, 0.2499, 0.25, 0.5, 0.75, 0.7501, 1.0)] == [0, 0, 1, 1, 1, 0, 0]
    assert 1.0 in NoiseRange(1)
    assert str(NoiseRange(0.9)) == "sigma 0.9 to 1"


def test_dense_steps_of_few_and_of_many_steps():
    """At the same noise levels, shifted by 5 as Wan's schedule is."""
    recipe = Recipe(Clear(3), dense_steps=SIGMA)

    def dense(steps):
        even = [1 - step / steps for step in range(steps)]
        levels = [5 * s / (1 + 4 * s) for s in even]
        return [i for i, s in enumerate(levels) if recipe.is_dense_step(i, steps, s)]

    assert (dense(4), dense(8), dense(50)) == ([0, 1], [0, 1, 2], list(range(18)))


def test_needs_a_noise_level():
    with pytest.raises(ValueError, match=r"`dense_steps` of sigma 0\.9 to 1 needs the noise level"):
        Recipe(Clear(3), dense_steps=SIGMA).is_dense_step(0, 4)


@pytest.mark.parametrize(
    ("recipe", "needs"),
    [
        (Recipe(Clear(3), dense_steps=SIGMA), True),
        (Recipe({"all": Dense(), "1": ByNoise({0.5: Dense(), 0: Clear(3)})}), True),
        (Recipe(Clear(3), dense_steps=0.5), False),
    ],
)
def test_which_recipes_do(recipe, needs):
    assert recipe.needs_noise is needs


def test_files_tag_and_repr():
    recipe = Recipe(ByNoise({0: Radial(0.2), 0.6: Radial(0.8), 0.9: Dense()}), dense_steps=SIGMA)
    assert Recipe(recipe.attention, dense_steps=NoiseRange(0.9)) == recipe
    assert eval(repr(recipe)) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert recipe.to_dict()["dense_steps"] == {"sigma": [0.9, 1.0]}
    assert recipe.to_dict()["attention"]["levels"][0] == [0.9, {"pattern": "Dense"}]
    by_hand = """
        attention:
          pattern: ByNoise
          levels: [[0.9, Dense], [0.6, {pattern: Radial, decay_factor: 0.8}]]
        dense_steps: {sigma: [0.9, 1.0]}
    """
    with pytest.raises((ValueError, TypeError), match="`levels` must"):
        Recipe.from_yaml(by_hand)
    others = {Recipe(recipe.attention, dense_steps={"sigma": (0.8, 1.0)}).tag, Recipe(recipe.attention).tag}
    assert recipe.tag not in others
    assert recipe.tag.startswith("bynoise-")
    assert len(recipe.tag) == len("bynoise-000000")


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            {"sigma": (1.0, 0.9)},
            r"`dense_steps`: a range of noise levels must be \(low, high\), got \(1\.0, 0",
        ),
        ({"sigma": (0.9, 1000)}, r"`dense_steps`: `high` must be a noise level from 0 to 1, got 1000"),
        ({"sigma": (-0.1, 1)}, "`low` must be a noise level from 0 to 1"),
        ({"sigma": (float("nan"), 1)}, "`low` must be a noise level from 0 to 1"),
        ({"sigma": (True, 1)}, "`low` must be a noise level from 0 to 1"),
        ({"sigma": 0.9}, "must be {'sigma': "),
        ({"sigma": (0.1, 0.2, 0.3)}, "must be {'sigma': "),
        ({"noise": (0.9, 1.0)}, "must be {'sigma': "),
        ({"sigma": (0.9, 1.0), "steps": 3}, "must be {'sigma': "),
        ({}, "must be {'sigma': "),
    ],
)
def test_impossible_ranges(steps, message):
    with pytest.raises(ValueError, match=message):
        Recipe(Clear(3), dense_steps=steps)


def test_layers_have_no_noise_levels():
    with pytest.raises(TypeError, match="`dense_layers` must be an int"):
        Recipe(Clear(3), dense_layers=SIGMA)
