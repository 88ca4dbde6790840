"""diffusers' own attention under a pattern's dense mask: what accelerated transformers are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch

from dit_accel import TokenLayout
from dit_accel.patterns import Pattern
from dit_accel.pipelines import family_of


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def mask_layers(
    transformer: torch.nn.Module,
    masked: Callable,
    pattern: Pattern,
    layout: TokenLayout,
    layers: Sequence[str] | None = None,
) -> None:
    """Puts the pattern's token mask under layers of a transformer, all unless some are named."""
    modules = family_of(transformer).layers(transformer)
    masked(modules, dict.fromkeys(layers or modules, pattern.token_mask(layout)))


def under_masks(
    tools: SimpleNamespace,
    masked: Callable,
    pattern: Pattern,
    layers: Sequence[str] | None = None,
    grid: tuple[int, ...] = (8, 12),
    text_len: int = 7,
    **run,
) -> torch.Tensor:
    """What an untouched pipeline makes when diffusers' own attention gets the pattern's token mask too."""
    pipe = tools.make()
    # Z-Image fills captions up, and its masks may be longer than a call
    longest = text_len + 70 if "zimage" in tools.run.__name__ else text_len
    layout = family_of(pipe.transformer).planned_layout((1, *grid)[-3:], longest)
    mask_layers(pipe.transformer, masked, pattern, layout, layers)
    return tools.run(pipe, grid=grid, text_len=text_len, **run)
