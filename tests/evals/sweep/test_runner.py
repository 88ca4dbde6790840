"""Sweeps: runs in turn, stopped and resumed, and the rows that come of them."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dit_accel import Recipe, media, patterns, pipelines
from dit_accel.evals.metrics import pairs, sets
from dit_accel.evals.metrics.features import Scenes
from dit_accel.evals.metrics.folders import Folder
from dit_accel.evals.sweep import report as sweep_report
from dit_accel.evals.sweep.rows import Judges, judge, unfit
from dit_accel.evals.sweep.runner import RUNS, Sweep
from dit_accel.generation import Request, execute
from dit_accel.pipelines import tiny
from dit_accel.pipelines.tiny.evaluate import held_out_scenes
from dit_accel.scorers.pretrained import Sources

CPU = torch.device("cpu")
METHODS = {
    "dense": None,
    "near": Recipe(patterns.Neighborhood((3, 3)), name="near"),
    "all": Recipe(patterns.Dense(), name="all"),
}
TIMED = {"warm_up_seconds", "peak_memory_bytes"}
NAMES = ("psnr", "ssim", "attributes", "frechet-scenes")


@pytest.fixture(scope="module")
def pipe():
    pipe = pipelines.load("tiny-flux")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sweep_in(folder, **changes):
    """Two held-out captions at 64x64 pixels in one step."""
    captions = [tiny.caption(scene) for scene in held_out_scenes(2)]
    requests = [Request(text, 64, 64, None, 1, 4.0, seed, 24) for seed, text in enumerate(captions)]
    return replace(Sweep(folder, METHODS, requests, 1, ".png", {"model": "tiny-flux"}), **changes)


@pytest.fixture(scope="module")
def done(pipe, tmp_path_factory):
    """A finished sweep, and its runs."""
    sweep = sweep_in(tmp_path_factory.mktemp("sweep"))
    return sweep, sweep.run(pipe)


def stop_after(count):
    """A `Track` as of a process that is stopped before item `count`, counted from 0."""

    def track(items, description):
        for place, item in enumerate(items):
            if place == count:
                raise KeyboardInterrupt
            yield item

    return track


def lasting(rows):
    """Rows without what differs from time to time."""
    times = {"step_seconds", "step_speedup", "seconds", "speedup"}
    return [
        {key: value for key, value in row.items() if key not in {*TIMED, "metrics"}}
        | {"metrics": {name: one for name, one in row["metrics"].items() if name not in times}}
        for row in rows
    ]


# -- running -------------------------------------------------------------------------------------------------


def test_settings_take_turns(tmp_path):
    two = {name: METHODS[name] for name in ("dense", "near")}
    sweep = sweep_in(tmp_path, methods=two, repeats=2)
    assert sweep.missing([]) == [
        (prompt, repeat, name) for prompt in (0, 1) for repeat in (0, 1) for name in ("dense", "near")
    ]


def test_a_stopped_sweep_goes_on_where_it_was(pipe, done, tmp_path):
    whole, runs = done
    sweep = sweep_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(pipe, stop_after(4))
    assert len(sweep.kept()) == 4
    assert sweep.missing(sweep.kept()) == [(1, 0, "near"), (1, 0, "all")]
    early = json.loads((tmp_path / RUNS).read_text())["runs"]
    resumed = sweep.run(pipe, stop_after(2))
    assert resumed[:4] == early
    judges = Judges.prepare(NAMES, Sources(), CPU)
    assert lasting(judge(sweep, resumed, judges).rows) == lasting(judge(whole, runs, judges).rows)
    for name in METHODS:
        same = zip(sweep.outputs(name).files, whole.outputs(name).files, strict=True)
        assert all(ours.read_bytes() == theirs.read_bytes() for ours, theirs in same)
    assert not sweep.missing(sweep.kept())


def test_damaged_and_missing_outputs_are_made_again(pipe, done, tmp_path):
    whole, _ = done
    sweep = sweep_in(tmp_path)
    sweep.run(pipe)
    damaged, lost = sweep.outputs("near").files[0], sweep.outputs("dense").files[1]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    lost.unlink()
    assert sweep.missing(sweep.kept()) == [(0, 0, "near"), (1, 0, "dense")]
    sweep.run(pipe, stop_after(2))
    assert damaged.read_bytes() == whole.outputs("near").files[0].read_bytes()
    assert lost.read_bytes() == whole.outputs("dense").files[1].read_bytes()


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        (lambda sweep: {"repeats": 2}, "repeats"),
        (lambda sweep: {"about": {"model": "tiny-sd3"}}, "model"),
        (lambda sweep: {"methods": {"dense": None, "near": METHODS["all"]}}, "recipes"),
        (lambda sweep: {"requests": [replace(one, steps=2) for one in sweep.requests]}, "steps"),
        (lambda sweep: {"requests": [replace(one, seed=7) for one in sweep.requests]}, "seeds"),
        (lambda sweep: {"requests": sweep.requests[:1]}, "prompts"),
    ],
    ids=["repeats", "model", "recipes", "steps", "seeds", "prompts"],
)
def test_runs_with_other_settings_are_refused(done, change, setting):
    sweep, _ = done
    with pytest.raises(ValueError, match=f"another `{setting}`.*use the same settings, or another --out"):
        replace(sweep, **change(sweep)).kept()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "other"}'])
def test_a_file_that_holds_no_runs_is_refused(tmp_path, text):
    (tmp_path / RUNS).write_text(text)
    with pytest.raises(ValueError, match="does not hold the runs of a sweep; use another --out"):
        sweep_in(tmp_path).kept()


def test_videos_are_kept_without_loss(tmp_path):
    torch.manual_seed(0)
    pipe = tiny.INFO["tiny-wan"].build()
    request = Request("a red circle", 48, 32, 5, 1, 1.0, 3, 24)
    sweep = sweep_in(tmp_path, methods={"dense": None}, requests=[request], suffix=".mp4")
    (run,) = sweep.run(pipe)
    frames = media.load(sweep.outputs("dense").files[0])
    assert sweep.picture() == frames.shape[:3] == (5, 32, 48)
    assert np.array_equal(frames, execute(pipe, request, None).frames)
    assert run["run_density"] == 1


# -- rows ----------------------------------------------------------------------------------------------------


def test_speed_is_the_ratio_of_medians(tmp_path):
    sweep = sweep_in(tmp_path, methods={"dense": None, "near": METHODS["near"]})
    known = {"warm_up_seconds": 1.0, "peak_memory_bytes": None, "commit": "a"}
    known |= dict.fromkeys(("pattern_density", "block_density", "run_density", "run_block_density"), 0.5)
    seconds = {"dense": [8.0, 80.0, 10.0], "near": [4.0, 5.0, 900.0]}
    runs = [
        {"setting": name, "seconds": value, "step_seconds_median": value / 10 + (name == "near"), **known}
        for name, values in seconds.items()
        for value in values
    ]
    dense, near = judge(sweep, runs, Judges({}, [], False)).rows
    values = {name: one["value"] for name, one in near["metrics"].items()}
    assert values == {"step_seconds": 1.5, "step_speedup": 1 / 1.5, "seconds": 5.0, "speedup": 2.0}
    assert dense["metrics"]["speedup"]["value"] == dense["metrics"]["step_speedup"]["value"] == 1
    assert near["peak_memory_bytes"] is None
    runs[0]["commit"] = "b"
    assert judge(sweep, runs, Judges({}, [], False)).warnings == ["the runs are of several commits: a, b"]


def test_quality_is_that_of_the_other_commands(pipe, done):
    sweep, runs = done
    judged = judge(sweep, runs, Judges.prepare(NAMES, Sources(), CPU))
    dense, near, same = judged.rows
    assert set(dense["metrics"]) == {"step_seconds", "step_speedup", "seconds", "speedup", "attributes"}
    assert "pairs" not in dense
    ours, theirs = (Folder.open(sweep.outputs(name).path) for name in ("near", "dense"))
    expected = pairs.measure(ours, theirs, pairs.prepare(["psnr", "ssim"], Sources(), CPU))
    assert near["pairs"] == expected
    found = sets.compare(["frechet-scenes"], ours, theirs, Scenes(Sources(), CPU))
    for name in ("frechet-scenes", "kid-scenes"):  # the latter comes with the former
        assert near["metrics"][name] == found.metrics[name]
    assert judged.features[0] == {"setting": "near", **found.features}
    assert found.warnings[0] in judged.warnings
    options = {"size": (64, 64), "steps": 1, "guidance": 4.0, "batch": 1, "progress": False}
    accuracy = tiny.attribute_accuracy(pipe, 2, 0, **options)
    assert dense["attributes"] == {key: accuracy[key] for key in dense["attributes"]}
    assert dense["metrics"]["attributes"]["value"] == accuracy["mean"]
    assert same["metrics"]["psnr"]["value"] is None
    assert (same["metrics"]["psnr"]["identical"], same["metrics"]["ssim"]["value"]) == (2, 1)
    assert 0 < near["pattern_density"] == near["run_density"] < 1
    assert same["pattern_density"] is None, "nothing is accelerated"


def test_what_does_not_apply_has_a_reason():
    caption, other = (Request(text, 8, 64) for text in ("a fox at the top on a blue plain background", "x"))
    assert not unfit(["psnr", "attributes", "frechet-scenes"], [caption, caption], bundled=True)
    assert "2 prompts" in unfit(["kid-scenes"], [caption], bundled=True)["kid-scenes"]
    assert "got 'x'" in unfit(["attributes"], [caption, other], bundled=True)["attributes"]
    assert "only what bundled models" in unfit(["attributes"], [caption], bundled=False)["attributes"]
    assert "11 pixels a side, and pictures have 8" in unfit(["ssim"], [caption], bundled=True)["ssim"]
    assert not unfit(["ssim", "lpips"], [Request("x")], bundled=False), "the pipeline's own size is not known"
    moving = replace(caption, prompt="a fox moving up at the top on a blue plain background")
    assert "others of videos" in unfit(["attributes"], [caption, moving], bundled=True)["attributes"]


# -- files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answer(done):
    sweep, runs = done
    judged = judge(sweep, runs, Judges.prepare(NAMES, Sources(), CPU))
    return {
        "label": "tiny | flux",
        "command": "dit-accel eval sweep",
        "environment": {"packages": {"dit-accel": "0", "torch": "2"}, "python": "3", "commit": "c"},
        "settings": {**sweep.settings, "dtype": "float32", "machine": "a processor"},
        "picture": sweep.picture(),
        "memory": "not measured",
        **vars(judged),
        "skipped": {"lpips": "no torchvision"},
        "files": {suffix: f"sweep.{suffix}" for suffix in sweep_report.SUFFIXES},
    }


def test_every_file_has_a_line_per_setting(answer, tmp_path):
    pytest.importorskip("matplotlib")
    sweep_report.write(answer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(answer["files"].values())
    lines = list(csv.DictReader(io.StringIO((tmp_path / "sweep.csv").read_text())))
    assert [line["setting"] for line in lines] == list(METHODS)
    assert lines[0]["psnr"] == lines[2]["psnr"] == "", "dense has none, and equal outputs have no finite one"
    near = answer["rows"][1]["metrics"]
    assert float(lines[1]["psnr"]) == pytest.approx(near["psnr"]["value"], rel=1e-5)
    assert float(lines[1]["speedup"]) == pytest.approx(near["speedup"]["value"], rel=1e-5)
    page = (tmp_path / "sweep.md").read_text()
    assert "| all | " in page
    assert "identical" in page
    assert "![quality against speed](sweep.png)" in page
    assert "lpips skipped: no torchvision" in page
    assert "not comparable with FID" in page


def test_the_plot_has_a_point_for_each_known_quality(answer, tmp_path):
    pytest.importorskip("matplotlib")
    figure = sweep_report.plot(answer, tmp_path / "new" / "sweep.png")
    drawn = {axes.get_ylabel(): axes.lines[:-1] for axes in figure.axes if axes.lines}
    assert {name.split()[0]: len(points) for name, points in drawn.items()} == {
        "attributes": 3,
        "psnr": 1,
        "ssim": 2,
        "frechet-scenes": 2,
        "kid-scenes": 2,
    }
    (point,) = drawn["psnr (higher is better)"]
    near = answer["rows"][1]["metrics"]
    assert point.get_xdata()[0] == near["step_speedup"]["value"]
    assert point.get_ydata()[0] == near["psnr"]["value"]
