"""One table of several results."""

import json

import pytest

from dit_accel.evals.reports import result_files as report


def result(label=None, **values):
    metrics = {
        name.replace("_", "-"): {"value": value, "better": "lower" if "frechet" in name else "higher"}
        for name, value in values.items()
    }
    return {"schema": report.SCHEMA, "label": label, "command": "dit-accel eval x | y", "metrics": metrics}


def test_metrics_of_all_results_are_columns():
    results = {"a": result(psnr=31.24567), "b": result(psnr=28.0, frechet_scenes=0.001234)}
    columns, rows = report.table(results)
    assert columns == ["result", "psnr ↑", "frechet-scenes ↓"]
    assert rows == [["a", "31.25", ""], ["b", "28", "0.001234"]]


def test_values_that_do_not_exist_are_said():
    same, none = result(psnr=None), result(psnr=None)
    same["metrics"]["psnr"]["identical"] = 3
    _, rows = report.table({"same": same, "none": none})
    assert [row[1] for row in rows] == ["identical", "none"]


def test_markdown_says_whose_features_and_what_was_skipped():
    one = result(frechet_scenes=1.5) | {"warnings": ["few samples"], "skipped": {"fid": "no weights"}}
    text = report.markdown({"a|b": one})
    assert text.splitlines()[:3] == ["| result | frechet-scenes ↓ |", "| --- | ---: |", r"| a\|b | 1.5 |"]
    assert "not comparable with FID" in text
    assert "- a|b: few samples." in text
    assert "- a|b: fid skipped: no weights." in text
    assert "`dit-accel eval x | y`" in text
    assert "FID" not in report.markdown({"a": result(psnr=1.0)})


def test_files_go_by_label_then_by_name(tmp_path):
    paths = [tmp_path / "clear.json", tmp_path / "b.json", tmp_path / "deep" / "b.json"]
    paths[2].parent.mkdir()
    for path, one in zip(paths, (result("CLEAR, r = 8", psnr=1.0), result(), result()), strict=True):
        path.write_text(json.dumps(one))
    assert list(report.load_all(paths)) == ["CLEAR, r = 8", f"b ({paths[1]})", f"b ({paths[2]})"]


def test_rows_of_a_sweep_are_results(tmp_path):
    path = tmp_path / "sweep.json"
    rows = [
        {"setting": name, "metrics": result(psnr=value)["metrics"]}
        for name, value in (("a", 1.0), ("b", 2.0))
    ]
    sweep = {"schema": report.SCHEMA, "kind": "sweep", "label": "tiny", "command": "dit-accel eval sweep"}
    path.write_text(json.dumps({**sweep, "rows": rows, "warnings": ["few"], "skipped": {"lpips": "none"}}))
    found = report.load_all([path])
    assert report.table(found)[1] == [["tiny a", "1"], ["tiny b", "2"]]
    assert report.notes(found) == ["tiny a: few.", "tiny a: lpips skipped: none."]
    path.write_text(json.dumps({**sweep, "rows": None}))
    with pytest.raises(ValueError, match="is no result"):
        report.load(path)


@pytest.mark.parametrize(
    "text", ["", "no json", "[1]", "{}", '{"schema": "dit-accel/eval/0", "metrics": {}}']
)
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match="there is no file"):
        report.load(path)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"cannot be read as a result|is no result"):
        report.load(path)


def test_intervals_are_in_brackets():
    one = result(clip=26.12345)
    one["metrics"]["clip"]["interval"] = [25.5, 26.75]
    text = report.markdown({"a": one, "b": result(clip=1.0)})
    assert "| a | 26.12 [25.5, 26.75] |" in text
    assert text.count("In brackets: 95% bootstrap intervals") == 1
    assert "In brackets" not in report.markdown({"b": result(clip=1.0)})
