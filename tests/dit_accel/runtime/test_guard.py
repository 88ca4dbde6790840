"""A run that turns NaN or infinite raises, naming step and layer, unless the recipe says otherwise."""

import pickle

import pytest
import torch

from dit_accel import NonFiniteError, Recipe, accelerated, enable
from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import Clear, Dense, Neighborhood
from dit_accel.runtime import guard

FAMILIES = pytest.mark.parametrize("family", ["flux", "sd3", "wan", "hunyuan"])


@pytest.fixture
def case(family, request):
    return request.getfixturevalue(family)


def sparse(family: str):
    return Clear(3) if family in ("flux", "sd3") else Neighborhood((3, 3, 3))


@FAMILIES
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_names_the_layer_where_it_began(case, family, value, dense):
    handle = enable(case.pipe, Dense() if dense else sparse(family))
    name, layer = list(handle.bindings["transformer"].modules.items())[1]
    with torch.no_grad():
        layer.to_v.weight[0, 0] = value
    with pytest.raises(
        NonFiniteError, match=rf"step 0 of 3 .* began in attention layer {name}\. .*dense_layers"
    ):
        case.run(case.pipe)


def test_names_a_module_that_is_no_layer(flux):
    enable(flux.pipe, Clear(3))
    with torch.no_grad():
        flux.pipe.transformer.transformer_blocks[1].ff.net[2].bias[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"began in module transformer_blocks\.1\.ff\.net\.2\."):
        flux.run(flux.pipe)


def test_says_that_the_inputs_were_not_finite(wan):
    enable(wan.pipe, Neighborhood((3, 3, 3)))
    inputs = wan.inputs(wan.pipe)
    inputs["hidden_states"][0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="what module patch_embedding was given was not finite already"):
        wan.pipe.transformer(**inputs)


@FAMILIES
def test_in_the_middle_of_a_run(case, family):
    """And the next run is as if nothing had happened."""
    enable(case.pipe, sparse(family))
    expected = case.run(case.pipe)

    def spoil(pipe, step, timestep, values):
        return {"latents": values["latents"] * float("nan")} if step == 1 else values

    with pytest.raises(NonFiniteError, match="step 2 of 3"):
        case.run(case.pipe, callback_on_step_end=spoil)
    assert torch.equal(case.run(case.pipe), expected)


def test_can_be_switched_off(flux):
    with torch.no_grad():
        flux.pipe.transformer.transformer_blocks[0].attn.to_v.weight[0, 0] = float("nan")
    with accelerated(flux.pipe, Recipe(Clear(3), guard=False)):
        assert flux.run(flux.pipe).isnan().any()
    with pytest.raises(ValueError, match="`guard` must be True or False, got 'no'"):
        Recipe(Clear(3), guard="no")
    assert Recipe.from_dict(Recipe(Clear(3), guard=False).to_dict()).guard is False


def test_of_guidance(flux):
    perturbation = HeadPerturbation([(1, 0)], kind="temperature", temperature=1e308, scale=1e308)
    enable(flux.pipe, Recipe(Clear(3), guidance=perturbation))
    with pytest.raises(NonFiniteError, match="in the perturbed branch of guidance"):
        flux.run(flux.pipe)


def test_a_late_answer_is_read_at_the_next_call(flux, monkeypatch):
    """As a GPU gives it: nothing waits for it in its own call, but for the last of a run."""
    waited = []

    class Event:
        def synchronize(self):
            waited.append(handle.step)

    now = guard.watch

    def late(sample, step, total, again):
        watched = now(sample, step, total, again)
        watched.ready = Event()
        return watched

    monkeypatch.setattr(guard, "watch", late)
    handle = enable(flux.pipe, Clear(3))
    flux.run(flux.pipe)
    assert waited == [1, 2, 2]  # steps 0 and 1 at the call after them, step 2 at once
    pickle.loads(pickle.dumps(handle.latest))
    with torch.no_grad():
        flux.pipe.transformer.transformer_blocks[1].attn.to_v.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"step 0 of 3 .* attention layer double\.1"):
        flux.run(flux.pipe)
