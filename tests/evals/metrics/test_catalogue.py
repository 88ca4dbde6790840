"""The catalogue of metrics: names, availability, and what to do about what is missing."""

import sys
import types

import pytest

from dit_accel.errors import UnavailableError
from dit_accel.evals.metrics.catalogue import METRICS, available, of_command, set_metric
from dit_accel.scorers.pretrained import Sources


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """No weights anywhere, and neither torchvision nor EfficientNet."""
    import huggingface_hub
    import torch

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    return Sources(tmp_path)


def test_published_names_are_for_published_features_only():
    assert set_metric("frechet", "inception") == "fid"
    assert set_metric("mmd", "clip") == "cmmd"
    assert set_metric("frechet", "scenes") == "frechet-scenes"
    scenes = [metric for metric in METRICS.values() if metric.extractor == "scenes"]
    assert len(scenes) == 4
    assert all(metric.name.endswith("-scenes") for metric in scenes)
    assert all("not comparable with FID" in metric.description for metric in scenes)
    named = [metric.description for name, metric in METRICS.items() if "efficientnet" in name]
    assert len(named) == 5
    assert all("not comparable with FID" in text or "not LPIPS" in text for text in named)
    assert {"fid", "kid", "cmmd", "prdc"} <= set(of_command("dist"))
    assert set(of_command("pairs")) == {"psnr", "ssim", "ms_ssim", "lpips", "efficientnet_distance"}


def test_what_is_bundled_runs_and_what_is_not_says_why(bare):
    status = {name: metric.describe(bare) for name, metric in METRICS.items()}
    runs = {name for name, row in status.items() if row["available"]}
    scenes = {f"{kind}-scenes" for kind in ("frechet", "kid", "mmd", "prdc")}
    assert runs == {"psnr", "ssim", "ms_ssim", "attributes", "temporal_flickering"} | scenes
    assert status["lpips"]["reason"] == "torchvision is not installed: pip install 'dit-accel[eval-full]'"
    remedy = "efficientnet_lite_pytorch is not installed: pip install 'dit-accel[efficientnet]'"
    assert status["frechet-efficientnet"]["reason"] == status["efficientnet_distance"]["reason"] == remedy
    assert "inception-2015-12-05.pt" in status["fid"]["reason"]
    assert len(status["fid"]["weights"]["sha256"]) == 64
    assert "clip-vit-large-patch14-336" in status["cmmd"]["reason"]
    assert all((row["reason"] is None) == row["available"] for row in status.values())


def test_a_torchvision_for_another_torch_is_said_to_be_broken(bare, monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.syspath_prepend(tmp_path)
    assert "torchvision cannot be imported (operator nms does not exist)" in METRICS["lpips"].missing(bare)


def test_lpips_with_torchvision_still_needs_weights(bare, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    assert "alexnet-owt-7be5be79.pth (sha256 begins with 7be5be79)" in METRICS["lpips"].missing(bare)


def test_unavailable_metrics_fail_or_are_skipped(bare):
    assert available(["psnr", "ssim"], bare, False) == (["psnr", "ssim"], {})
    with pytest.raises(UnavailableError, match=r"lpips: torchvision .*; --allow-skipped goes on without"):
        available(["psnr", "lpips"], bare, False)
    with pytest.raises(UnavailableError, match=r"^fid, kid: there is no inception"):
        available(["fid", "kid"], bare, False)
    names, skipped = available(["psnr", "lpips"], bare, True)
    assert names == ["psnr"]
    assert list(skipped) == ["lpips"]
    with pytest.raises(UnavailableError, match="none of lpips, fid can run here"):
        available(["lpips", "fid"], bare, True)
