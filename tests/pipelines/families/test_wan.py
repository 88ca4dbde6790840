import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from pattern_cases import VIDEO

from dit_accel import TokenLayout, summary
from dit_accel.patterns import Clear, Dense, Neighborhood, SparseVideoGen
from dit_accel.pipelines import family_named
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, disable, enable, handle_of

FAMILY = family_named("wan")
NEAR = Neighborhood((3, 3, 3))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def under_masks(
    wan, masked, pattern, grid=(3, 6, 8), layers=None, prepare=lambda pipe: None, make=None, **run
):
    """The untouched pipeline's output when diffusers' own attention gets the pattern's token mask."""
    pipe = wan.make(**(make or {}))
    prepare(pipe)
    mask = pattern.token_mask(TokenLayout(grid))
    for transformer in filter(None, (pipe.transformer, pipe.transformer_2)):
        modules = FAMILY.layers(transformer)
        masked(modules, dict.fromkeys(layers or modules, mask))
    return wan.run(pipe, grid=grid, **run)


def near_everywhere():
    return dict.fromkeys(["blocks.0", "blocks.1", "blocks.2"], NEAR.token_mask(TokenLayout((3, 6, 8))))


class TestMatchesMaskedDense:
    @pytest.mark.parametrize("order", ["raster", "tile", "hilbert", "auto"])
    @pytest.mark.parametrize("pattern", VIDEO.values(), ids=VIDEO)
    def test_orders_and_patterns(self, wan, masked, pattern, order):
        with accelerated(wan.pipe, Recipe(pattern, order=order, block_size=(16, 16))):
            close(wan.run(wan.pipe), under_masks(wan, masked, pattern))

    @pytest.mark.parametrize(
        "run",
        [
            {"batch": 2, "cfg": 3.0},
            {"num_videos_per_prompt": 2},
            {"grid": (4, 3, 11)},
        ],
        ids=lambda run: "-".join(f"{k}{v}" for k, v in run.items()).replace(" ", ""),
    )
    def test_runs(self, wan, masked, run):
        with accelerated(wan.pipe, Recipe(NEAR, order="hilbert")):
            close(wan.run(wan.pipe, **run), under_masks(wan, masked, NEAR, **run))

    def test_some_layers(self, wan, masked):
        with accelerated(wan.pipe, Recipe(NEAR, dense_layers={0, -1}, order="hilbert")):
            close(wan.run(wan.pipe), under_masks(wan, masked, NEAR, layers=["blocks.1"]))

    def test_odd_latents_are_cropped_as_the_model_does(self, wan, masked):
        inputs = wan.inputs(wan.pipe)
        inputs["hidden_states"] = torch.randn(1, 4, 3, 13, 17)
        ref = wan.make().transformer
        masked(FAMILY.layers(ref), near_everywhere())
        enable(wan.pipe, Recipe(NEAR, order="hilbert"))
        with torch.no_grad():
            close(wan.pipe.transformer(**inputs)[0], ref(**inputs)[0])


def test_second_order_scheduler(wan, masked):
    def heun(pipe):
        pipe.scheduler = FlowMatchHeunDiscreteScheduler()

    with accelerated(wan.pipe, Recipe(NEAR, dense_steps={0, -1})) as handle:
        heun(wan.pipe)  # the clock reads the scheduler that the pipeline has, not the one it had
        wan.run(wan.pipe, steps=4, cfg=2.0)
        stats = handle.stats()
        assert (stats["calls"], stats["steps"], stats["dense_steps"]) == (14, 4, [0, 3])
    with accelerated(wan.pipe, Recipe(NEAR, order="hilbert")):
        close(wan.run(wan.pipe, steps=4), under_masks(wan, masked, NEAR, steps=4, prepare=heun))


class TestTwoTransformers:
    def test_are_one(self, wan, masked):
        pipe = wan.make(two=True)
        dense = wan.run(pipe, steps=6)
        handle = enable(pipe, Recipe(NEAR, order="hilbert"))
        assert list(handle.bindings) == ["transformer", "transformer_2"]
        assert handle_of(pipe.transformer) is handle_of(pipe.transformer_2) is handle
        close(wan.run(pipe, steps=6), under_masks(wan, masked, NEAR, steps=6, make={"two": True}))
        assert handle.stats()["calls"] == 6
        disable(pipe.transformer_2)
        assert handle_of(pipe) is None
        assert torch.equal(wan.run(pipe, steps=6), dense)

    def test_recipes_of_their_own_return_after_accelerated(self, wan):
        pipe = wan.make(two=True)
        recipes = {"transformer": NEAR, "transformer_2": Clear(2)}
        handles = [enable(getattr(pipe, name), recipe) for name, recipe in recipes.items()]
        with accelerated(pipe, Dense()):
            assert not any(handle.active for handle in handles)
        assert [handle_of(getattr(pipe, name)) for name in recipes] == handles

    def test_the_latest_run_is_that_of_both(self, wan):
        """The first call of a run is the first transformer's alone."""
        pipe = wan.make(two=True)
        recipe = Recipe(SparseVideoGen(0.4, True, True, block_size=8, profile_frames=2), min_tokens=90)
        handle = enable(pipe, recipe)
        wan.run(pipe, grid=(4, 4, 6), steps=6)
        assert set(handle.stats()["temporal_heads"]) == {"transformer", "transformer_2"}
        wan.run(pipe, grid=(3, 4, 6), steps=6)  # too few tokens: no head chooses
        assert handle.stats()["temporal_heads"] == {}
        assert "fewer than min_tokens" in str(summary(pipe))

    def test_steps_count_through_both(self, wan):
        pipe = wan.make(two=True)
        handle = enable(pipe, Recipe(NEAR, dense_steps={0, -1}))
        wan.run(pipe, steps=6, cfg=2.0)
        assert (handle.stats()["calls"], handle.stats()["dense_steps"]) == (12, [0, 5])


def test_cross_attention_is_untouched(wan):
    before = [block.attn2.processor for block in wan.pipe.transformer.blocks]
    enable(wan.pipe, NEAR)
    assert all(
        block.attn2.processor is p for block, p in zip(wan.pipe.transformer.blocks, before, strict=True)
    )
