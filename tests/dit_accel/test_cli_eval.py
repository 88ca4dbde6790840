"""`dit-accel eval list | pairs | dist | report`: files, JSON, exit codes and errors."""

from __future__ import annotations

import json
import sys
from unittest import mock

import numpy as np
import pytest
from typer.testing import CliRunner

from dit_accel.cli import app
from dit_accel.evals import media

SCHEMA = "dit-accel/eval/1"


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


def run(*arguments, code=0):
    line = ["eval", *map(str, arguments)]
    with mock.patch.object(sys, "argv", ["dit-accel", *line]):  # results name their command
        result = CliRunner().invoke(app, line)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}"
    return result


def error(*arguments, code=1) -> str:
    line = run(*arguments, code=code).stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def strict(text: str) -> dict:
    """JSON without NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} in the JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("command", ["list", "pairs", "dist", "report"])
def test_help_has_an_example(command):
    assert f"Example: dit-accel eval {command}" in " ".join(run(command, "--help").stdout.split())


# -- list ----------------------------------------------------------------------------------------------------


def test_list_says_what_runs_and_why_not():
    answer = strict(run("list", "--json").stdout)
    assert answer["schema"] == "dit-accel/eval-list/1"
    rows = {row["name"]: row for row in answer["metrics"]}
    assert rows["psnr"]["available"]
    assert rows["frechet-scenes"]["available"]
    assert not rows["lpips"]["available"]
    assert "pip install" in rows["lpips"]["reason"]
    assert not rows["fid"]["available"]
    shown = " ".join(run("list").stdout.split())
    assert all(name in shown for name in rows)
    assert "lpips: torchvision is not installed" in shown
    assert "fid, kid, mmd-inception, prdc: there is no inception-2015-12-05.pt" in shown


# -- pairs ---------------------------------------------------------------------------------------------------


def test_pairs(folders, tmp_path):
    test, ref = folders
    out = tmp_path / "new" / "pairs.json"
    arguments = ("pairs", "--test", test, "--ref", ref, "--label", "noise")
    answer = strict(run(*arguments, "--json", "--out", out).stdout)
    assert answer == strict(out.read_text())
    assert (answer["schema"], answer["kind"], answer["label"]) == (SCHEMA, "pairs", "noise")
    assert answer["environment"]["packages"]["torch"]
    assert answer["command"].startswith(f"dit-accel eval pairs --test {test} --ref {ref}")
    assert (answer["test"], answer["frames"]) == (str(test), "all")
    assert [row["name"] for row in answer["pairs"]] == [f"{index}.png" for index in range(8)]
    mean = np.mean([row["psnr"] for row in answer["pairs"]])
    assert answer["metrics"]["psnr"]["value"] == pytest.approx(mean)
    assert answer["metrics"]["ssim"]["settings"]["window"] == "Gaussian, sigma 1.5, 11 pixels"
    assert f"{mean:.4g}" in run(*arguments).stdout
    kept = list((tmp_path / "cache").rglob("*.npy"))
    assert len(kept) == 16


def test_identical_pairs_have_no_infinity(folders):
    _, ref = folders
    answer = strict(run("pairs", "--test", ref, "--ref", ref, "--json", "--no-cache").stdout)
    assert answer["metrics"]["psnr"]["value"] is None
    assert answer["metrics"]["psnr"]["identical"] == 8
    assert answer["pairs"][0]["psnr"] is None
    assert "identical" in run("pairs", "--test", ref, "--ref", ref, "--no-cache").stdout


def test_unavailable_metrics_are_exit_code_3_unless_skipped(folders, tmp_path):
    test, ref = folders
    arguments = (
        "pairs",
        "--test",
        test,
        "--ref",
        ref,
        "--metrics",
        "psnr,lpips",
        "--out",
        tmp_path / "a.json",
    )
    assert "lpips: torchvision is not installed" in error(*arguments, code=3)
    assert not (tmp_path / "a.json").exists()
    result = run(*arguments, "--allow-skipped")
    assert "skipped lpips: torchvision" in result.stderr
    answer = strict((tmp_path / "a.json").read_text())
    assert (list(answer["metrics"]), list(answer["skipped"])) == (["psnr"], ["lpips"])
    only = ("pairs", "--test", test, "--ref", ref, "--metrics", "lpips", "--allow-skipped")
    assert "none of lpips can run here" in error(*only, code=3)


def test_bad_pairs_are_one_line_and_write_nothing(folders, tmp_path):
    test, ref = folders
    arguments = ("pairs", "--test", test, "--ref", ref, "--out", tmp_path / "a.json")
    (ref / "7.png").rename(ref / "x.png")
    assert "no partner of the same name" in error(*arguments)
    (ref / "x.png").rename(ref / "7.png")
    (ref / "7.png").write_bytes(b"")
    assert "7.png cannot be read" in error(*arguments)
    media.save(ref / "7.png", np.zeros((1, 32, 36, 3), np.uint8))
    assert "7.png: sizes differ: 32x32 and 36x32" in error(*arguments)
    assert "there is no folder" in error("pairs", "--test", tmp_path / "none", "--ref", ref)
    assert "frames are all, first" in error(*arguments, "--frames", "last")
    assert "`--weights` must be a folder" in error(*arguments, "--weights", tmp_path / "none")
    assert not (tmp_path / "a.json").exists()


def test_wrong_usage_is_exit_code_2(folders):
    test, ref = folders
    assert "psnr, ssim, ms_ssim, lpips; got fid" in usage(
        "pairs", "--test", test, "--ref", ref, "--metrics", "fid"
    )
    assert "got none" in usage("pairs", "--test", test, "--ref", ref, "--metrics", ",")
    assert "either `--ref` or `--stats`" in usage("dist", "--test", test)
    assert "must be clean or legacy" in usage("dist", "--test", test, "--ref", ref, "--resize", "bicubic")
    several = ("--metrics", "fid,cmmd", "--save-stats", "a.npz")
    assert "of one extractor" in usage("dist", "--test", test, "--ref", ref, *several)
    assert "written already" in usage("dist", "--test", test, "--stats", "a.npz", "--save-stats", "b.npz")
    run("report", code=2)


def usage(*arguments) -> str:
    """What wrong usage prints, out of its box."""
    return " ".join(run(*arguments, code=2).stderr.replace("│", " ").split())


# -- dist ----------------------------------------------------------------------------------------------------


def test_dist_with_the_bundled_encoder_is_never_called_fid(folders, tmp_path):
    test, ref = folders
    arguments = ("dist", "--test", test, "--ref", ref)
    result = run(*arguments, "--json", "--out", tmp_path / "dist.json")
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
    shown = run(*arguments).stdout
    assert "frechet-scenes" in shown
    assert "not comparable with FID" in shown


def test_statistics_stand_in_for_the_reference(folders, tmp_path):
    test, ref = folders
    whole = strict(
        run("dist", "--test", test, "--ref", ref, "--save-stats", tmp_path / "ref.npz", "--json").stdout
    )
    again = strict(run("dist", "--test", test, "--stats", tmp_path / "ref.npz", "--json").stdout)
    assert again["metrics"] == whole["metrics"]
    assert again["features"] == whole["features"]
    other = ("dist", "--test", test, "--stats", tmp_path / "ref.npz", "--frames", "first")
    assert "made with frames 'middle'" in error(*other)


def test_bad_dist_is_one_line_and_writes_nothing(folders, tmp_path):
    test, ref = folders
    arguments = ("dist", "--test", test, "--ref", ref, "--out", tmp_path / "a.json")
    assert "fid: there is no inception-2015-12-05.pt" in error(*arguments, "--metrics", "fid", code=3)
    skipping = ("--metrics", "fid,kid-scenes", "--allow-skipped", "--json")
    assert list(strict(run(*arguments[:-2], *skipping).stdout)["skipped"]) == ["fid"]
    assert "must end in .npz" in error(*arguments, "--save-stats", tmp_path / "a.pt")
    assert "does not hold statistics" in error("dist", "--test", test, "--stats", tmp_path / "none.npz")
    for path in sorted(ref.iterdir())[1:]:
        path.unlink()
    assert "samples are needed, got 1 in the reference set" in error(*arguments)
    (ref / "0.png").write_bytes(b"no picture")
    assert "0.png cannot be read" in error(*arguments)
    assert not (tmp_path / "a.json").exists()


# -- report --------------------------------------------------------------------------------------------------


def test_report_is_one_table(folders, tmp_path):
    test, ref = folders
    run("pairs", "--test", test, "--ref", ref, "--out", tmp_path / "noise.json")
    run("dist", "--test", test, "--ref", ref, "--label", "as a set", "--out", tmp_path / "set.json")
    files = (tmp_path / "noise.json", tmp_path / "set.json")
    text = run("report", *files, "--md", "--out", tmp_path / "table.md").stdout
    assert text.strip() == (tmp_path / "table.md").read_text().strip()
    head, _, first, second, *_ = text.splitlines()
    assert head.startswith("| result | psnr ↑ | ssim ↑ | frechet-scenes ↓ |")
    assert first.startswith("| noise |")
    assert second.startswith("| as a set |")
    assert "biased upward" in text
    assert strict(run("report", *files, "--json").stdout)["results"].keys() == {"noise", "as a set"}
    assert "as a set" in run("report", *files).stdout
    (tmp_path / "noise.json").write_text("{}")
    assert "noise.json is no result" in error("report", *files)
