"""Tiny pipelines of image families with random weights, and ways to run them."""

from __future__ import annotations

import torch
from tiny_pipelines import TEXT_DIM, embeddings, padded_prompt, pipeline_of, random_transformer, run


def make_flux(seed: int = 0, **config):
    """A FluxPipeline of 2 double and 2 single blocks, 2 heads of 16, for embeddings in and latents out."""
    sizes = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    sizes |= {"axes_dims_rope": (4, 6, 6), "in_channels": 16, "joint_attention_dim": TEXT_DIM}
    sizes |= {"pooled_projection_dim": TEXT_DIM}
    made = random_transformer("FluxTransformer2DModel", sizes, config, seed)
    return pipeline_of("FluxPipeline", made)


def make_flux2(seed: int = 0, **config):
    """A Flux2KleinPipeline of 2 double and 2 parallel blocks, 2 heads of 16, which takes guidance."""
    from accelerate.hooks import ModelHook
    from diffusers import AutoencoderKLFlux2

    sizes = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    sizes |= {"axes_dims_rope": (4, 4, 4, 4), "in_channels": 16, "joint_attention_dim": TEXT_DIM}
    sizes |= {"guidance_embeds": False}
    made = random_transformer("Flux2Transformer2DModel", sizes, config, seed, norms=".attn.norm_")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    blocks |= {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "latent_channels": 4}
    pipe = pipeline_of("Flux2KleinPipeline", made, vae=AutoencoderKLFlux2(**blocks).eval())
    pipe.vae._hf_hook = ModelHook()  # so that offload hooks of the transformer alone tell where to run
    return pipe


def make_sd3(seed: int = 0, **config):
    """A StableDiffusion3Pipeline of 3 blocks, 2 heads of 16, without what SD3.5 adds unless configured."""
    sizes = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4}
    sizes |= {"out_channels": 4, "joint_attention_dim": TEXT_DIM, "pooled_projection_dim": TEXT_DIM}
    sizes |= {"caption_projection_dim": 32, "sample_size": 16, "pos_embed_max_size": 24}
    made = random_transformer("SD3Transformer2DModel", sizes, config, seed, norms=".norm_")
    return pipeline_of("StableDiffusion3Pipeline", made)


def make_qwen(seed: int = 0, **config):
    """A QwenImagePipeline of 3 blocks, 2 heads of 16, for embeddings in and latents out."""
    sizes = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 16}
    sizes |= {"out_channels": 4, "joint_attention_dim": TEXT_DIM, "axes_dims_rope": (4, 6, 6)}
    made = random_transformer("QwenImageTransformer2DModel", sizes, config, seed, norms=".attn.norm_")
    return pipeline_of("QwenImagePipeline", made)


def make_chroma(seed: int = 0, **config):
    """A ChromaPipeline of 2 double and 2 single blocks, 2 heads of 16, for embeddings in and latents out."""
    sizes = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    sizes |= {"axes_dims_rope": (4, 6, 6), "in_channels": 16, "joint_attention_dim": TEXT_DIM}
    sizes |= {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 2}
    made = random_transformer("ChromaTransformer2DModel", sizes, config, seed, norms=".attn.norm_")
    return pipeline_of("ChromaPipeline", made)


def make_zimage(seed: int = 0, **config):
    """A ZImagePipeline of 3 blocks and a refiner each, 2 heads of 16, for embeddings in and latents out."""
    sizes = {"dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    sizes |= {"in_channels": 4, "cap_feat_dim": TEXT_DIM, "axes_dims": [4, 6, 6]}
    made = random_transformer("ZImageTransformer2DModel", sizes, config, seed, norms=".attention.norm_")
    for token in (made.x_pad_token, made.cap_pad_token):  # which are made as zeros
        torch.nn.init.normal_(token)
    return pipeline_of("ZImagePipeline", made)


def make_hunyuanimage(seed: int = 0, **config):
    """A HunyuanImagePipeline of 2 double and 2 single blocks, 2 heads of 16, for embeddings in, latents."""
    from diffusers import ClassifierFreeGuidance

    sizes = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    sizes |= {"in_channels": 4, "out_channels": 4, "rope_axes_dim": (8, 8), "num_refiner_layers": 1}
    sizes |= {"text_embed_dim": TEXT_DIM, "text_embed_2_dim": TEXT_DIM, "mlp_ratio": 2.0}
    made = random_transformer("HunyuanImageTransformer2DModel", sizes, config, seed, norms=".attn.norm_")
    return pipeline_of("HunyuanImagePipeline", made, guider=ClassifierFreeGuidance())


def run_flux(pipe, grid=(8, 12), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs) -> torch.Tensor:
    """Latents (B, H * W, C) for a grid of tokens; `cfg` above 1 calls the transformer twice per step."""
    dtype = pipe.transformer.dtype
    embeds = embeddings(batch, text_len, seed + 1).to(dtype)
    kwargs |= {"prompt_embeds": embeds, "pooled_prompt_embeds": embeds[:, 0]}
    if cfg > 1:
        negative = embeddings(batch, text_len, seed + 2).to(dtype)
        kwargs |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative[:, 0]}
    return run(pipe, grid, steps, seed, true_cfg_scale=cfg, **kwargs)


def run_flux2(pipe, grid=(8, 12), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs) -> torch.Tensor:
    """Latents (B, C, 2 H, 2 W) for a grid of tokens; `cfg` above 1 calls the transformer twice per step."""
    embeds, negative = (embeddings(batch, text_len, seed + i).to(pipe.transformer.dtype) for i in (1, 2))
    kwargs |= {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    return run(pipe, grid, steps, seed, guidance_scale=cfg, **kwargs)


def run_sd3(pipe, grid=(8, 12), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs) -> torch.Tensor:
    """Latents (B, C, 2 H, 2 W) for a grid of tokens; `cfg` above 1 doubles the batch of the transformer."""
    dtype = pipe.transformer.dtype
    embeds, negative = (embeddings(batch, text_len, seed + i).to(dtype) for i in (1, 2))
    kwargs |= {"prompt_embeds": embeds, "pooled_prompt_embeds": embeds[:, 0]}
    kwargs |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative[:, 0]}
    return run(pipe, grid, steps, seed, guidance_scale=cfg, **kwargs)


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
    return run(pipe, grid, steps, seed, true_cfg_scale=cfg, **kwargs)


def run_chroma(
    pipe, grid=(8, 12), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, mask_dtype=None, **kwargs
) -> torch.Tensor:
    """Latents (B, H * W, C) for a grid of tokens; `cfg` above 1 calls the transformer twice per step.

    Masks are of numbers as the pipeline's own, in the transformer's dtype unless another is given.
    """
    dtype, signs = pipe.transformer.dtype, ("", "negative_")
    for i, sign in enumerate(signs[: 1 + (cfg > 1)], start=1):
        given = padded_prompt(batch, text_len, seed + i, sign)
        kwargs[f"{sign}prompt_embeds"] = given[f"{sign}prompt_embeds"].to(dtype)
        kwargs[f"{sign}prompt_attention_mask"] = given[f"{sign}prompt_attention_mask"].to(mask_dtype or dtype)
    return run(pipe, grid, steps, seed, guidance_scale=cfg, **kwargs)


def run_zimage(pipe, grid=(8, 12), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs) -> torch.Tensor:
    """Latents (B, C, 2 H, 2 W) for a grid of tokens; `cfg` above 1 doubles the batch of the transformer.

    The first prompt has `text_len` tokens, the next 30 more, and so on.
    """
    dtype = pipe.transformer.dtype

    def prompts(seed: int) -> list[torch.Tensor]:
        return [embeddings(1, text_len + 30 * i, seed + i)[0].to(dtype) for i in range(batch)]

    kwargs |= {"prompt_embeds": prompts(seed + 1), "negative_prompt_embeds": prompts(seed + 11)}
    return run(pipe, grid, steps, seed, guidance_scale=cfg - 1, **kwargs)


def run_hunyuanimage(
    pipe, grid=(8, 12), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs
) -> torch.Tensor:
    """Latents (B, C, H, W) for a grid of tokens, with text of `text_len`, 3 of them of the second encoder.

    Of both encoders the masks hide the first token of every sample and, of the next samples, more at the end.
    """
    dtype = pipe.transformer.dtype

    def prompt(seed: int) -> dict[str, torch.Tensor]:
        given = {}
        for suffix, length in (("", text_len - 3), ("_2", 3)):
            given["prompt_embeds" + suffix] = embeddings(batch, length, seed + len(suffix)).to(dtype)
            places, last = torch.arange(length), length - torch.arange(batch)[:, None]
            given["prompt_embeds_mask" + suffix] = ((places > 0) & (places < last)).long()
        return given

    kwargs |= prompt(seed + 1)
    if cfg > 1:
        kwargs |= {f"negative_{name}": x for name, x in prompt(seed + 4).items()}
    pipe.guider = pipe.guider.new(guidance_scale=cfg)
    return run(pipe, grid, steps, seed, pixels=32, **kwargs)


PIPELINES = {
    "flux": (make_flux, run_flux),
    "chroma": (make_chroma, run_chroma),
    "flux2": (make_flux2, run_flux2),
    "hunyuanimage": (make_hunyuanimage, run_hunyuanimage),
    "qwen": (make_qwen, run_qwen),
    "sd3": (make_sd3, run_sd3),
    "zimage": (make_zimage, run_zimage),
}
