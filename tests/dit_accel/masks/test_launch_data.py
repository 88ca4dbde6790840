import copy
import pickle
from dataclasses import dataclass

import torch

from dit_accel.masks.launch_data import LaunchData


@dataclass
class Lengths:
    values: torch.Tensor


@dataclass
class Order:
    values: torch.Tensor


def test_makes_each_kind_once_for_each_argument():
    data, made = LaunchData(), []

    def make(kind, n):
        made.append((kind, n))
        return kind(torch.full((1,), n))

    for _ in range(2):
        for kind in (Lengths, Order):
            for n in (1, 2):
                value = data.get(kind, lambda kind=kind, n=n: make(kind, n), n)
                assert type(value) is kind
                assert int(value.values) == n
    assert len(made) == 4


def test_what_is_made_in_inference_mode_can_be_saved_for_backward():
    data = LaunchData()
    with torch.inference_mode():
        data.get(Lengths, lambda: Lengths(torch.ones(3)))
    weight = torch.ones(3, requires_grad=True)
    (weight * data.get(Lengths, lambda: None).values).sum().backward()
    assert weight.grad.tolist() == [1, 1, 1]


def test_copies_start_empty():
    data = LaunchData()
    data.get(Lengths, lambda: Lengths(torch.ones(3)))
    for other in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert other.get(Lengths, lambda: 7) == 7
