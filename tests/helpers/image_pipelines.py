"""Tiny pipelines of image families with random weights, ways to run them, and their oracles of masks."""

from __future__ import annotations

from unittest import mock

import torch
from video_pipelines import TEXT_DIM, MaskedProcessor, embeddings, tell_norms_apart


def make_flux2(seed: int = 0, **config):
    """A Flux2KleinPipeline of 2 double and 2 parallel blocks, 2 heads of 16, which takes guidance."""
    from accelerate.hooks import ModelHook
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )

    sizes = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    sizes |= {"axes_dims_rope": (4, 4, 4, 4), "in_channels": 16, "joint_attention_dim": TEXT_DIM}
    torch.manual_seed(seed)
    transformer = Flux2Transformer2DModel(**{**sizes, "guidance_embeds": False, **config}).eval()
    tell_norms_apart(transformer, ".attn.norm_")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    blocks |= {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "latent_channels": 4}
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=AutoencoderKLFlux2(**blocks).eval(),
        text_encoder=None, tokenizer=None, transformer=transformer,
    )  # fmt: skip
    pipe.vae._hf_hook = ModelHook()  # so that offload hooks of the transformer alone tell where to run
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_qwen(seed: int = 0, **config):
    """A QwenImagePipeline of 3 blocks, 2 heads of 16, for embeddings in and latents out."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    sizes = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 16}
    sizes |= {"out_channels": 4, "joint_attention_dim": TEXT_DIM, "axes_dims_rope": (4, 6, 6)}
    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(**{**sizes, **config}).eval()
    tell_norms_apart(transformer, ".attn.norm_")
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_flux2(pipe, grid=(8, 12), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs) -> torch.Tensor:
    """Latents (B, C, 2 H, 2 W) for a grid of tokens; `cfg` above 1 calls the transformer twice per step."""
    embeds, negative = (embeddings(batch, text_len, seed + i).to(pipe.transformer.dtype) for i in (1, 2))
    kwargs |= {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    size = {"height": grid[0] * 16, "width": grid[1] * 16, "num_inference_steps": steps}
    generator = torch.Generator().manual_seed(seed)
    return pipe(**size, guidance_scale=cfg, generator=generator, output_type="latent", **kwargs).images


def run_qwen(pipe, grid=(8, 12), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs) -> torch.Tensor:
    """Latents (B, H * W, C) for a grid of tokens; `cfg` above 1 calls the transformer twice per step.

    The first prompt ends in 2 padded places, the next in 5, and so on.
    """
    dtype = pipe.transformer.dtype
    valid = (text_len - 2 - torch.arange(batch) * 3).clamp(min=1)
    mask = (torch.arange(text_len) < valid[:, None]).long()
    kwargs |= {"prompt_embeds": embeddings(batch, text_len, seed + 1).to(dtype), "prompt_embeds_mask": mask}
    if cfg > 1:
        kwargs |= {"negative_prompt_embeds": embeddings(batch, text_len, seed + 2).to(dtype)}
        kwargs |= {"negative_prompt_embeds_mask": mask.flip(0)}
    size = {"height": grid[0] * 16, "width": grid[1] * 16, "num_inference_steps": steps}
    generator = torch.Generator().manual_seed(seed)
    return pipe(**size, true_cfg_scale=cfg, generator=generator, output_type="latent", **kwargs).images


class MaskedTwiceProcessor(MaskedProcessor):
    """The same for the processor of HunyuanVideo 1.5, which makes a mask of padded text itself."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        return self.masked_twice(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb=image_rotary_emb
        )

    def masked_twice(self, *args, **kwargs):
        names = type(self.original).__call__.__globals__
        dispatch = names["dispatch_attention_fn"]

        def masked_twice(query, key, value, attn_mask=None, **options):
            length = key.shape[1]
            mask = self.mask[..., :length, :length]
            mask = mask if attn_mask is None else mask & attn_mask
            return dispatch(query, key, value, attn_mask=mask, **options)

        with mock.patch.dict(names, dispatch_attention_fn=masked_twice):
            return self.original(*args, **kwargs)


class MaskedAloneProcessor(MaskedTwiceProcessor):
    """The same for that of FLUX.2's parallel blocks, which attend to one stream."""

    def __call__(self, attn, hidden_states, attention_mask=None, image_rotary_emb=None):
        return self.masked_twice(attn, hidden_states, attention_mask, image_rotary_emb)


class MaskedQwenProcessor(MaskedTwiceProcessor):
    """The same for that of Qwen-Image, which takes the text's mask under another name."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, encoder_hidden_states_mask=None,
        attention_mask=None, image_rotary_emb=None,
    ):  # fmt: skip
        return self.masked_twice(
            attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
        )  # fmt: skip


PIPELINES = {
    "flux2": (make_flux2, run_flux2),
    "qwen": (make_qwen, run_qwen),
}
MASKED = {
    "Flux2ParallelSelfAttnProcessor": MaskedAloneProcessor,
    "QwenDoubleStreamAttnProcessor2_0": MaskedQwenProcessor,
}
