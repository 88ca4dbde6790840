"""FLUX: text before image, rotary embedding on all tokens, double-stream then single-stream blocks.

Kontext's reference image stands behind the image: it is the layout's anchor, attended densely.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dit_accel.layout import TokenLayout

from .attention import (
    Family,
    Permute,
    SparseProcessor,
    double_and_single,
    double_and_single_blocks,
    project_qkv,
    project_text_qkv,
    read_once,
)

Grid = tuple[int, int, int]


class FluxProcessor(SparseProcessor):
    """Double blocks bring image and text apart; single blocks bring [text, image] in one tensor."""

    def project(self, attn, hidden_states, encoder_hidden_states, rotary):
        text_len = self.layout.text_len
        if encoder_hidden_states is None:
            hidden_states = torch.cat([hidden_states[:, text_len:], hidden_states[:, :text_len]], dim=1)
        q, k, v = (x.unflatten(-1, (-1, attn.head_dim)) for x in project_qkv(attn, hidden_states))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            text_q, text_k, text_v = (
                x.unflatten(-1, (-1, attn.head_dim)) for x in project_text_qkv(attn, encoder_hidden_states)
            )
            q = torch.cat([q, attn.norm_added_q(text_q)], dim=1)
            k = torch.cat([k, attn.norm_added_k(text_k)], dim=1)
            v = torch.cat([v, text_v], dim=1)
        if rotary is not None:
            from diffusers.models.embeddings import apply_rotary_emb

            rotary = tuple(torch.cat([table[text_len:], table[:text_len]]) for table in rotary)
            q = apply_rotary_emb(q, rotary, sequence_dim=1)
            k = apply_rotary_emb(k, rotary, sequence_dim=1)
        return q, k, v

    def output(self, attn, out, encoder_hidden_states):
        text_len = self.layout.text_len
        image, text = out.split([out.shape[1] - text_len, text_len], dim=1)
        if encoder_hidden_states is None:
            return torch.cat([text, image], dim=1)
        image = attn.to_out[1](attn.to_out[0](image.contiguous()))
        return image, attn.to_add_out(text.contiguous())


class Flux(Family):
    name = "flux"
    transformer = "FluxTransformer2DModel"
    originals = ("FluxAttnProcessor",)
    processor = FluxProcessor

    def layers(self, transformer: nn.Module) -> dict[str, nn.Module]:
        return double_and_single(transformer)

    def blocks(self, transformer: nn.Module) -> tuple[nn.ModuleList, ...]:
        return double_and_single_blocks(transformer)

    def layout(self, transformer: nn.Module, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        grid, reference = read_once(memo, inputs["img_ids"], grids_of_ids)
        text_len = inputs["encoder_hidden_states"].shape[1]
        return TokenLayout(grid, text_len=text_len, text_first=True, anchor=reference)

    def enter(
        self, transformer: nn.Module, inputs: dict[str, Any], layout: TokenLayout, permute: Permute
    ) -> dict:
        changed = {
            "hidden_states": _move_image(inputs["hidden_states"], 1, layout, permute),
            "img_ids": _move_image(inputs["img_ids"], -2, layout, permute),
        }
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            if inputs.get(name) is not None:
                changed[name] = [_move_image(sample, 1, layout, permute) for sample in inputs[name]]
        return inputs | changed

    def leave(
        self, transformer: nn.Module, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        return _move_image(sample, 1, layout, restore)


def _move_image(x: torch.Tensor, dim: int, layout: TokenLayout, move: Permute) -> torch.Tensor:
    """x with the image's tokens moved and those of a reference image, which stand behind, left in place."""
    if layout.anchor is None:
        return move(x, dim)
    image, reference = x.split([layout.visual_len, layout.anchor_len], dim=dim)
    return torch.cat([move(image, dim), reference], dim=dim)


def grids_of_ids(ids: torch.Tensor) -> tuple[Grid, Grid | None]:
    """The token grids (1, H, W) of image and reference image (or None), from image ids (S, 3) or (B, S, 3).

    Raises:
        ValueError: ids that are not one or two full row-major grids.
    """
    rows = (ids[0] if ids.ndim == 3 else ids).detach().cpu()
    of_reference = (rows[:, 0] != rows[0, 0]).nonzero()
    if not len(of_reference):
        return _grid(rows), None
    start = int(of_reference[0])
    return _grid(rows[:start]), _grid(rows[start:])


def _grid(rows: torch.Tensor) -> Grid:
    """The token grid behind the ids (S, 3) of one image."""
    start_of_row = (rows[:, 1] != rows[0, 1]).nonzero()
    width = int(start_of_row[0]) if len(start_of_row) else len(rows)
    height = len(rows) // width
    # in bf16, as pipelines pass them, places from 257 on are rounded
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2)
    expected = (places + (rows[0, 1:].long() if len(rows) else 0)).to(rows.dtype)
    if (
        height * width != len(rows)
        or not torch.equal(rows[:, 1:], expected)
        or (rows[:, 0] != rows[0, 0]).any()
    ):
        raise ValueError(
            "the image ids of this FLUX call are not one full grid of tokens, nor those of one image and one "
            "reference image (Kontext), which accelerated attention does not support; "
            "`dit_accel.disable(pipe)` for such calls"
        )
    return 1, height, width


FAMILY = Flux()
