"""`dit-accel eval sweep`: files, sweeps that go on, exit codes and errors."""

from __future__ import annotations

import json
import sys

import pytest

SMALL = ("--native", "--steps", 1, "-n", 2)
TIMES = {"step_seconds", "step_speedup", "seconds", "speedup"}
NOT_KEPT = {"metrics", "warm_up_seconds", "peak_memory_bytes"}


@pytest.fixture
def sweep(cli_of):
    return cli_of("eval", "sweep")


@pytest.fixture(autouse=True)
def _bare(tmp_path, monkeypatch):
    """No torchvision, which LPIPS needs, and a cache of the test's own."""
    monkeypatch.setenv("DIT_ACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "torchvision", None)


@pytest.fixture
def recipes(tmp_path):
    """Two recipe files."""
    near, wide = tmp_path / "near.yaml", tmp_path / "wide.yaml"
    near.write_text("attention: {pattern: Neighborhood, window: [3, 3]}\nname: near\n")
    wide.write_text("attention: {pattern: Clear, radius: 3}\nname: wide\n")
    return near, wide


def lasting(answer: dict) -> list[dict]:
    """Rows without what differs from time to time."""
    return [
        {key: value for key, value in row.items() if key not in NOT_KEPT}
        | {name: one["value"] for name, one in row["metrics"].items() if name not in TIMES}
        for row in answer["rows"]
    ]


def test_help_has_an_example(sweep):
    assert "Example: dit-accel eval sweep" in " ".join(sweep.run("--help").stdout.split())


def test_a_sweep_from_its_first_run_to_the_report(sweep, cli_of, strict, recipes, tmp_path):
    pytest.importorskip("matplotlib")
    near, wide = recipes
    out = tmp_path / "results" / "tiny-flux"
    arguments = ("--model", "tiny-flux", "--recipes", near, wide, *SMALL, "--out", out)
    arguments += ("--allow-skipped", "--json")
    first = sweep.run(*arguments)
    answer = strict(first.stdout)
    assert answer == strict((out / "sweep.json").read_text())
    assert (answer["schema"], answer["kind"], answer["label"]) == ("dit-accel/eval/1", "sweep", "tiny-flux")
    assert answer["command"].startswith("dit-accel eval sweep --model tiny-flux --recipes")
    assert [row["setting"] for row in answer["rows"]] == ["dense", "near", "wide"]
    assert list(answer["skipped"]) == ["lpips"]
    assert "0 runs are there, 6 to make" in first.stderr
    names = {path.name for path in out.iterdir()}
    assert names == {"sweep.json", "sweep.csv", "sweep.md", "sweep.png", "runs.json", "media"}
    for row in answer["rows"]:
        assert sorted(path.name for path in (out / row["outputs"]).iterdir()) == ["000.png", "001.png"]

    record = strict((out / "runs.json").read_text())
    seconds = [[one["seconds"] for one in record["runs"] if one["setting"] == s] for s in ("dense", "near")]
    dense, recipe = (sum(two) / 2 for two in seconds)
    metrics = answer["rows"][1]["metrics"]
    assert metrics["speedup"]["value"] == pytest.approx(dense / recipe)
    assert set(answer["rows"][0]["metrics"]) == {*TIMES, "attributes"}, "dense has no fidelity"
    assert {"psnr", "ssim", "attributes", "frechet-scenes", "kid-scenes"} <= set(metrics)

    record["runs"] = record["runs"][:-2]  # as if the process had been stopped there
    (out / "runs.json").write_text(json.dumps(record))
    (out / answer["rows"][2]["outputs"] / "001.png").unlink()
    again = sweep.run(*arguments)
    assert "4 runs are there, 2 to make" in again.stderr
    assert lasting(strict(again.stdout)) == lasting(answer)

    shown = cli_of("eval", "report").run(out / "sweep.json", "--md").stdout
    assert "| tiny-flux near |" in shown
    assert shown.count("lpips skipped") == 1
    other = ("-m", "tiny-flux", "-r", near, "-r", wide, *SMALL, "--seed", 1, "-o", out, "--allow-skipped")
    assert "another `prompts`" in sweep.error(*other)
    assert strict((out / "sweep.json").read_text())["rows"] == strict(again.stdout)["rows"]


def test_prompts_of_a_file_and_one_repeat_more(sweep, strict, recipes, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red thing\n\n")
    arguments = ("-m", "tiny-flux", "-r", recipes[0], "--prompts", prompts, "--native", "--steps", 1)
    arguments += ("--size", "64x64", "--repeats", 2, "--no-plot", "--allow-skipped", "-o", tmp_path / "out")
    shown = sweep.run(*arguments).stdout
    answer = strict((tmp_path / "out" / "sweep.json").read_text())
    assert [row["runs"] for row in answer["rows"]] == [2, 2]
    assert "2 prompts" in answer["skipped"]["frechet-scenes"]
    assert "got 'a red thing'" in answer["skipped"]["attributes"]
    assert "near" in shown
    assert not (tmp_path / "out" / "sweep.png").exists()
    assert "attributes skipped" in (tmp_path / "out" / "sweep.md").read_text()


def test_without_recipes_the_presets_of_the_model_are_taken(sweep, strict, tmp_path):
    arguments = ("-m", "tiny-flux", "--size", "160x160", "--steps", 2, "-n", 1, "-o", tmp_path / "out")
    answer = strict(sweep.run(*arguments, "--allow-skipped", "--no-plot", "--json").stdout)
    names = ["dense", "tiny-flux-clear", "tiny-flux-neighborhood", "tiny-flux-routed"]
    assert [row["setting"] for row in answer["rows"]] == names
    assert all(0 < row["run_density"] <= 1 for row in answer["rows"])


def test_a_recipe_that_does_not_fit_is_refused_before_any_run(sweep, tmp_path):
    arguments = ("-m", "tiny-flux", "-r", "tiny-flux-neighborhood", *SMALL, "-o", tmp_path / "out")
    assert "`window`" in sweep.error(*arguments, "--allow-skipped", "--no-plot")
    assert not (tmp_path / "out").exists()


def test_unavailable_metrics_are_exit_code_3(sweep, recipes, tmp_path):
    arguments = ("-m", "tiny-flux", "-r", recipes[0], *SMALL, "-o", tmp_path / "out", "--no-plot")
    assert "lpips: torchvision is not installed" in sweep.error(*arguments, code=3)
    assert "cuda:99" in sweep.error(*arguments, "--device", "cuda:99", code=3)
    assert not (tmp_path / "out").exists()


def test_the_plot_needs_matplotlib(sweep, recipes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ("-m", "tiny-flux", "-r", recipes[0], *SMALL, "-o", tmp_path / "out")
    message = 'sweep.png needs matplotlib: pip install "dit-accel[eval]", or do without (--no-plot)'
    assert message in sweep.error(*arguments, code=3)
    answer = json.loads(sweep.run(*arguments, "--allow-skipped", "--json").stdout)
    assert answer["skipped"]["plot"].startswith("sweep.png needs matplotlib")
    assert "png" not in answer["files"]
    assert not (tmp_path / "out" / "sweep.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "nothing"], "'nothing' is neither a preset nor a recipe file"),
        (["--recipe", "wan-radial"], "family 'wan'"),
        (["--recipe", "near.yaml"], "must name different recipes, none called 'dense'; got near, near"),
        (["--size", "60x64"], "width must be a multiple of 8 for this model, got 60"),
        (["--size", "8x8", "--metrics", "ssim"], "ssim: it needs at least 11 pixels a side"),
        (["--frames", "5"], "`--frames` is for video models"),
        (["--guidance", "nan"], "`--guidance` must be a number of at least 0"),
        (["-n", "1", "--metrics", "kid-scenes"], "kid-scenes: a set needs at least 2 prompts"),
        (["--prompts", "none.txt"], "there is no file none.txt"),
        (["--prompts", "empty.txt"], "empty.txt is empty: it holds no line of text"),
        (["--out", "empty.txt"], "must be a folder, got the file empty.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_anything_is_made(
    sweep, arguments, message, recipes, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    before = sorted(tmp_path.iterdir())
    common = ["-m", "tiny-flux", "-r", "near.yaml", "--native", "--steps", 1, "-o", "out", "--allow-skipped"]
    assert message in sweep.error(*common, "--no-plot", *arguments)
    assert sorted(tmp_path.iterdir()) == before


def test_wrong_usage_is_exit_code_2(sweep, recipes, tmp_path):
    common = ("-o", tmp_path / "out", "--no-plot")
    assert "presets are made for bundled models only" in sweep.usage("-m", "some/model", *common)
    named = ("-r", recipes[0], *common)
    assert "captions are known for bundled models only" in sweep.usage("-m", "some/model", *named)
    assert "either `--prompts` or `-n`" in sweep.usage("-m", "tiny-flux", "-n", 2, "--prompts", "a", *named)
    assert "psnr, ssim, ms_ssim, lpips" in sweep.usage("-m", "tiny-flux", "--metrics", "vmaf", *named)
    assert "got temporal_flickering" in sweep.usage(
        "-m", "tiny-flux", "--metrics", "temporal_flickering", *named
    )
    sweep.run("-m", "tiny-flux", code=2)
    assert not (tmp_path / "out").exists()
