"""Tiny pipelines of Wan and its relatives with random weights, and ways to run them."""

from __future__ import annotations

import torch
from tiny_pipelines import TEXT_DIM, embeddings, loop_of, pipeline_of, random_transformer, run

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT_DIM,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 3,
}


def make_wan(seed: int = 0, two: bool = False, expand_timesteps: bool = False, **config):
    """A WanPipeline of 3 blocks, 2 heads of 16; `two` gives it the two transformers of Wan 2.2."""
    made = random_transformer("WanTransformer3DModel", SIZES, config, seed)
    parts = {"transformer_2": None, "boundary_ratio": None, "expand_timesteps": expand_timesteps}
    if two:
        second = random_transformer("WanTransformer3DModel", SIZES, config, seed=None)
        parts |= {"transformer_2": second, "boundary_ratio": 0.5}
    return pipeline_of("WanPipeline", made, **parts)


def make_skyreels(seed: int = 0, pipeline: str = "SkyReelsV2Pipeline", **config):
    """A SkyReelsV2Pipeline, or one for diffusion forcing, of 3 blocks, 2 heads of 16."""
    from diffusers import UniPCMultistepScheduler

    made = random_transformer("SkyReelsV2Transformer3DModel", SIZES, config, seed)
    shifted = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0}
    return pipeline_of(pipeline, made, scheduler=UniPCMultistepScheduler(**shifted))


def make_far(seed: int = 0, **config):
    """An AnyFlowFARPipeline of 3 blocks, 2 heads of 16, two chunks of one frame kept in full."""
    from diffusers import FlowMapEulerDiscreteScheduler

    sizes = {**SIZES, "full_chunk_limit": 2, "chunk_partition": (1, 1, 1)}
    made = random_transformer("AnyFlowFARTransformer3DModel", sizes, config, seed)
    return pipeline_of("AnyFlowFARPipeline", made, scheduler=FlowMapEulerDiscreteScheduler())


def _wan_like(kind: str, seed: int, **config):
    """A loop around a transformer of 3 blocks, 2 heads of 16, of one of Wan's relatives."""
    return loop_of(random_transformer(kind, SIZES, config, seed))


def make_animate(seed: int = 0, **config):
    """Wan Animate with a motion encoder for faces of 16 x 16 pixels."""
    sizes = {"in_channels": 12, "latent_channels": 4, "image_dim": None, "inject_face_latents_blocks": 3}
    sizes |= {"motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16}
    sizes |= {"motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16}
    sizes |= {"face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2}
    return _wan_like("WanAnimateTransformer3DModel", seed, **{**sizes, **config})


def make_chrono(seed: int = 0, **config):
    """ChronoEdit."""
    return _wan_like("ChronoEditTransformer3DModel", seed, **config)


def make_helios(seed: int = 0, **config):
    """Helios, which amplifies the keys of its history."""
    sizes = {"rope_dim": (4, 6, 6), "is_amplify_history": True}
    return _wan_like("HeliosTransformer3DModel", seed, **{**sizes, **config})


def run_wan(pipe, grid=(3, 6, 8), steps=3, batch=1, text_len=5, cfg=1.0, seed=0, **kwargs) -> torch.Tensor:
    """Latents (B, C, F, 2 H, 2 W) for a grid of tokens."""
    kwargs |= {"prompt_embeds": embeddings(batch, text_len, seed + 1)}
    if cfg > 1:
        kwargs |= {"negative_prompt_embeds": embeddings(batch, text_len, seed + 2)}
    return run(pipe, grid, steps, seed, guidance_scale=cfg, **kwargs)


def run_far(pipe, grid=(3, 6, 8), steps=3, batch=1, text_len=5, cfg=1.0, seed=0, **kwargs) -> torch.Tensor:
    """Latents (B, C, F, 2 H, 2 W) for a grid of tokens; `cfg` above 1 doubles the batch."""
    kwargs |= {"prompt_embeds": embeddings(batch, text_len, seed + 1)}
    if cfg > 1:
        kwargs |= {"negative_prompt_embeds": embeddings(batch, text_len, seed + 2)}
    return run(pipe, grid, steps, seed, guidance_scale=cfg, **kwargs)


def run_wan_like(
    pipe, grid=(3, 6, 8), steps=3, batch=1, text_len=5, cfg=1.0, seed=0, **kwargs
) -> torch.Tensor:
    """Latents (B, C, F, 2 H, 2 W) for a grid of tokens; `cfg` above 1 calls the transformer twice.

    Of Wan Animate latents have channels of conditions, which stay, and poses and faces beside them.
    """
    generator, config = torch.Generator().manual_seed(seed), pipe.transformer.config
    frames, rows, columns = grid[0], 2 * grid[1], 2 * grid[2]
    latents = torch.randn(batch, config.out_channels, frames, rows, columns, generator=generator)
    if "motion_encoder_size" in config:
        kwargs["pose_hidden_states"] = latents[:, :, 1:].flip(-1)
        faces = torch.randn(batch, 3, 4 * (frames - 1), 16, 16, generator=generator)
        conditions = torch.randn(batch, 8, frames, rows, columns, generator=generator)
        kwargs |= {"face_pixel_values": faces, "conditions": conditions}

    def given(seed: int) -> dict:
        return {"encoder_hidden_states": embeddings(batch, text_len, seed), **kwargs}

    return pipe(latents, given(seed + 1), given(seed + 2), steps, cfg, batched=False)


PIPELINES = {
    "wan": (make_wan, run_wan),
    "skyreels": (make_skyreels, run_wan),
    "animate": (make_animate, run_wan_like),
    "chrono": (make_chrono, run_wan_like),
    "far": (make_far, run_far),
    "helios": (make_helios, run_wan_like),
}
