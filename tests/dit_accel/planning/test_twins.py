"""FLOPs of models whose blocks are alike: what is counted is what running every block counts."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dit_accel.planning import model_config, twins
from dit_accel.planning.model_config import all_published


def counts(model: nn.Module, counting, *inputs: torch.Tensor) -> dict:
    with counting as counter:
        model(*inputs)
    return {name: dict(of_name) for name, of_name in counter.get_flop_counts().items() if of_name}


class Block(nn.Module):
    def __init__(self, width: int, times: int):
        super().__init__()
        self.times = times
        self.project = nn.Linear(16, width)
        self.back = nn.Linear(width, 16)

    def forward(self, x, mask=None):
        for _ in range(self.times):
            x = self.back(self.project(x))
        return x


class Model(nn.Module):
    """Twins; a block that is wider; one that computes twice; a block that is run again, on fewer tokens."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            [Block(32, 1), Block(32, 1), Block(48, 1), Block(32, 2), Block(32, 1), Block(32, 2)]
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.blocks[4](x[:, :3])


def test_what_differs_is_counted_by_itself():
    with torch.device("meta"):
        model, x = Model(), torch.empty(1, 9, 16)
    plain = counts(model, FlopCounterMode(display=False), x)
    assert counts(model, twins.counting(model), x) == plain
    of_block = [sum(plain[f"Model.blocks.{n}"].values()) for n in range(6)]
    one = 2 * 2 * 9 * 16 * 32
    assert of_block == [one, one, one * 3 // 2, 2 * one, one * 4 // 3, 2 * one]


def test_twins_are_not_run_and_forwards_come_back():
    with torch.device("meta"):
        model, x = Model(), torch.empty(1, 9, 16)
    with mock.patch.object(nn.Linear, "forward", autospec=True, side_effect=nn.Linear.forward) as linear:
        counts(model, twins.counting(model), x)
        counted = linear.call_count
        model(x)
    assert counted == 2 * (1 + 1 + 2 + 1)  # a block of each kind, and that on fewer tokens
    assert linear.call_count - counted == 2 * (1 + 1 + 1 + 2 + 1 + 2 + 1)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "name",
    [
        "flux.1-dev",
        "hunyuan-video-1.5",
        "kandinsky-5-lite",
        "ltx-2-19b",
        "sd3-medium",
        "wan2.1-14b",
        "z-image",
    ],
)
def test_published_models_with_three_blocks_of_each_kind(name, monkeypatch):
    model = all_published()[name]
    depths = {key for key in model.config if key.endswith("layers") or key.endswith("_blocks")}
    few = {key: 3 for key in depths if type(model.config[key]) is int and model.config[key] > 3}
    model = replace(model, config=model.config | few)
    transformer, grid = model.transformer(), (3 if model.video else 1, 4, 6)
    found = model.count_flops(transformer, grid)
    assert few
    monkeypatch.setattr(model_config, "counting", lambda _: FlopCounterMode(display=False))
    assert found == model.count_flops(transformer, grid)
