"""Guidance with other inputs of the transformer, and of its batch: what the branches share stays exact."""

import dataclasses

import pytest
import torch
from diffusers import WanVACETransformer3DModel

from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import Clear, Dense, Neighborhood
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, disable, enable

W = 2.5
GUIDANCE = HeadPerturbation({(1, 1): 1.0, (2, 0): 0.5}, scale=W)


@pytest.fixture
def case(family, request):
    return request.getfixturevalue(family)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shares_blocks_exactly(transformer, inputs, guidance=GUIDANCE):
    """The partial forward is that of the whole perturbed model, whatever else goes into the transformer."""
    image = family_of(transformer).name in ("flux", "sd3")
    recipe = Recipe(Clear(3) if image else Neighborhood((3, 3, 3)), order="hilbert")
    with torch.no_grad():
        with accelerated(transformer, recipe):
            cond = transformer(**inputs)[0]
        with accelerated(transformer, recipe), guidance.applied(transformer):
            perturbed = transformer(**inputs)[0]
        with accelerated(transformer, dataclasses.replace(recipe, guidance=guidance)):
            close(transformer(**inputs)[0], cond + W * (cond - perturbed))
    assert not torch.allclose(cond, perturbed, atol=1e-3)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_with_controlnet_residuals(case):
    residuals = [random(1, 96, 32, seed=seed) for seed in range(3)]
    if family_of(case.pipe.transformer).name == "flux":
        more = {"controlnet_block_samples": residuals[:2], "controlnet_single_block_samples": residuals[2:]}
    else:
        more = {"block_controlnet_hidden_states": residuals[:2]}
    shares_blocks_exactly(case.pipe.transformer, case.inputs(case.make()) | more)


@pytest.mark.parametrize("family", ["flux"])
@pytest.mark.parametrize("kind", ["soft_pag", "seg"])
def test_with_a_reference_image(case, kind):
    inputs = case.inputs(case.make())
    ids = torch.cartesian_prod(torch.ones(1), torch.arange(5.0), torch.arange(7.0))
    inputs["img_ids"] = torch.cat([inputs["img_ids"], ids])
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], random(1, 35, 16)], dim=1)
    shares_blocks_exactly(case.pipe.transformer, inputs, dataclasses.replace(GUIDANCE, kind=kind))


@pytest.mark.parametrize("family", ["hunyuan"])
def test_with_a_given_first_frame(case):
    shares_blocks_exactly(
        case.make(image_condition_type="token_replace").transformer, case.inputs(case.make())
    )


@pytest.mark.parametrize("family", ["wan"])
@pytest.mark.parametrize("heads", [[(1, 1)], [(2, 0), (4, 1)]], ids=["blocks", "control"])
def test_with_control_blocks(case, heads):
    """VACE's run before the others, so perturbing one of them leaves nothing to share."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
    sizes |= {"text_dim": 16, "freq_dim": 16, "ffn_dim": 64, "num_layers": 3}
    torch.manual_seed(0)
    transformer = WanVACETransformer3DModel(**sizes, vace_layers=[0, 2], vace_in_channels=6).eval()
    inputs = case.inputs(case.make()) | {"control_hidden_states": random(1, 6, 3, 12, 16)}
    shares_blocks_exactly(transformer, inputs, HeadPerturbation(heads, scale=W))


@pytest.mark.parametrize("family", ["sd3"])
def test_halves_of_a_bare_transformer_s_batch(case):
    """The same latents twice are [uncond, cond]; others are all conditional."""
    one = case.inputs(case.make())
    other = one | {name: one[name] + 1 for name in ("encoder_hidden_states", "pooled_projections")}
    both = {k: torch.cat([other[k], x]) if torch.is_tensor(x) else x for k, x in one.items()}
    transformer = case.pipe.transformer
    with torch.no_grad():
        plain = transformer(**both)[0]
        with GUIDANCE.applied(transformer):
            perturbed = transformer(**both)[0]
        enable(transformer, Recipe(Dense(), guidance=GUIDANCE))
        close(transformer(**both)[0], plain + W * (plain - perturbed)[1:])
        both["hidden_states"] = torch.cat([one["hidden_states"], one["hidden_states"] * 2])
        disable(transformer)
        plain = transformer(**both)[0]
        with GUIDANCE.applied(transformer):
            perturbed = transformer(**both)[0]
        enable(transformer, Recipe(Dense(), guidance=GUIDANCE))
        close(transformer(**both)[0], plain + W * (plain - perturbed))
