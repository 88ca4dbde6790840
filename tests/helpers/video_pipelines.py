"""Tiny pipelines of video families with random weights, ways to run them, and their oracles of masks."""

from __future__ import annotations

from functools import wraps
from unittest import mock

import torch
import torch.nn.functional as F
from chunk_masks import MaskedCausalProcessor

TEXT_DIM = 16


def tell_norms_apart(transformer, name_part: str) -> None:
    """Random weights for the norms with `name_part` in their names, so that none passes for another."""
    for name, weight in transformer.named_parameters():
        if name_part in name:
            torch.nn.init.uniform_(weight, 0.5, 2)


def make_ltx(seed: int = 0, **config):
    """An LTXPipeline of 3 blocks, 2 heads of 16, for embeddings in, packed latents out."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
    sizes |= {"cross_attention_dim": 32, "caption_channels": TEXT_DIM, "num_layers": 3}
    torch.manual_seed(seed)
    transformer = LTXVideoTransformer3DModel(**{**sizes, **config}).eval()
    pipe = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_cogvideox(seed: int = 0, **config):
    """A CogVideoXPipeline of 3 blocks, 2 heads of 16, with rotary embedding unless configured."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
    sizes |= {"text_embed_dim": TEXT_DIM, "time_embed_dim": 16, "num_layers": 3, "max_text_seq_length": 7}
    sizes |= {"sample_width": 16, "sample_height": 12, "sample_frames": 9}
    torch.manual_seed(seed)
    config = {"use_rotary_positional_embeddings": True, **config}
    transformer = CogVideoXTransformer3DModel(**{**sizes, **config}).eval()
    tell_norms_apart(transformer, ".norm_")
    pipe = CogVideoXPipeline(
        scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction"), vae=None, text_encoder=None,
        tokenizer=None, transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_mochi(seed: int = 0, **config):
    """A loop around Mochi's transformer of 3 blocks, 2 heads of 16: its pipeline makes no single step."""
    from diffusers import FlowMatchEulerDiscreteScheduler, MochiTransformer3DModel
    from loops import Loop

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 3}
    sizes |= {"text_embed_dim": TEXT_DIM, "pooled_projection_dim": 24, "time_embed_dim": 16}
    torch.manual_seed(seed)
    transformer = MochiTransformer3DModel(**{**sizes, **config}).eval()
    tell_norms_apart(transformer, ".norm_")
    torch.nn.init.normal_(transformer.pos_frequencies)  # zeros say nothing of places
    return Loop(transformer, FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


def make_ltx2(seed: int = 0, **config):
    """A loop around LTX-2's transformer of 3 blocks, 2 heads of 16, and 2 of 8 for audio."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTX2VideoTransformer3DModel
    from loops import Loop

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
    sizes |= {"audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_in_channels": 4}
    sizes |= {"audio_out_channels": 4, "cross_attention_dim": 32, "audio_cross_attention_dim": 16}
    sizes |= {"caption_channels": TEXT_DIM, "num_layers": 3, "rope_type": "split"}
    torch.manual_seed(seed)
    transformer = LTX2VideoTransformer3DModel(**{**sizes, **config}).eval()
    return Loop(transformer, FlowMatchEulerDiscreteScheduler())


def make_kandinsky5(seed: int = 0, **config):
    """A loop around Kandinsky 5's transformer of 3 blocks, 2 heads of 16; its gates are zero as made."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel
    from loops import Loop

    sizes = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": TEXT_DIM, "in_text_dim2": TEXT_DIM}
    sizes |= {"time_dim": 16, "model_dim": 32, "ff_dim": 48, "num_text_blocks": 1, "num_visual_blocks": 3}
    torch.manual_seed(seed)
    transformer = Kandinsky5Transformer3DModel(**{**sizes, "axes_dims": (4, 6, 6), **config}).eval()
    for name, weight in transformer.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(weight, std=0.3)
    tell_norms_apart(transformer, "_norm.weight")
    return Loop(transformer, FlowMatchEulerDiscreteScheduler())


def _wan_like(kind: str, seed: int, **config):
    """A loop around a transformer of 3 blocks, 2 heads of 16, of one of Wan's relatives."""
    import diffusers
    from loops import Loop

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
    sizes |= {"text_dim": TEXT_DIM, "freq_dim": 16, "ffn_dim": 64, "num_layers": 3}
    torch.manual_seed(seed)
    transformer = getattr(diffusers, kind)(**{**sizes, **config}).eval()
    return Loop(transformer, diffusers.FlowMatchEulerDiscreteScheduler())


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


def make_far(seed: int = 0, **config):
    """An AnyFlowFARPipeline of 3 blocks, 2 heads of 16, two chunks of one frame kept in full."""
    from diffusers import AnyFlowFARPipeline, AnyFlowFARTransformer3DModel, FlowMapEulerDiscreteScheduler

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
    sizes |= {"text_dim": TEXT_DIM, "freq_dim": 16, "ffn_dim": 64, "num_layers": 3}
    sizes |= {"full_chunk_limit": 2, "chunk_partition": (1, 1, 1)}
    torch.manual_seed(seed)
    transformer = AnyFlowFARTransformer3DModel(**{**sizes, **config}).eval()
    pipe = AnyFlowFARPipeline(
        scheduler=FlowMapEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_minimaxh3(seed: int = 0, **config):
    """A loop around MiniMax H3's transformer of 3 blocks, 2 heads of 16."""
    from diffusers import MiniMaxH3Scheduler, MiniMaxH3Transformer3DModel
    from loops import Loop

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_layers": 3}
    sizes |= {"num_refiner_layers": 1, "ffn_dim": 32, "in_channels": 2, "audio_in_channels": 4}
    sizes |= {"text_dim": TEXT_DIM, "time_embed_hidden_dim": 16, "time_embed_dim": 16, "rope_freq_dim": 2}
    torch.manual_seed(seed)
    transformer = MiniMaxH3Transformer3DModel(**{**sizes, **config}).eval()
    tell_norms_apart(transformer, ".attn.norm_")
    return Loop(transformer, MiniMaxH3Scheduler(shift=1.0))


def embeddings(batch: int, text_len: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, text_len, TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def padded_prompt(batch: int, text_len: int, seed: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """Embeddings and their mask: the first ends in 2 padded places, the next in 5, and so on."""
    valid = (text_len - 2 - torch.arange(batch) * 3).clamp(min=1)
    mask = (torch.arange(text_len) < valid[:, None]).long()
    embeds = embeddings(batch, text_len, seed)
    return {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_attention_mask": mask}


def run_ltx(pipe, grid=(3, 6, 8), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs) -> torch.Tensor:
    """Packed latents (B, F * H * W, C); `cfg` above 1 doubles the batch of the transformer."""
    kwargs |= padded_prompt(batch, text_len, seed + 1)
    kwargs |= padded_prompt(batch, text_len, seed + 2, "negative_")
    size = {"num_frames": (grid[0] - 1) * 8 + 1, "height": grid[1] * 32, "width": grid[2] * 32}
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        **size,
        num_inference_steps=steps,
        guidance_scale=cfg,
        generator=generator,
        output_type="latent",
        **kwargs,
    ).frames


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


def run_far(pipe, grid=(3, 6, 8), steps=3, batch=1, text_len=5, cfg=1.0, seed=0, **kwargs) -> torch.Tensor:
    """Latents (B, C, F, 2 H, 2 W) for a grid of tokens; `cfg` above 1 doubles the batch."""
    kwargs |= {"prompt_embeds": embeddings(batch, text_len, seed + 1)}
    if cfg > 1:
        kwargs |= {"negative_prompt_embeds": embeddings(batch, text_len, seed + 2)}
    size = {"num_frames": (grid[0] - 1) * 4 + 1, "height": grid[1] * 16, "width": grid[2] * 16}
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": steps, "guidance_scale": cfg, "generator": generator}
    return pipe(**size, **options, output_type="latent", **kwargs).frames


def run_cogvideox(
    pipe, grid=(3, 6, 8), steps=3, batch=1, text_len=7, cfg=1.0, seed=0, **kwargs
) -> torch.Tensor:
    """Latents (B, F, C, 2 H, 2 W) for a grid of tokens; `cfg` above 1 doubles the batch."""
    kwargs |= {"prompt_embeds": embeddings(batch, text_len, seed + 1)}
    kwargs |= {"negative_prompt_embeds": embeddings(batch, text_len, seed + 2)}
    frames = grid[0] * (pipe.transformer.config.patch_size_t or 1)
    size = {"num_frames": (frames - 1) * 4 + 1, "height": grid[1] * 16, "width": grid[2] * 16}
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        **size,
        num_inference_steps=steps,
        guidance_scale=cfg,
        generator=generator,
        output_type="latent",
        **kwargs,
    ).frames


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


def both(mask: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """A mask of booleans together with one that a model gives, which may be of numbers that are added."""
    return mask & given if given.dtype == torch.bool else given.masked_fill(~mask, -torch.inf)


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


class MaskedProcessor:
    """The oracle: the diffusers processor itself under a dense mask, in the model's own token order."""

    def __init__(self, original, mask: torch.Tensor):
        self.original, self.mask = original, mask

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        mask = self.mask
        if attention_mask is not None:  # padded text, which stands last and may be shorter in this call
            length = attention_mask.shape[-1]
            mask = both(mask[..., :length, :length], attention_mask)
        return self.original(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


class MaskedMochiProcessor(MaskedProcessor):
    """The same for Mochi's processor, which takes samples one by one, each with its valid text alone."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs):
        attend, visual = F.scaled_dot_product_attention, hidden_states.shape[1]
        samples = iter(self.mask.expand(len(hidden_states), -1, -1, -1) if self.mask.ndim == 4 else ())

        def masked(*qkv, **options):
            mask = self.mask if self.mask.ndim == 2 else next(samples)[None]
            length = qkv[0].shape[2]
            assert length <= visual + encoder_hidden_states.shape[1]
            return attend(*qkv, attn_mask=mask[..., :length, :length], **options)

        with mock.patch.object(F, "scaled_dot_product_attention", masked):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


def masked_dispatch(original, mask: torch.Tensor) -> MaskedProcessor:
    """The same for processors that take masks in forms of their own, or none."""

    class Masked(MaskedProcessor):
        @wraps(type(original).__call__)  # modules pass what its signature names
        def __call__(self, *args, **kwargs):
            names = type(self.original).__call__.__globals__
            dispatch = names["dispatch_attention_fn"]

            def masked(*qkv, attn_mask=None, **options):
                assert attn_mask is None
                return dispatch(*qkv, attn_mask=self.mask, **options)

            with mock.patch.dict(names, dispatch_attention_fn=masked):
                return self.original(*args, **kwargs)

    return Masked(original, mask)


PIPELINES = {
    "ltx": (make_ltx, run_ltx),
    "ltx2": (make_ltx2, run_ltx2),
    "cogvideox": (make_cogvideox, run_cogvideox),
    "mochi": (make_mochi, run_mochi),
    "kandinsky5": (make_kandinsky5, run_kandinsky5),
    "animate": (make_animate, run_wan_like),
    "chrono": (make_chrono, run_wan_like),
    "far": (make_far, run_far),
    "helios": (make_helios, run_wan_like),
    "minimaxh3": (make_minimaxh3, run_minimaxh3),
}
MASKED = {
    "AnyFlowCausalAttnProcessor": MaskedCausalProcessor,
    "LTXVideoAttnProcessor": masked_dispatch,
    "HeliosAttnProcessor": masked_dispatch,
    "MiniMaxH3AttnProcessor": masked_dispatch,
    "Kandinsky5AttnProcessor": masked_dispatch,
    "LTX2AudioVideoAttnProcessor": masked_dispatch,
    "LTX2PerturbedAttnProcessor": masked_dispatch,
    "MochiAttnProcessor2_0": MaskedMochiProcessor,
}
