"""The tab Evaluate: result files as tables and plots, none but those of its folder."""

import csv
import io
import subprocess
import sys

import pytest
import torch

pytest.importorskip("gradio", reason="needs dit-accel[demo]")
from gradio_client.exceptions import AppError

from dit_accel.demos import evaluate
from dit_accel.demos.settings import RESULTS, Settings
from dit_accel.evals.reports import result_files

SETTINGS = Settings(torch.device("cpu"), torch.float32)
SWEEP = "sweep/tiny-flux/sweep.json"


def test_every_result_of_the_repository_is_listed():
    known = evaluate.results(SETTINGS)
    assert SWEEP in known
    assert "bench_cpu.csv" in known
    assert len(known[evaluate.ALL]) >= 2


def test_a_table_is_that_of_the_report(client):
    table, *_ = client.predict(SWEEP, api_name="/results")
    columns, rows = result_files.table(result_files.load_all([RESULTS / SWEEP]))
    assert table["headers"] == [column.replace("_", " ") for column in columns]
    assert table["data"] == rows


def test_csv_files_are_tables_too(client):
    table, *_ = client.predict("bench_cpu.csv", api_name="/results")
    rows = list(csv.reader(io.StringIO((RESULTS / "bench_cpu.csv").read_text())))
    assert table["headers"] == rows[0]
    assert len(table["data"]) == min(len(rows) - 1, evaluate.MOST_ROWS)


def test_the_command_prints_the_same_table(client):
    command = client.predict(SWEEP, api_name="/results")[-1]
    text = command.replace("dit-accel ", f"{sys.executable} -m dit_accel ", 1)
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True, timeout=900)
    assert done.stdout.strip() == result_files.markdown(result_files.load_all([RESULTS / SWEEP])).strip()


@pytest.mark.parametrize("label", ["../../pyproject.toml", "/etc/passwd", str(RESULTS / SWEEP), ""])
def test_only_what_is_listed_is_opened(client, label):
    with pytest.raises(AppError, match=r"listed results|choices"):
        client.predict(label, api_name="/results")


def test_it_is_shown_in_the_browser(open_page):
    page = open_page("Evaluate")
    page.locator("#table td").first.wait_for(state="attached")  # the first is for measuring, and hidden
    page.locator("#plot").wait_for()  # hidden until there is something to plot
