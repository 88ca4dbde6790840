"""Plans: densities are the masks', times and memory a hand count's, bad input is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from small_configs import FLUX, HEADS, HUNYUAN, SD3, SMALL, WAN, WIDTH

from dit_accel import Recipe, accelerated, pipelines
from dit_accel.generation import Request, build_masks, load
from dit_accel.patterns import ByNoise, Clear, Dense, Neighborhood, SparseVideoGen
from dit_accel.pipelines import tiny
from dit_accel.planning import densities
from dit_accel.planning.plan import plan
from dit_accel.runtime.geometry import block_sizes
from dit_accel.runtime.measured_speed import MeasuredSpeed, measured_speed

# text and picture of whole blocks: masks have as many wherever text stands, and estimates take it to be last
ALIGNED = (dataclasses.replace(FLUX, text_len=128, size=(1, 256, 256)), SD3, HUNYUAN, WAN)
NEAR = Neighborhood((3, 5))
MEASURED = MeasuredSpeed((0.5, 0.6, 0.8), 0.5, "a test")
NOTE = (
    "block densities are estimated from {} query blocks: masks of more than 131072 tokens are not built "
    "for a plan"
)


def approximately(data):
    """JSON-like data whose floats are equal but for rounding."""
    if isinstance(data, dict):
        return {key: approximately(value) for key, value in data.items()}
    if isinstance(data, list):
        return [approximately(value) for value in data]
    return pytest.approx(data, rel=1e-12) if isinstance(data, float) else data


class TestNoiseLevels:
    """Of recipes that go by them."""

    BY_NOISE = ByNoise({0.9: Dense(), 0.6: Neighborhood((3, 3, 5)), 0: Neighborhood((3, 3, 3))})

    @pytest.mark.parametrize(("steps", "shift"), [(4, 5.0), (8, 1.0), (50, 3.0)])
    def test_are_those_of_the_scheduler(self, steps, shift):
        recipe = Recipe(Neighborhood((3, 3, 3)), dense_steps={"sigma": (0.8, 1.0)})
        answer = plan(recipe, model=WAN, steps=steps, shift=shift)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
        assert answer.noise_levels == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-6)
        assert answer.dense_steps == sum(level >= 0.8 for level in answer.noise_levels)

    def test_of_bundled_models_are_those_of_their_schedulers(self):
        recipe = Recipe(NEAR, dense_steps={"sigma": (0.8, 1.0)})
        answer = plan(recipe, model="tiny-flux", size=(256, 192), steps=6)
        scheduler = pipelines.load("tiny-flux").scheduler
        config = scheduler.config
        lengths = config.base_image_seq_len, config.max_image_seq_len
        mu = calculate_shift(math.prod(answer.grid), *lengths, config.base_shift, config.max_shift)
        scheduler.set_timesteps(sigmas=[1 - i / 6 for i in range(6)], mu=mu)
        assert answer.noise_levels == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-5)
        config = pipelines.load("tiny-wan").scheduler.config
        wan = Recipe(Neighborhood((3, 3, 3)), dense_steps={"sigma": (0.8, 1.0)})
        second = plan(wan, model="tiny-wan", size=(64, 64), frames=9, steps=2).noise_levels[1]
        assert second == pytest.approx(config.flow_shift / (1 + config.flow_shift))

    def test_a_model_whose_schedule_is_not_known(self):
        with pytest.raises(ValueError, match=r"the noise schedule of .* is not known; give its `shift`"):
            plan(Recipe(self.BY_NOISE), model=WAN)
        with pytest.raises(ValueError, match="`shift` must be a positive number"):
            plan(Recipe(self.BY_NOISE), model=WAN, shift=0)

    def test_densities_are_the_mean_of_the_sparse_steps(self):
        """Steps at 1, 0.94, 0.83 and 0.63: two of them dense, but none by `dense_steps`."""
        by_noise, one, other = (
            Recipe(pattern, dense_layers=1, order="raster")
            for pattern in (self.BY_NOISE, *(pattern for _, pattern in self.BY_NOISE.levels[1:]))
        )
        wide, narrow = (plan(recipe, model=WAN, steps=4, rates=MEASURED) for recipe in (one, other))
        answer = plan(by_noise, model=WAN, steps=4, shift=5.0, rates=MEASURED)
        assert answer.density == pytest.approx((1 + 1 + wide.density + wide.density) / 4)
        assert answer.dense_steps == 0
        assert answer.run.predicted == pytest.approx(4 / (2 + 2 / wide.run.predicted))
        even = plan(by_noise, model=WAN, steps=4, shift=1.0, rates=MEASURED)  # 1, 0.75, 0.5, 0.25
        assert even.density == pytest.approx((1 + wide.density + 2 * narrow.density) / 4)
        mean = 4 / (1 + 1 / wide.run.predicted + 2 / narrow.run.predicted)
        assert even.run.predicted == pytest.approx(mean)
        assert even.layers == narrow.layers


class TestDensities:
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize("model_config", SMALL, ids=lambda b: b.name)
    def test_are_those_of_the_pattern_and_the_mask(self, model_config, device):
        recipe = Recipe(NEAR, dense_layers=1, order="tile")
        answer = plan(recipe, model=model_config, device=device)
        blocks = answer.block_size
        assert blocks in block_sizes(recipe, device)
        found = {name: group for group in answer.layers for name in group.names}
        family = model_config.description
        assert list(found) == list(dict.fromkeys(sum((g.names for g in answer.layers), ())))
        for name in family.layers(model_config.transformer()):
            own = family.layer_layout(name, model_config.layout(answer.grid))
            mask = NEAR.block_mask(own, blocks, "tile")
            if found[name].pattern is None:
                assert found[name].density == found[name].block_density == 1
                assert found[name].reason == "dense_layers"
            else:
                assert found[name].density == pytest.approx(NEAR.density(own), rel=1e-12)
                assert found[name].block_density == mask.block_density

    @pytest.mark.parametrize("model_config", [FLUX, WAN], ids=lambda b: b.name)
    def test_under_each_order(self, model_config):
        answer = plan(NEAR, model=model_config)
        layout = model_config.layout(answer.grid)
        assert [row.order for row in answer.orders] == ["raster", "tile", "hilbert", "auto"]
        for row in answer.orders:
            assert row.block_density == NEAR.block_mask(layout, answer.block_size, row.order).block_density
        *others, auto = answer.orders
        assert auto.takes in [row.order for row in others]
        assert auto.block_density == next(r.block_density for r in others if r.order == auto.takes)
        assert answer.block_density == pytest.approx(auto.block_density, rel=1e-12)  # averaged over layers

    def test_heads_that_choose_have_orders_of_their_own(self):
        pattern = SparseVideoGen(keep=0.5, block_size=16)
        answer = plan(pattern, model=WAN)
        mask = pattern.head_mask(WAN.layout(answer.grid), answer.block_size)
        assert [(row.order, row.block_density) for row in answer.orders] == [
            ("chosen in each call", mask.block_density)
        ]
        assert answer.density == mask.density


class TestEstimates:
    """Where masks are too large to be built for a plan; here the limit is low, and all rows are drawn."""

    @pytest.fixture(autouse=True)
    def low_limit(self, monkeypatch):
        monkeypatch.setattr(densities, "EXACT_UP_TO", 3)

    @pytest.mark.parametrize(
        "recipe",
        [
            Recipe(NEAR, dense_layers=1),
            Recipe({"all": NEAR, "heads.0": Clear(3)}, order="tile", dense_steps=2),
            Recipe({"heads.1": NEAR}, min_tokens=100),
            Recipe(NEAR, min_tokens=10**6),
            Recipe(Dense()),
        ],
        ids=["a-dense-layer", "two-patterns", "dense-heads", "too-short", "dense"],
    )
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize("model_config", ALIGNED, ids=lambda b: b.name)
    def test_of_all_rows_are_the_exact_plan(self, model_config, device, recipe, monkeypatch):
        found = plan(recipe, model=model_config, device=device, rates=MEASURED).to_dict()
        monkeypatch.setattr(densities, "EXACT_UP_TO", 10**6)
        exact = plan(recipe, model=model_config, device=device, rates=MEASURED).to_dict()
        assert found["memory"].pop("masks") is None
        assert exact["memory"].pop("masks") is not None
        assert exact.pop("sampled") is None
        sampled = found.pop("sampled")
        assert (sampled is None) == (not found["orders"])
        notes, expected = found.pop("notes"), exact.pop("notes")
        assert notes == ([NOTE.format(sampled)] if sampled else []) + expected
        exact["orders"] = [row for row in exact["orders"] if row["order"] != "hilbert"]
        for row in (*found["orders"], *exact["orders"]):
            row.pop("takes")  # a curve may be better than both
        assert found == approximately(exact)

    def test_patterns_that_choose_online_are_exact(self):
        answer = plan(SparseVideoGen(keep=0.5, block_size=16), model=WAN)
        assert (answer.sampled, answer.memory.masks is None) == (None, False)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_is_what_a_real_run_builds(name):
    recipe = Recipe(NEAR, dense_layers=1)
    answer = plan(recipe, model=name, size=(96, 64), frames=9 if tiny.INFO[name].video else None)
    frames = answer.size[0] if tiny.INFO[name].video else None
    pipe = load(name, torch.float32, torch.device("cpu"))
    request = Request("a red circle", 96, 64, frames, 2).with_defaults(name, "native")
    with accelerated(pipe, recipe) as handle:
        build_masks(pipe, request)
        geometry = handle.bindings["transformer"].geometry
    assert geometry.layout == answer.layout
    assert geometry.over_layers(geometry.densities) == answer.density
    assert geometry.over_layers(geometry.block_densities) == answer.block_density


class TestPrediction:
    def test_by_hand(self):
        answer = plan(Recipe(NEAR, dense_layers=1, dense_steps=2), model=WAN, rates=MEASURED)
        attention = 4 * WIDTH * answer.tokens**2
        paid = answer.layers[1].block_density
        assert answer.attention.predicted == pytest.approx(0.6 / paid)
        assert (answer.attention.low, answer.attention.high) == pytest.approx((0.5 / paid, 0.8 / paid))
        assert answer.attention.ideal == pytest.approx(1 / paid)
        rest = answer.flops.rest / 0.5
        step = (3 * attention + rest) / (attention + 2 * attention * paid / 0.6 + rest)
        assert answer.step.predicted == pytest.approx(step)
        assert (answer.steps, answer.dense_steps) == (10, 2)
        assert answer.run.predicted == pytest.approx(10 / (2 + 8 / step))

    def test_dense_changes_nothing(self):
        answer = plan(Dense(), model=WAN, rates=MEASURED)
        assert (answer.density, answer.block_density, answer.orders, answer.mask) == (1, 1, (), None)
        assert answer.attention.predicted == answer.step.predicted == answer.run.predicted == 1

    def test_nothing_is_claimed_where_nothing_is_measured(self):
        rates = measured_speed("cpu", "float32", 64, tables=[])
        assert rates == MeasuredSpeed(source="block-sparse attention is not measured on cpu in float32")
        answer = plan(NEAR, model=WAN, rates=rates)
        assert answer.attention.predicted is answer.step.low is answer.run.high is None
        assert answer.attention.ideal == pytest.approx(1 / answer.block_density)
        assert "not measured" in answer.notes[0]
        assert "assumed" in answer.notes[1]

    def test_a_backend_that_was_not_measured(self):
        answer = plan(Recipe(NEAR, backend="reference"), model=WAN, rates=MEASURED)
        assert answer.attention.predicted is None
        assert "'reference' is not measured" in answer.notes[0]


class TestMemory:
    def test_by_hand(self):
        answer = plan(NEAR, model=WAN, dtype=torch.bfloat16)
        assert answer.memory.qkv_and_output == 4 * answer.tokens * WIDTH * 2
        assert answer.memory.scores_never_made == answer.tokens**2 * HEADS * 2
        assert answer.memory.weights == 2 * sum(p.numel() for p in WAN.transformer().parameters())
        mask = answer.mask
        tensors = (*mask.full.tensors().values(), *mask.partial.tensors().values(), mask.tiles)
        order = 0 if mask.order is None else mask.order.nbytes
        assert answer.memory.masks == sum(t.nbytes for t in tensors) + order


class TestRefuses:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"family": "sora"}, "the families are .*hunyuan-video, .*sd3"),
            ({"family": "wan", "variant": "wan3"}, "its variants are wan2.1-14b"),
            ({}, "got neither"),
            ({"family": "wan", "model": "tiny-wan"}, "got both"),
            ({"model": WAN, "variant": "wan2.1-14b"}, "goes with `family`"),
            ({"model": "nothing/here"}, "neither a bundled model nor a pipeline folder"),
            ({"model": WAN, "size": (128, 90)}, "height must be a multiple of 16 .* got 90; try 80 or 96"),
            ({"model": WAN, "frames": 10}, "multiple of 4 plus 1 .* got 10; try 9 or 13"),
            ({"model": FLUX, "frames": 9}, "small-flux makes images"),
            ({"model": WAN, "size": (64, 64)}, "window"),
            ({"model": WAN, "steps": 0}, "`steps` must be a positive integer"),
            ({"model": FLUX, "size": (10**6, 10**6)}, "must be at most 4194304 tokens, got 3906250007"),
            ({"model": WAN, "frames": 10**9 + 1}, "must be at most 4194304 tokens"),
        ],
        ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            plan(Neighborhood((5, 5)), **arguments)

    def test_a_recipe_of_another_family(self):
        with pytest.raises(ValueError, match="'flux-clear-r16' is for the family 'flux', but small-wan"):
            plan("flux-clear-r16", model=WAN)
