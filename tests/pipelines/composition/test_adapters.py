"""IP-Adapters, which bring attention processors of their own."""

import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

from dit_accel.errors import UnavailableError
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, disable, enable


def install(case, pipe):
    """The processors that `load_ip_adapter` installs, with random weights: one per joint attention."""
    torch.manual_seed(3)
    transformer = pipe.transformer
    for block in transformer.transformer_blocks:
        if case.family == "flux":
            block.attn.set_processor(FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32))
        else:
            block.attn.set_processor(
                SD3IPAdapterJointAttnProcessor2_0(hidden_size=32, ip_hidden_states_dim=16, head_dim=16)
            )


@pytest.mark.feature("IP-Adapter loaded before enable", families=("flux", "sd3"))
def test_loaded_before(case, cell):
    pipe = case.make()
    install(case, pipe)
    before = pipe.transformer.attn_processors
    short = "it brings its own attention; make its layers dense"
    with cell.refused(UnavailableError, r"IPAdapter.*unload .*an IP-Adapter.*make the layer dense", short):
        enable(pipe, case.recipe)
    assert pipe.transformer.attn_processors == before


@pytest.mark.feature("IP-Adapter loaded while enabled", families=("flux", "sd3"))
def test_loaded_while_enabled(case, cell):
    pipe = case.make()
    dense = case.run(pipe)
    before = dict(pipe.transformer.attn_processors)
    enable(pipe, case.recipe)
    install(case, pipe)
    short = "diffusers replaces the processors; load before enable, its layers dense"
    with cell.refused(
        RuntimeError, r"replaced by .*IPAdapter.*loading an IP-Adapter\) and enable again", short
    ):
        case.run(pipe)
    disable(pipe)
    pipe.transformer.set_attn_processor(before)
    assert torch.equal(case.run(pipe), dense)


@pytest.mark.feature("IP-Adapter with its layers dense", families=("flux",))
def test_other_layers(case):
    """FLUX's acts in double blocks alone, so single blocks can be accelerated."""
    image = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))
    kwargs = {"joint_attention_kwargs": {"ip_hidden_states": [image]}}
    ref, pipe = case.make(), case.make()
    install(case, ref)
    install(case, pipe)
    untouched = case.run(ref, **kwargs)
    layers = case.layers(ref.transformer)
    mask = case.pattern.token_mask(case.layout)
    case._masked(layers, {name: mask for name in layers if name.startswith("single")})
    with accelerated(pipe, Recipe({"single": case.pattern}, order="hilbert")):
        torch.testing.assert_close(case.run(pipe, **kwargs), case.run(ref, **kwargs), rtol=1e-4, atol=1e-5)
    assert torch.equal(case.run(pipe, **kwargs), untouched)
