"""The benchmark of choosing by content, at a size at which it says nothing."""

from dit_accel.evals.benchmarks import choosing


def test_writes_a_row_for_each_setting(tmp_path):
    sizes = ["--grid", "2", "16", "16", "--heads", "1", "--head-dim", "16", "--repeats", "2"]
    choosing.main([*sizes, "--out", str(tmp_path)])
    text = (tmp_path / "choosing_cpu.md").read_text()
    for name in choosing.SETTINGS:
        assert f"| {name} | " in text
    assert len((tmp_path / "choosing_cpu.csv").read_text().splitlines()) == 1 + 2 * len(choosing.SETTINGS)
