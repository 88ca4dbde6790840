"""The one way in which tiny pipelines are made and run: random weights, embeddings in, latents out."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

TEXT_DIM = 16


def random_transformer(
    kind: str, sizes: dict[str, Any], config: dict[str, Any], seed: int | None, norms: str | None = None
) -> nn.Module:
    """A transformer of diffusers with random weights, as for inference.

    Args:
        kind: its class.
        sizes: its configuration.
        config: what a test has otherwise.
        seed: of the weights; None: they go on from where the one before ended.
        norms: part of the names of norms that are told apart.
    """
    import diffusers

    if seed is not None:
        torch.manual_seed(seed)
    made = getattr(diffusers, kind)(**{**sizes, **config}).eval()
    if norms is not None:
        tell_norms_apart(made, norms)
    return made


def tell_norms_apart(transformer: nn.Module, name_part: str) -> None:
    """Random weights for the norms with `name_part` in their names, so that none passes for another."""
    for name, weight in transformer.named_parameters():
        if name_part in name:
            nn.init.uniform_(weight, 0.5, 2)


def pipeline_of(kind: str, transformer: nn.Module, **parts: Any) -> Any:
    """A pipeline of diffusers around a transformer: Euler's steps unless `parts` say otherwise.

    Args:
        kind: its class.
        transformer: of the pipeline.
        parts: other arguments of the class; those that it asks for and are not given are None.
    """
    import diffusers

    made = getattr(diffusers, kind)
    parts = {"transformer": transformer, "scheduler": _euler(), **parts}
    asked = inspect.signature(made).parameters.values()
    missing = [one.name for one in asked if one.default is one.empty and one.name not in parts]
    pipe = made(**dict.fromkeys(missing), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loop_of(transformer: nn.Module, scheduler: Any = None) -> Any:
    """A plain loop around a transformer, by Euler's steps unless another scheduler is given."""
    from loops import Loop

    return Loop(transformer, scheduler or _euler())


def _euler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def run(
    pipe: Any, grid: tuple[int, ...], steps: int, seed: int, pixels: int = 16, frames: int = 4, **call: Any
) -> torch.Tensor:
    """What a pipeline of diffusers makes for a grid of tokens, (H, W) or (F, H, W), as latents.

    Args:
        pipe: of images or of videos, as the grid has it.
        grid: in tokens.
        steps: of the sampler.
        seed: of the noise.
        pixels, frames: how many a token stands for, along each side and in time.
        call: other arguments of the pipeline.
    """
    size = {"height": grid[-2] * pixels, "width": grid[-1] * pixels}
    if len(grid) == 3:
        size["num_frames"] = (grid[0] - 1) * frames + 1
    generator = torch.Generator().manual_seed(seed)
    made = pipe(**size, num_inference_steps=steps, generator=generator, output_type="latent", **call)
    return made.frames if len(grid) == 3 else made.images


def embeddings(batch: int, text_len: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, text_len, TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def padded_prompt(batch: int, text_len: int, seed: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """Embeddings and their mask: the first ends in 2 padded places, the next in 5, and so on."""
    valid = (text_len - 2 - torch.arange(batch) * 3).clamp(min=1)
    mask = (torch.arange(text_len) < valid[:, None]).long()
    embeds = embeddings(batch, text_len, seed)
    return {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_attention_mask": mask}
