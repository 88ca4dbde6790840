"""The whole run without a GPU: from a bare checkout, with torch and triton alone, and in its time.

What is compiled and timed stands in for the GPU's; what happens around it is what happens on one.
"""

import csv
import importlib.util
import json
import shutil
import subprocess
import venv
from pathlib import Path

import pytest
import torch

from dit_accel.evals.benchmarks.table import COLUMNS
from dit_accel.evals.gpu_bench import launches, schedule
from dit_accel.kernels.block_sparse import tuned

ROOT = Path(__file__).parents[3]
FOLDERS = ("dit_accel", "kernels", "evals", "pipelines")
ALONE = (  # torch, triton and what torch cannot be imported without
    "torch", "torchgen", "functorch", "triton", "sympy", "mpmath", "networkx", "jinja2", "markupsafe",
    "filelock", "fsspec", "typing_extensions",
)  # fmt: skip
MINUTES = 15  # it ends when its work is done: half a minute on a machine with nothing else to do


def bare_python(folder: Path) -> Path:
    """A Python in which only the packages of `ALONE` are installed."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in ALONE:
        if (spec := importlib.util.find_spec(name)) is None:
            continue
        path = Path(spec.origin)
        path = path.parent if path.name == "__init__.py" else path
        (site / path.name).symlink_to(path)
    for name in ("torch", "triton"):
        for record in Path(torch.__file__).parents[1].glob(f"{name}-*.dist-info"):
            (site / record.name).symlink_to(record)
    return folder / "bin" / "python"


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout, which is no clone, and not installed anywhere."""
    root = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "weights", "results", "*.safetensors")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return bare_python(tmp_path_factory.mktemp("bare") / "venv")


@pytest.fixture(scope="module")
def rehearsal(checkout, python, tmp_path_factory):
    """What a run left behind, and what it printed."""
    out, before = tmp_path_factory.mktemp("run") / "out", files(checkout)
    command = [python, "-m", "dit_accel.evals.gpu_bench", "--device", "cpu", "--minutes", str(MINUTES)]
    command += ["--out", out, "--commit", "abc123"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(out.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert files(checkout) == before, "the checkout is as it was"
    return out, done.stdout


@pytest.fixture(scope="module")
def rows(rehearsal):
    return [json.loads(line) for line in (rehearsal[0] / "measurements.jsonl").read_text().splitlines()]


pytestmark = pytest.mark.slow


def test_nothing_else_is_installed_there(python):
    code = (
        "import importlib.util, torch, triton\n"
        "names = ('numpy', 'yaml', 'diffusers', 'transformers', 'safetensors', 'PIL')\n"
        "print([name for name in names if importlib.util.find_spec(name)])"
    )
    done = subprocess.run([python, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "[]", done.stderr


def test_it_ends_in_its_time(rows):
    assert rows[-1]["at"] < MINUTES * 60


def test_every_phase_did_its_work(rows):
    kinds = {row["kind"] for row in rows}
    assert kinds == {"machine", "fault", "check", "matmul", "time", "backward", "launch", "left out"}
    timed = {row["provider"] for row in rows if row["kind"] == "time"}
    assert timed == {"sdpa-flash", "sdpa-math", "gather", "gather-int8", "gather-tail"}
    backward = {row["provider"] for row in rows if row["kind"] == "backward"}
    assert backward == {"sdpa-flash", "sdpa-math", "gather", "gather-tail"}
    assert all(row["right"] and row["repeats"] for row in rows if row["kind"] == "check")
    measured = {(tuple(row["case"]), tuple(row["launch"])) for row in rows if row["kind"] == "launch"}
    first = schedule.tuning_cases("cpu")[64][0]
    assert {launch for case, launch in measured if case == (first.name, first.preset)} == {
        *launches.REHEARSAL_GRID, *launches.REHEARSAL_BACKWARD_GRID
    }  # fmt: skip


def test_every_job_left_a_row(rows):
    phases = schedule.of("cpu")
    jobs = [*phases.checks, *phases.rate, *phases.shapes, *phases.backward, *phases.steps]
    assert {job.name for job in jobs} <= {row["job"] for row in rows}


def test_what_was_lost_cost_itself_alone(rows):
    reasons = {}
    for row in rows:
        if row["kind"] == "left out":
            reasons.setdefault(row["job"], []).append(row["reason"])
    assert "no end after 6 s" in reasons["fault: hang"][0]
    assert "signal SIGABRT" in reasons["fault: crash"][0]
    illegal = reasons["fault: an illegal memory access"]
    assert "CUDA error" in illegal[0]
    assert "exit code 9" in illegal[1]
    lost = {name for name in reasons if not name.startswith("fault: ")}
    assert not any(name.startswith("check ") for name in lost)


def test_what_is_not_installed_is_named(rows):
    reasons = [row["reason"] for row in rows if row["kind"] == "left out"]
    assert "flash_attn is not installed" in reasons
    assert any("diffusers, which is not installed" in reason for reason in reasons)
    assert any(reason.startswith(("ncu is", "no time left")) for reason in reasons)


def test_the_table_of_launches_is_written_and_read_back(rehearsal, monkeypatch):
    found = tuned.load(rehearsal[0] / "tuned.json")
    keys = {format: ((0, 0), 4, 64, "pointer", 64, format, "forward") for format in ("none", "int8")}
    backward = {launch: ((0, 0), 4, 64, *launch.kind) for launch in launches.REHEARSAL_BACKWARD_GRID}
    assert found.keys() == {*keys.values(), *backward.values()}
    assert {launch: found[key].launch for launch, key in backward.items()} == {
        launch: launch for launch in backward
    }
    for entry in found.values():
        assert entry.launch in (*launches.REHEARSAL_GRID, *launches.REHEARSAL_BACKWARD_GRID)
        assert entry.torch == torch.__version__
        assert entry.commit == "abc123"
    assert found[keys["none"]].gain >= 1  # of another format less is kept too: it is the fastest of its kind
    monkeypatch.setattr(tuned, "PATH", rehearsal[0] / "tuned.json")
    tuned._read.cache_clear()
    try:
        assert tuned.find((0, 0), 4, 64) == found[keys["none"]].launch
    finally:
        tuned._read.cache_clear()


def test_measurements_are_kept_in_every_form(rehearsal, rows):
    out, printed = rehearsal
    with (out / "bench_cpu.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    timed = [row for row in rows if row["kind"] in ("time", "backward")]
    assert sum(line["metric"] == "ms" for line in lines) == len(timed)
    assert {line["commit"] for line in lines} == {"abc123"}
    page = (out / "bench_cpu.md").read_text()
    assert page.startswith("# Rehearsal without a GPU")
    assert "nothing here is a measurement" in page
    assert printed.rstrip().endswith(page.rstrip())
    assert printed.count(" TFLOP/s\n") == sum("tflops" in row for row in rows)


def test_a_run_without_a_gpu_prints_its_schedule(checkout, python, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [python, "-W", "ignore", "-m", "dit_accel.evals.gpu_bench", "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "no CUDA device here" in done.stdout
    assert not (tmp_path / "out").exists()
