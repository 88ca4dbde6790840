"""What makers and runners of tiny pipelines share: random weights and random embeddings of prompts."""

from __future__ import annotations

import torch

TEXT_DIM = 16


def tell_norms_apart(transformer, name_part: str) -> None:
    """Random weights for the norms with `name_part` in their names, so that none passes for another."""
    for name, weight in transformer.named_parameters():
        if name_part in name:
            torch.nn.init.uniform_(weight, 0.5, 2)


def embeddings(batch: int, text_len: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, text_len, TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def padded_prompt(batch: int, text_len: int, seed: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """Embeddings and their mask: the first ends in 2 padded places, the next in 5, and so on."""
    valid = (text_len - 2 - torch.arange(batch) * 3).clamp(min=1)
    mask = (torch.arange(text_len) < valid[:, None]).long()
    embeds = embeddings(batch, text_len, seed)
    return {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_attention_mask": mask}
