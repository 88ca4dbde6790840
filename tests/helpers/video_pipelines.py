"""Tiny pipelines of other video families with random weights, and ways to run them."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import (
    TEXT_DIM,
    embeddings,
    loop_of,
    padded_prompt,
    pipeline_of,
    random_transformer,
    run,
    tell_norms_apart,
)


def make_hunyuan(seed: int = 0, **config):
    """A HunyuanVideoPipeline of 2 double and 2 single blocks, 2 heads of 16, distilled unless configured."""
    sizes = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    sizes |= {"in_channels": 4, "out_channels": 4, "rope_axes_dim": (4, 6, 6), "num_refiner_layers": 1}
    sizes |= {"text_embed_dim": TEXT_DIM, "pooled_projection_dim": TEXT_DIM}
    made = random_transformer("HunyuanVideoTransformer3DModel", sizes, config, seed, norms=".attn.norm_")
    return pipeline_of("HunyuanVideoPipeline", made)


def make_hunyuan15(seed: int = 0, **config):
    """A HunyuanVideo15Pipeline of 3 blocks, 2 heads of 16, for embeddings in, latents out."""
    import diffusers

    if not hasattr(diffusers, "HunyuanVideo15Pipeline"):
        pytest.skip(f"diffusers {diffusers.__version__} has no HunyuanVideo 1.5")
    from diffusers import AutoencoderKLHunyuanVideo15, ClassifierFreeGuidance

    sizes = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "num_refiner_layers": 1}
    sizes |= {"in_channels": 9, "out_channels": 4, "rope_axes_dim": (4, 6, 6), "mlp_ratio": 2.0}
    sizes |= {"text_embed_dim": TEXT_DIM, "text_embed_2_dim": TEXT_DIM, "image_embed_dim": TEXT_DIM}
    made = random_transformer("HunyuanVideo15Transformer3DModel", sizes, config, seed, norms=".attn.norm_")
    vae = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(32,) * 5, layers_per_block=1)
    pipe = pipeline_of("HunyuanVideo15Pipeline", made, vae=vae, guider=ClassifierFreeGuidance())
    pipe.vae = None  # of which only the constructor asks the number of channels
    pipe.vision_num_semantic_tokens = 3
    return pipe


def make_ltx(seed: int = 0, **config):
    """An LTXPipeline of 3 blocks, 2 heads of 16, for embeddings in, packed latents out."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
    sizes |= {"cross_attention_dim": 32, "caption_channels": TEXT_DIM, "num_layers": 3}
    made = random_transformer("LTXVideoTransformer3DModel", sizes, config, seed)
    return pipeline_of("LTXPipeline", made)


def make_ltx2(seed: int = 0, **config):
    """A loop around LTX-2's transformer of 3 blocks, 2 heads of 16, and 2 of 8 for audio."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
    sizes |= {"audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_in_channels": 4}
    sizes |= {"audio_out_channels": 4, "cross_attention_dim": 32, "audio_cross_attention_dim": 16}
    sizes |= {"caption_channels": TEXT_DIM, "num_layers": 3, "rope_type": "split"}
    made = random_transformer("LTX2VideoTransformer3DModel", sizes, config, seed)
    return loop_of(made)


def make_cogvideox(seed: int = 0, **config):
    """A CogVideoXPipeline of 3 blocks, 2 heads of 16, with rotary embedding unless configured."""
    from diffusers import CogVideoXDDIMScheduler

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
    sizes |= {"text_embed_dim": TEXT_DIM, "time_embed_dim": 16, "num_layers": 3, "max_text_seq_length": 7}
    sizes |= {"sample_width": 16, "sample_height": 12, "sample_frames": 9}
    sizes |= {"use_rotary_positional_embeddings": True}
    made = random_transformer("CogVideoXTransformer3DModel", sizes, config, seed, norms=".norm_")
    return pipeline_of(
        "CogVideoXPipeline", made, scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction")
    )


def make_mochi(seed: int = 0, **config):
    """A loop around Mochi's transformer of 3 blocks, 2 heads of 16: its pipeline makes no single step."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 3}
    sizes |= {"text_embed_dim": TEXT_DIM, "pooled_projection_dim": 24, "time_embed_dim": 16}
    made = random_transformer("MochiTransformer3DModel", sizes, config, seed, norms=".norm_")
    torch.nn.init.normal_(made.pos_frequencies)  # zeros say nothing of places
    return loop_of(made, FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


def make_kandinsky5(seed: int = 0, **config):
    """A loop around Kandinsky 5's transformer of 3 blocks, 2 heads of 16; its gates are zero as made."""
    sizes = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": TEXT_DIM, "in_text_dim2": TEXT_DIM}
    sizes |= {"time_dim": 16, "model_dim": 32, "ff_dim": 48, "num_text_blocks": 1, "num_visual_blocks": 3}
    sizes |= {"axes_dims": (4, 6, 6)}
    made = random_transformer("Kandinsky5Transformer3DModel", sizes, config, seed)
    for name, weight in made.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(weight, std=0.3)
    tell_norms_apart(made, "_norm.weight")
    return loop_of(made)


def make_minimaxh3(seed: int = 0, **config):
    """A loop around MiniMax H3's transformer of 3 blocks, 2 heads of 16."""
    from diffusers import MiniMaxH3Scheduler

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_layers": 3}
    sizes |= {"num_refiner_layers": 1, "ffn_dim": 32, "in_channels": 2, "audio_in_channels": 4}
    sizes |= {"text_dim": TEXT_DIM, "time_embed_hidden_dim": 16, "time_embed_dim": 16, "rope_freq_dim": 2}
    made = random_transformer("MiniMaxH3Transformer3DModel", sizes, config, seed, norms=".attn.norm_")
    return loop_of(made, MiniMaxH3Scheduler(shift=1.0))


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
    return run(pipe, grid, steps, seed, true_cfg_scale=cfg, **kwargs)


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
    return run(pipe, grid, steps, seed, **kwargs)


def run_ltx(pipe, grid=(3, 6, 8), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs) -> torch.Tensor:
    """Packed latents (B, F * H * W, C); `cfg` above 1 doubles the batch of the transformer."""
    kwargs |= padded_prompt(batch, text_len, seed + 1)
    kwargs |= padded_prompt(batch, text_len, seed + 2, "negative_")
    return run(pipe, grid, steps, seed, pixels=32, frames=8, guidance_scale=cfg, **kwargs)


def run_ltx2(pipe, grid=(3, 6, 8), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs) -> torch.Tensor:
    """Packed latents (B, F * H * W, C) of the video beside 5 audio tokens; `cfg` above 1 doubles batches."""

    def given(seed: int) -> dict:
        text, mask = padded_prompt(batch, text_len, seed).values()
        audio = torch.randn(batch, 5, 4, generator=torch.Generator().manual_seed(5))
        texts = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
        texts |= {f"audio_{name}": x for name, x in texts.items()}
        size = dict(zip(("num_frames", "height", "width"), grid, strict=True))
        return {"audio_hidden_states": audio, "audio_num_frames": 5, **texts, **size, **kwargs}

    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, grid[0] * grid[1] * grid[2], 4, generator=generator)
    return pipe(latents, given(seed + 1), given(seed + 2), steps, cfg, batched=True)


def run_cogvideox(
    pipe, grid=(3, 6, 8), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs
) -> torch.Tensor:
    """Latents (B, F, C, 2 H, 2 W) for a grid of tokens; `cfg` above 1 doubles the batch."""
    kwargs |= {"prompt_embeds": embeddings(batch, text_len, seed + 1)}
    kwargs |= {"negative_prompt_embeds": embeddings(batch, text_len, seed + 2)}
    frames = grid[0] * (pipe.transformer.config.patch_size_t or 1)
    return run(pipe, (frames, *grid[1:]), steps, seed, guidance_scale=cfg, **kwargs)


def run_mochi(pipe, grid=(3, 6, 8), steps=3, batch=1, text_len=7, cfg=1.0, seed=0) -> torch.Tensor:
    """Latents (B, C, F, 2 H, 2 W) for a grid of tokens; `cfg` above 1 doubles the batch."""

    def given(seed: int) -> dict:
        return dict(
            zip(
                ("encoder_hidden_states", "encoder_attention_mask"),
                padded_prompt(batch, text_len, seed).values(),
                strict=True,
            )
        )

    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, grid[0], 2 * grid[1], 2 * grid[2], generator=generator)
    return pipe(latents, given(seed + 1), given(seed + 2), steps, cfg, batched=True)


def run_kandinsky5(
    pipe, grid=(3, 6, 8), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs
) -> torch.Tensor:
    """Latents (B, F, 2 H, 2 W, C) for a grid of tokens; `cfg` above 1 calls the transformer twice."""
    places = {"visual_rope_pos": [torch.arange(n) for n in grid], "text_rope_pos": torch.arange(text_len)}

    def given(seed: int) -> dict:
        text = embeddings(batch, text_len, seed)
        return {"encoder_hidden_states": text, "pooled_projections": text[:, 0], **places, **kwargs}

    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, grid[0], 2 * grid[1], 2 * grid[2], 4, generator=generator)
    return pipe(latents, given(seed + 1), given(seed + 2), steps, cfg, batched=False)


def packed(grid: tuple[int, int, int], texts: int, sounds: int) -> dict[str, torch.Tensor]:
    """How MiniMax H3 is told of a sequence of text, sound and a video of so many tokens."""
    every, first = torch.arange(texts + sounds + grid[0] * grid[1] * grid[2]), texts + sounds
    places = torch.zeros(len(every), 3, dtype=torch.float64)
    places[:first, 0] = every[:first]
    times = 5 / 3 * torch.cumsum(torch.tensor([1, 4, 4] * grid[0])[: grid[0]], 0)
    axes = [texts + times.double(), *(torch.linspace(0, 32, n + 1).double()[:n] for n in grid[1:])]
    places[first:] = torch.cartesian_prod(*axes)
    return {
        "timestep_indices": torch.zeros_like(every),
        "token_tags": (every < texts).long() + 2 * ((every >= texts) & (every < first)),
        "position_ids": places,
        "video_indices": every[first:],
        "audio_indices": every[texts:first],
        "text_indices": every[:texts],
    }


def run_minimaxh3(
    pipe, grid=(3, 6, 8), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs
) -> torch.Tensor:
    """The video's rows (B, F * H * W, C) behind `text_len` others, 3 of them of sound.

    The model knows no guidance; `cfg` above 1 calls the transformer twice.
    """
    generator = torch.Generator().manual_seed(seed)
    sound = torch.randn(batch, 3, 4, generator=generator)
    layout = packed(grid, text_len - 3, 3)

    def given(seed: int) -> dict:
        text = embeddings(batch, text_len - 3, seed)
        return {"audio_hidden_states": sound, "encoder_hidden_states": text, **layout, **kwargs}

    latents = torch.randn(batch, grid[0] * grid[1] * grid[2], 8, generator=generator)
    return pipe(latents, given(seed + 1), given(seed + 2), steps + 1, cfg, batched=False)


PIPELINES = {
    "hunyuan": (make_hunyuan, run_hunyuan),
    "hunyuan15": (make_hunyuan15, run_hunyuan15),
    "ltx": (make_ltx, run_ltx),
    "ltx2": (make_ltx2, run_ltx2),
    "cogvideox": (make_cogvideox, run_cogvideox),
    "mochi": (make_mochi, run_mochi),
    "kandinsky5": (make_kandinsky5, run_kandinsky5),
    "minimaxh3": (make_minimaxh3, run_minimaxh3),
}
