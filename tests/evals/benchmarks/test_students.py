"""Students side by side: that they are trained, drawn and measured, once each, and what is written."""

import numpy as np
import pytest

from dit_accel import Recipe
from dit_accel.evals.benchmarks import recoloured, student_runs, students
from dit_accel.patterns import Agent, Clear

SMALL = ["--size", "1", "48", "64", "--steps", "2", "--batch", "2", "--drawn", "16", "--scenes", "2",
         "--sampling-steps", "2", "--repeats", "1", "--transfer-size", "1", "64", "80",
         "--transfer-scenes", "1", "--recoloured", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The folders of a small run, and the text of its table."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patched:
        two = {"near": Recipe(Clear(1)), "agents": Recipe(Agent((1, 2, 2)))}
        patched.setitem(student_runs.KINDS, "image", (two, {"rank": 2}))
        run = ["tiny-flux", *SMALL, "--work", str(work), "--out", str(out)]
        assert students.main(run) == 0
        yield run, work, out


def test_every_student_has_a_row(table):
    _, _, out = table
    text = (out / "students" / "tiny-flux.md").read_text()
    assert "## tiny-flux 1x48x64, 2 steps of 2 samples; 2 captions, 2 sampling steps" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in rows[2:]] == ["| dense", "| near", "| agents"]
    assert all(line.count("|") == rows[0].count("|") for line in rows)
    assert rows[0].endswith("| attributes at 64x80 | attributes of a tuned copy |")
    assert len((out / "students_cpu.csv").read_text().splitlines()) == 1 + 3 * 10


def test_pictures_and_curves(table):
    from dit_accel import media

    _, _, out = table
    assert media.load(out / "students" / "tiny-flux.png").shape == (1, 5 * 48, 2 * 64, 3)
    assert (out / "students" / "tiny-flux-loss.png").stat().st_size > 1000


def test_the_adapter_changes_what_is_drawn(table):
    _, work, _ = table
    before, after = (
        np.load(work / "tiny-flux" / "pictures" / f"{name} 1x48x64.npy") for name in ("near before", "near")
    )
    assert before.shape == after.shape == (2, 1, 48, 64, 3)
    assert (before != after).any()


def test_goes_on_from_what_was_done(table, monkeypatch):
    run, _, _ = table
    monkeypatch.setattr(student_runs, "generate", None)  # drawn already
    assert students.main(run) == 0
    other = [*run, "--steps", "3"]
    with pytest.raises(ValueError, match="another --work"):
        students.main(other)


def test_curves_are_of_every_step_once(table):
    _, work, _ = table
    bench = student_runs.Bench("tiny-flux", "image", None, {}, (1, 48, 64), [], 2, 2, work / "tiny-flux")
    assert bench.losses("near").shape == (2,)


def test_exchanged_colours():
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert recoloured.exchanged(picture)[0, 0].tolist() == [2, 0, 1]
    assert (recoloured.exchanged(recoloured.exchanged(picture), back=True) == picture).all()


def test_the_copy_is_another_model(table):
    _, work, _ = table
    folder = work / "tiny-flux" / "pictures"
    own, copy = (np.load(folder / f"near{name} 1x48x64.npy") for name in ("", " recoloured"))
    assert (own[:1] != copy).any()


def test_some_of_the_students(table):
    run, work, _ = table
    folder = str(work / "other")
    with pytest.raises(ValueError, match="students of the kind 'image' are near, agents, got 'far'"):
        students.main([*run, "--work", folder, "--student", "far"])
    assert not (work / "other").exists()
    bench = student_runs.Bench("tiny-flux", "image", None, {}, (1, 8, 8), [], 2, 2, work, ("agents",))
    assert list(bench.students) == ["agents"]
