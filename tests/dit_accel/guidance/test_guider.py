"""The guider in modular pipelines, against the ordinary pipelines with the same guidance."""

import json

import pytest
import torch
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
    StableDiffusion3T2ICoreDenoiseStep,
)
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

from dit_accel.guidance import HeadPerturbation, HeadPerturbationGuidance
from dit_accel.patterns import Clear, Dense, Neighborhood
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable, handle_of

BOTH = pytest.mark.parametrize("family", ["sd3", "wan"])
G = 3.0
GUIDANCE = HeadPerturbation({(1, 1): 1.0, (2, 0): 0.5}, scale=2.5)
PAG = HeadPerturbation([1], kind="pag", tokens="image", scale=2.5)
SEG = HeadPerturbation([1], kind="seg", sigma=0.7, scale=2.5)
LATE = HeadPerturbation([(1, 1)], scale=2.5, start=0.5, strength=lambda done: 1 - done)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def options(case) -> dict:
    """What ordinary and modular pipelines both take."""
    positive, negative = noise(1, 7, 16, seed=1), noise(1, 7, 16, seed=2)
    both = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    if case.name == "sd3":
        both |= {"pooled_prompt_embeds": positive[:, 0], "negative_pooled_prompt_embeds": negative[:, 0]}
        size, latents = {"height": 128, "width": 192}, noise(1, 4, 16, 24, seed=0)
    else:
        size, latents = {"height": 96, "width": 128, "num_frames": 9}, noise(1, 4, 3, 12, 16, seed=0)
    return both | size | {"latents": latents, "num_inference_steps": 4}


def ordinary(case, pipe, cfg: float) -> torch.Tensor:
    return pipe(**options(case), guidance_scale=cfg, output_type="latent")[0]


def modular(case, pipe, guider, cfg: float) -> torch.Tensor:
    blocks = StableDiffusion3T2ICoreDenoiseStep() if case.name == "sd3" else WanCoreDenoiseStep()
    driver = blocks.init_pipeline()
    driver.update_components(transformer=pipe.transformer, scheduler=pipe.scheduler, guider=guider)
    chosen = options(case)
    if case.name == "sd3" and cfg == 1:  # may be left out here
        chosen |= {"negative_prompt_embeds": None, "negative_pooled_prompt_embeds": None}
    return driver(**chosen, output="latents")


@BOTH
@pytest.mark.parametrize("cfg", [1.0, G], ids=["plain", "cfg"])
@pytest.mark.parametrize("guidance", [GUIDANCE, PAG, SEG, LATE], ids=["heads", "pag", "seg", "schedule"])
def test_is_that_of_ordinary_pipelines(case, guidance, cfg):
    pipe = case.make()
    plain = ordinary(case, pipe, cfg)
    with accelerated(pipe, Recipe(Dense(), guidance=guidance)):
        expected = ordinary(case, pipe, cfg)
    actual = modular(case, pipe, HeadPerturbationGuidance(guidance, guidance_scale=cfg), cfg)
    close(actual, expected)
    assert not torch.allclose(actual, plain, atol=1e-3)
    assert handle_of(pipe) is None
    assert torch.equal(ordinary(case, pipe, cfg), plain)


@pytest.mark.parametrize("family", ["flux", "hunyuan", "hunyuan15"])
@pytest.mark.parametrize("cfg", [1.0, G], ids=["plain", "cfg"])
def test_in_a_loop_of_one_s_own(case, cfg):
    """FLUX and HunyuanVideo have no guider in their modular pipelines, or no such pipeline."""
    transformer, inputs = case.make().transformer, case.inputs(torch.float32)
    text = inputs.pop("encoder_hidden_states")
    guider = HeadPerturbationGuidance(GUIDANCE, guidance_scale=cfg)
    guider.set_state(step=0, num_inference_steps=4, timestep=inputs["timestep"])
    batches = guider.prepare_inputs({"encoder_hidden_states": (text, -text)})
    with torch.no_grad():
        for batch in batches:
            guider.prepare_models(transformer)
            batch.noise_pred = transformer(**inputs, encoder_hidden_states=batch.encoder_hidden_states)[0]
            guider.cleanup_models(transformer)
        cond, uncond = (transformer(**inputs, encoder_hidden_states=x)[0] for x in (text, -text))
        with GUIDANCE.applied(transformer):
            perturbed = transformer(**inputs, encoder_hidden_states=text)[0]
    assert len(batches) == 2 + (cfg > 1)
    close(guider(batches).pred, uncond + cfg * (cond - uncond) + 2.5 * (cond - perturbed))


@BOTH
def test_on_top_of_a_sparse_pattern(case):
    pipe = case.make()
    pattern = Clear(3) if case.name == "sd3" else Neighborhood((3, 3, 3))
    with accelerated(pipe, Recipe(pattern, guidance=GUIDANCE)):
        expected = ordinary(case, pipe, G)
    handle = enable(pipe.transformer, pattern)
    close(modular(case, pipe, HeadPerturbationGuidance(GUIDANCE, guidance_scale=G), G), expected)
    assert handle_of(pipe) is handle


@BOTH
def test_disabled_or_without_scale_is_no_guidance(case):
    pipe = case.make()
    plain = modular(case, pipe, HeadPerturbationGuidance(GUIDANCE, enabled=False), 1.0)
    nothing = HeadPerturbationGuidance(HeadPerturbation([(1, 1)], scale=0), guidance_scale=1.0)
    assert torch.equal(modular(case, pipe, nothing, 1.0), plain)
    close(plain, ordinary(case, pipe, 1.0))


@BOTH
def test_after_an_error_nothing_stays_perturbed(case):
    pipe, guider = case.make(), HeadPerturbationGuidance(GUIDANCE, guidance_scale=G)
    expected = modular(case, pipe, guider, G)
    calls = []

    def fail(module, args):
        calls.append(module)
        if len(calls) == 3:  # cond, uncond, perturbed
            raise InterruptedError

    with pipe.transformer.register_forward_pre_hook(fail), pytest.raises(InterruptedError):
        modular(case, pipe, guider, G)
    assert torch.equal(modular(case, pipe, guider, G), expected)
    assert handle_of(pipe) is None


def test_config_round_trip(tmp_path):
    guider = HeadPerturbationGuidance(GUIDANCE, guidance_scale=G)
    assert guider.new(guidance_scale=2.0).perturbation == GUIDANCE
    assert guider.new(guidance_scale=2.0).guidance_scale == 2.0
    guider.save_pretrained(tmp_path)
    assert "heads" in json.loads((tmp_path / "guider_config.json").read_text())["perturbation"]
    assert HeadPerturbationGuidance.from_pretrained(tmp_path).perturbation == GUIDANCE
    with pytest.raises(TypeError, match="must be a `HeadPerturbation`, got 3"):
        HeadPerturbationGuidance(3)
