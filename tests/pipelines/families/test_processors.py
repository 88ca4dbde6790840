"""What diffusers' own code does with the processors of an enabled transformer: IP-Adapters and PAG."""

import pytest
import torch
from diffusers import StableDiffusion3PAGImg2ImgPipeline, StableDiffusion3PAGPipeline

from dit_accel.errors import UnavailableError
from dit_accel.patterns import Clear, Dense
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, disable, enable, handle_of

WIDTH, TEXT, IMAGE = 32, 16, 24


def ip_adapter(transformer):
    """Random weights of an IP-Adapter of one picture, as its files hold them."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    layers = {}
    for i in range(transformer.config.num_layers):
        for name in ("to_k_ip", "to_v_ip"):
            layers |= {f"{i}.{name}.weight": random(WIDTH, TEXT), f"{i}.{name}.bias": random(WIDTH)}
    image = {"proj.weight": random(4 * TEXT, IMAGE), "proj.bias": random(4 * TEXT)}
    image |= {"norm.weight": torch.ones(TEXT), "norm.bias": torch.zeros(TEXT)}
    return {"image_proj": image, "ip_adapter": layers}


def load(pipe):
    pipe.load_ip_adapter(
        ip_adapter(pipe.transformer), weight_name="", image_encoder_pretrained_model_name_or_path=None
    )


EMBEDS = [torch.randn(1, 1, IMAGE, generator=torch.Generator().manual_seed(5))]
PICTURE = {"ip_adapter_image_embeds": EMBEDS, "negative_ip_adapter_image_embeds": EMBEDS}


class TestIPAdapter:
    """FLUX's acts in double blocks."""

    @pytest.mark.parametrize("attention", [Clear(4), {"double": Clear(3)}, {"single": Clear(2)}], ids=str)
    def test_loading_while_enabled(self, flux, attention):
        """Loading and unloading finish; then the processors that went missing are named."""
        pipe = flux.pipe
        untouched = flux.run(pipe)
        enable(pipe, Recipe(attention, order="hilbert"))
        load(pipe)
        with pytest.raises(RuntimeError, match=r"was replaced by .* call `dit_accel.disable` before replac"):
            flux.run(pipe)
        pipe.unload_ip_adapter()
        with pytest.raises(RuntimeError, match="was replaced by FluxAttnProcessor"):
            flux.run(pipe)
        disable(pipe)
        assert {type(p).__name__ for p in pipe.transformer.attn_processors.values()} == {"FluxAttnProcessor"}
        assert torch.equal(flux.run(pipe), untouched)

    def test_unloading_while_enabled(self, flux):
        """With the adapter's layers dense, which works until it is unloaded."""
        pipe, recipe = flux.pipe, Recipe({"single": Clear(3)}, order="hilbert")
        untouched = flux.run(pipe)
        with accelerated(pipe, recipe):
            expected = flux.run(pipe)
        load(pipe)
        enable(pipe, recipe)
        adapted = flux.run(pipe, **PICTURE)
        assert not torch.allclose(adapted, expected, atol=1e-3)
        pipe.set_ip_adapter_scale(0.0)
        torch.testing.assert_close(flux.run(pipe, **PICTURE), expected, rtol=1e-4, atol=1e-5)
        pipe.unload_ip_adapter()
        assert pipe.transformer.encoder_hid_proj is None
        with pytest.raises(RuntimeError, match="was replaced by FluxAttnProcessor"):
            flux.run(pipe)
        disable(pipe)
        assert torch.equal(flux.run(pipe), untouched)
        with accelerated(pipe, recipe):
            assert torch.equal(flux.run(pipe), expected)


PAG = [StableDiffusion3PAGPipeline, StableDiffusion3PAGImg2ImgPipeline]


@pytest.mark.parametrize("pipeline", PAG, ids=lambda cls: cls.__name__)
class TestPAG:
    """Its pipelines replace processors in every call."""

    def make(self, sd3, pipeline, layers):
        parts = {
            n: x for n, x in sd3.pipe.components.items() if n not in ("image_encoder", "feature_extractor")
        }
        pipe = pipeline(**parts, pag_applied_layers=layers)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @pytest.mark.parametrize(
        ("layers", "named"), [("blocks.1", "blocks.1"), (["blocks.2", "blocks.0"], "blocks.0")]
    )
    def test_refused(self, sd3, pipeline, layers, named):
        pipe = self.make(sd3, pipeline, layers)
        untouched = sd3.run(sd3.pipe)
        before = list(pipe.transformer.attn_processors.values())
        for attention in (Clear(3), {named: Clear(3)}):
            with pytest.raises(UnavailableError, match=rf"make these layers dense \('{named}' here\)"):
                enable(pipe, Recipe(attention))
            assert handle_of(pipe) is None
        assert all(a is b for a, b in zip(pipe.transformer.attn_processors.values(), before, strict=True))
        assert torch.equal(sd3.run(sd3.pipe), untouched)

    def test_accepted_where_its_layers_are_dense(self, sd3, pipeline):
        pipe = self.make(sd3, pipeline, "blocks.1")
        with accelerated(pipe, Recipe({"all": Clear(3), "blocks.1": Dense()})) as handle:
            assert handle.bindings["transformer"].sparse_layers == ["blocks.0", "blocks.2"]
            if pipeline is StableDiffusion3PAGPipeline:
                sd3.run(pipe, pag_scale=0.7)
                assert handle.stats()["calls"] == 3
