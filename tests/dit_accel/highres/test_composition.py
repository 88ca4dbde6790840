"""The cells of the table "What composes" of docs/highres.md that no other test covers."""

from types import SimpleNamespace

import pytest
import torch

import dit_accel
from dit_accel import Recipe
from dit_accel.errors import UnavailableError
from dit_accel.guidance import HeadPerturbation
from dit_accel.highres import Anchor, Compressed, Naive, Shifted, Swim
from dit_accel.highres.proportional import proportional
from dit_accel.patterns import Clear, Dense

WINDOWS = Naive((1, 2))
SWIM = Swim((1, 2))
COMPRESSED = Compressed((2, 3))


@pytest.fixture(params=["wan", "flux", "sd3", "hunyuan"])
def family(request, families):
    tools = families[request.param]
    return SimpleNamespace(**vars(tools), pipe=tools.make(), name=request.param)


def latents(family, method, recipe=None, **options):
    if recipe is not None:
        dit_accel.enable(family.pipe, recipe)
    try:
        with method.applied(family.pipe):
            return family.run(family.pipe, **options)
    finally:
        dit_accel.disable(family.pipe)


@pytest.mark.parametrize("method", [SWIM, WINDOWS, COMPRESSED], ids=["swim", "naive", "compressed"])
def test_backends_agree(family, method):
    plain = latents(family, method)
    for backend in ("gather", "reference"):
        other = latents(family, method, Recipe(Dense(), backend=backend))
        assert torch.allclose(other, plain, atol=5e-6)


@pytest.mark.parametrize("method", [SWIM, WINDOWS], ids=["swim", "naive"])
def test_tails(family, method):
    """In blocks of 16 tokens windows leave some out, which then show through."""
    small = {"block_size": (16, 16)}
    plain = latents(family, method, Recipe(Dense(), **small))
    tail = latents(family, method, Recipe(Dense(), tail="pooled", **small))
    assert torch.isfinite(tail).all()
    assert not torch.allclose(tail, plain, atol=1e-5)


@pytest.mark.parametrize("method", [SWIM, WINDOWS, COMPRESSED], ids=["swim", "naive", "compressed"])
def test_quantization(family, method):
    plain, int8 = (latents(family, method, recipe) for recipe in (None, Recipe(Dense(), quantization="int8")))
    assert torch.allclose(int8, plain, atol=5e-3)
    assert not torch.equal(int8, plain)


def test_windows_take_the_place_of_a_recipes_patterns(family):
    plain = latents(family, WINDOWS)
    assert torch.allclose(latents(family, WINDOWS, Recipe(Clear(2), dense_steps=1)), plain, atol=5e-6)
    assert not torch.allclose(latents(family, Shifted((2, 2))), plain, atol=1e-5)


def test_guidance_by_heads_in_windows(wan):
    recipe = Recipe(Dense(), guidance=HeadPerturbation(heads=[(1, 0)]))
    family = SimpleNamespace(**vars(wan))
    assert not torch.allclose(latents(family, WINDOWS, recipe), latents(family, WINDOWS), atol=1e-5)


def test_step_caches_in_windows(wan):
    from diffusers import FirstBlockCacheConfig

    family = SimpleNamespace(**vars(wan))
    plain = latents(family, WINDOWS)
    wan.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    assert torch.allclose(latents(family, WINDOWS), plain, atol=1e-5)


def test_compressed_keys_are_a_tail(wan):
    family = SimpleNamespace(**vars(wan))
    small = {"block_size": (16, 16)}
    plain = latents(family, COMPRESSED, Recipe(Dense(), **small))
    assert torch.equal(latents(family, COMPRESSED, Recipe(Clear(2), tail="pooled", **small)), plain)
    assert not torch.allclose(latents(family, COMPRESSED), plain, atol=1e-5)  # other blocks, other means


def test_a_tail_beside_an_anchor_is_refused(flux):
    dit_accel.enable(flux.pipe, Recipe(Dense(), tail="pooled"))
    with pytest.raises((ValueError, UnavailableError), match="hides"), Anchor((2, 2)).applied(flux.pipe):
        flux.run(flux.pipe)


def test_reference_images_are_refused(flux):
    inputs = {k: v for k, v in flux.inputs(flux.pipe).items() if k != "return_dict"}
    other = inputs["img_ids"].clone()
    other[:, 0] = 1
    inputs |= {"img_ids": torch.cat([inputs["img_ids"], other])}
    inputs |= {"hidden_states": inputs["hidden_states"].repeat(1, 2, 1)}
    with torch.no_grad(), SWIM.applied(flux.pipe), pytest.raises(UnavailableError, match="reference image"):
        flux.pipe.transformer(**inputs)


def test_diffusion_forcing_is_refused(families):
    make, run = families["skyreels"].make, families["skyreels"].run
    pipe = make(num_frame_per_block=3)
    with SWIM.applied(pipe), pytest.raises(UnavailableError, match="one noise level"):
        run(pipe)


def test_proportional_windows_that_move(flux):
    with Shifted((2, 2)).applied(flux.pipe), proportional(flux.pipe, 12):
        assert torch.isfinite(flux.run(flux.pipe)).all()


def test_proportional_windows(family):
    plain = latents(family, WINDOWS)
    with WINDOWS.applied(family.pipe), proportional(family.pipe, 12):
        assert not torch.allclose(family.run(family.pipe), plain, atol=1e-6)
