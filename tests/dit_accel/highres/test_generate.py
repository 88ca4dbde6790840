"""Passes of a generation above native size: the same by hand, their steps, errors, and what is kept."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import dit_accel
from dit_accel import Recipe, latents
from dit_accel.highres import METHODS, Naive, Swim, Upscaled, generate
from dit_accel.highres.native import Native, Size
from dit_accel.highres.schedule import Part, first_level, own_shift
from dit_accel.patterns import Clear
from dit_accel.pipelines import load

PROMPT = "a fox at the top left on a blue striped background"


@pytest.fixture(scope="module")
def tiny_flux():
    return quiet(load("tiny-flux"))


@pytest.fixture(scope="module")
def tiny_wan():
    return quiet(load("tiny-wan"))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def options(**changes):
    seed = torch.Generator().manual_seed(3)
    shared = {"num_inference_steps": 4, "output_type": "np", "generator": seed, "max_sequence_length": 24}
    return {"width": 96, "height": 80, **shared, **changes}


def image(pipe, prompt=PROMPT, **changes) -> np.ndarray:
    return generate(pipe, prompt, **options(**changes)).images


def video(pipe, prompt=PROMPT, **changes) -> np.ndarray:
    return generate(pipe, prompt, **options(width=80, height=80, num_frames=5, **changes)).frames


# -- one way through -----------------------------------------------------------------------------------------


def test_two_passes_by_hand(tiny_flux):
    """FLUX takes latents and the end of a list of noise levels itself."""
    pipe, generator = tiny_flux, torch.Generator().manual_seed(3)
    shared = {"generator": generator, "max_sequence_length": 24}
    native = pipe(PROMPT, height=56, width=72, num_inference_steps=4, output_type="pt", **shared).images
    enlarged = F.interpolate(native, (80, 96), mode="bilinear", align_corners=False)
    with torch.no_grad():
        encoded = pipe.vae.encode(enlarged * 2 - 1).latent_dist.mode()
    encoded = (encoded - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    config = pipe.scheduler.config  # the pipeline's own shift at 10 x 12 tokens
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (120 - config.base_image_seq_len)
    levels = np.array([1, 0.75, 0.5, 0.25])[2:]
    first = np.exp(mu) / (np.exp(mu) + 1 / levels[0] - 1)
    noise = torch.randn(encoded.shape, generator=generator)
    begun = pipe._pack_latents(first * noise + (1 - first) * encoded, 1, 4, 20, 24)
    shared |= {"latents": begun.float(), "sigmas": levels.tolist(), "output_type": "np"}
    wanted = pipe(PROMPT, height=80, width=96, num_inference_steps=2, **shared).images
    assert np.abs(image(pipe, method="upscaled", strength=0.5) - wanted).max() < 1e-4


def test_wan_runs_the_end_of_its_schedule(tiny_wan):
    steps = []

    def note(pipe, step, timestep, values):
        steps.append((step, float(timestep), len(pipe.scheduler.timesteps)))
        return values

    result = video(tiny_wan, method="swim", num_inference_steps=5, shift=9.0, callback_on_step_end=note)
    assert result.shape == (1, 5, 80, 80, 3)
    assert np.isfinite(result).all()
    scheduler = type(tiny_wan.scheduler).from_config(tiny_wan.scheduler.config)
    scheduler.set_timesteps(5)
    above = type(scheduler).from_config(scheduler.config, flow_shift=9.0)
    above.set_timesteps(5)
    timesteps = [*scheduler.timesteps.tolist(), *above.timesteps[2:].tolist()]
    assert steps == [(i, t, 5 if i < 5 else 3) for i, t in enumerate(timesteps)]


def test_windows_over_everything_are_the_upscaled_pass(tiny_flux):
    wanted = image(tiny_flux, method="upscaled")
    for method in (Naive((99, 99)), Swim((99, 99), None, None), Swim((99, 99), 1, None)):
        assert np.abs(image(tiny_flux, method=method) - wanted).max() < 1e-4
    assert np.abs(image(tiny_flux, method="naive") - wanted).max() > 1e-3


def test_direct_is_the_pipeline(tiny_flux):
    wanted = tiny_flux(PROMPT, **options()).images
    assert np.array_equal(image(tiny_flux, method="direct"), wanted)


def test_samples_and_seeds(tiny_flux):
    generators = [torch.Generator().manual_seed(i) for i in (1, 2)]
    prompts = [PROMPT, "a blue square at the bottom right on a plain background"]
    both = image(tiny_flux, prompts, generator=generators)
    assert both.shape == (2, 80, 96, 3)
    alone = image(tiny_flux, prompts[1], generator=torch.Generator().manual_seed(2))
    assert np.abs(both[1] - alone[0]).max() < 1e-3
    two = image(tiny_flux, num_images_per_prompt=2)
    assert two.shape == (2, 80, 96, 3)
    assert np.array_equal(image(tiny_flux), image(tiny_flux))


@pytest.mark.parametrize("kind", ["pil", "pt", "latent"])
def test_output_types(tiny_flux, kind):
    result = generate(tiny_flux, PROMPT, **options(output_type=kind)).images
    assert {"pil": lambda x: x[0].size == (96, 80), "pt": lambda x: x.shape == (1, 3, 80, 96),
            "latent": lambda x: x.shape == (1, 120, 16)}[kind](result)  # fmt: skip
    assert isinstance(generate(tiny_flux, PROMPT, **options(return_dict=False)), tuple)


def test_everything_is_put_back(tiny_flux):
    scheduler, bar = tiny_flux.scheduler, dict(tiny_flux._progress_bar_config)
    dit_accel.enable(tiny_flux, Recipe(Clear(3)))
    image(tiny_flux)
    assert tiny_flux.scheduler is scheduler
    assert tiny_flux._progress_bar_config == bar
    assert dit_accel.handle_of(tiny_flux).recipe == Recipe(Clear(3))
    dit_accel.disable(tiny_flux)
    with pytest.raises(ZeroDivisionError):
        image(tiny_flux, callback_on_step_end=lambda pipe, step, *_: {} if step < 4 else 1 / 0)
    assert tiny_flux.scheduler is scheduler
    assert dit_accel.handle_of(tiny_flux) is None


def test_interrupted_in_the_native_pass(tiny_flux):
    def stop(pipe, step, timestep, values):
        pipe._interrupt = True
        return values

    assert image(tiny_flux, callback_on_step_end=stop).shape == (1, 56, 72, 3)


def test_other_arguments_above_native_size(tiny_flux):
    wanted = image(tiny_flux)
    assert np.array_equal(image(tiny_flux, above={"true_cfg_scale": 1.0}), wanted)
    guided = {"negative_prompt": "", "true_cfg_scale": 4.0}
    assert not np.array_equal(image(tiny_flux, above=guided), wanted)


# -- a result that is given or kept --------------------------------------------------------------------------


def test_kept_result(tiny_flux, tmp_path):
    path = tmp_path / "base.safetensors"

    def stop(pipe, step, timestep, values):
        if step == 4:
            raise KeyboardInterrupt
        return values

    wanted = image(tiny_flux)
    with pytest.raises(KeyboardInterrupt):
        image(tiny_flux, keep=path, callback_on_step_end=stop)
    steps = []
    resumed = image(tiny_flux, keep=path, callback_on_step_end=lambda p, i, t, v: steps.append(i) or v)
    assert steps == [0, 1]
    assert np.array_equal(resumed, wanted)
    assert np.array_equal(image(tiny_flux, keep=path, method="upscaled"), image(tiny_flux, method="upscaled"))
    with pytest.raises(ValueError, match=r"is of another request: `prompt` was 'a fox"):
        image(tiny_flux, "a blue square", keep=path)
    with pytest.raises(ValueError, match=r"is of another request: `part` was Part"):
        image(tiny_flux, method="growing", keep=path)  # whose native pass ends early
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        image(tiny_flux, keep=path)


def test_given_picture(tiny_flux):
    picture = torch.rand(1, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    plain = image(tiny_flux, base=picture, strength=0.25)
    assert plain.shape == (1, 80, 96, 3)
    steps = []
    image(tiny_flux, base=picture, callback_on_step_end=lambda p, i, t, v: steps.append(i) or v)
    assert steps == [0, 1]


# -- errors before any work ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 100}, "`width` must be a multiple of 8 for this model, got 100; try 96 or 104"),
        ({"height": 0}, "`height` must be a positive integer, got 0"),
        ({"width": 32, "height": 32}, "must be of at least the native area, 64x64, got 32x32"),
        ({"num_frames": 5}, "`num_frames` is for video models"),
        ({"strength": 0}, "`strength` must be above 0 and at most 1, got 0"),
        ({"strength": 1.5}, "`strength` must be above 0 and at most 1, got 1.5"),
        ({"strength": 0.2}, "leaves none of 4 steps"),
        ({"method": "swimm"}, "`method` must be one of swim, clear, shifted"),
        ({"method": 3}, "`method` must be one of"),
        ({"shift": 0}, "`shift` must be a positive number, got 0"),
        ({"native": (64,)}, "`native` must be 2 integers"),
        ({"keep": "base.png"}, "`keep` must name a .safetensors file"),
        ({"keep": "x.safetensors", "method": "direct"}, "has no native pass"),
        ({"base": torch.zeros(1, 3, 8, 8) - 1}, "`base` must have values from 0 to 1, got -1 to -1"),
        ({"base": torch.zeros(1, 4, 8, 8)}, "`base` must be a tensor of pictures"),
        ({"latents": None}, "there is `latents`, which the passes set themselves"),
        ({"above": {"width": 3}}, "`above` has `width`, which the passes set themselves"),
    ],
)
def test_refused(tiny_flux, changes, message):
    hook = tiny_flux.transformer.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with hook, pytest.raises(ValueError, match=message):
        image(tiny_flux, **changes)


def test_refused_of_other_models(tiny_wan, sd3, flux):
    with pytest.raises(ValueError, match="`num_frames` must be a multiple of 4 plus 1 for this model, got 6"):
        generate(tiny_wan, PROMPT, width=128, height=128, num_frames=6)
    with pytest.raises(ValueError, match="this model has places for 24 rows and columns"):
        generate(sd3.pipe, PROMPT, width=512, height=512, native=(64, 64))
    with pytest.raises(dit_accel.UnavailableError, match="none of those whose native size is known"):
        generate(flux.pipe, PROMPT, width=512, height=512)
    with pytest.raises(TypeError, match="there is `widht`, which FluxPipeline does not take"):
        generate(flux.pipe, PROMPT, width=512, height=512, native=(64, 64), widht=3)


def test_schedulers_of_no_flow(tiny_flux, monkeypatch):
    from diffusers import DDIMScheduler

    monkeypatch.setattr(tiny_flux, "scheduler", DDIMScheduler())
    with pytest.raises(dit_accel.UnavailableError, match="scheduler of flows"):
        image(tiny_flux)


# -- sizes and schedules -------------------------------------------------------------------------------------


def test_native_size_that_is_given(tiny_flux, tiny_wan):
    assert Native.of(tiny_flux, (None, 32, 48)).size == Size(48, 32)
    assert Native.of(tiny_wan, (None, 32, 48)).size == Size(48, 32, 81)  # as its pipeline's default
    assert Native.of(tiny_wan, (9, 32, 48)).size == Size(48, 32, 9)


def test_a_kept_result_of_several_generators(tiny_flux, tmp_path):
    generators = lambda: [torch.Generator().manual_seed(i) for i in (1, 2)]  # noqa: E731
    shared = {"prompt": [PROMPT] * 2, "num_inference_steps": 2, "keep": tmp_path / "two.safetensors"}
    first = image(tiny_flux, generator=generators(), **shared)
    assert np.array_equal(image(tiny_flux, generator=generators(), **shared), first)


def test_native_size_of_an_aspect(tiny_flux):
    native = Native.of(tiny_flux)
    assert native.of_aspect(Size(128, 128)) == Size(64, 64)
    assert native.of_aspect(Size(192, 96)) == Size(88, 48)
    wan = Native(native.family, Size(832, 480, 81), (16, 16), 4, True, False)
    assert wan.of_aspect(Size(1920, 1088, 81)) == Size(832, 480, 81)  # as FreeSwim has it
    assert wan.grid(Size(1920, 1088, 81)) == (21, 68, 120)


@pytest.mark.parametrize("tokens", [64, 100, 5000])
def test_own_shift_is_what_the_pipeline_uses(tiny_flux, tokens):
    scheduler = type(tiny_flux.scheduler).from_config(tiny_flux.scheduler.config)
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    sigmas = np.linspace(1, 0.1, 10)
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    part = Part(10, 4, shift=own_shift(config, tokens))
    assert first_level(tiny_flux, part) == pytest.approx(float(scheduler.sigmas[4]), rel=1e-5)


def test_packing_is_the_pipelines(tiny_flux):
    x = torch.randn(2, 4, 12, 16)
    tokens = tiny_flux._pack_latents(x, 2, 4, 12, 16)
    assert torch.equal(latents.packed(x), tokens)
    unpacked, back = latents.packing(tiny_flux, 48, 64)(tokens)
    assert torch.equal(unpacked, x)
    assert torch.equal(back(unpacked), tokens)


def test_names():
    assert all(METHODS[name].name == name for name in METHODS)
    assert repr(Upscaled()) == "Upscaled()"
