"""The time and how phases share it, and what a run does when there is none."""

import itertools

import pytest

from dit_accel.evals.gpu_bench import schedule
from dit_accel.evals.gpu_bench.driver import WRITING, Bench, Budget
from dit_accel.kernels.block_sparse import tuned


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


SHARES = {"first": 1, "second": 2, "third": 1}


class TestBudget:
    def test_phases_share_the_time(self):
        clock = Clock()
        budget = Budget(40 + WRITING, SHARES, clock)
        assert budget.deadline("first") == pytest.approx(10)
        clock.now += 10
        assert budget.deadline("second") == pytest.approx(30)
        clock.now += 20
        assert budget.deadline("third") == pytest.approx(40)

    def test_what_a_phase_leaves_goes_to_the_next(self):
        clock = Clock()
        budget = Budget(40 + WRITING, SHARES, clock)
        clock.now += 1
        assert budget.deadline("second") == pytest.approx(1 + 39 * 2 / 3)
        assert budget.deadline("third") == pytest.approx(40)

    def test_no_phase_ends_after_the_time(self):
        clock = Clock()
        budget = Budget(40 + WRITING, SHARES, clock)
        for late in (5, 20, 10, 30):
            clock.now += late
            for phase in SHARES:
                assert budget.deadline(phase) <= max(40, budget.spent)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_shares_and_limits_name_every_phase(device):
    assert tuple(schedule.SHARES[device]) == tuple(schedule.SECONDS[device]) == schedule.PHASES
    assert sum(schedule.SHARES[device].values()) == 100


def test_what_does_not_fit_is_listed(tmp_path, capsys, monkeypatch):
    bench = Bench("cpu", 0.2, tmp_path, cores=2)
    ticks = itertools.count()
    monkeypatch.setattr(bench.budget, "_now", lambda: bench.budget._begin + 5 * next(ticks))
    assert not bench.run(), "nothing was checked"
    phases = schedule.of("cpu")
    every = (*phases.checks, *phases.rate, *phases.shapes, *phases.backward, *phases.steps)
    jobs = {job.name for job in every}
    reasons = {row["job"]: row["reason"] for row in bench.rows if row["kind"] == "left out"}
    assert jobs <= set(reasons)
    assert "no time left in its phase" in reasons.values()
    page = (tmp_path / "bench_cpu.md").read_text()
    assert all(name in page for name in jobs)
    assert not (tmp_path / "tuned.json").exists()


def test_a_damaged_table_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "tuned.json").write_text("{")
    with pytest.raises(ValueError, match=r"tuned\.json is not a table"):
        Bench("cpu", 1, tmp_path, cores=2)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.json"]


def test_what_the_kernels_table_has_stays_in_the_new_one(tmp_path, monkeypatch):
    own = tmp_path / "own.json"
    entry = tuned.Entry("9.0", 2, 64, 64, 32, 4, 2, 1.1, "a GPU", "2", "3", "12", "abc")
    tuned.save(own, [entry])
    monkeypatch.setattr(tuned, "PATH", own)
    bench = Bench("cpu", 1, tmp_path / "out", cores=2)
    bench.entries = [tuned.Entry("8.0", 2, 64, 64, 32, 4, 2, 1.1, "a GPU", "2", "3", "12", "abc")]
    bench._write()
    kept = {key[:3] for key in tuned.load(tmp_path / "out" / "own.json")}
    assert kept == {((9, 0), 2, 64), ((8, 0), 2, 64)}
    assert tuned.load(own) == {entry.key: entry}, "only --apply changes it"
