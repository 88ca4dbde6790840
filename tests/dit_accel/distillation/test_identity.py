"""By what a distillation is known again: weights, and arguments of calls."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dit_accel.distillation.identity import modules_of, told, weights_of
from dit_accel.files import read_text


def layers(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30)).to(dtype)


def test_weights():
    """By values, names, shapes and dtypes; a compiled module is the same."""
    one = {"a": layers()}
    assert weights_of(one) == weights_of({"a": torch.compile(layers())})
    changed = {"a": layers()}
    with torch.no_grad():
        changed["a"][0].weight.mul_(1.01)
    low, one_less = {"a": layers(torch.bfloat16)}, {"a": layers()[:1]}
    away = {"a": layers().to("meta")}
    found = [weights_of(x) for x in (one, changed, low, one_less, away, {"b": layers()})]
    assert len(set(found)) == len(found)


def test_quantized_weights():
    quantization = pytest.importorskip("torchao.quantization")
    found = []
    for scale in (1.0, 1.0, 1.5):
        module = layers()
        with torch.no_grad():
            module[0].weight.mul_(scale)
        quantization.quantize_(module, quantization.Int8WeightOnlyConfig())
        found.append(weights_of({"a": module}))
    assert found[0] == found[1]
    assert len(set(found)) == 2


def test_modules_of_a_pipeline(flux):
    assert list(modules_of(flux.pipe)) == [
        name for name, part in flux.pipe.components.items() if isinstance(part, nn.Module)
    ]


def many(value: int) -> torch.Tensor:
    x = torch.zeros(3000)
    x[1500] = value
    return x


def test_values_are_told_apart_by_what_they_hold():
    """What text shows of them is the same."""
    picture = Image.new("RGB", (8, 8))
    other = picture.copy()
    other.putpixel((3, 3), (1, 2, 3))
    pairs = [
        (many(0), many(1)),
        (many(0).numpy(), many(1).numpy()),
        (picture, other),
        ({"x": [many(0)]}, {"x": [many(1)]}),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)),
    ]
    for one, another in pairs:
        assert told(one) != told(another)
        assert json.loads(json.dumps(told(one))) == told(one)
    assert told({"a": 1, "b": (1.5, None, "x at 0x12")}) == {"a": 1, "b": [1.5, None, "x at 0x12"]}


CODE = """
import torch
from dit_accel.distillation.identity import told
padding = [object() for _ in range(int({number}))]
class Callback: pass
print(told([Callback(), lambda: 1, torch.Generator(), torch.zeros(3)]))
"""


def test_they_are_the_same_in_another_process(tmp_path):
    found = []
    for number in (1, 1000):
        path = tmp_path / "out"
        with path.open("w") as file:
            subprocess.run([sys.executable, "-c", CODE.format(number=number)], stdout=file, check=True)
        found.append(read_text(path))
    assert found[0] == found[1]
    assert "0x" not in found[0]
