"""What holds for every family alike, on tiny random pipelines of the real classes."""

import pytest
import torch

from dit_accel.errors import UnavailableError
from dit_accel.guidance import HeadPerturbation
from dit_accel.highres import Rotary, Swim, generate
from dit_accel.layer_names import flat_indices
from dit_accel.patterns import Clear, Dense
from dit_accel.pipelines import families as known
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe, presets
from dit_accel.runtime.switching import accelerated
from dit_accel.summary import summary

PIPELINES = (
    "animate",
    "chroma",
    "chrono",
    "cogvideox",
    "far",
    "flux",
    "flux2",
    "helios",
    "hunyuan",
    "hunyuan15",
    "hunyuanimage",
    "kandinsky5",
    "ltx",
    "ltx2",
    "minimaxh3",
    "mochi",
    "qwen",
    "sd3",
    "skyreels",
    "wan",
    "zimage",
)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pattern_that_covers_all_is_stock_and_disable_restores(families, name):
    """In another token order, in batches under guidance, with padded text where the family has it."""
    tools = families[name]
    pipe = tools.make()
    run = {"batch": 2, "cfg": 3.0, "steps": 2}
    family, stock = family_of(pipe.transformer), tools.run(pipe, **run)
    processors = {m: m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")}
    with accelerated(pipe, Recipe(Clear(60), order="hilbert")) as handle:
        found = tools.run(pipe, **run)
        layers = set(family.layers(pipe.transformer).values())
        changed = {module for module, own in processors.items() if module.processor is not own}
        text = str(summary(pipe))
        assert handle.run_density == 1
        assert (handle.token_order() is not None) is family.moves_tokens
    assert changed == layers
    assert family.stays_dense
    assert f"dense under every recipe: {family.stays_dense}" in text
    # Kandinsky 5 rounds queries and keys to bf16 in every dtype, where fp32's last bit may decide
    rtol, atol = (1e-3, 1e-3) if name == "kandinsky5" else (1e-4, 1e-5)
    torch.testing.assert_close(found, stock, rtol=rtol, atol=atol)
    assert torch.equal(tools.run(pipe, **run), stock)
    assert all(module.processor is own for module, own in processors.items())


@pytest.mark.parametrize("name", PIPELINES)
def test_dense_layers_are_those_of_diffusers_bit_by_bit(families, name):
    """But where diffusers' own waste memory, and ours stand in for them."""
    tools = families[name]
    pipe = tools.make()
    stock = tools.run(pipe, batch=2, cfg=3.0, steps=2)
    with accelerated(pipe, Dense()):
        found = tools.run(pipe, batch=2, cfg=3.0, steps=2)
    if family_of(pipe.transformer).accelerates_dense:
        torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(found, stock)


@pytest.mark.parametrize("name", ["chroma", "flux2", "hunyuanimage", "qwen", "zimage"])
def test_runs_above_native_size_are_refused_with_the_reason(families, name):
    """Whole runs, and their parts on a transformer."""
    pipe = families[name].make()
    refused = rf"not there for the family .*{family_of(pipe.transformer).highres_refusal}; call the pipeline"
    with pytest.raises(UnavailableError, match=refused):
        generate(pipe, "a cat", width=512, height=512, native=(128, 128))
    for part in (Swim((2, 2)).applied(pipe), Rotary("ntk").applied(pipe.transformer, (8, 8))):
        with pytest.raises(UnavailableError, match=refused), part:
            pass


def test_every_family_is_in_the_table(families):
    assert set(PIPELINES) == set(families)
    tried = {family_of(tools.make().transformer).name for tools in families.values()}
    assert tried == {family.name for family in known()}
    assert all(presets(name) for name in tried)


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in ("far", "zimage")])
def test_guidance_by_perturbed_heads(families, name):
    """Two layers' heads, one of them by half; AnyFlow-FAR and Z-Image refuse it, in their tests."""
    tools = families[name]
    pipe = tools.make()
    heads = {(1, 1): 1.0, (2, 0): 0.5}
    guidance = HeadPerturbation(heads, scale=2.5)
    inputs, transformer = tools.inputs(pipe), pipe.transformer
    with torch.no_grad():
        own = transformer(**inputs)[0]
        with guidance.applied(transformer):
            perturbed = transformer(**inputs)[0]
        with HeadPerturbation([(1, 1)]).applied(transformer):
            one = transformer(**inputs)[0]
        with accelerated(transformer, Recipe(Dense(), guidance=guidance)) as handle:
            guided = transformer(**inputs)[0]
            assert set(handle.bindings["transformer"].branch.layers) == chosen_layers(transformer, (1, 2))
    torch.testing.assert_close(guided, own + 2.5 * (own - perturbed), rtol=1e-4, atol=1e-5)
    for other in (guided, perturbed, one):
        assert not torch.allclose(other, own, atol=1e-3)
    assert not torch.allclose(perturbed, one, atol=1e-3)


def chosen_layers(transformer, indices) -> set[str]:
    """Names of layers by their flat index, which a layer's second attention (SD3.5) shares with it."""
    names = list(family_of(transformer).layers(transformer))
    return {name for name, index in zip(names, flat_indices(names), strict=True) if index in indices}
