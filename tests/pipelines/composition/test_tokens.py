"""Tokens that break naive geometry: residuals from outside, reference images, timesteps per token."""

import pytest
import torch
from diffusers import WanVACETransformer3DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from dit_accel import TokenLayout
from dit_accel.runtime.switching import accelerated, enable


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def call(pipe, inputs):
    return pipe.transformer(**inputs)[0]


def works(case, inputs, layout=None, **config):
    """One call with these inputs, under a dense mask and after `disable`."""
    pipe = case.make(**config)
    untouched, expected = call(pipe, inputs), call(case.masked(layout=layout, **config), inputs)
    assert not torch.allclose(expected, untouched, atol=1e-3)
    with accelerated(pipe, case.recipe):
        close(call(pipe, inputs), expected)
    assert torch.equal(call(pipe, inputs), untouched)


@pytest.mark.feature("ControlNet residuals", families=("flux", "sd3", "qwen"))
def test_controlnet_residuals(case):
    """Of every block, and of fewer than there are blocks."""
    inputs = case.inputs()
    residuals = [random(1, 96, 32, seed=seed) for seed in range(3)]
    if case.family == "flux":
        more = {"controlnet_block_samples": residuals[:1], "controlnet_single_block_samples": residuals[1:]}
        works(case, inputs | more)
        works(case, inputs | {"controlnet_block_samples": residuals[:1], "controlnet_blocks_repeat": True})
    elif case.family == "qwen":
        works(case, inputs | {"controlnet_block_samples": residuals})
        works(case, inputs | {"controlnet_block_samples": residuals[:2]})
    else:
        works(case, inputs | {"block_controlnet_hidden_states": residuals})
        works(case, inputs | {"block_controlnet_hidden_states": residuals[:2]})


@pytest.mark.feature("Kontext's reference image", families=("flux",))
@pytest.mark.parametrize("reference", [(5, 7)], ids=["5x7"])
def test_kontext(case, reference):
    """Attended densely: every token attends to it, and it to every token."""
    inputs = case.inputs()
    ids = FluxPipeline._prepare_latent_image_ids(1, *reference, "cpu", torch.float32)
    ids[:, 0] = 1
    count = len(ids)
    inputs["img_ids"] = torch.cat([inputs["img_ids"], ids])
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], random(1, count, 16)], dim=1)
    layout = TokenLayout((1, 8, 12), 7, text_first=True, anchor=(1, *reference))
    works(case, inputs, layout)


@pytest.mark.feature("Given images of Qwen-Image-Edit", families=("qwen",))
def test_given_images(case):
    """Several of other sizes than the picture's."""
    inputs, grids = case.inputs(), [(1, 5, 7), (1, 3, 4)]
    hidden = torch.cat([inputs["hidden_states"], random(1, 47, 16)], dim=1)
    shapes = [[*sample, *grids] for sample in inputs["img_shapes"]]
    layout = TokenLayout((1, 8, 12), 7, text_first=True, anchor=(1, 1, 47))
    works(case, inputs | {"hidden_states": hidden, "img_shapes": shapes}, layout)


@pytest.mark.feature("Reference images of FLUX.2", families=("flux2",))
def test_reference_images(case):
    """Several of other sizes than the picture's."""
    inputs = case.inputs()
    ids = [torch.cartesian_prod(*map(torch.arange, (1, *grid, 1))) for grid in ((5, 7), (3, 4))]
    for i, rows in enumerate(ids, start=1):
        rows[:, 0] = 10 * i
    inputs["img_ids"] = torch.cat([inputs["img_ids"], torch.cat(ids)[None]], dim=1)
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], random(1, 47, 16)], dim=1)
    layout = TokenLayout((1, 8, 12), 7, text_first=True, anchor=(1, 1, 47))
    works(case, inputs, layout)


@pytest.mark.feature("A timestep per token (Wan 2.2 5B)", families=("wan",))
def test_timestep_per_token(case):
    """With image conditioning, tokens of the first frame have another timestep."""
    inputs = case.inputs(case.make(expand_timesteps=True))
    assert inputs["timestep"].shape == (1, 3 * 6 * 8)
    works(case, inputs | {"timestep": inputs["timestep"] * torch.linspace(0, 1, 3 * 6 * 8)})
    case.works(lambda pipe: None, config={"expand_timesteps": True})


@pytest.mark.feature("Image-to-video", families=("wan", "hunyuan"))
def test_image_to_video(case):
    inputs = case.inputs()
    video = {"hidden_states": random(1, 9, 3, 12, 16)}
    if case.family == "wan":  # image tokens before 512 text tokens, a number that stands in diffusers
        text = {"encoder_hidden_states": random(1, 512, 16, seed=1)}
        image = {"encoder_hidden_states_image": random(1, 5, 24, seed=2)}
        works(case, inputs | video | text | image, in_channels=9, added_kv_proj_dim=32, image_dim=24)
    else:  # two ways to give the first frame
        works(case, inputs | video, in_channels=9, image_condition_type="latent_concat")
        works(case, inputs, image_condition_type="token_replace")


@pytest.mark.feature("VACE's control blocks", families=("wan",))
def test_vace(case, masked):
    def make():
        torch.manual_seed(0)
        sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
        sizes |= {"text_dim": 16, "freq_dim": 16, "ffn_dim": 64, "num_layers": 3}
        return WanVACETransformer3DModel(**sizes, vace_layers=[0, 2], vace_in_channels=6).eval()

    inputs = case.inputs() | {"control_hidden_states": random(1, 6, 3, 12, 16)}
    ref, transformer = make(), make()
    with torch.no_grad():
        untouched = transformer(**inputs)[0]
        case.mask(ref)
        assert list(case.layers(ref)) == ["blocks.0", "blocks.1", "blocks.2", "vace.0", "vace.1"]
        with accelerated(transformer, case.recipe):
            close(transformer(**inputs)[0], ref(**inputs)[0])
            shorter = inputs | {"control_hidden_states": random(1, 6, 2, 12, 16)}
            with pytest.raises(
                ValueError,
                match=r"must, in accelerated calls, have the frames.*\(3, 12, 16\).*\(2, 12, 16\).*disable",
            ):
                transformer(**shorter)
        assert torch.equal(transformer(**inputs)[0], untouched)


@pytest.mark.feature("Prompt template cropping", families=("hunyuan",))
def test_prompt_template(case):
    """Prompts as the pipeline encodes them: in a template whose tokens are cropped, padded behind."""
    run = {"prompt": ["a red square", "a small blue disc left"], "pooled_prompt_embeds": random(2, 16)}

    def prompt(pipe):
        add_text_encoder(pipe)

    def images(pipe):
        return pipe(
            **run, height=96, width=128, num_frames=9, num_inference_steps=2, max_sequence_length=10,
            prompt_template={"template": "describe the video in detail {}", "crop_start": 5},
            generator=torch.Generator().manual_seed(0), output_type="latent",
        ).frames  # fmt: skip

    seen = []
    pipe = case.untouched(prompt)
    untouched = images(pipe)
    with pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_attention_mask"]), with_kwargs=True
    ):
        images(pipe)
    assert seen[0].tolist() == [[1] * 3 + [0] * 7, [1] * 5 + [0] * 5]
    expected = images(case.masked(prompt, layout=TokenLayout(case.grid, 10)))
    assert not torch.allclose(expected, untouched, atol=1e-3)
    with accelerated(pipe, case.recipe):
        close(images(pipe), expected)
    assert torch.equal(images(pipe), untouched)


def add_text_encoder(pipe) -> None:
    """A random LLaMA of the embeddings' width, and a tokenizer of whole words that pads behind."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    template, others = "describe the video in detail", "a red square small blue disc left"
    words = ["pad", *f"{template} {others}".split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="pad"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pipe.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="pad", padding_side="right"
    )
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    pipe.text_encoder = LlamaModel(LlamaConfig(vocab_size=len(words), **sizes)).eval()


def test_more_reference_images_are_refused(flux):
    ids = [FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32) for _ in range(3)]
    for i, rows in enumerate(ids):
        rows[:, 0] = i
    inputs = flux.inputs(flux.pipe) | {"img_ids": torch.cat(ids), "hidden_states": random(1, 48, 16)}
    from dit_accel.patterns import Clear

    enable(flux.pipe, Clear(3))
    with pytest.raises(ValueError, match=r"image and one reference image.*`dit_accel.disable\(pipe\)`"):
        call(flux.pipe, inputs)
