"""`dit-accel eval list | pairs | dist | report`: files, JSON, exit codes and errors."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from dit_accel import media

SCHEMA = "dit-accel/eval/1"


@pytest.fixture
def evaluate(cli_of):
    return cli_of("eval")


@pytest.fixture(autouse=True)
def _bare(tmp_path, monkeypatch):
    """No weights, no torchvision, and a cache of the test's own."""
    import torch

    monkeypatch.setenv("DIT_ACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(sys.modules, "torchvision", None)


@pytest.fixture
def folders(tmp_path):
    """Eight pictures, and noisy copies of the same names."""
    generator = np.random.default_rng(0)
    for index in range(8):
        flat = np.broadcast_to(generator.integers(0, 200, (1, 1, 1, 3)), (1, 32, 32, 3))
        media.save(tmp_path / "ref" / f"{index}.png", flat.astype(np.uint8))
        noisy = flat + generator.integers(0, 50, flat.shape)
        media.save(tmp_path / "test" / f"{index}.png", noisy.astype(np.uint8))
    return tmp_path / "test", tmp_path / "ref"


@pytest.mark.parametrize("command", ["list", "pairs", "dist", "report"])
def test_help_has_an_example(evaluate, command):
    assert f"Example: dit-accel eval {command}" in " ".join(evaluate.run(command, "--help").stdout.split())


# -- list ----------------------------------------------------------------------------------------------------


def test_list_says_what_runs_and_why_not(evaluate, strict):
    answer = strict(evaluate.run("list", "--json").stdout)
    assert answer["schema"] == "dit-accel/eval-list/1"
    rows = {row["name"]: row for row in answer["metrics"]}
    assert rows["psnr"]["available"]
    assert rows["frechet-scenes"]["available"]
    assert not rows["lpips"]["available"]
    assert "pip install" in rows["lpips"]["reason"]
    assert not rows["fid"]["available"]
    shown = " ".join(evaluate.run("list").stdout.split())
    assert all(name in shown for name in rows)
    assert "lpips: torchvision is not installed" in shown
    assert "fid, kid, mmd-inception, prdc: there is no inception-2015-12-05.pt" in shown


# -- pairs ---------------------------------------------------------------------------------------------------


def test_pairs(evaluate, strict, folders, tmp_path):
    test, ref = folders
    out = tmp_path / "new" / "pairs.json"
    arguments = ("pairs", "--test", test, "--ref", ref, "--label", "noise")
    answer = strict(evaluate.run(*arguments, "--json", "--out", out).stdout)
    assert answer == strict(out.read_text())
    assert (answer["schema"], answer["kind"], answer["label"]) == (SCHEMA, "pairs", "noise")
    assert answer["environment"]["packages"]["torch"]
    assert answer["command"].startswith(f"dit-accel eval pairs --test {test} --ref {ref}")
    assert (answer["test"], answer["frames"]) == (str(test), "all")
    assert [row["name"] for row in answer["pairs"]] == [f"{index}.png" for index in range(8)]
    mean = np.mean([row["psnr"] for row in answer["pairs"]])
    assert answer["metrics"]["psnr"]["value"] == pytest.approx(mean)
    assert answer["metrics"]["ssim"]["settings"]["window"] == "Gaussian, sigma 1.5, 11 pixels"
    assert f"{mean:.4g}" in evaluate.run(*arguments).stdout
    kept = list((tmp_path / "cache").rglob("*.npy"))
    assert len(kept) == 24  # of each pair two metrics, and whether it is of one colour


def test_identical_pairs_have_no_infinity(evaluate, strict, folders):
    _, ref = folders
    answer = strict(evaluate.run("pairs", "--test", ref, "--ref", ref, "--json", "--no-cache").stdout)
    assert answer["metrics"]["psnr"]["value"] is None
    assert answer["metrics"]["psnr"]["identical"] == 8
    assert answer["pairs"][0]["psnr"] is None
    assert "identical" in evaluate.run("pairs", "--test", ref, "--ref", ref, "--no-cache").stdout


def test_unavailable_metrics_are_exit_code_3_unless_skipped(evaluate, strict, folders, tmp_path):
    test, ref = folders
    out = tmp_path / "a.json"
    arguments = ("pairs", "--test", test, "--ref", ref, "--metrics", "psnr,lpips", "--out", out)
    assert "lpips: torchvision is not installed" in evaluate.error(*arguments, code=3)
    assert not out.exists()
    result = evaluate.run(*arguments, "--allow-skipped")
    assert "skipped lpips: torchvision" in result.stderr
    answer = strict(out.read_text())
    assert (list(answer["metrics"]), list(answer["skipped"])) == (["psnr"], ["lpips"])
    only = ("pairs", "--test", test, "--ref", ref, "--metrics", "lpips", "--allow-skipped")
    assert "none of lpips can run here" in evaluate.error(*only, code=3)


def test_bad_pairs_are_one_line_and_write_nothing(evaluate, folders, tmp_path):
    test, ref = folders
    arguments = ("pairs", "--test", test, "--ref", ref, "--out", tmp_path / "a.json")
    (ref / "7.png").rename(ref / "x.png")
    assert "no partner of the same name" in evaluate.error(*arguments)
    (ref / "x.png").rename(ref / "7.png")
    (ref / "7.png").write_bytes(b"")
    assert "7.png cannot be read" in evaluate.error(*arguments)
    media.save(ref / "7.png", np.zeros((1, 32, 36, 3), np.uint8))
    assert "7.png: sizes differ: 32x32 and 36x32" in evaluate.error(*arguments)
    assert "there is no folder" in evaluate.error("pairs", "--test", tmp_path / "none", "--ref", ref)
    assert "frames are all, first" in evaluate.error(*arguments, "--frames", "last")
    assert "`--weights` must be a folder" in evaluate.error(*arguments, "--weights", tmp_path / "none")
    assert not (tmp_path / "a.json").exists()


def test_wrong_usage_is_exit_code_2(evaluate, folders):
    test, ref = folders
    assert "psnr, ssim, ms_ssim, lpips, efficientnet_distance; got fid" in evaluate.usage(
        "pairs", "--test", test, "--ref", ref, "--metrics", "fid"
    )
    assert "got none" in evaluate.usage("pairs", "--test", test, "--ref", ref, "--metrics", ",")
    assert "either `--ref` or `--stats`" in evaluate.usage("dist", "--test", test)
    assert "must be clean or legacy" in evaluate.usage(
        "dist", "--test", test, "--ref", ref, "--resize", "bicubic"
    )
    several = ("--metrics", "fid,cmmd", "--save-stats", "a.npz")
    assert "of one extractor" in evaluate.usage("dist", "--test", test, "--ref", ref, *several)
    assert "written already" in evaluate.usage(
        "dist", "--test", test, "--stats", "a.npz", "--save-stats", "b.npz"
    )
    evaluate.run("report", code=2)


# -- dist ----------------------------------------------------------------------------------------------------


def test_dist_with_the_bundled_encoder_is_never_called_fid(evaluate, strict, folders, tmp_path):
    test, ref = folders
    arguments = ("dist", "--test", test, "--ref", ref)
    result = evaluate.run(*arguments, "--json", "--out", tmp_path / "dist.json")
    answer = strict(result.stdout)
    assert answer == strict((tmp_path / "dist.json").read_text())
    assert (answer["schema"], answer["kind"]) == (SCHEMA, "dist")
    quantities = {"frechet", "kid", "precision", "recall", "density", "coverage"}
    assert set(answer["metrics"]) == {f"{name}-scenes" for name in quantities}
    (features,) = answer["features"]
    assert features["extractor"] == "scenes"
    assert features["samples"] == {"test": 8, "reference": 8}
    assert len(features["reference"]["data_sha256"]) == len(features["test"]["extractor_sha256"]) == 64
    assert "8 samples is biased upward" in answer["warnings"][0]
    assert "warning: frechet-scenes of 8 samples" in result.stderr
    shown = evaluate.run(*arguments).stdout
    assert "frechet-scenes" in shown
    assert "not comparable with FID" in shown


def test_statistics_stand_in_for_the_reference(evaluate, strict, folders, tmp_path):
    test, ref = folders
    whole = strict(
        evaluate.run(
            "dist", "--test", test, "--ref", ref, "--save-stats", tmp_path / "ref.npz", "--json"
        ).stdout
    )
    again = strict(evaluate.run("dist", "--test", test, "--stats", tmp_path / "ref.npz", "--json").stdout)
    assert again["metrics"] == whole["metrics"]
    assert again["features"] == whole["features"]
    other = ("dist", "--test", test, "--stats", tmp_path / "ref.npz", "--frames", "first")
    assert "made with frames 'middle'" in evaluate.error(*other)


def test_bad_dist_is_one_line_and_writes_nothing(evaluate, strict, folders, tmp_path):
    test, ref = folders
    arguments = ("dist", "--test", test, "--ref", ref, "--out", tmp_path / "a.json")
    assert "fid: there is no inception-2015-12-05.pt" in evaluate.error(
        *arguments, "--metrics", "fid", code=3
    )
    skipping = ("--metrics", "fid,kid-scenes", "--allow-skipped", "--json")
    assert list(strict(evaluate.run(*arguments[:-2], *skipping).stdout)["skipped"]) == ["fid"]
    assert "must end in .npz" in evaluate.error(*arguments, "--save-stats", tmp_path / "a.pt")
    assert "does not hold statistics" in evaluate.error(
        "dist", "--test", test, "--stats", tmp_path / "none.npz"
    )
    for path in sorted(ref.iterdir())[1:]:
        path.unlink()
    assert "samples are needed, got 1 in the reference set" in evaluate.error(*arguments)
    (ref / "0.png").write_bytes(b"no picture")
    assert "0.png cannot be read" in evaluate.error(*arguments)
    assert not (tmp_path / "a.json").exists()


# -- report --------------------------------------------------------------------------------------------------


def test_report_is_one_table(evaluate, strict, folders, tmp_path):
    test, ref = folders
    evaluate.run("pairs", "--test", test, "--ref", ref, "--out", tmp_path / "noise.json")
    evaluate.run("dist", "--test", test, "--ref", ref, "--label", "as a set", "--out", tmp_path / "set.json")
    files = (tmp_path / "noise.json", tmp_path / "set.json")
    text = evaluate.run("report", *files, "--md", "--out", tmp_path / "table.md").stdout
    assert text.strip() == (tmp_path / "table.md").read_text().strip()
    head, _, first, second, *_ = text.splitlines()
    assert head.startswith("| result | psnr ↑ | ssim ↑ | frechet-scenes ↓ |")
    assert first.startswith("| noise |")
    assert second.startswith("| as a set |")
    assert "biased upward" in text
    assert strict(evaluate.run("report", *files, "--json").stdout)["results"].keys() == {"noise", "as a set"}
    assert "as a set" in evaluate.run("report", *files).stdout
    (tmp_path / "noise.json").write_text("{}")
    assert "noise.json is no result" in evaluate.error("report", *files)
