"""The table of methods above native size, on an untrained model of the scenes that are counted."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from dit_accel.evals.benchmarks import highres
from dit_accel.pipelines import load
from dit_accel.pipelines.tiny import INFO
from dit_accel.pipelines.tiny.checker import count_objects
from dit_accel.pipelines.tiny.scenes import render


@pytest.fixture
def untrained(monkeypatch):
    """tiny-flux of the emoji world without trained weights."""
    torch.manual_seed(0)
    pipe = INFO["tiny-flux"].build()
    pipe.register_to_config(_name_or_path=load("tiny-flux").config._name_or_path)
    monkeypatch.setattr(highres, "load", lambda *_: pipe)
    return pipe


def test_table_rows_and_pictures(untrained, tmp_path):
    options = [
        "tiny-flux",
        "--scenes",
        "1",
        "--sides",
        "2",
        "--steps",
        "2",
        "--methods",
        "direct",
        "swim",
        "flow",
    ]
    assert highres.main([*options, "--keep", str(tmp_path / "keep"), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "highres_cpu.md").read_text()
    assert "## tiny-flux at 4 times its area, 1 scenes" in text
    for method in ("native size", "direct", "swim", "flow"):
        assert f"| {method} | " in text
    with (tmp_path / "highres_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 5
    assert {row["provider"] for row in rows} == {"native size", "direct", "swim", "flow"}
    assert Image.open(tmp_path / "highres-tiny-flux-x2.png").size == (160, 4 * 160)
    assert len(list((tmp_path / "keep").glob("*.safetensors"))) == 2


def test_scenes(untrained):
    scenes = highres.scenes_of_one_object(untrained, 5)
    assert len(scenes) == 5
    assert all(len(scene.objects) == 1 for scene in scenes)


def test_objects_are_counted():
    scenes = highres.held_out_scenes(12)
    for scene in scenes:
        assert count_objects(render(scene, 128, 128)[0]) == len(scene.objects)
    twice = np.concatenate([render(highres.held_out_scenes(1, video=True)[0], 128, 128, 1)[0]] * 2, axis=1)
    assert count_objects(twice) >= 1
