"""The other pipelines of the same transformers: image-to-image, inpainting, Fill, Kontext, ControlNet."""

import diffusers
import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.runtime.switching import accelerated

LATENT_CHANNELS = {"flux": 4, "sd3": 16}  # 16 is what SD3's inpainting insists on
OF_SD3 = {"in_channels": 16, "out_channels": 16}


def autoencoder(channels: int) -> diffusers.AutoencoderKL:
    """A random autoencoder that shrinks 8 times."""
    torch.manual_seed(4)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "latent_channels": channels}
    return diffusers.AutoencoderKL(**blocks, **sizes, shift_factor=0.1).eval()


def works(case, kind, config=None, parts=None, layout=None, **run):
    """A run of another pipeline around the same transformer, whose scheduler tells the steps as well.

    `parts` are those that only that pipeline has.
    """
    generator = torch.Generator().manual_seed(7)
    image = torch.rand(1, 3, 128, 192, generator=generator)
    text, pooled = torch.randn(1, 7, 16, generator=generator), torch.randn(1, 16, generator=generator)
    negative = {"negative_prompt_embeds": text, "negative_pooled_prompt_embeds": pooled}
    vae = autoencoder(LATENT_CHANNELS[case.family])

    def make(untouched):
        known = untouched.components | {"vae": vae} | (parts or {})
        pipe = kind(**{name: part for name, part in known.items() if name in kind.__init__.__annotations__})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def images(pipe):
        torch.manual_seed(6)  # SD3's ControlNet pipeline draws its control image's latents from it
        images = {"image": image} if "control_image" not in run else {}
        return pipe(
            **images, prompt_embeds=text, pooled_prompt_embeds=pooled, height=128, width=192,
            num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent",
            **negative if case.family == "sd3" else {}, **run,
        ).images  # fmt: skip

    config = config or (OF_SD3 if case.family == "sd3" else {})
    pipe, expected = make(case.make(**config)), images(make(case.masked(layout=layout, **config)))
    untouched = images(pipe)
    assert not torch.allclose(expected, untouched, atol=1e-3)
    with accelerated(pipe, case.recipe) as handle:
        torch.testing.assert_close(images(pipe), expected, rtol=1e-4, atol=1e-5)
        assert handle.stats()["steps"] == (4 if "strength" not in run else 2)
    assert torch.equal(images(pipe), untouched)


def mask_of_left_half() -> torch.Tensor:
    mask = torch.zeros(1, 1, 128, 192)
    mask[..., :96] = 1
    return mask


@pytest.mark.feature("Image-to-image pipeline", families=("flux", "sd3"))
def test_image_to_image(case):
    name = {"flux": "FluxImg2ImgPipeline", "sd3": "StableDiffusion3Img2ImgPipeline"}[case.family]
    works(case, getattr(diffusers, name), strength=0.5)


@pytest.mark.feature("Inpainting pipeline", families=("flux", "sd3"))
def test_inpainting(case):
    name = {"flux": "FluxInpaintPipeline", "sd3": "StableDiffusion3InpaintPipeline"}[case.family]
    works(case, getattr(diffusers, name), strength=0.5, mask_image=mask_of_left_half())


@pytest.mark.feature("Fill pipeline", families=("flux",))
def test_fill(case):
    """The masked image and the mask come beside the latents, as channels: 16 + 16 + 4 * 8 * 8."""
    config = {"in_channels": 16 + 16 + 256, "out_channels": 16, "guidance_embeds": True}
    works(case, diffusers.FluxFillPipeline, config, mask_image=mask_of_left_half())


@pytest.mark.feature("Kontext pipeline", families=("flux",))
def test_kontext(case):
    """The reference image is attended densely."""
    layout = TokenLayout((1, 8, 12), 7, text_first=True, anchor=(1, 8, 12))
    config = {"in_channels": 16, "guidance_embeds": True}
    works(case, diffusers.FluxKontextPipeline, config, layout=layout, _auto_resize=False, max_area=128 * 192)


@pytest.mark.feature("ControlNet pipeline", families=("flux", "sd3"))
def test_controlnet(case):
    generator = torch.Generator().manual_seed(5)
    control = torch.rand(1, 3, 128, 192, generator=generator)
    model = {"flux": "FluxControlNetModel", "sd3": "SD3ControlNetModel"}[case.family]
    name = {"flux": "FluxControlNetPipeline", "sd3": "StableDiffusion3ControlNetPipeline"}[case.family]
    config = OF_SD3 if case.family == "sd3" else {}
    sizes = {
        "flux": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16},
        "sd3": {"num_layers": 2, "num_extra_conditioning_channels": 0},
    }[case.family]
    transformer = case.make(**config).transformer
    controlnet = getattr(diffusers, model).from_transformer(transformer, **sizes).eval()
    for parameter in controlnet.parameters():  # its outputs begin at zero
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    works(case, getattr(diffusers, name), parts={"controlnet": controlnet}, control_image=control)
