"""How fast this machine is, measured when asked: dense attention, and an autoencoder's small picture."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

TOKENS, HEADS = 2048, 4
SIDE = 128  # pixels


@lru_cache(maxsize=16)
def attention_rate(device: str, dtype: torch.dtype, head_dim: int) -> float:
    """FLOP/s of dense attention, 4 heads of 2048 tokens: the best of three calls, in well under a second."""
    options = {"device": device, "dtype": dtype}
    q = torch.zeros(1, HEADS, TOKENS, head_dim, **options)
    return 4 * HEADS * TOKENS**2 * head_dim / _seconds(lambda: scaled_dot_product_attention(q, q, q), device)


def autoencoder_rate(vae: Any, device: str, shape: tuple[int, ...], flops: int) -> float:
    """FLOP/s of decoding, by an autoencoder of this one's shape with random weights.

    Args:
        shape: of the latents (1, C, [F,] H, W) that it decodes.
        flops: of that.
    """
    real = nn.Module.to(type(vae).from_config(vae.config).eval(), device, vae.dtype)
    latents = torch.zeros(shape, device=device, dtype=vae.dtype)
    return flops / _seconds(lambda: real.decode(latents), device)


def _seconds(work: Callable[[], Any], device: str) -> float:
    """Of the fastest of three, after one that is not counted."""
    found = []
    with torch.inference_mode():
        for _ in range(4):
            _wait(device)
            started = time.perf_counter()
            work()
            _wait(device)
            found.append(time.perf_counter() - started)
    return min(found[1:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
