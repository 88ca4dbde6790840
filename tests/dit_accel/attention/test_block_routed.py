"""Routed layers in runs: how long a choice is used, whose it is, and what is told of it."""

from __future__ import annotations

import diffusers
import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.attention import online
from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import Neighborhood, Routed
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable
from dit_accel.summary import summary

EVERY = Routed(top_k=0.3, block_size=(16, 16))
THIRD = Routed(top_k=0.3, block_size=(16, 16), refresh=3)
FAMILIES = pytest.mark.parametrize("family", ["flux", "sd3", "wan", "hunyuan"])


@pytest.fixture
def case(family, request):
    return request.getfixturevalue(family)


@pytest.fixture
def chosen(monkeypatch):
    """Masks in the order in which calls used them: (where in the run's memory, step, token mask)."""
    seen = []

    def tell(call, mask):
        seen.append((call.memory and call.memory._place, call.step, mask.to_token_mask()))
        original(call, mask)

    original = online.tell
    monkeypatch.setattr(online, "tell", tell)
    return seen


def by_place(seen):
    """(step, mask) of each layer and branch."""
    found = {}
    for place, step, mask in seen:
        found.setdefault(place, []).append((step, mask))
    return found.values()


@FAMILIES
def test_a_choice_is_used_for_executed_steps(case, chosen):
    """Of each layer, in each guidance branch; dense steps are not counted, and a run begins anew."""
    recipe = Recipe(THIRD, dense_steps={0, 2})
    with accelerated(case.pipe, recipe):
        first = case.run(case.pipe, steps=7, cfg=3.0)
        seen = list(chosen)
        chosen.clear()
        assert torch.equal(case.run(case.pipe, steps=7, cfg=3.0), first)
    assert all(torch.equal(a[2], b[2]) for a, b in zip(seen, chosen, strict=True))
    for one in by_place(seen):
        steps, masks = zip(*one, strict=True)
        assert steps == (1, 3, 4, 5, 6)
        for at, mask in enumerate(masks):
            assert torch.equal(mask, masks[at // 3 * 3])
    assert any(not torch.equal(one[0][1], one[3][1]) for one in by_place(seen))


@pytest.mark.parametrize("family", ["wan"])
class TestRuns:
    def test_branches_choose_for_themselves(self, case, chosen):
        with accelerated(case.pipe, Recipe(THIRD)):
            case.run(case.pipe, steps=1, cfg=3.0)
        cond, uncond = chosen[:3], chosen[3:]
        assert {place[1] for place, *_ in cond} == {0}
        assert {place[1] for place, *_ in uncond} == {1}
        assert any(not torch.equal(a[2], b[2]) for a, b in zip(cond, uncond, strict=True))

    def test_one_step_is_as_without(self, case):
        with accelerated(case.pipe, Recipe(EVERY)):
            expected = case.run(case.pipe, steps=1, cfg=3.0)
        with accelerated(case.pipe, Recipe(THIRD)):
            assert torch.equal(case.run(case.pipe, steps=1, cfg=3.0), expected)

    def test_another_size_or_batch_chooses_anew(self, case, chosen):
        inputs = case.inputs(case.pipe)
        transformer = case.pipe.transformer
        with accelerated(transformer, Recipe(THIRD)) as handle, torch.no_grad():
            handle.begin(2)
            transformer(**inputs)
            chosen.clear()
            later = {n: torch.cat([x, x]) if torch.is_tensor(x) else x for n, x in inputs.items()}
            transformer(**{**later, "timestep": later["timestep"] - 100})
        assert {mask.shape[0] for *_, mask in chosen} == {2}

    def test_with_gradients_every_call_chooses(self, case, chosen):
        transformer, inputs = case.pipe.transformer, case.inputs(case.pipe)
        with accelerated(transformer, Recipe(THIRD)):
            for step in range(2):
                transformer(**{**inputs, "timestep": inputs["timestep"] - step})
        assert all(place is None for place, *_ in chosen)

    def test_a_block_cache_leaves_steps_out(self, case, chosen):
        """FirstBlockCache: layer 0 runs at every step, the others where their blocks are not skipped."""
        case.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.08))
        with accelerated(case.pipe, Recipe(THIRD)):
            case.run(case.pipe, steps=9, cfg=3.0)
        by_layer = {one[0]: [] for one in chosen}
        for place, step, mask in chosen:
            by_layer[place].append((step, mask))
        counts = {place[-1]: len(calls) for place, calls in by_layer.items()}
        assert counts["blocks.0"] == 9
        assert 3 < counts["blocks.1"] < 9
        for calls in by_layer.values():
            masks = [mask for _, mask in calls]
            assert all(torch.equal(mask, masks[at // 3 * 3]) for at, mask in enumerate(masks))

    def test_the_perturbed_branch_keeps_its_own(self, case, chosen):
        guidance = HeadPerturbation({(1, 1): 1.0, (2, 0): 0.5}, scale=2.5)
        with accelerated(case.pipe, Recipe(THIRD, guidance=guidance)):
            case.run(case.pipe, steps=4)
        places = {place for place, *_ in chosen}
        assert {place[2] for place in places} == {"blocks.0", "blocks.1", "blocks.2", "perturbed"}
        for one in by_place(chosen):
            assert all(torch.equal(mask, one[at // 3 * 3][1]) for at, (_, mask) in enumerate(one))

    def test_summary_tells_densities_by_step(self, case):
        pattern = Routed(top_p=0.4, block_size=(16, 16))
        enable(case.pipe, Recipe({"all": pattern, "1/heads.0": Neighborhood(3)}, dense_steps=1))
        handle = enable(case.pipe, Recipe({"all": pattern, "1": Neighborhood(3)}, dense_steps=1))
        case.run(case.pipe, steps=3, cfg=3.0)
        rows = {row["layer"]: row for row in summary(case.pipe).rows}
        assert list(rows["blocks.0"]["density_by_step"]) == [1, 2]
        assert rows["blocks.0"]["density"] < pattern.density(TokenLayout((3, 6, 8)))
        assert rows["blocks.1"]["density_by_step"] == {}
        sparse = sum(row["density"] for row in rows.values()) / 3
        assert handle.run_density == pytest.approx((1 + 2 * sparse) / 3)
        assert "aims at 0.400" in str(summary(case.pipe))


@FAMILIES
def test_checkpointed_blocks_choose_what_they_chose(case):
    """Gradients of a call are the same with gradient checkpointing, reused choices or not."""
    inputs = case.inputs(case.pipe)
    transformer = case.pipe.transformer
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            transformer.enable_gradient_checkpointing()
        with accelerated(transformer, Recipe(THIRD)):
            transformer(**inputs)[0].square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in transformer.named_parameters() if p.grad is not None})
        transformer.zero_grad(set_to_none=True)
    assert len(gradients[0]) > 20
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)
