"""EfficientNet-Lite0 with its real weights, on photographs that scikit-image brings."""

import numpy as np
import pytest
import torch

from dit_accel.evals.metrics import pairs
from dit_accel.evals.metrics.features import EfficientNet
from dit_accel.scorers import efficientnet, scene_encoder
from dit_accel.scorers.pretrained import Sources

for package in efficientnet.PACKAGES:
    pytest.importorskip(package)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network():
    return efficientnet.load()


@pytest.fixture(scope="module")
def photographs() -> dict[str, np.ndarray]:
    from skimage import data

    return {"cat": data.cat(), "coffee": data.coffee()}


def tensor(picture: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255
    return scene_encoder.resize(pixels, efficientnet.SIDE)


@pytest.mark.parametrize(("name", "label"), [("cat", 285), ("coffee", 967)])  # Egyptian cat, espresso
def test_weights_and_preparation_are_those_of_imagenet(network, photographs, name, label):
    logits = network.backbone._fc(network(tensor(photographs[name])))
    assert logits.argmax() == label
    assert logits.softmax(1)[0, label] > 0.6


def test_distance_grows_with_damage(network, photographs):
    cat, coffee = (tensor(photographs[name]) for name in ("cat", "coffee"))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(cat.shape, generator=generator)
    found = [network.distance(cat + amount * noise, cat).item() for amount in (0.0, 0.02, 0.1)]
    assert found[0] == 0
    assert found[0] < found[1] < found[2] < network.distance(cat, coffee).item()
    assert network.distance(cat, coffee).item() == pytest.approx(network.distance(coffee, cat).item())


def test_it_is_an_extractor_and_a_metric_of_pairs(network, photographs):
    shown = [photographs["cat"], photographs["coffee"]]
    extractor = EfficientNet(Sources(), CPU)
    features = extractor(shown)
    assert features.shape == (2, 1280)
    assert torch.allclose(features[0], network(tensor(shown[0]))[0], atol=1e-3)
    (metric,) = pairs.prepare(["efficientnet_distance"], Sources(), CPU).values()
    cat = shown[0][None]
    assert metric.score(cat, cat) == 0
    assert metric.score(cat[:, ::-1].copy(), cat) > 0.1
    assert metric.settings["weights_sha256"] == extractor.fingerprint
