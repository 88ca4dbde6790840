"""`dit-accel eval vbench`: videos made and resumed, what is missing, runs, scores, exit codes and errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import processes
import pytest

from dit_accel import media

INFO = [
    {"prompt_en": "a still lake", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a red car", "dimension": ["color"]},
]
SCRIPT = """
import json, pathlib, sys
options = dict(part.split("=", 1) for part in sys.argv[1:] if "=" in part)
if sys.argv[-1] == "scene":
    sys.exit(7)
result = {sys.argv[-1]: [0.75, [{"video_path": options["--videos_path"], "video_results": 0.75}]]}
(pathlib.Path(options["--output_path"]) / "r_eval_results.json").write_text(json.dumps(result))
"""
SMALL = ("--size", "32x32", "--frames", 5, "--steps", 1)


@pytest.fixture
def vbench(cli_of):
    return cli_of("eval", "vbench")


@pytest.fixture
def info(tmp_path) -> Path:
    path = tmp_path / "info.json"
    path.write_text(json.dumps(INFO))
    return path


@pytest.fixture
def videos(tmp_path) -> Path:
    """Video 0 to 4 of both prompts, all the same."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    content = media.save(tmp_path / "source.mp4", frames).read_bytes()
    folder = tmp_path / "videos"
    folder.mkdir()
    for entry in INFO:
        for index in range(5):
            (folder / f"{entry['prompt_en']}-{index}.mp4").write_bytes(content)
    return folder


@pytest.fixture
def python(tmp_path) -> Path:
    """An interpreter that has a `vbench`."""
    package = tmp_path / "site" / "vbench"
    (package / "launch").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch" / "evaluate.py").write_text(SCRIPT)
    scene = {"prompt_en": "a still lake", "dimension": ["scene"]}
    (package / "VBench_full_info.json").write_text(json.dumps([*INFO, scene]))
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{package.parent}" exec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("command", ["prompts", "generate", "check", "run", "aggregate"])
def test_help_has_an_example(vbench, command):
    assert f"Example: dit-accel eval vbench {command}" in " ".join(
        vbench.run(command, "--help").stdout.split()
    )


# -- prompts and check ---------------------------------------------------------------------------------------


def test_prompts_are_listed_by_dimension(vbench, strict, info, python):
    answer = strict(vbench.run("prompts", "--prompts", info, "--json").stdout)
    assert answer["schema"] == "dit-accel/vbench-prompts/1"
    assert answer["dimensions"] == {"temporal_flickering": ["a still lake"], "color": ["a red car"]}
    rows = [line.split() for line in vbench.run("prompts", "--prompts", info).stdout.splitlines()]
    assert ["temporal_flickering", "1", "75", "25"] in rows
    assert ["color", "1", "85", "5"] in rows
    listed = vbench.run("prompts", "--vbench-python", python, "--dimensions", "color").stdout
    assert listed == "# color\na red car\n"
    assert "Physics: not among VBench's dimensions" in vbench.usage("prompts", "--dimensions", "Physics")
    assert "has no vbench" in vbench.error("prompts", code=3)


def test_check_names_what_is_missing(vbench, strict, info, videos):
    (videos / "a red car-1.mp4").unlink()
    (videos / "a red car-2.mp4").write_bytes(b"")
    (videos / "notes.txt").touch()
    arguments = ("check", "--videos", videos, "--prompts", info)
    result = vbench.run(*arguments, "--json", code=1)
    answer = strict(result.stdout)
    assert (answer["schema"], answer["complete"]) == ("dit-accel/vbench-check/1", False)
    flickering, color = answer["dimensions"]
    assert (flickering["videos"], flickering["whole"], flickering["missing"]) == (25, 5, 20)
    assert (color["videos"], color["whole"], color["missing"], color["damaged"]) == (5, 3, 1, 1)
    assert len(answer["missing"]) == 21
    assert answer["damaged"] == {"a red car-2.mp4": "empty"}
    assert "warning: VBench looks for the suffix" in result.stderr
    shown = vbench.error(*arguments, "--dimensions", "color")
    assert shown.endswith("1 missing: a red car-1.mp4; 1 damaged: a red car-2.mp4")
    assert "flickering" not in vbench.run(*arguments, "--dimensions", "color", "-n", 1).stdout


# -- generate ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_videos_are_made_and_a_stopped_run_goes_on(vbench, strict, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "new" / "videos"
    prompts.write_text("a red circle\na blue square\n")
    arguments = ("generate", "-m", "tiny-wan", "--prompts", prompts, "-n", 2, *SMALL, "--out", out)
    answer = strict(vbench.run(*arguments, "--json").stdout)
    assert (answer["made"], answer["kept"], answer["processes"]) == (4, 0, 1)
    names = {f"{prompt}-{index}.mp4" for prompt in ("a red circle", "a blue square") for index in (0, 1)}
    assert {path.name for path in out.iterdir()} == names
    assert media.load(out / "a red circle-1.mp4").shape == (5, 32, 32, 3)
    assert len({path.read_bytes() for path in out.iterdir()}) == 4
    vbench.run("check", "--videos", out, "--prompts", prompts, "-n", 2)
    record = strict((tmp_path / "new" / "videos.json").read_text())
    assert (record["schema"], record["model"], record["recipe"]) == (answer["schema"], "tiny-wan", None)
    assert record["environment"]["packages"]["torch"]

    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    cut, lost = out / "a red circle-1.mp4", out / "a blue square-0.mp4"
    cut.write_bytes(before[cut.name][0][:100])
    lost.unlink()
    assert "2 videos made, 2 kept" in vbench.run(*arguments).stdout
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    assert {name: one[0] for name, one in after.items()} == {name: one[0] for name, one in before.items()}
    assert {name for name in names if before[name] == after[name]} == names - {cut.name, lost.name}

    assert "another `request`" in vbench.error(*arguments, "--seed", 3)
    assert "another `fps`" in vbench.error(*arguments, "--fps", 16)
    (tmp_path / "new" / "videos.json").write_text("{}")
    assert "is something else; use another --out" in vbench.error(*arguments)


@pytest.mark.slow
def test_two_processes_make_what_one_makes(vbench, strict, tmp_path):
    """Two CPU processes go on with what one made, and make what it would have made."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    arguments = ["eval", "vbench", "generate", "-m", "tiny-wan", "--prompts", prompts, "-n", 3, *SMALL]
    vbench.run(*arguments[2:], "--out", tmp_path / "one")
    (tmp_path / "two").mkdir()
    for index, bytes_left in ((0, None), (1, 100)):  # whole, and cut off
        made = tmp_path / "one" / f"a red circle-{index}.mp4"
        (tmp_path / "two" / made.name).write_bytes(made.read_bytes()[:bytes_left])
    program = ["-m", "dit_accel.cli", *arguments, "--json", "--out", tmp_path / "two"]
    answer = strict("".join(one.stdout for one in processes.launch(tmp_path, *program)))
    assert (answer["made"], answer["kept"], answer["processes"]) == (2, 1, 2)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_what_cannot_be_generated_is_one_line_and_writes_nothing(vbench, info, tmp_path):
    arguments = ("generate", "--prompts", info, "--out", tmp_path / "videos")
    assert "makes images" in vbench.error(*arguments, "-m", "tiny-flux")
    assert "`--size`" in vbench.error(*arguments, "-m", "tiny-wan", "--size", "big")
    assert "`--frames` must be at least 2" in vbench.error(*arguments, "-m", "tiny-wan", "--frames", 1)
    assert "is a file" in vbench.error("generate", "--prompts", info, "-m", "tiny-wan", "--out", info)
    assert "there is no interpreter" in vbench.error(
        *arguments[:1], *arguments[3:], "-m", "tiny-wan", "--vbench-python", "x", code=3
    )
    assert sorted(tmp_path.iterdir()) == [info]


# -- run -----------------------------------------------------------------------------------------------------


def test_our_flickering_goes_into_scores(vbench, strict, info, videos, tmp_path):
    out = tmp_path / "run.json"
    arguments = ("run", "--videos", videos, "--prompts", info, "--no-cache")
    answer = strict(
        vbench.run(*arguments, "--dimensions", "temporal_flickering", "--json", "--out", out).stdout
    )
    assert answer == strict(out.read_text())
    assert (answer["schema"], answer["kind"]) == ("dit-accel/eval/1", "vbench")
    assert answer["implementation"] == "dit-accel"
    result = answer["metrics"]["temporal_flickering"]
    frames = media.load(videos / "a still lake-0.mp4").astype(float)
    assert result["value"] == pytest.approx(1 - np.abs(frames[1:] - frames[:-1]).mean() / 255)
    assert [row["name"] for row in result["videos"]] == [f"a still lake-{index}.mp4" for index in range(5)]
    scores = strict(vbench.run("aggregate", out, "--json").stdout)
    assert scores["dimensions"]["temporal_flickering"]["raw"] == result["value"]
    every = strict(vbench.run("run", "--videos", videos, "--custom", *arguments[5:], "--dimensions",
                       "temporal_flickering", "--json").stdout)  # fmt: skip
    assert len(every["metrics"]["temporal_flickering"]["videos"]) == 10


def test_flickering_of_unfiltered_videos_warns(vbench, info, videos):
    (videos / "a still lake-0.mp4").rename(videos / "a still lake-24.mp4")
    (videos / "a still lake-0.mp4").write_bytes((videos / "a still lake-24.mp4").read_bytes())
    arguments = ("run", "--videos", videos, "--prompts", info, "--no-cache", "--dimensions")
    assert "has `vbench static_filter` pick them" in vbench.run(*arguments, "temporal_flickering").stderr


def test_what_cannot_be_scored_is_exit_code_3_or_skipped(vbench, strict, info, videos, tmp_path):
    arguments = ("run", "--videos", videos, "--prompts", info, "--no-cache", "--weights", tmp_path)
    assert "color: only VBench itself has them" in vbench.error(*arguments, "--dimensions", "color", code=3)
    subject = vbench.error(*arguments, "--dimensions", "subject_consistency", code=3)
    assert "facebook/dino-vitb16 is not in the Hugging Face cache" in subject
    both = ("--dimensions", "temporal_flickering,color", "--json")
    assert "color: only VBench" in vbench.error(*arguments, *both, code=3)
    answer = strict(vbench.run(*arguments, *both, "--allow-skipped").stdout)
    assert list(answer["metrics"]) == ["temporal_flickering"]
    assert list(answer["skipped"]) == ["color"]


def test_bad_videos_are_one_line_and_write_nothing(vbench, info, videos, tmp_path):
    arguments = ("run", "--videos", videos, "--prompts", info, "--no-cache", "--out", tmp_path / "run.json")
    arguments += ("--dimensions", "temporal_flickering")
    (videos / "a still lake-3.mp4").unlink()
    assert "1 missing: a still lake-3.mp4 (--allow-missing goes on without)" in vbench.error(*arguments)
    assert (
        "warning: scores lack videos"
        in vbench.run(*arguments[:-4], *arguments[-2:], "--allow-missing").stderr
    )
    (videos / "a still lake-3.mp4").write_bytes(b"")
    assert "1 damaged: a still lake-3.mp4" in vbench.error(*arguments, "--allow-missing")
    content = bytearray((videos / "a still lake-2.mp4").read_bytes())
    start = content.index(b"mdat") + 4
    content[start : start + 200] = bytes(200)  # whole by its boxes, but not what is in them
    (videos / "a still lake-3.mp4").write_bytes(content)
    assert "a still lake-3.mp4 cannot be read" in vbench.error(*arguments)
    assert not (tmp_path / "run.json").exists()


def test_vbench_runs_in_its_own_environment(vbench, strict, videos, python, tmp_path):
    output, out = tmp_path / "results", tmp_path / "run.json"
    arguments = ("run", "--videos", videos, "--vbench-python", python, "--output-path", output)
    answer = strict(vbench.run(*arguments, "--dimensions", "color", "--json", "--out", out).stdout)
    assert answer["metrics"] == {"color": {"value": 0.75, "better": "higher"}}
    assert answer["implementation"].startswith("vbench")
    assert answer["prompts"].endswith("VBench_full_info.json")
    both = (*arguments, "--dimensions", "color,scene", "--out", tmp_path / "both.json")
    assert "vbench ended with exit code 7 in scene" in vbench.error(*both)
    assert not (tmp_path / "both.json").exists()
    assert [path.name for path in output.iterdir()] == ["color_eval_results.json"]
    assert "vbench: color is there" in vbench.run(*both, "--resume", code=1).stderr
    scores = strict(vbench.run("aggregate", output, "--json").stdout)
    assert scores["dimensions"]["color"]["normalised"] == 0.75
    assert "`--custom` has no color" in vbench.usage(*arguments, "--custom", "--dimensions", "color")
    assert "its full-info JSON" in vbench.usage(*arguments, "--prompts", "a.txt", "--dimensions", "color")


# -- aggregate -----------------------------------------------------------------------------------------------


def test_aggregate(vbench, cli_of, strict, tmp_path):
    pytest.importorskip("matplotlib")
    names = "subject_consistency background_consistency temporal_flickering motion_smoothness dynamic_degree"
    names += " aesthetic_quality imaging_quality object_class multiple_objects human_action color"
    names += " spatial_relationship scene appearance_style temporal_style overall_consistency"
    row = (96.78, 96.63, 98.89, 97.73, 59.86, 60.82, 61.68, 83.37, 62.63, 98.00, 79.41, 69.90, 51.14)
    row += (24.80, 24.36, 26.66)
    whole, half, plot = tmp_path / "whole.json", tmp_path / "half.json", tmp_path / "radar.png"
    percent = dict(zip(names.split(), row, strict=True))
    (tmp_path / "a.json").write_text(json.dumps(percent))
    arguments = ("aggregate", tmp_path / "a.json", "--label", "CogVideoX-2B", "--out", whole)
    assert "must be a fraction" in vbench.error(*arguments)
    shown = vbench.run(*arguments, "--percent").stdout
    assert all(score in shown for score in ("82.18", "75.83", "80.91"))
    assert strict(whole.read_text())["metrics"]["vbench-total"]["value"] == pytest.approx(0.8091, abs=2e-4)

    del percent["color"]
    (tmp_path / "b.json").write_text(json.dumps({name: [value / 100, []] for name, value in percent.items()}))
    arguments = ("aggregate", tmp_path / "b.json", "--json", "--label", "half")
    result = vbench.run(*arguments, "--out", half, "--plot", plot, "--beside", whole)
    answer = strict(result.stdout)
    assert answer == strict(half.read_text())
    assert answer["schema"] == "dit-accel/eval/1"
    assert answer["metrics"]["vbench-total"]["value"] is None
    assert answer["metrics"]["vbench-quality"]["value"] == pytest.approx(0.8218, abs=2e-4)
    assert "no score for color, so its group and the total have none" in result.stderr
    assert media.load(plot).size
    zero = strict(vbench.run(*arguments, "--missing-as-zero").stdout)
    expected = (4 * 0.8218 + 0.7583 - 0.7941 / 9) / 5
    assert zero["metrics"]["vbench-total"]["value"] == pytest.approx(expected, abs=2e-4)
    report = cli_of("eval", "report").run(whole, half, "--md").stdout
    assert "| CogVideoX-2B | 0.8091 | 0.8218 | 0.7583 |" in report
    assert "| half | none | 0.8218 | none |" in report


def test_bad_aggregates_are_one_line_and_write_nothing(vbench, tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"i2v_subject": [0.9, []]}')
    arguments = ("aggregate", path, "--out", tmp_path / "scores.json")
    assert "i2v_subject (of i2v): not among" in vbench.error(*arguments)
    assert "a plot is written as .png" in vbench.error(*arguments, "--plot", tmp_path / "a.txt")
    assert "`--suite` is t2v or i2v" in vbench.usage(*arguments, "--suite", "vbench2")
    path.write_text('{"color": [NaN, []]}')
    assert "NaN is no number" in vbench.error(*arguments)
    assert list(tmp_path.iterdir()) == [path]
