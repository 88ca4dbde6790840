"""Starting values that the video models' narrow autoencoders learn from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def keep_signals(vae: nn.Module, latent_channels: int) -> None:
    """Rescales fresh weights so that a picture's colours reach the other end.

    PyTorch's default weights shrink a signal by sqrt(3) per convolution; after a dozen only the biases are
    left, which norms over few channels never remove. And the posteriors are made narrow: a wide one drowns
    the first signal.
    """
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.weight.mul_(3**0.5)
            nn.init.zeros_(module.bias)
    bias: Any = vae.quant_conv.bias
    bias[latent_channels:] = -5.0
