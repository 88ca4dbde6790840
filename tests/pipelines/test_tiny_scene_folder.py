"""Folders of drawn scenes, read again by what distillation reads folders with."""

import numpy as np
import pytest

from dit_accel import media
from dit_accel.distillation.folders import read_folder
from dit_accel.pipelines.tiny.__main__ import main
from dit_accel.pipelines.tiny.captions import read_caption
from dit_accel.pipelines.tiny.scene_folder import write_scenes


@pytest.mark.parametrize(("name", "size"), [("tiny-flux", (1, 64, 96)), ("tiny-wan", (5, 64, 64))])
def test_what_is_drawn_is_read_again(tmp_path, name, size):
    items = read_folder(write_scenes(name, tmp_path / "a", 2, size))
    again = read_folder(write_scenes(name, tmp_path / "b", 2, size))
    assert [item.caption for item in items] == [item.caption for item in again]
    for item, other in zip(items, again, strict=True):
        assert read_caption(item.caption)
        frames = media.load(item.path)
        assert frames.shape == (*size, 3)
        assert np.array_equal(frames, media.load(other.path))


def test_the_command(tmp_path, capsys):
    main(["scenes", "tiny-flux", "--out", str(tmp_path / "scenes"), "-n", "1"])
    assert str(tmp_path / "scenes") in capsys.readouterr().out
    assert media.load(read_folder(tmp_path / "scenes")[0].path).shape[1] == 384
