"""`dit-accel eval scores`: files, JSON, exit codes and errors, with tiny random CLIP models."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import score_packages
import torch
from tiny_clip import save_clip

from dit_accel import media


@pytest.fixture
def evaluate(cli_of):
    return cli_of("eval")


@pytest.fixture(autouse=True)
def _bare(tmp_path, monkeypatch):
    """Nothing in the Hugging Face cache, neither package, and a cache of the test's own."""
    import huggingface_hub

    monkeypatch.setenv("DIT_ACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    for package in ("ImageReward", "pyiqa"):
        monkeypatch.setitem(sys.modules, package, None)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_clip(folder / "clip-vit-large-patch14")
    save_clip(folder / "HPSv2-hf", 1)
    return folder


@pytest.fixture
def arguments(tmp_path, weights):
    """Four files, one of them a video, and lines of prompts."""
    generator = np.random.default_rng(0)
    for index in range(4):
        count, suffix = (5, "gif") if index == 3 else (1, "png")
        frames = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        media.save(tmp_path / "test" / f"{index:03d}.{suffix}", frames)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue circle\na circle\nred\n")
    return (
        "scores", "--test", tmp_path / "test", "--prompts", tmp_path / "prompts.txt", "--weights", weights
    )  # fmt: skip


def test_help_has_an_example(evaluate):
    shown = " ".join(evaluate.run("scores", "--help").stdout.split())
    assert "Example: dit-accel eval scores --test" in shown


def test_list_has_every_score_with_its_reason(evaluate, strict, weights):
    rows = strict(evaluate.run("list", "--json", "--weights", weights).stdout)["metrics"]
    rows = {row["name"]: row for row in rows if row["command"] == "scores"}
    assert set(rows) == {"clip", "pickscore", "hpsv2", "aesthetics", "image-reward", "topiq"}
    assert {name for name, row in rows.items() if row["available"]} == {"clip", "hpsv2"}
    assert {name for name, row in rows.items() if not row["needs_prompts"]} == {"aesthetics", "topiq"}
    assert "yuvalkirstain/PickScore_v1" in rows["pickscore"]["reason"]
    assert rows["topiq"]["reason"] == "pyiqa is not installed: pip install pyiqa"
    assert rows["image-reward"]["weights"]["file"] == "ImageReward.pt and med_config.json"
    assert rows["image-reward"]["also"][0]["url"].endswith("/bert-base-uncased")


def test_scores(evaluate, strict, arguments, tmp_path):
    out = tmp_path / "new" / "scores.json"
    options = ("--metrics", "clip,hpsv2", "--label", "dense", "--frames", "2")
    answer = strict(evaluate.run(*arguments, *options, "--json", "--out", out).stdout)
    assert answer == strict(out.read_text())
    assert (answer["schema"], answer["kind"], answer["label"]) == ("dit-accel/eval/1", "scores", "dense")
    assert answer["command"].startswith("dit-accel eval scores --test")
    assert answer["environment"]["packages"]["transformers"]
    assert answer["environment"]["cpu"]["name"]
    assert (answer["frames"], answer["bootstrap"]["resamples"]) == ("2", 2000)
    assert [row["name"] for row in answer["files"]] == ["000.png", "001.png", "002.png", "003.gif"]
    assert [row["prompt"] for row in answer["files"]] == ["a red circle", "a blue circle", "a circle", "red"]
    for name, backbone in (("clip", "openai/clip-vit-large-patch14"), ("hpsv2", "adams-story/HPSv2-hf")):
        metric = answer["metrics"][name]
        assert metric["value"] == pytest.approx(np.mean([row[name] for row in answer["files"]]))
        low, high = metric["interval"]
        assert metric["lowest"] <= low < metric["value"] < high <= metric["highest"]
        assert metric["settings"]["backbone"] == backbone
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 8
    value, (low, high) = (answer["metrics"]["clip"][key] for key in ("value", "interval"))
    shown = evaluate.run(*arguments, "--frames", "2").stdout
    assert f"{value:.4g} [{low:.4g}, {high:.4g}]" in shown
    assert "95% bootstrap intervals" in shown


def test_report_takes_scores(evaluate, arguments, tmp_path):
    evaluate.run(*arguments, "--out", tmp_path / "dense.json")
    evaluate.run("pairs", "--test", tmp_path / "test", "--ref", tmp_path / "test", "--out",
                 tmp_path / "pairs.json")  # fmt: skip
    text = evaluate.run("report", tmp_path / "dense.json", tmp_path / "pairs.json", "--md").stdout
    head, _, first, *_ = text.splitlines()
    assert head == "| result | clip ↑ | psnr ↑ | ssim ↑ |"
    value = json.loads((tmp_path / "dense.json").read_text())["metrics"]["clip"]["value"]
    assert first.startswith(f"| dense | {value:.4g} [")
    assert "95% bootstrap intervals" in text


def test_topiq_needs_no_prompts_and_keeps_stdout_clean(evaluate, strict, arguments, tmp_path, monkeypatch):
    """With a stand-in for pyiqa, see `score_packages`."""
    monkeypatch.setitem(sys.modules, "pyiqa", score_packages.pyiqa())
    folder = tmp_path / "w" / "IQA-PyTorch-Weights"
    folder.mkdir(parents=True)
    torch.save({"params": {"weight": torch.tensor(1.0)}}, folder / "cfanet_nr_koniq_res50-9a73138b.pth")
    words = ("scores", "--test", tmp_path / "test", "--weights", tmp_path / "w", "--metrics", "topiq")
    answer = strict(evaluate.run(*words, "--json").stdout)
    means = [media.load(path).mean() / 255 for path in sorted((tmp_path / "test").iterdir())]
    assert [row["topiq"] for row in answer["files"]] == pytest.approx(means, rel=1e-5)
    assert answer["prompts"] is None
    assert answer["files"][0]["prompt"] is None


def test_cut_prompts_are_warned_of(evaluate, strict, arguments, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{'red ' * 9}\na blue circle\na circle\nred\n")
    result = evaluate.run(*arguments, "--json")
    warning = "clip read the first 8 tokens of 1 longer prompts"
    assert strict(result.stdout)["warnings"] == [warning]
    assert f"warning: {warning}" in result.stderr


def test_unavailable_scores_are_exit_code_3_unless_skipped(evaluate, strict, arguments, tmp_path):
    out = tmp_path / "a.json"
    several = (*arguments, "--metrics", "clip,image-reward,topiq", "--out", out)
    message = evaluate.error(*several, code=3)
    assert "image-reward: ImageReward is not installed: pip install image-reward" in message
    assert "topiq: pyiqa is not installed: pip install pyiqa" in message
    assert not out.exists()
    assert "skipped topiq: pyiqa" in evaluate.run(*several, "--allow-skipped").stderr
    answer = strict(out.read_text())
    assert (list(answer["metrics"]), list(answer["skipped"])) == (["clip"], ["image-reward", "topiq"])
    only = (*arguments, "--metrics", "topiq", "--allow-skipped")
    assert "none of topiq can run here" in evaluate.error(*only, code=3)


def test_bad_input_is_one_line_before_any_model_is_loaded(evaluate, arguments, tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("dit_accel.evals.metrics.scores.prepare", load)
    lines = tmp_path / "prompts.txt"
    arguments = (*arguments, "--out", tmp_path / "a.json")
    whole = lines.read_text()
    lines.write_text("a red circle\na blue circle\na circle\n")
    assert "1 files have no prompt: 003.gif" in evaluate.error(*arguments)
    lines.write_text(whole + "a dog\n")
    assert "1 prompts have no file: 'a dog'" in evaluate.error(*arguments)
    lines.write_text(whole)
    assert "frames are all, first" in evaluate.error(*arguments, "--frames", "last")
    (tmp_path / "test" / "002.png").write_bytes(b"")
    assert "002.png cannot be read" in evaluate.error(*arguments)
    (tmp_path / "empty").mkdir()
    assert "holds no images or videos" in evaluate.error(*arguments, "--test", tmp_path / "empty")
    assert "there is no folder" in evaluate.error(*arguments, "--test", tmp_path / "none")
    assert "there is no file" in evaluate.error(*arguments, "--prompts", tmp_path / "none.txt")
    assert not (tmp_path / "a.json").exists()


def test_wrong_usage_is_exit_code_2(evaluate, arguments, tmp_path):
    known = "clip, pickscore, hpsv2, aesthetics, image-reward, topiq; got psnr"
    assert known in evaluate.usage(*arguments, "--metrics", "psnr")
    without = ("scores", "--test", tmp_path / "test", "--metrics", "topiq,hpsv2,clip")
    assert "hpsv2, clip judge by the prompt: give `--prompts`" in evaluate.usage(*without)
