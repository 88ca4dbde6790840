"""The table of calibrated plans: made whole at a tiny size, gone on with, and refused with other settings."""

import pytest

from dit_accel import TokenLayout
from dit_accel.evals.benchmarks import calibrated
from dit_accel.evals.benchmarks.calibrated import Subject, gather_share, main

SMALL = ["--size", "64", "64", "--frames", "5", "--steps", "2", "--scenes", "2", "--calibrated-on", "1"]


def test_a_table_that_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    line = ["tiny-wan", *SMALL, "--densities", "0.6", "--repeats", "1", "--work", str(tmp_path / "work")]
    made, output = [], Subject.output

    def counted(self, number):
        made.append(number)
        if len(made) == 4:
            raise KeyboardInterrupt
        return output(self, number)

    monkeypatch.setattr(Subject, "output", counted)
    with pytest.raises(KeyboardInterrupt):
        main([*line, "--out", str(tmp_path / "out")])
    assert main([*line, "--out", str(tmp_path / "out")]) == 0
    first = len(made)
    assert main([*line, "--out", str(tmp_path / "out")]) == 0
    assert len(made) == first  # all was kept
    text = (tmp_path / "out" / "calibrated_cpu.md").read_text()
    assert "| PARO | 0.6 |" in text
    assert "| mixed | 0.6 |" in text
    assert "| dense | 1 | 1.000 | 100.0 | 1.000 |" in text
    assert "of dense attention" in text
    with pytest.raises(ValueError, match="was begun with another `steps`, 2, not 3; use"):
        main([*line, "--steps", "3", "--out", str(tmp_path / "out")])


def test_scenes_to_calibrate_on_are_others(tmp_path):
    options = calibrated.argparse.Namespace(
        size=(64, 64), frames=5, steps=2, scenes=3, calibrated_on=2, work=tmp_path
    )
    subject = Subject.of("tiny-wan", options)
    assert (len(subject.scenes), len(subject.others)) == (3, 2)
    assert not {calibrated.caption(one) for one in subject.scenes} & {
        calibrated.caption(one) for one in subject.others
    }


def test_share_of_the_gather():
    low, middle, high = gather_share(TokenLayout((2, 8, 8)), 2, 16, 2)
    assert 0 < low <= middle <= high
