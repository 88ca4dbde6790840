"""tiny-hunyuan-video: configuration of its parts, and how its autoencoder's latents are made standard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .starting import keep_signals
from .text_encoders import TEXT_LENGTH, clip, llama
from .word_tokenizers import chat_tokenizer, tokenizer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CLIP_LENGTH = 77  # the pipeline pads CLIP's prompts to this many tokens, whatever its arguments


def build(words: Sequence[str]) -> DiffusionPipeline:
    """tiny-hunyuan-video with untrained weights: 4 frames of 8x8 pixels per token (1 frame in the first).

    Guidance is the true kind, by a second call with an empty prompt: a distilled scale would need a teacher.
    """
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from transformers import CLIPTextModel

    latent_channels, width = 8, 64
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=latent_channels,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        spatial_compression_ratio=4,
        mid_block_add_attention=False,  # it spans whole clips, so it would act differently at every size
        scaling_factor=1.0,
    )
    keep_signals(vae, latent_channels)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=2,
        num_single_layers=4,
        num_refiner_layers=1,
        mlp_ratio=2.5,
        guidance_embeds=False,
        text_embed_dim=width,
        pooled_projection_dim=width,
        rope_axes_dim=(8, 12, 12),
    )
    prefix, crop = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0], DEFAULT_PROMPT_TEMPLATE["crop_start"]
    chat = chat_tokenizer(words, crop + TEXT_LENGTH, prefix, crop)
    return HunyuanVideoPipeline(
        text_encoder=llama(len(chat), width),
        tokenizer=chat,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=clip(CLIPTextModel, words, width, CLIP_LENGTH),
        tokenizer_2=tokenizer(words, CLIP_LENGTH),
    )


@torch.no_grad()
def standardise(vae: Any, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Moves ``mean`` and ``std`` (C,) of the latents into the 1x1x1 convolutions at either side of them.

    The pipeline knows one ``scaling_factor`` and no shift; this way each channel is standard before it. What
    is decoded stays the same.
    """
    before, after, channels = vae.quant_conv, vae.post_quant_conv, vae.config.latent_channels
    after.bias += after.weight.flatten(1) @ mean
    after.weight *= std.view(1, -1, 1, 1, 1)
    before.weight[:channels] /= std.view(-1, 1, 1, 1, 1)
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()  # the other half are logarithms of variances
