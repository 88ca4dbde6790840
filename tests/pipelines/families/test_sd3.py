import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.errors import UnavailableError
from dit_accel.patterns import Clear, Dense, Neighborhood
from dit_accel.pipelines import family_named
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, disable, enable
from dit_accel.summary import summary

FAMILY = family_named("sd3")
NEAR = Neighborhood((3, 5))
SD35 = {"dual_attention_layers": (0, 2), "qk_norm": "rms_norm"}
MODELS = pytest.mark.parametrize("model", [{}, SD35], ids=["sd3", "sd3.5"])
LAYERS = ["blocks.0", "blocks.1", "blocks.2", "blocks.0.attn2", "blocks.2.attn2"]  # of SD35


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def token_mask(pattern, name, grid=(8, 12), text_len=7):
    """A pattern's mask in a layer: its second attention has no text."""
    return pattern.token_mask(TokenLayout((1, *grid), 0 if name.endswith("attn2") else text_len))


def masked_pipe(sd3, masked, patterns, model=SD35, prepare=lambda pipe: None, **geometry):
    """An untouched pipeline whose own attention gets the token mask of a pattern, or of one per layer."""
    pipe = sd3.make(**model)
    prepare(pipe)
    modules = FAMILY.layers(pipe.transformer)
    patterns = patterns if isinstance(patterns, dict) else dict.fromkeys(modules, patterns)
    masked(modules, {name: token_mask(p, name, **geometry) for name, p in patterns.items()})
    return pipe


def under_masks(sd3, masked, patterns, model=SD35, prepare=lambda pipe: None, **run):
    geometry = {name: run[name] for name in ("grid", "text_len") if name in run}
    return sd3.run(masked_pipe(sd3, masked, patterns, model, prepare, **geometry), **run)


class TestMatchesMaskedDense:
    @MODELS
    @pytest.mark.parametrize("order", ["raster", "tile", "hilbert", "auto"])
    @pytest.mark.parametrize("pattern", [Clear(3), NEAR], ids=["clear", "neighborhood"])
    def test_orders_and_patterns(self, sd3, masked, pattern, order, model):
        pipe = sd3.make(**model)
        with accelerated(pipe, Recipe(pattern, order=order, block_size=(16, 16))):
            close(sd3.run(pipe), under_masks(sd3, masked, pattern, model))

    @MODELS
    @pytest.mark.parametrize(
        "run",
        [
            {"batch": 2, "cfg": 3.0},
            {"grid": (5, 13)},
            {"grid": (16, 3), "text_len": 1},
            {"text_len": 40, "steps": 1},
        ],
        ids=lambda run: "-".join(f"{k}{v}" for k, v in run.items()).replace(" ", ""),
    )
    def test_runs(self, sd3, masked, run, model):
        pipe = sd3.make(**model)
        with accelerated(pipe, Recipe(Clear(3), order="hilbert")):
            close(sd3.run(pipe, **run), under_masks(sd3, masked, Clear(3), model, **run))

    @pytest.mark.parametrize(
        ("recipe", "patterns"),
        [
            (Recipe(Clear(3), dense_layers=1), {n: Clear(3) for n in LAYERS if "0" not in n}),
            (Recipe(Clear(3), dense_layers={0, -1}), {"blocks.1": Clear(3)}),
            (Recipe({"blocks.0": NEAR}), {"blocks.0": NEAR, "blocks.0.attn2": NEAR}),
            (Recipe({"-1.attn2": NEAR}), {"blocks.2.attn2": NEAR}),
            (Recipe({"all": NEAR, "attn2": Dense()}), {f"blocks.{i}": NEAR for i in range(3)}),
            (
                Recipe({"all": NEAR, "blocks.attn2": Clear(3)}),
                {n: Clear(3) if "attn2" in n else NEAR for n in LAYERS},
            ),
        ],
        ids=["first-dense", "ends-dense", "block", "last-second", "second-dense", "second-other"],
    )
    def test_some_layers(self, sd3, masked, recipe, patterns):
        pipe = sd3.make(**SD35)
        with accelerated(pipe, recipe) as handle:
            assert handle.bindings["transformer"].sparse_layers == list(patterns)
            close(sd3.run(pipe), under_masks(sd3, masked, patterns))

    def test_heads(self, sd3, masked):
        ref, pipe = sd3.make(**SD35), sd3.make(**SD35)
        masks = {n: torch.stack([token_mask(p, n) for p in (Clear(3), NEAR)]) for n in LAYERS}
        masked(FAMILY.layers(ref.transformer), masks)
        with accelerated(pipe, Recipe({"all": NEAR, "heads.0": Clear(3)}, order="hilbert")):
            close(sd3.run(pipe, cfg=3.0), sd3.run(ref, cfg=3.0))

    def test_dense_steps(self, sd3, masked):
        """Dense steps keep the model's own order of tokens, the others do not."""
        pipe, ref = sd3.make(**SD35), masked_pipe(sd3, masked, Clear(3))
        own = {name: module.processor for name, module in FAMILY.layers(ref.transformer).items()}

        def masked_from_step_1(_, step, timestep, tensors):
            for name, module in FAMILY.layers(ref.transformer).items():
                module.set_processor(own[name])
            return tensors

        for name, module in FAMILY.layers(ref.transformer).items():
            module.set_processor(own[name].original)
        with accelerated(pipe, Recipe(Clear(3), order="hilbert", dense_steps=1)):
            close(sd3.run(pipe), sd3.run(ref, callback_on_step_end=masked_from_step_1))

    @MODELS
    def test_skip_layer_guidance(self, sd3, masked, model):
        """A call with fewer blocks and half the batch, which is no step of its own."""
        skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0, "skip_layer_guidance_stop": 0.7}
        run = {"cfg": 3.0, "steps": 4, **skip}
        expected = under_masks(sd3, masked, Clear(3), model, **run)
        assert not torch.allclose(expected, under_masks(sd3, masked, Clear(3), model, cfg=3.0, steps=4))
        pipe = sd3.make(**model)
        with accelerated(pipe, Recipe(Clear(3), order="hilbert")) as handle:
            close(sd3.run(pipe, **run), expected)
            assert (handle.stats()["calls"], handle.stats()["steps"], handle.step) == (6, 4, 3)

    def test_controlnet_residuals(self, sd3, masked):
        pipe, ref = sd3.make(**SD35), masked_pipe(sd3, masked, Clear(3))
        inputs = sd3.inputs(pipe)
        torch.manual_seed(0)
        inputs["block_controlnet_hidden_states"] = [torch.randn(1, 96, 32) for _ in range(2)]
        enable(pipe, Recipe(Clear(3), order="hilbert"))
        with torch.no_grad():
            close(pipe.transformer(**inputs)[0], ref.transformer(**inputs)[0])
            positional = inputs.pop("hidden_states")
            out = pipe.transformer(positional, **inputs | {"return_dict": True})
            close(out.sample, ref.transformer(positional, **inputs)[0])

    def test_odd_latents_are_cropped_as_the_model_does(self, sd3, masked):
        pipe, ref = sd3.make(), masked_pipe(sd3, masked, Clear(3), {})
        inputs = sd3.inputs(pipe) | {"hidden_states": torch.randn(1, 4, 17, 25)}
        enable(pipe, Recipe(Clear(3), order="hilbert"))
        with torch.no_grad():
            close(pipe.transformer(**inputs)[0], ref.transformer(**inputs)[0])


class TestProcessors:
    @MODELS
    def test_disable_is_bit_identical(self, sd3, model):
        pipe = sd3.make(**model)
        dense, before = sd3.run(pipe, cfg=3.0), list(pipe.transformer.attn_processors.values())
        enable(pipe, Recipe(Clear(3), order="hilbert"))
        assert not torch.allclose(sd3.run(pipe, cfg=3.0), dense, atol=1e-3)
        disable(pipe)
        assert all(a is b for a, b in zip(pipe.transformer.attn_processors.values(), before, strict=True))
        assert torch.equal(sd3.run(pipe, cfg=3.0), dense)

    def test_fused_projections(self, sd3, masked):
        expected = under_masks(sd3, masked, Clear(3), {})
        transformer = sd3.pipe.transformer
        transformer.fuse_qkv_projections()
        for layer in FAMILY.layers(transformer).values():  # what must not be read any more
            layer.to_q.weight.data += 1
        with accelerated(sd3.pipe, Recipe(Clear(3), order="hilbert")):
            close(sd3.run(sd3.pipe), expected)
        transformer.unfuse_qkv_projections()  # leaves the fused weights in the layers
        for layer in FAMILY.layers(transformer).values():
            layer.to_q.weight.data -= 1
            layer.to_qkv.weight.data += 1
        with accelerated(sd3.pipe, Recipe(Clear(3), order="hilbert")):
            close(sd3.run(sd3.pipe), expected)
            transformer.fuse_qkv_projections()
            with pytest.raises(
                RuntimeError, match=r"replaced by FusedJointAttnProcessor2_0 .* `dit_accel.disable`"
            ):
                sd3.run(sd3.pipe)

    @pytest.mark.parametrize("model", [{"qk_norm": "rms_norm"}, {"dual_attention_layers": (1,)}], ids=str)
    def test_fused_projections_that_diffusers_gets_wrong(self, sd3, model):
        pipe = sd3.make(**model)
        pipe.transformer.fuse_qkv_projections()
        with pytest.raises(UnavailableError, match=r"leaves out the QK norm .*`transformer.unfuse_qkv_pro"):
            enable(pipe, Clear(3))
        pipe.transformer.unfuse_qkv_projections()
        enable(pipe, Clear(3))

    @pytest.mark.parametrize("name", ["SD3IPAdapterJointAttnProcessor2_0", "PAGCFGJointAttnProcessor2_0"])
    def test_others_are_refused(self, sd3, name):
        from diffusers.models import attention_processor

        sizes = {"hidden_size": 32, "ip_hidden_states_dim": 16, "head_dim": 16} if "IP" in name else {}
        processor = getattr(attention_processor, name)(**sizes)
        sd3.pipe.transformer.transformer_blocks[1].attn.set_processor(processor)
        with pytest.raises(UnavailableError, match=rf"layer blocks\.1 .* {name}, .*make the layer dense"):
            enable(sd3.pipe, Clear(3))
        with accelerated(sd3.pipe, Recipe(Clear(3), dense_layers={1})):
            assert sd3.pipe.transformer.transformer_blocks[1].attn.processor is processor

    def test_xformers_is_stood_in_for(self, sd3, masked):
        from diffusers.models.attention_processor import XFormersJointAttnProcessor

        pipe = sd3.make(**SD35)
        pipe.transformer.set_attn_processor(XFormersJointAttnProcessor())
        with accelerated(pipe, Recipe(Clear(3), order="hilbert")):
            close(sd3.run(pipe), under_masks(sd3, masked, Clear(3)))


def test_summary(sd3):
    pipe = sd3.make(**SD35)
    assert [row["layer"] for row in summary(pipe).rows] == LAYERS
    handle = enable(pipe, Recipe({"all": Clear(3), "blocks.1": Dense()}))
    sd3.run(pipe)
    table = summary(pipe)
    assert "(sd3), grid 1 x 8 x 12 tokens + 7 text" in str(table)
    names = [line.split()[0] for line in str(table).splitlines()[-4:]]
    assert names == ["blocks.0", "blocks.1", "blocks.2", "blocks.0-2.attn2"]
    joint, second = (Clear(3).density(TokenLayout((1, 8, 12), text_len)) for text_len in (7, 0))
    assert [row["density"] for row in table.rows] == pytest.approx([joint, 1, joint, second, second])
    pairs = 103**2, 96**2
    total = (2 * joint + 1) * pairs[0] + 2 * second * pairs[1]
    assert handle.run_density == pytest.approx(total / (3 * pairs[0] + 2 * pairs[1]))
