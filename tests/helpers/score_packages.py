"""Small stand-ins for the packages ImageReward and pyiqa, which are not installed where the tests run.

They have what `dit_accel.evals.metrics.scores` calls, with the arguments of image-reward 1.5 and pyiqa
0.1.16, and print to stdout as those do. They cannot show that the real packages give the published scores.
"""

from __future__ import annotations

import json
import types
from pathlib import Path

import torch


class Reward(torch.nn.Module):
    """Words of the prompt x mean of the picture x `weight`, in ImageReward's interface."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.weight = device, torch.nn.Parameter(torch.full((), torch.nan))
        self.blip = types.SimpleNamespace(tokenizer=lambda prompt: {"input_ids": prompt.split()})

    def score(self, prompt: str, image) -> float:
        pixels = torch.tensor(list(image.getdata()), dtype=torch.float32)
        return (len(prompt.split()) * pixels.mean() * self.weight).item()


def image_reward() -> types.ModuleType:
    """The module `ImageReward`, whose `load` accepts weights that lack some, as the real one does."""

    def load(name: str, device: str, med_config: str) -> Reward:
        json.loads(Path(med_config).read_text())
        print(f"load checkpoint from {name}")
        model = Reward(device)
        model.load_state_dict(torch.load(name, weights_only=True), strict=False)
        return model.eval()

    module = types.ModuleType("ImageReward")
    module.load = load
    return module


class Quality(torch.nn.Module):
    """Mean of the picture x `weight`, in the interface of a metric of pyiqa."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Module()
        self.net.weight = torch.nn.Parameter(torch.full((), torch.nan))

    def load_weights(self, path: str) -> None:
        print(f"Loading pretrained model from {path}")
        self.net.load_state_dict(torch.load(path, weights_only=True)["params"], strict=True)

    def forward(self, target: torch.Tensor) -> torch.Tensor:
        assert target.shape[:2] == (1, 3)
        assert 0 <= target.min() <= target.max() <= 1
        return (target.mean() * self.net.weight).view(1, 1)


def pyiqa() -> types.ModuleType:
    """The module `pyiqa`, which refuses to be asked for a download."""

    def create_metric(name: str, device: torch.device, pretrained: bool, backbone_pretrain: bool) -> Quality:
        assert name == "topiq_nr"
        assert not pretrained
        assert not backbone_pretrain
        return Quality().to(device)

    module = types.ModuleType("pyiqa")
    module.create_metric = create_metric
    return module
