"""Calibrations beside all else that recipes have: each goes together, or is refused with the reason."""

from dataclasses import replace

import calibrations
import pytest
import torch

import dit_accel
from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import ByNoise, Calibrated, ChunkCausal, Dense, Neighborhood, Rectified, Routed
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable

GRID, SIZE = (3, 6, 8), (16, 16)
NEAR = Neighborhood((3, 3, 3))


@pytest.fixture
def found(wan):
    return calibrations.drawn_for(wan.pipe.transformer, GRID, steps=2, tails=False)


def called(pipe, inputs, recipe) -> torch.Tensor:
    with torch.no_grad(), accelerated(pipe, recipe):
        return pipe.transformer(**inputs)[0]


def as_specified(pipe, inputs, recipe) -> torch.Tensor:
    """The output, which is that of the specification."""
    recipe = replace(recipe, block_size=SIZE)
    actual = called(pipe, inputs, recipe)
    expected = called(pipe, inputs, replace(recipe, backend="reference"))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    return actual


def test_heads_of_other_selectors(wan, found):
    """A window in one head, blocks chosen by content in another: each head is what its selector says."""
    inputs, own = wan.inputs(wan.pipe), Calibrated(found)
    alone = as_specified(wan.pipe, inputs, Recipe(own))
    for other in (NEAR, Routed(top_k=0.3, block_size=SIZE), ByNoise({0.5: NEAR, 0: Dense()})):
        mixed = as_specified(wan.pipe, inputs, Recipe({"all": own, "heads.1": other}))
        assert not torch.allclose(mixed, alone, atol=1e-4)
    layers = as_specified(wan.pipe, inputs, Recipe({"all": NEAR, "blocks.1": own}))
    assert not torch.allclose(layers, called(wan.pipe, inputs, Recipe(NEAR)), atol=1e-4)


def test_a_tail_of_the_recipe(wan, found):
    """For all heads where the calibration has none; refused where it says which have one."""
    inputs, own = wan.inputs(wan.pipe), Recipe(Calibrated(found), tail="pooled")
    with_tail = as_specified(wan.pipe, inputs, own)
    without = as_specified(wan.pipe, inputs, replace(own, tail=None))
    dense = called(wan.pipe, inputs, Recipe(Dense()))
    assert 0 < (with_tail - dense).norm() < (without - dense).norm()
    with_tails = calibrations.drawn_for(wan.pipe.transformer, GRID, steps=2)
    with pytest.raises(ValueError, match="says itself which heads have a tail; use tail=None"):
        enable(wan.pipe, Recipe(Calibrated(with_tails), tail="pooled"))


def test_tails_count_in_densities(wan):
    """Pooled keys are paid for: more than the blocks alone."""
    densities = []
    for tails in (True, False):
        found = calibrations.drawn_for(wan.pipe.transformer, GRID, steps=2, tails=tails)
        with accelerated(wan.pipe, Recipe(Calibrated(found), block_size=SIZE)) as handle:
            wan.run(wan.pipe, steps=2)
            densities.append(handle.stats()["block_density"])
    assert densities[0] > densities[1]


def test_one_rule_for_densities_with_a_tail(wan):
    """Pooled keys are in the block density alone, whether recipe or calibration says where they are."""
    found = calibrations.drawn_for(wan.pipe.transformer, GRID, steps=1, rows=1, tails=False)
    everywhere = replace(found, tail=torch.ones_like(found.tail))
    rows = []
    for recipe in (Recipe(Calibrated(found), tail="pooled"), Recipe(Calibrated(everywhere))):
        with accelerated(wan.pipe, replace(recipe, block_size=SIZE)):
            wan.run(wan.pipe, steps=1)
            rows.append(dit_accel.summary(wan.pipe).rows)
    for name in ("density", "block_density"):
        by_recipe, own = ([row[name] for row in table] for table in rows)
        assert own == pytest.approx(by_recipe)
    assert all(row["density"] < row["block_density"] < 1 for row in rows[1])


def test_dense_layers_and_steps(wan, found):
    dense = wan.run(wan.pipe, steps=2)
    for recipe in (
        Recipe(Calibrated(found), dense_steps=2),
        Recipe(Calibrated(found), dense_layers={0, 1, 2}),
    ):
        with accelerated(wan.pipe, recipe):
            torch.testing.assert_close(wan.run(wan.pipe, steps=2), dense)


def test_guidance_by_perturbed_heads(wan, found):
    perturbed = HeadPerturbation([(1, 0)], kind="uniform", scale=2.0)
    recipe = Recipe(Calibrated(found), guidance=perturbed, block_size=SIZE)
    with accelerated(wan.pipe, recipe):
        guided = wan.run(wan.pipe, steps=2)
    with accelerated(wan.pipe, replace(recipe, backend="reference")):
        torch.testing.assert_close(guided, wan.run(wan.pipe, steps=2), rtol=1e-4, atol=1e-5)
    with accelerated(wan.pipe, replace(recipe, guidance=None)):
        assert not torch.allclose(wan.run(wan.pipe, steps=2), guided, atol=1e-4)


def test_gradients(wan, found):
    """Through the gather into the orders of heads and back."""
    inputs, grads = wan.inputs(wan.pipe), []
    weight = wan.pipe.transformer.blocks[0].attn1.to_q.weight
    for backend in ("auto", "reference"):
        with accelerated(wan.pipe, Recipe(Calibrated(found), block_size=SIZE, backend=backend)):
            wan.pipe.transformer(**inputs)[0].square().sum().backward()
        grads.append(weight.grad.clone())
        wan.pipe.transformer.zero_grad()
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


def test_chunks_of_frames(skyreels):
    """Of autoregressive video models: heads see nothing of later chunks."""
    pipe = skyreels.pipe
    found = calibrations.drawn_for(pipe.transformer, GRID, steps=2, tails=False)
    heads = [Calibrated(found).for_head("blocks.0", head) for head in range(2)]
    layout = dit_accel.TokenLayout(GRID)
    for head in heads:
        restricted = ChunkCausal(1, head).at_step(0, total=2).token_mask(layout)
        assert torch.equal(restricted, ChunkCausal(1).token_mask(layout) & head.token_mask(layout))
    with_tails = calibrations.drawn_for(pipe.transformer, GRID, steps=2)
    head = next(h for h in range(2) if Calibrated(with_tails).for_head("blocks.0", h).own_tail)
    with pytest.raises(ValueError, match="has a tail, which would let chunks see frames to come; calibrate"):
        ChunkCausal(1, Calibrated(with_tails).for_head("blocks.0", head))


def test_what_is_no_base(found):
    with pytest.raises(ValueError, match="`base` must be a static pattern, Routed, Clustered or None"):
        Rectified(Calibrated(found))
    with pytest.raises(TypeError, match="`base` must be a static pattern"):
        ChunkCausal(2, Calibrated(found))


def test_by_noise_level(wan, found):
    """Dense in strong noise, calibrated in weak; the calibration's steps are still those of the run."""
    recipe = Recipe(ByNoise({0.6: Dense(), 0: Calibrated(found)}), block_size=SIZE)
    with accelerated(wan.pipe, recipe) as handle:
        actual = wan.run(wan.pipe, steps=2)
        densities = handle.stats()["step_densities"]
    assert densities[0] == 1 > densities[1]
    with accelerated(wan.pipe, Recipe(Calibrated(found), block_size=SIZE, dense_steps=1)) as handle:
        torch.testing.assert_close(actual, wan.run(wan.pipe, steps=2), rtol=1e-4, atol=1e-5)
        assert handle.stats()["step_densities"] == pytest.approx(densities)


def test_a_bare_transformer_counts_on_the_steps_of_the_calibration(wan, found):
    """Or on those that `begin` announces, which must be as many."""
    inputs = wan.inputs(wan.pipe)
    with torch.no_grad(), accelerated(wan.pipe.transformer, Calibrated(found)) as handle:
        first = wan.pipe.transformer(**inputs)[0]
        handle.begin(7)
        with pytest.raises(ValueError, match="made for runs of 2 steps, and this one has 7"):
            wan.pipe.transformer(**inputs)
    assert first.isfinite().all()
