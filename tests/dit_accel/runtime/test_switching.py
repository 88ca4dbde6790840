import copy
import dataclasses
from unittest import mock

import accelerate
import pytest
import torch
from torch import nn

from dit_accel.attention import transformer_call
from dit_accel.errors import UnavailableError
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Clear, Dense, Neighborhood, ShiftedWindow
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, disable, enable, handle_of
from dit_accel.summary import summary

SPARSE = Recipe(Clear(3), block_size=(16, 16))
BOTH = pytest.mark.parametrize("family", ["flux", "sd3", "wan", "hunyuan", "hunyuan15"])


@pytest.fixture
def case(family, request):
    """`case.pipe`, `case.run(pipe, ...)`, `case.make(seed)` of one family."""
    return request.getfixturevalue(family)


def processors(pipe):
    return list(pipe.transformer.attn_processors.values())


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@BOTH
class TestRestore:
    def test_disable_is_bit_identical(self, case):
        before, dense = processors(case.pipe), case.run(case.pipe)
        handle = enable(case.pipe, SPARSE)
        assert handle.active
        assert handle_of(case.pipe) is handle
        assert not torch.equal(case.run(case.pipe), dense)
        disable(case.pipe)
        assert all(a is b for a, b in zip(processors(case.pipe), before, strict=True))
        assert hooks(case.pipe.transformer) == 0
        assert not handle.active
        assert handle_of(case.pipe) is None
        assert torch.equal(case.run(case.pipe), dense)

    def test_disable_twice_and_never_enabled(self, case):
        disable(case.pipe)
        handle = enable(case.pipe, SPARSE)
        handle.disable()
        handle.disable()
        disable(case.pipe)
        assert hooks(case.pipe.transformer) == 0

    def test_enabling_again_restores_first(self, case):
        before = processors(case.pipe)
        first = enable(case.pipe, SPARSE)
        second = enable(case.pipe, Recipe(Clear(2), dense_layers=1))
        assert not first.active
        first.disable()
        assert second.active
        disable(case.pipe)
        assert all(a is b for a, b in zip(processors(case.pipe), before, strict=True))

    def test_accelerated_restores_even_after_an_error(self, case):
        dense = case.run(case.pipe)
        with pytest.raises(KeyError), accelerated(case.pipe, SPARSE):
            raise KeyError
        assert torch.equal(case.run(case.pipe), dense)

    def test_accelerated_nests(self, case):
        outer = enable(case.pipe, SPARSE)
        expected = case.run(case.pipe)
        with accelerated(case.pipe, Dense()) as inner:
            assert handle_of(case.pipe) is inner
            assert not torch.equal(case.run(case.pipe), expected)
        assert handle_of(case.pipe) is outer
        assert torch.equal(case.run(case.pipe), expected)

    def test_what_was_enabled_inside_accelerated_ends_with_it(self, case):
        before = processors(case.pipe)
        outer = enable(case.pipe, SPARSE)
        expected = case.run(case.pipe)
        with accelerated(case.pipe, Dense()):
            inner = enable(case.pipe, Clear(2))
        assert not inner.active
        assert handle_of(case.pipe) is outer
        assert torch.equal(case.run(case.pipe), expected)
        disable(case.pipe)
        assert all(a is b for a, b in zip(processors(case.pipe), before, strict=True))
        assert hooks(case.pipe.transformer) == 0

    def test_foreign_processor_survives_disable(self, case):
        enable(case.pipe, SPARSE)
        module = next(iter(handle_of(case.pipe).bindings["transformer"].modules.values()))
        foreign = module.processor.original.__class__()
        module.set_processor(foreign)
        with pytest.raises(RuntimeError, match=r"was replaced by .* while dit-accel was enabled"):
            case.run(case.pipe)
        disable(case.pipe)
        assert module.processor is foreign


@BOTH
class TestRuns:
    def test_dense_matches_untouched(self, case):
        dense = case.run(case.pipe)
        layers = range(3 + (case.pipe.transformer.config.num_layers == 2))  # 2 + 2, or 3 in SD3 and Wan
        recipes = (
            Dense(),
            Recipe(Clear(3), dense_steps=1.0),
            Recipe(Clear(3), dense_layers=layers),
            Recipe({"heads.0": Dense(), "heads.1": Dense()}),
        )
        for recipe in recipes:
            with accelerated(case.pipe, recipe) as handle:
                assert torch.equal(case.run(case.pipe), dense)
                assert handle.run_density == 1.0

    def test_second_run_is_identical(self, case):
        enable(case.pipe, dataclasses.replace(SPARSE, dense_steps=1))
        assert torch.equal(case.run(case.pipe), case.run(case.pipe))

    def test_two_pipelines_do_not_affect_each_other(self, case):
        other = case.make(seed=1)
        dense, other_dense = case.run(case.pipe), case.run(other)
        enable(case.pipe, SPARSE)
        sparse = case.run(case.pipe)
        assert torch.equal(case.run(other), other_dense)
        enable(other, Recipe(Clear(2)))
        assert torch.equal(case.run(case.pipe), sparse)
        disable(case.pipe)
        assert torch.equal(case.run(case.pipe), dense)
        assert not torch.equal(case.run(other), other_dense)

    def test_copy_of_an_enabled_pipeline_is_its_own(self, case):
        dense = case.run(case.pipe)
        enable(case.pipe.transformer, SPARSE)
        twin = copy.deepcopy(case.pipe.transformer)
        disable(case.pipe)
        assert handle_of(twin).active
        assert torch.equal(case.run(case.pipe), dense)

    def test_guidance_calls_do_not_advance_the_step(self, case):
        handle = enable(case.pipe, dataclasses.replace(SPARSE, dense_steps={1, -1}))
        case.run(case.pipe, steps=4, cfg=3.0)
        stats = handle.stats()
        calls = 4 if handle.bindings["transformer"].family.name == "sd3" else 8  # SD3 batches its branches
        assert (stats["calls"], stats["steps"], stats["dense_steps"]) == (calls, 4, [1, 3])

    def test_density_of_a_run(self, case):
        handle = enable(case.pipe, dataclasses.replace(SPARSE, dense_layers=1, dense_steps=0.25))
        assert handle.run_density is None
        case.run(case.pipe, steps=4)
        geometry = handle.bindings["transformer"].geometry
        density, layers = Clear(3).density(geometry.layout), len(geometry.attentions)
        expected = 0.25 + 0.75 * (1 + (layers - 1) * density) / layers
        assert handle.run_density == pytest.approx(expected)
        assert handle.run_block_density >= handle.run_density
        case.run(case.pipe, steps=1)
        assert handle.run_density == 1.0

    def test_aborted_run_leaves_nothing_behind(self, case):
        handle = enable(case.pipe, dataclasses.replace(SPARSE, dense_steps=1))
        expected = case.run(case.pipe)

        step = mock.patch.object(case.pipe.scheduler, "step", side_effect=InterruptedError)
        with pytest.raises(InterruptedError), step:
            case.run(case.pipe)
        assert torch.equal(case.run(case.pipe), expected)
        assert handle.stats()["calls"] == 3

    def test_error_inside_a_layer_leaves_nothing_behind(self, case):
        handle = enable(case.pipe, SPARSE)
        expected = case.run(case.pipe)
        binding = handle.bindings["transformer"]

        def fail(module, args):
            raise InterruptedError

        last = binding.modules[binding.sparse_layers[-1]]
        with last.to_q.register_forward_pre_hook(fail), pytest.raises(InterruptedError):
            case.run(case.pipe)
        assert transformer_call.current(binding) is None
        assert torch.equal(case.run(case.pipe), expected)

    def test_set_attention_backend_reaches_dense_layers(self, case):
        layers = enable(case.pipe, SPARSE).bindings["transformer"].modules.values()
        case.pipe.transformer.set_attention_backend("_native_math")
        case.run(case.pipe)
        disable(case.pipe)
        assert all(layer.processor._attention_backend == "_native_math" for layer in layers)


@BOTH
class TestBareTransformer:
    def call(self, case, transformer, timesteps):
        """Calls with the inputs that the pipeline passes, at given timesteps."""
        inputs = case.inputs(case.pipe)
        return [transformer(**{**inputs, "timestep": inputs["timestep"] * 0 + t})[0] for t in timesteps]

    def test_steps_from_the_timestep(self, case):
        handle = enable(case.pipe.transformer, dataclasses.replace(SPARSE, dense_steps=1))
        self.call(case, case.pipe.transformer, [2000.0, 2000.0, 5.0, 5.0, 2.0])
        assert (handle.stats()["calls"], handle.stats()["dense_steps"], handle.step) == (5, [0], 2)

    def test_fraction_needs_begin(self, case):
        handle = enable(case.pipe.transformer, dataclasses.replace(SPARSE, dense_steps=0.5))
        with pytest.raises(ValueError, match=r"handle\.begin\(steps\)"):
            case.run(case.pipe)
        handle.begin(4)
        case.run(case.pipe, steps=4)
        assert handle.stats()["dense_steps"] == [0, 1]

    def test_it_runs_where_offloading_brings_its_weights(self, case):
        """Between the calls they are on the meta device."""
        transformer = case.make().transformer
        accelerate.cpu_offload(transformer, execution_device=torch.device("cpu"))
        enable(transformer, dataclasses.replace(SPARSE, backend="native"))
        with torch.no_grad():
            transformer(**case.inputs(case.pipe))
        assert {row["backend"] for row in summary(transformer).rows} == {"native"}
        enable(transformer, SPARSE)
        assert {row["backend"] for row in summary(transformer).rows} == {"auto: native"}

    def test_forward_must_not_be_bypassed(self, case):
        enable(case.pipe, SPARSE)
        inputs = case.inputs(case.pipe)
        with pytest.raises(RuntimeError, match="call the transformer itself"):
            case.pipe.transformer.forward(**inputs)


def test_patterns_that_change_keep_block_size_and_token_order(flux):
    """Caches that carry tokens from step to step rely on it."""
    handle = enable(flux.pipe, Recipe({"all": ShiftedWindow(), "1": ShiftedWindow(seed=1)}))
    binding, layout = handle.bindings["transformer"], TokenLayout((1, 16, 24), 5, text_first=True)
    geometries = [binding.geometry_of(layout, step) for step in range(20)]
    assert len(set(geometries)) > 4
    assert len({geometry.block_size for geometry in geometries}) == 1
    assert all(torch.equal(geometry.order, geometries[0].order) for geometry in geometries)
    densities = {tuple(geometry.densities) for geometry in geometries}
    assert densities == {(ShiftedWindow().density(layout),) * 4}
    again = binding.geometry_of(layout, 19)
    assert again is geometries[19]


class TestErrors:
    """Bad input: an error before anything is patched."""

    @pytest.fixture(autouse=True)
    def _untouched(self, flux):
        before = processors(flux.pipe)
        yield
        assert all(a is b for a, b in zip(processors(flux.pipe), before, strict=True))
        assert hooks(flux.pipe.transformer) == 0

    @pytest.mark.parametrize(
        ("recipe", "error", "message"),
        [
            ("nope", ValueError, "neither a preset nor a recipe file"),
            (
                "wan-radial",
                ValueError,
                "preset 'wan-radial' is for the family 'wan', but this is a flux transformer",
            ),
            (
                Recipe({"blocks": Clear(3)}),
                ValueError,
                "matches no layer; the layers here are double.0-1, single.0-1",
            ),
            (Recipe({"heads.2": Clear(3)}), ValueError, "head 2 is out of range"),
            (Recipe(Clear(3), dense_layers=9), ValueError, "this model has 4 attention layers"),
            (Recipe(Clear(3), backend="triton"), UnavailableError, "backend 'triton' cannot run here"),
            (
                Recipe(Clear(3), quantization="int8", backend="flex"),
                UnavailableError,
                "flex does not compute quantization='int8'",
            ),
            (42, TypeError, "expected a Recipe"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_recipes(self, flux, recipe, error, message):
        with pytest.raises(error, match=message):
            enable(flux.pipe, recipe)

    def test_failed_enable_keeps_what_was_enabled(self, flux):
        handle = enable(flux.pipe, SPARSE)
        expected = flux.run(flux.pipe)
        with pytest.raises(ValueError, match="neither a preset"):
            enable(flux.pipe, "nope")
        with pytest.raises(ValueError, match="matches no layer"):
            enable(flux.pipe, Recipe({"blocks": Clear(3)}))
        assert handle_of(flux.pipe) is handle
        assert torch.equal(flux.run(flux.pipe), expected)
        disable(flux.pipe)

    def test_targets(self):
        with pytest.raises(
            TypeError, match=r"Linear is not supported; supported transformers are .*FluxTransformer2DModel"
        ):
            enable(nn.Linear(2, 2), Dense())
        with pytest.raises(TypeError, match="expected a diffusers pipeline with a transformer"):
            enable("flux", Dense())

    def test_head_dim(self, flux):
        wide = flux.make(
            attention_head_dim=512, num_attention_heads=1, axes_dims_rope=(8, 252, 252)
        ).transformer
        with pytest.raises(UnavailableError, match="512"):
            enable(wide, Clear(3))

    def test_unknown_processor(self, flux):
        class Other:
            pass

        module = flux.pipe.transformer.transformer_blocks[0].attn
        original = module.processor
        module.set_processor(Other())
        with pytest.raises(UnavailableError, match=r"layer double\.0 .* attention processor Other"):
            enable(flux.pipe, Clear(3))
        enable(flux.pipe, Recipe({"single": Clear(3)}))
        disable(flux.pipe)
        module.set_processor(original)

    def test_window_larger_than_its_axis(self, flux):
        with accelerated(flux.pipe, Recipe(Neighborhood((3, 13)), dense_steps=2)):
            with pytest.raises(ValueError, match=r"`window` 13 .* axis W .*grid \(1, 8, 12\)"):
                flux.run(flux.pipe)
            flux.run(flux.pipe, grid=(8, 16))
