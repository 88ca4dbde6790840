"""Sliders of patterns: which numbers they turn, and that turning gives that pattern."""

import pytest

from dit_accel import Recipe, patterns, presets
from dit_accel.demos import inputs, knobs

GRID = (17, 22, 24)


@pytest.mark.parametrize(
    ("pattern", "labels"),
    [
        (patterns.Clear(12), ["radius"]),
        (patterns.Neighborhood((3, 9, 9)), ["window, frames", "window, rows", "window, columns"]),
        (patterns.Neighborhood((9, 9)), ["window, rows", "window, columns"]),
        (patterns.Radial(decay_factor=0.2), ["decay factor"]),
        (patterns.Dense(), []),
    ],
)
def test_what_matters_most_has_a_slider(pattern, labels):
    assert [knob.label for knob in knobs.knobs(pattern, GRID)] == labels


def test_turning_changes_that_number_alone():
    pattern = patterns.Neighborhood((3, 9, 9), stride=(1, 3, 3))
    assert knobs.turned(pattern, GRID, [5, None, 11]) == patterns.Neighborhood((5, 9, 11), stride=(1, 3, 3))
    assert knobs.turned(pattern, GRID, [3, 9, 9]) is pattern


@pytest.mark.parametrize("name", presets())
def test_every_preset_stays_itself_until_it_is_turned(name):
    recipe = presets()[name]
    pattern = knobs.first_pattern(recipe)
    values = [knob.value for knob in knobs.knobs(pattern, GRID)]
    assert len(values) <= knobs.KNOBS
    assert knobs.with_pattern(recipe, knobs.turned(pattern, GRID, values), recipe.dense_steps) is recipe
    assert len(knobs.sliders(pattern, GRID)) == knobs.KNOBS


def test_a_turned_preset_is_no_preset_any_more():
    recipe = knobs.with_pattern(presets()["tiny-flux-clear"], patterns.Clear(3), 1)
    assert recipe == Recipe(patterns.Clear(3), dense_layers=2, dense_steps=1, tail="pooled", family="flux")
    assert recipe.name == ""


def test_selectors_keep_their_other_patterns():
    recipe = Recipe({"double": patterns.Clear(3), "single": patterns.Dense()})
    changed = knobs.with_pattern(recipe, patterns.Clear(5), 0)
    assert changed.attention == {"double": patterns.Clear(5), "single": patterns.Dense()}


def test_numbers_are_a_knob_of_every_recipe_and_of_dense_attention():
    recipe = presets()["tiny-flux-clear"]
    assert knobs.numbers_of(recipe) == knobs.AS_GIVEN
    assert knobs.with_numbers(recipe, knobs.AS_GIVEN) is recipe
    changed = knobs.with_numbers(recipe, "int8")
    assert (changed.quantization, changed.attention, changed.name) == ("int8", recipe.attention, "")
    assert knobs.numbers_of(changed) == "int8"
    assert knobs.with_numbers(changed, knobs.AS_GIVEN) == recipe
    assert knobs.with_numbers(None, knobs.AS_GIVEN) is None
    assert knobs.with_numbers(None, "int8-fp8") == Recipe(patterns.Dense(), quantization="int8-fp8")
    mixed = Recipe(patterns.Dense(), quantization={"double": "int8"})
    assert knobs.numbers_of(mixed) == knobs.AS_GIVEN
    assert inputs.numbers("int8") == "int8"
    with pytest.raises(ValueError, match=r"Numbers must be one of as the model has them, int8, .*'int3'"):
        inputs.numbers("int3")
