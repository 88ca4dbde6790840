"""LTX-2: a stream of video tokens and one of audio tokens; the video's self-attention (`attn1`) is sparse.

Audio's own attention, attention from either stream to the other and to text are untouched. Tokens of
keyframes and reference videos, which pipelines put behind the video, are attended densely: they stand where
other families have text.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from dit_accel.masks.layout import TokenLayout

from .base import Fill
from .ltx_video import Grid, LTXVideo
from .registry import register
from .splits import split_outputs, split_tokens
from .tokens import Permute, move_part


@register
class LTX2(LTXVideo):
    """Packed tokens, the grid said by the pipeline."""

    name = "ltx-2"
    transformer = "LTX2VideoTransformer3DModel"
    originals = ("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor")
    distillation_refusal = "they denoise sound beside the video"
    stays_dense = (
        "audio's self-attention; attention from video to audio, from audio to video and to text; tokens of "
        "keyframes and reference videos"
    )
    text_name = "keyframe and reference"

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        if inputs.get("video_self_attention_mask") is not None:
            raise ValueError(
                "LTX-2's `video_self_attention_mask` is not supported in accelerated calls, whose masks are "
                "the pattern's; leave it out, or `dit_accel.disable(pipe)` for such calls"
            )
        grid, tokens = tuple(inputs.get(name) for name in ("num_frames", "height", "width")), 0
        if None not in grid:
            tokens = inputs["hidden_states"].shape[1] - math.prod(grid)
        if None in grid or tokens < 0:
            raise ValueError(
                f"this LTX-2 call says {grid} frames, rows and columns of its "
                f"{inputs['hidden_states'].shape[1]} video tokens; accelerated attention needs all three, "
                "and no more than there are tokens"
            )
        return TokenLayout(grid, text_len=tokens)

    def enter(self, transformer: Any, inputs: dict[str, Any], layout: TokenLayout, permute: Permute) -> dict:
        moved = super().enter(transformer, inputs, layout, permute)
        if (keyframes := inputs.get("video_keyframes_mask")) is not None:
            moved["video_keyframes_mask"] = move_part(keyframes, 1, layout.visual_slice, permute)
        return moved

    def parallel_plan(self, transformer: Any) -> dict[str, Any]:
        """Of the video; audio, which is short, is in every process."""
        tables = dict.fromkeys(("rope", "cross_attn_rope"), dict.fromkeys((0, 1), _rotary_dim(transformer)))
        return split_tokens(("hidden_states", 3), ("timestep", 2)) | split_outputs(tables)

    def not_parallel(self, transformer: Any, inputs: dict[str, Any]) -> str | None:
        marked = inputs.get("video_keyframes_mask") is not None
        if marked and transformer.config.get("use_keyframes_abs_pos_embedding"):
            return "`video_keyframes_mask` is of all tokens, and no plan splits it; use one process a prompt"
        return super().not_parallel(transformer, inputs)

    def exchanging(self, transformer: Any) -> list[nn.Module]:
        return [block.video_to_audio_attn for block in transformer.transformer_blocks]

    def placed_outputs(self, transformer: Any) -> dict[nn.Module, int | tuple[int, int]]:
        dim = _rotary_dim(transformer)
        return {transformer.rope: dim, transformer.cross_attn_rope: dim}

    # -- what is known before a run --------------------------------------------------------------------------

    def example_inputs(self, config: Any, grid: Grid, text_len: int, fill: Fill) -> dict[str, Any]:
        seconds = ((grid[0] - 1) * config.vae_scale_factors[0] + 1) / 24
        rate = config.audio_sampling_rate / config.audio_hop_length / config.audio_scale_factor
        audio, timestep = round(seconds * rate), fill(1).fill_(500)
        text, mask = fill(1, text_len, config.caption_channels), fill(1, text_len).fill_(1)
        return {
            "hidden_states": fill(1, math.prod(grid), config.in_channels),
            "audio_hidden_states": fill(1, audio, config.audio_in_channels),
            "encoder_hidden_states": text,
            "audio_encoder_hidden_states": text,
            "encoder_attention_mask": mask,
            "audio_encoder_attention_mask": mask,
            "timestep": timestep,
            "sigma": timestep,
            "num_frames": grid[0],
            "height": grid[1],
            "width": grid[2],
            "audio_num_frames": audio,
        }

    def prompt_tokens(self, folder: Any, longest: int | None) -> int:
        return longest or 1024


def _rotary_dim(transformer: Any) -> int:
    """The dimension of tokens in tables of the rotary embedding."""
    return 2 if transformer.config.rope_type == "split" else 1
