"""Our own VBench dimensions: flickering by its definition, the consistencies with small stand-ins."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTModel

from dit_accel import media
from dit_accel.errors import UnavailableError
from dit_accel.evals.metrics.folders import Store
from dit_accel.evals.vbench.dimensions import _resized, consistency, flickering, measure, prepare
from dit_accel.scorers.pretrained import Sources

CPU = torch.device("cpu")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def frames(count=4, height=16, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_flickering_is_one_minus_the_mean_absolute_difference():
    video = frames(5)
    errors = [np.abs(video[i].astype(float) - video[i + 1].astype(float)).mean() for i in range(4)]
    assert flickering(video) == pytest.approx((255 - np.mean(errors)) / 255, rel=1e-12)
    still = np.repeat(video[:1], 3, axis=0)
    assert flickering(still) == 1.0
    flash = np.stack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)])
    assert flickering(flash) == flickering(flash[::-1]) == 0.0


def test_consistency_is_vbenchs_loop():
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = 0.0
    for i in range(1, 6):
        before = max(0.0, F.cosine_similarity(features[i - 1], features[i], dim=0).item())
        first = max(0.0, F.cosine_similarity(features[0], features[i], dim=0).item())
        total += (before + first) / 2
    assert consistency(features) == pytest.approx(total / 5, rel=1e-12)
    assert consistency(torch.stack([features[0], -features[0]])) == 0.0


def test_frames_are_resized_by_their_shorter_side():
    assert _resized(frames(2, 112, 200), CPU, "bilinear").shape == (2, 3, 224, 400)
    assert _resized(frames(1, 400, 300), CPU, "bicubic").shape == (1, 3, 298, 224)
    same = frames(1, 224, 230)
    kept = _resized(same, CPU, "bilinear")
    assert torch.allclose(kept, torch.tensor(same).permute(0, 3, 1, 2) / 255, atol=1e-6)


def test_the_mean_is_over_videos_or_over_frames(tmp_path):
    for name, count in (("a", 2), ("b", 5)):
        media.save(tmp_path / f"{name}.gif", frames(count, seed=count))
    paths = [tmp_path / "a.gif", tmp_path / "b.gif"]
    ready = prepare(["temporal_flickering"], Sources(), CPU)
    result = measure({"temporal_flickering": paths}, ready)["temporal_flickering"]
    expected = [flickering(media.load(path)) for path in paths]
    assert [(row["name"], row["value"]) for row in result["videos"]] == list(
        zip(("a.gif", "b.gif"), expected, strict=True)
    )
    assert result["value"] == pytest.approx(np.mean(expected), rel=1e-12)


def test_what_cannot_be_scored_is_named_and_finished_videos_are_kept(tmp_path):
    store = Store(tmp_path / "kept")
    ready = prepare(["temporal_flickering"], Sources(), CPU)
    whole = media.save(tmp_path / "whole.gif", frames(3))
    one = media.save(tmp_path / "one.png", frames(1))
    with pytest.raises(ValueError, match=r"one\.png has 1 frame, and at least 2"):
        measure({"temporal_flickering": [whole, one]}, ready, store=store)
    assert len(list(store.folder.rglob("*.npy"))) == 1
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ValueError, match=r"empty\.mp4 cannot be read"):
        measure({"temporal_flickering": [tmp_path / "empty.mp4"]}, ready)


# -- with weights --------------------------------------------------------------------------------------------


def test_without_weights_the_consistencies_are_unavailable(tmp_path):
    with pytest.raises(
        UnavailableError, match=r"facebook/dino-vitb16 is not in the .*dino-vitb16/ in a folder"
    ):
        prepare(["subject_consistency"], Sources(tmp_path), CPU)
    with pytest.raises(UnavailableError, match="openai/clip-vit-base-patch32 is not in"):
        prepare(["background_consistency"], Sources(tmp_path), CPU)


@pytest.fixture
def models(tmp_path):
    """Small networks of the real classes where the published ones would be."""
    torch.manual_seed(0)
    dino = ViTModel(ViTConfig(**SIZES, image_size=224, patch_size=32), add_pooling_layer=False).eval()
    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**SIZES, image_size=224, patch_size=32, projection_dim=8)
    ).eval()
    dino.save_pretrained(tmp_path / "weights" / "dino-vitb16")
    clip.save_pretrained(tmp_path / "weights" / "clip-vit-base-patch32")
    return dino, clip, Sources(tmp_path / "weights")


@torch.inference_mode()
def test_consistencies_are_of_the_networks_features(models, tmp_path):
    dino, clip, sources = models
    video = media.load(media.save(tmp_path / "a.gif", frames(19, 32, 48)))
    short = media.load(media.save(tmp_path / "b.gif", frames(2, 32, 32, seed=1)))
    paths = [tmp_path / "a.gif", tmp_path / "b.gif"]
    names = ["subject_consistency", "background_consistency"]
    ready = prepare(names, sources, CPU)
    result = measure(dict.fromkeys(names, paths), ready)

    def normalised(pixels, mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    subject, background = [], []
    for shown in (video, short):
        pixels = normalised(_resized(shown, CPU, "bilinear"), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        tokens = dino(pixels, interpolate_pos_encoding=True).last_hidden_state
        subject.append(consistency(tokens[:, 0]))
        wide = _resized(shown, CPU, "bicubic")
        left = (wide.shape[-1] - 224) // 2
        means = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        background.append(consistency(clip(normalised(wide[..., left : left + 224], *means)).image_embeds))
    for name, values in zip(names, (subject, background), strict=True):
        assert [row["value"] for row in result[name]["videos"]] == pytest.approx(values, abs=1e-6)
        assert result[name]["value"] == pytest.approx((18 * values[0] + values[1]) / 19, abs=1e-6)
        assert len(result[name]["settings"]["weights_sha256"]) == 64
    assert result["subject_consistency"]["settings"]["backbone"] == "facebook/dino-vitb16"
