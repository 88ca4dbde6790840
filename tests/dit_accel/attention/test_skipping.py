"""Layers that skip in runs: whose marks are whose, how long they last, and what is told of them."""

from __future__ import annotations

import pytest
import torch

from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import Dense, Neighborhood, Skipping
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable
from dit_accel.summary import summary

SKIPPING = Skipping(-0.5, block_size=(16, 16))


@pytest.fixture
def case(family, request):
    """Queries and keys of which some weigh much less than others."""
    found = request.getfixturevalue(family)
    generator = torch.Generator().manual_seed(3)
    for name, module in found.pipe.transformer.named_modules():
        if name.endswith(("norm_q", "norm_k")) and getattr(module, "weight", None) is not None:
            module.weight.data.normal_(std=2, generator=generator)
        elif name.endswith(("to_q", "to_k")):
            module.weight.data.mul_(5)  # which SD3 does not normalise
    return found


def densities(pipe) -> dict[str, list[float]]:
    return {row["layer"]: list(row["density_by_step"].values()) for row in summary(pipe).rows}


@pytest.mark.parametrize("family", ["flux", "sd3", "wan", "hunyuan"])
def test_a_run_begins_with_all_and_computes_less_and_less(case):
    dense = case.run(case.pipe, steps=1, cfg=3.0)
    handle = enable(case.pipe, Recipe(SKIPPING))
    torch.testing.assert_close(case.run(case.pipe, steps=1, cfg=3.0), dense, rtol=1e-4, atol=1e-5)
    first = case.run(case.pipe, steps=4, cfg=3.0)
    seen = densities(case.pipe)
    for steps in seen.values():
        assert steps[0] == 1
        assert steps == sorted(steps, reverse=True)
    assert min(steps[-1] for steps in seen.values()) < 1
    assert handle.run_density < 1
    assert torch.equal(case.run(case.pipe, steps=4, cfg=3.0), first)
    assert densities(case.pipe) == seen


@pytest.mark.parametrize("family", ["wan"])
class TestRuns:
    def test_dense_steps_mark_nothing(self, case):
        enable(case.pipe, Recipe(SKIPPING, dense_steps=2))
        case.run(case.pipe, steps=3)
        assert {tuple(steps) for steps in densities(case.pipe).values()} == {(1.0,)}

    def test_another_size_begins_anew(self, case):
        inputs, transformer = case.inputs(case.pipe), case.pipe.transformer
        enable(transformer, Recipe(SKIPPING)).begin(3)
        with torch.no_grad():
            transformer(**inputs)
            twice = {n: torch.cat([x, x]) if torch.is_tensor(x) else x for n, x in inputs.items()}
            transformer(**{**twice, "timestep": twice["timestep"] - 100})
        assert {tuple(steps) for steps in densities(transformer).values()} == {(1.0, 1.0)}

    def test_training_computes_all(self, case):
        transformer, inputs = case.pipe.transformer, case.inputs(case.pipe)
        expected = transformer(**{**inputs, "timestep": inputs["timestep"] - 1})[0]
        with accelerated(transformer, Recipe(SKIPPING)):
            transformer(**inputs)
            actual = transformer(**{**inputs, "timestep": inputs["timestep"] - 1})[0]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    def test_perturbed_layers_skip_as_well(self, case):
        guidance = HeadPerturbation({(1, 1): 1.0}, scale=2.5)
        enable(case.pipe, Recipe(SKIPPING, guidance=guidance))
        case.run(case.pipe, steps=3)
        assert densities(case.pipe)["blocks.1"][-1] < 1

    def test_beside_other_heads_and_with_a_tail(self, case):
        """Head 1 is dense or near; the tail stands for what head 0 skips."""
        for other in (Dense(), Neighborhood(3)):
            recipe = Recipe({"all": other, "heads.0": SKIPPING}, block_size=(16, 16), tail="pooled")
            with accelerated(case.pipe, Recipe(recipe.attention, block_size=(16, 16))):
                without = case.run(case.pipe, steps=3)
            with accelerated(case.pipe, recipe):
                with_tail = case.run(case.pipe, steps=3)
            reference = Recipe(recipe.attention, block_size=(16, 16), tail="pooled", backend="reference")
            with accelerated(case.pipe, reference):
                torch.testing.assert_close(case.run(case.pipe, steps=3), with_tail, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(with_tail, without, atol=1e-4)
