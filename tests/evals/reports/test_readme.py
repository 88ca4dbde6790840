"""Tables in the README come from reports."""

import json

import pytest

from dit_accel.evals.reports import marked, readme


@pytest.fixture
def report():
    dense = {
        "name": "dense",
        "step_seconds_median": 2.0,
        "step_speedup": 1.0,
        "seconds": 41.0,
        "speedup": 1.0,
    }
    dense |= {"run_density": 1.0, "identical": True, "psnr_db": None, "ssim": 1.0}
    near = {"name": "near", "step_seconds_median": 2.5, "step_speedup": 0.8, "seconds": 51.25, "speedup": 0.8}
    near |= {"run_density": 0.25, "identical": False, "psnr_db": 21.26, "ssim": 0.8765}
    settings = {
        "model": "tiny-wan",
        "width": 256,
        "height": 192,
        "frames": 29,
        "steps": 20,
        "dtype": "float32",
    }
    packages = {"torch": "2.13.0", "diffusers": "0.42.1", "dit-accel": "0.1.0"}
    return {
        "command": "dit-accel compare -m tiny-wan",
        "settings": settings | {"device": "cpu", "repeats": 1},
        "environment": {"cpu": {"name": "A CPU", "torch_threads": 2}, "gpus": [], "packages": packages},
        "methods": [dense, near],
    }


def test_table_shows_dense_first_and_slower_settings_too(report):
    lines = readme.table(report).splitlines()
    assert lines[0] == "**tiny-wan**, 256x192 px, 29 frames, 20 steps, float32"
    assert lines[4] == "| dense | 2.000 | 1.00x | 41.0 | 1.00x | 100% |  |  |"
    assert lines[5] == "| near | 2.500 | 0.80x | 51.2 | 0.80x | 25% | 21.3 | 0.876 |"
    assert "A CPU, 2 threads; torch 2.13.0" in lines[-1]
    assert "`dit-accel compare -m tiny-wan`" in lines[-1]


def test_writing_twice_is_writing_once(report, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(report))
    begin, end = marked.markers("results")
    readme.README.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    readme.main(["report.json"])
    once = readme.README.read_text()
    readme.main(["report.json"])
    assert readme.README.read_text() == once
    assert once.startswith("above\n")
    assert once.endswith("\nbelow\n")
    assert "old" not in once
