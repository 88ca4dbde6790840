import pytest
from torch import nn

from dit_accel import TokenLayout
from dit_accel.patterns import ByNoise, Clear, Dense, Neighborhood
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import enable
from dit_accel.summary import summary


def test_not_enabled(flux):
    text = str(summary(flux.pipe))
    assert text.startswith("transformer: FluxTransformer2DModel (flux), not accelerated")
    assert [row["layer"] for row in summary(flux.pipe.transformer).rows] == [
        "double.0",
        "double.1",
        "single.0",
        "single.1",
    ]
    assert all(row["pattern"] is None and row["density"] == 1.0 for row in summary(flux.pipe).rows)


def test_before_and_after_a_run(flux):
    enable(flux.pipe, Recipe({"double": Clear(3), "single.0": Dense()}, dense_layers=1, dense_steps=0.5))
    before = summary(flux.pipe)
    assert "geometry and densities unknown until the first run" in str(before)
    assert [row["density"] for row in before.rows] == [1.0, None, 1.0, 1.0]
    assert [row["pattern"] for row in before.rows] == [None, "Clear(radius=3)", None, None]
    notes = [row["note"].removeprefix("model's own attention: ") for row in before.rows]
    assert notes == ["dense_layers", "", "Dense()", "no selector names it"]
    assert [row["dense_steps"] for row in before.rows] == ["all", "first 50%", "all", "all"]
    assert [row["backend"] for row in before.rows] == [None, "auto: native", None, None]

    flux.run(flux.pipe, steps=4)
    after = summary(flux.pipe)
    assert "grid 1 x 8 x 12 tokens + 7 text" in str(after)
    assert "2 of 4 steps dense" in str(after)
    density = after.rows[1]["density"]
    assert 0 < density < after.rows[1]["block_density"] <= 1
    assert f"{density:.4f}" in str(after)


def test_equal_neighbours_share_a_line(flux):
    enable(flux.pipe, Recipe({"all": Clear(3), "single/heads.0": Neighborhood((3, 3))}, dense_steps={0, -1}))
    table = summary(flux.pipe)
    assert len(table.rows) == 4
    lines = str(table).splitlines()[-2:]
    assert lines[0].split()[0] == "double.0-1"
    assert lines[1].startswith("single.0-1")
    assert "1 heads Neighborhood(window=(3, 3)), 1 heads Clear(radius=3)" in lines[1]
    assert "-1, 0" in lines[1]


def test_two_transformers(wan):
    pipe = wan.make(two=True)
    enable(pipe, Neighborhood((3, 3, 3)))
    wan.run(pipe, steps=6)
    table = summary(pipe)
    assert [row["transformer"] for row in table.rows] == ["transformer"] * 3 + ["transformer_2"] * 3
    assert "transformer_2: blocks.0-2" in str(table)


def test_unsupported():
    with pytest.raises(TypeError, match="Linear is not supported"):
        summary(nn.Linear(2, 2))


def test_by_noise_level(wan):
    """What each step was, and the pattern in few words."""
    near = Neighborhood((3, 3, 3))
    recipe = Recipe(ByNoise({0.5: Dense(), 0: near}), dense_steps={"sigma": (0.9, 1.0)})
    handle = enable(wan.pipe, recipe)
    assert summary(wan.pipe).rows[0]["dense_steps"] == "sigma 0.9 to 1"
    assert (
        summary(wan.pipe).rows[0]["pattern"]
        == "ByNoise(levels=((0.5, Dense()), (0.0, Neighborhood(window=(3, 3, 3)))))"
    )
    wan.run(wan.pipe, steps=4, cfg=3.0)
    stats, density = handle.stats(), near.density(TokenLayout((3, 6, 8)))
    sigmas = wan.pipe.scheduler.sigmas.tolist()[:-1]
    assert stats["dense_steps"] == [0]
    assert stats["step_densities"] == pytest.approx(
        {i: density if s < 0.5 else 1.0 for i, s in enumerate(sigmas)}
    )
    last = sum(s < 0.5 for s in sigmas)
    assert 0 < last < 3
    steps = "3" if last == 1 else f"{4 - last}-3"
    assert f"by step: 0-{3 - last} 1.0000, {steps} {density:.4f}" in str(summary(wan.pipe))
