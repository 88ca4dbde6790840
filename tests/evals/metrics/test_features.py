"""Extractors and where their weights come from; for InceptionV3 and CLIP with small stand-ins."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from dit_accel.errors import UnavailableError
from dit_accel.evals.metrics import features
from dit_accel.scorers import pretrained
from dit_accel.scorers.pretrained import Sources, WeightsFile

CPU = torch.device("cpu")


def pictures(*sizes):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def file_of(path, sha256=None):
    return WeightsFile(path.name, sha256 or hashlib.sha256(path.read_bytes()).hexdigest(), "https://nowhere")


# -- the bundled encoder -------------------------------------------------------------------------------------


def test_scenes_take_pictures_of_any_size():
    extractor = features.Scenes(Sources(), CPU)
    shown = pictures((64, 64), (48, 80), (200, 128))
    together = extractor(shown)
    assert together.shape == (3, 128)
    assert together.dtype == torch.float32
    alone = torch.cat([extractor([one]) for one in shown])
    assert torch.allclose(together, alone, atol=1e-5)
    assert "not comparable with FID" in extractor.title
    assert features.Scenes.weights is None, "there is nothing to look for"


def test_fingerprints_tell_weights_apart():
    module = nn.Linear(2, 2)
    before = pretrained.fingerprint(module)
    assert pretrained.fingerprint(module) == before
    with torch.no_grad():
        module.bias[0] += 1
    assert pretrained.fingerprint(module) != before


# -- InceptionV3 ---------------------------------------------------------------------------------------------


class Layers(nn.Module):
    def forward(self, x):
        return torch.stack([x.mean((1, 2, 3)), x[:, 0, 0, 0], x[:, 2, -1, -1]], 1)[:, :, None, None]


class Graph(nn.Module):
    """Called as the 2015 graph is: pixels from 0 to 255, resized inside; `layers` take them ready."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, return_features: bool = False):
        return torch.stack([x.mean((1, 2, 3)), x.amax((1, 2, 3))], 1)


@pytest.fixture
def inception(tmp_path, monkeypatch):
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(Graph()).save(str(path))
    monkeypatch.setattr(features.Inception, "weights", file_of(path))
    return Sources(tmp_path)


def test_clean_resizes_like_pillow_in_floats(inception):
    extractor = features.Inception(inception, CPU)
    (picture,) = pictures((120, 400))
    found = extractor([picture])[0]
    red, _, blue = (Image.fromarray(picture[..., c].astype(np.float32)) for c in range(3))
    corner = np.asarray(red.resize((299, 299), Image.Resampling.BICUBIC))[0, 0]
    last = np.asarray(blue.resize((299, 299), Image.Resampling.BICUBIC))[-1, -1]
    assert found[1].item() == pytest.approx((corner - 128) / 128, rel=1e-5)
    assert found[2].item() == pytest.approx((last - 128) / 128, rel=1e-5)
    assert extractor.resize == "clean"


def test_legacy_leaves_pixels_to_the_graph(inception):
    extractor = features.Inception(inception, CPU, "legacy")
    shown = pictures((20, 30), (40, 10))
    found = extractor(shown)
    assert found[:, 1].tolist() == [one.max() for one in shown]
    assert extractor.resize == "legacy"


def test_missing_and_wrong_weights_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    reason = features.Inception.weights.missing(Sources())
    assert "there is no inception-2015-12-05.pt (sha256 begins with f58cb9b6)" in reason
    assert str(tmp_path / "hub" / "checkpoints") in reason
    assert "--allow-download" in reason
    with pytest.raises(UnavailableError, match="there is no inception"):
        features.Inception(Sources(), CPU)
    assert features.Inception.weights.missing(Sources(download=True)) is None
    (tmp_path / "inception-2015-12-05.pt").write_bytes(b"cut off")
    assert "damaged or another file" in features.Inception.weights.missing(Sources(tmp_path))
    assert "damaged or another file" in features.Inception.weights.missing(Sources(tmp_path, download=True))


def test_weights_are_downloaded_only_when_allowed_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    origin = tmp_path / "origin.pt"
    origin.write_bytes(b"weights")
    file = WeightsFile("net.pt", hashlib.sha256(b"weights").hexdigest()[:8], origin.as_uri())
    with pytest.raises(UnavailableError, match="or pass --allow-download"):
        file.get(Sources())
    path = file.get(Sources(download=True))
    assert path == tmp_path / "hub" / "checkpoints" / "net.pt"
    assert path.read_bytes() == b"weights"
    origin.unlink()
    assert file.get(Sources()) == path, "it is kept"
    other = WeightsFile("other.pt", "00000000", origin.as_uri())
    with pytest.raises(UnavailableError, match="could not be downloaded"):
        other.get(Sources(download=True))
    assert [file.name for file in path.parent.iterdir()] == ["net.pt"]


# -- CLIP ----------------------------------------------------------------------------------------------------


def test_clip_is_found_in_the_users_folder(tmp_path):
    assert "not in the Hugging Face cache" in features.Clip.weights.missing(Sources(tmp_path))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**sizes, image_size=28, patch_size=14, projection_dim=8)
    ).eval()
    model.save_pretrained(tmp_path / "clip-vit-large-patch14-336")
    assert features.Clip.weights.missing(Sources(tmp_path)) is None
    extractor = features.Clip(Sources(tmp_path), CPU)
    (picture,) = pictures((28, 28))
    mean, std = (np.array(values, np.float32) for values in (extractor.mean, extractor.std))
    pixels = torch.from_numpy((picture / np.float32(255) - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = model(pixel_values=pixels).image_embeds
    assert torch.allclose(extractor([picture]), expected, atol=1e-5)
    assert extractor(pictures((60, 40), (28, 28))).shape == (2, 8)
