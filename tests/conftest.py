"""Fixtures: tiny pipelines of the real diffusers classes with random weights, and ways to run them."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from functools import partial
from types import SimpleNamespace
from unittest import mock

import image_pipelines
import pytest
import torch
import torch.nn.functional as F
import video_pipelines
from hypothesis import HealthCheck, settings
from image_pipelines import MaskedTwiceProcessor
from video_pipelines import TEXT_DIM, MaskedProcessor, embeddings, padded_prompt, tell_norms_apart

pytest.register_assert_rewrite("mask_oracle")

# A failing test is the change's doing, not luck's; `make fuzz` looks for new examples.
# Neither does it fail for being slow: on a machine that does much else milliseconds become seconds.
SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **SLOW)
settings.register_profile("random", print_blob=True, **SLOW)
settings.load_profile("same")


def pytest_collection_modifyitems(items):
    """Files with most to do first: processes that take one after another then end at about the same time."""
    work = Counter()
    for item in items:
        work[item.path] += 1 if item.get_closest_marker("slow") is None else 40
    items.sort(key=lambda item: -work[item.path])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _attention_backend_of_diffusers():
    """`set_attention_backend` of any model is the default of all others from then on: not beyond its test."""
    yield
    if module := sys.modules.get("diffusers.models.attention_dispatch"):
        module._AttentionBackendRegistry.set_active_backend(
            module.AttentionBackendName(module.DIFFUSERS_ATTN_BACKEND)
        )


def make_flux(seed: int = 0, **config):
    """A FluxPipeline of 2 double and 2 single blocks, 2 heads of 16, for embeddings in and latents out."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    sizes = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    sizes |= {"axes_dims_rope": (4, 6, 6), "in_channels": 16, "joint_attention_dim": TEXT_DIM}
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(**{**sizes, "pooled_projection_dim": TEXT_DIM, **config}).eval()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_wan(seed: int = 0, two: bool = False, expand_timesteps: bool = False, **config):
    """A WanPipeline of 3 blocks, 2 heads of 16; `two` gives it the two transformers of Wan 2.2."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
    sizes |= {"text_dim": TEXT_DIM, "freq_dim": 16, "ffn_dim": 64, "num_layers": 3}
    torch.manual_seed(seed)
    transformers = [WanTransformer3DModel(**{**sizes, **config}).eval() for _ in range(1 + two)]
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformers[0], transformer_2=transformers[1] if two else None,
        boundary_ratio=0.5 if two else None, expand_timesteps=expand_timesteps,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_skyreels(seed: int = 0, pipeline: str = "SkyReelsV2Pipeline", **config):
    """A SkyReelsV2Pipeline, or one for diffusion forcing, of 3 blocks, 2 heads of 16."""
    import diffusers

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
    sizes |= {"text_dim": TEXT_DIM, "freq_dim": 16, "ffn_dim": 64, "num_layers": 3}
    torch.manual_seed(seed)
    transformer = diffusers.SkyReelsV2Transformer3DModel(**{**sizes, **config}).eval()
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    pipe = getattr(diffusers, pipeline)(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_hunyuan(seed: int = 0, **config):
    """A HunyuanVideoPipeline of 2 double and 2 single blocks, 2 heads of 16, distilled unless configured."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    sizes = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    sizes |= {"in_channels": 4, "out_channels": 4, "rope_axes_dim": (4, 6, 6), "num_refiner_layers": 1}
    sizes |= {"text_embed_dim": TEXT_DIM, "pooled_projection_dim": TEXT_DIM}
    torch.manual_seed(seed)
    transformer = HunyuanVideoTransformer3DModel(**{**sizes, **config}).eval()
    tell_norms_apart(transformer, ".attn.norm_")
    pipe = HunyuanVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_hunyuan15(seed: int = 0, **config):
    """A HunyuanVideo15Pipeline of 3 blocks, 2 heads of 16, for embeddings in, latents out."""
    import diffusers

    if not hasattr(diffusers, "HunyuanVideo15Pipeline"):
        pytest.skip(f"diffusers {diffusers.__version__} has no HunyuanVideo 1.5")
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )

    sizes = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "num_refiner_layers": 1}
    sizes |= {"in_channels": 9, "out_channels": 4, "rope_axes_dim": (4, 6, 6), "mlp_ratio": 2.0}
    sizes |= {"text_embed_dim": TEXT_DIM, "text_embed_2_dim": TEXT_DIM, "image_embed_dim": TEXT_DIM}
    torch.manual_seed(seed)
    transformer = HunyuanVideo15Transformer3DModel(**{**sizes, **config}).eval()
    tell_norms_apart(transformer, ".attn.norm_")
    pipe = HunyuanVideo15Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=transformer, guider=ClassifierFreeGuidance(),
        vae=AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(32,) * 5, layers_per_block=1),
    )  # fmt: skip
    pipe.vae = None  # of which only the constructor asks the number of channels
    pipe.vision_num_semantic_tokens = 3
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_sd3(seed: int = 0, **config):
    """A StableDiffusion3Pipeline of 3 blocks, 2 heads of 16, without what SD3.5 adds unless configured."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    sizes = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4}
    sizes |= {"out_channels": 4, "joint_attention_dim": TEXT_DIM, "pooled_projection_dim": TEXT_DIM}
    sizes |= {"caption_projection_dim": 32, "sample_size": 16, "pos_embed_max_size": 24}
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(**{**sizes, **config}).eval()
    tell_norms_apart(transformer, ".norm_")
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_flux(pipe, grid=(8, 12), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs) -> torch.Tensor:
    """Latents (B, H * W, C) for a grid of tokens; `cfg` above 1 calls the transformer twice per step."""
    dtype = pipe.transformer.dtype
    embeds = embeddings(batch, text_len, seed + 1).to(dtype)
    kwargs |= {"prompt_embeds": embeds, "pooled_prompt_embeds": embeds[:, 0]}
    if cfg > 1:
        negative = embeddings(batch, text_len, seed + 2).to(dtype)
        kwargs |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative[:, 0]}
    size = {"height": grid[0] * 16, "width": grid[1] * 16, "num_inference_steps": steps}
    generator = torch.Generator().manual_seed(seed)
    return pipe(**size, true_cfg_scale=cfg, generator=generator, output_type="latent", **kwargs).images


def run_wan(pipe, grid=(3, 6, 8), steps=3, batch=1, text_len=5, cfg=1.0, seed=0, **kwargs) -> torch.Tensor:
    """Latents (B, C, F, 2 H, 2 W) for a grid of tokens."""
    kwargs |= {"prompt_embeds": embeddings(batch, text_len, seed + 1)}
    if cfg > 1:
        kwargs |= {"negative_prompt_embeds": embeddings(batch, text_len, seed + 2)}
    size = {"num_frames": (grid[0] - 1) * 4 + 1, "height": grid[1] * 16, "width": grid[2] * 16}
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        **size,
        num_inference_steps=steps,
        guidance_scale=cfg,
        generator=generator,
        output_type="latent",
        **kwargs,
    ).frames


def run_hunyuan(
    pipe, grid=(3, 6, 8), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs
) -> torch.Tensor:
    """Latents (B, C, F, 2 H, 2 W) for a grid of tokens.

    The first prompt ends in 2 padded places, the next in 5, and so on; negative prompts have 4 places more.
    """

    def prompt(text_len: int, seed: int) -> dict[str, torch.Tensor]:
        given = padded_prompt(batch, text_len, seed)
        return given | {"pooled_prompt_embeds": given["prompt_embeds"][:, 0]}

    kwargs |= prompt(text_len, seed + 1)
    if cfg > 1:
        kwargs |= {f"negative_{name}": x for name, x in prompt(text_len + 4, seed + 2).items()}
    size = {"num_frames": (grid[0] - 1) * 4 + 1, "height": grid[1] * 16, "width": grid[2] * 16}
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        **size,
        num_inference_steps=steps,
        true_cfg_scale=cfg,
        generator=generator,
        output_type="latent",
        **kwargs,
    ).frames


def run_hunyuan15(
    pipe, grid=(3, 6, 8), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs
) -> torch.Tensor:
    """Latents (B, C, F, H, W) for a grid of tokens, with text of `text_len` and image embeddings of zeros.

    Text is that of the first encoder, less 3 tokens of the second and 3 of the image. Of both encoders the
    masks hide the first token of every sample and, of the next samples, more at the end.
    """

    def prompt(text_len: int, seed: int) -> dict[str, torch.Tensor]:
        given = {}
        for suffix, length in (("", text_len - 6), ("_2", 3)):
            given["prompt_embeds" + suffix] = embeddings(batch, length, seed + len(suffix))
            places, last = torch.arange(length), length - torch.arange(batch)[:, None]
            given["prompt_embeds_mask" + suffix] = ((places > 0) & (places < last)).long()
        return given

    kwargs |= prompt(text_len, seed + 1)
    if cfg > 1:
        kwargs |= {f"negative_{name}": x for name, x in prompt(text_len + 4, seed + 2).items()}
    pipe.guider = pipe.guider.new(guidance_scale=cfg)
    size = {"num_frames": (grid[0] - 1) * 4 + 1, "height": grid[1] * 16, "width": grid[2] * 16}
    generator = torch.Generator().manual_seed(seed)
    return pipe(**size, num_inference_steps=steps, generator=generator, output_type="latent", **kwargs).frames


def run_sd3(pipe, grid=(8, 12), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs) -> torch.Tensor:
    """Latents (B, C, 2 H, 2 W) for a grid of tokens; `cfg` above 1 doubles the batch of the transformer."""
    dtype = pipe.transformer.dtype
    embeds, negative = (embeddings(batch, text_len, seed + i).to(dtype) for i in (1, 2))
    kwargs |= {"prompt_embeds": embeds, "pooled_prompt_embeds": embeds[:, 0]}
    kwargs |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative[:, 0]}
    size = {"height": grid[0] * 16, "width": grid[1] * 16, "num_inference_steps": steps}
    generator = torch.Generator().manual_seed(seed)
    return pipe(**size, guidance_scale=cfg, generator=generator, output_type="latent", **kwargs).images


def by_name(module, args: tuple, kwargs: dict) -> dict:
    """The arguments of a module's forward by their names."""
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def transformer_inputs(pipe, run) -> dict:
    """The keyword arguments that a pipeline passes to its transformer, from a run of one step."""
    seen: dict = {}
    note = lambda module, args, kwargs: seen.update(by_name(module, args, kwargs))  # noqa: E731
    with pipe.transformer.register_forward_pre_hook(note, with_kwargs=True, prepend=True):
        run(pipe, steps=1)
    return seen


class MaskedJointProcessor(MaskedProcessor):
    """The same for the processors of SD3, which ignore masks and call PyTorch's function themselves."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        attend = F.scaled_dot_product_attention
        rotary = {} if image_rotary_emb is None else {"image_rotary_emb": image_rotary_emb}

        def masked(*qkv, attn_mask=None, **options):
            return attend(*qkv, attn_mask=self.mask, **options)

        with mock.patch.object(F, "scaled_dot_product_attention", masked):
            return self.original(attn, hidden_states, encoder_hidden_states, **rotary)


MASKED = {
    "HunyuanVideo15AttnProcessor2_0": MaskedTwiceProcessor,
    "CogVideoXAttnProcessor2_0": MaskedJointProcessor,
    "FusedCogVideoXAttnProcessor2_0": MaskedJointProcessor,
    "JointAttnProcessor2_0": MaskedJointProcessor,
    "FusedJointAttnProcessor2_0": MaskedJointProcessor,
    **video_pipelines.MASKED,
    **image_pipelines.MASKED,
}
FAMILIES = {
    "flux": (make_flux, run_flux),
    "wan": (make_wan, run_wan),
    "hunyuan": (make_hunyuan, run_hunyuan),
    "hunyuan15": (make_hunyuan15, run_hunyuan15),
    "sd3": (make_sd3, run_sd3),
    "skyreels": (make_skyreels, run_wan),
    **image_pipelines.PIPELINES,
    **video_pipelines.PIPELINES,
}


@pytest.fixture(scope="session")
def families() -> dict[str, SimpleNamespace]:
    """By family, how to `make` and `run` a pipeline, and the `inputs` that it passes to its transformer."""
    return {
        name: SimpleNamespace(make=make, run=run, inputs=partial(transformer_inputs, run=run))
        for name, (make, run) in FAMILIES.items()
    }


def _with_pipeline(tools: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(**vars(tools), pipe=tools.make())


@pytest.fixture
def flux(families):
    return _with_pipeline(families["flux"])


@pytest.fixture
def chroma(families):
    return _with_pipeline(families["chroma"])


@pytest.fixture
def flux2(families):
    return _with_pipeline(families["flux2"])


@pytest.fixture
def wan(families):
    return _with_pipeline(families["wan"])


@pytest.fixture
def hunyuan(families):
    return _with_pipeline(families["hunyuan"])


@pytest.fixture
def hunyuan15(families):
    return _with_pipeline(families["hunyuan15"])


@pytest.fixture
def qwen(families):
    return _with_pipeline(families["qwen"])


@pytest.fixture
def skyreels(families):
    return _with_pipeline(families["skyreels"])


@pytest.fixture
def ltx(families):
    return _with_pipeline(families["ltx"])


@pytest.fixture
def ltx2(families):
    return _with_pipeline(families["ltx2"])


@pytest.fixture
def kandinsky5(families):
    return _with_pipeline(families["kandinsky5"])


@pytest.fixture
def animate(families):
    return _with_pipeline(families["animate"])


@pytest.fixture
def chrono(families):
    return _with_pipeline(families["chrono"])


@pytest.fixture
def far(families):
    return _with_pipeline(families["far"])


@pytest.fixture
def helios(families):
    return _with_pipeline(families["helios"])


@pytest.fixture
def minimaxh3(families):
    return _with_pipeline(families["minimaxh3"])


@pytest.fixture
def cogvideox(families):
    return _with_pipeline(families["cogvideox"])


@pytest.fixture
def mochi(families):
    return _with_pipeline(families["mochi"])


@pytest.fixture
def zimage(families):
    return _with_pipeline(families["zimage"])


@pytest.fixture
def hunyuanimage(families):
    return _with_pipeline(families["hunyuanimage"])


@pytest.fixture
def sd3(families):
    return _with_pipeline(families["sd3"])


@pytest.fixture(scope="session")
def masked():
    """Puts token masks (S, S) or (heads, S, S), given by layer, under a transformer's processors."""

    from dit_accel.pipelines.families.processors import install

    def apply(modules: dict, masks: dict[str, torch.Tensor]) -> None:
        for name, mask in masks.items():
            original = modules[name].processor
            kind = MASKED.get(type(original).__name__, MaskedProcessor)
            install(modules[name], kind(original, mask[None] if mask.ndim == 3 else mask))

    return apply
