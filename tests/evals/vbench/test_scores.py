"""VBench's scores from its dimensions: published rows, missing dimensions, result files and the plot."""

import json
import math

import pytest
from PIL import Image

from dit_accel.evals.vbench.scores import SUITES, Scores, aggregate, radar, read, read_scores, table

# min, max, weight; Vchitect/VBench at 45e79ec, scripts/constant.py
T2V = {
    "subject_consistency": ("quality", 0.1462, 1.0, 1),
    "background_consistency": ("quality", 0.2615, 1.0, 1),
    "temporal_flickering": ("quality", 0.6293, 1.0, 1),
    "motion_smoothness": ("quality", 0.706, 0.9975, 1),
    "dynamic_degree": ("quality", 0.0, 1.0, 0.5),
    "aesthetic_quality": ("quality", 0.0, 1.0, 1),
    "imaging_quality": ("quality", 0.0, 1.0, 1),
    "object_class": ("semantic", 0.0, 1.0, 1),
    "multiple_objects": ("semantic", 0.0, 1.0, 1),
    "human_action": ("semantic", 0.0, 1.0, 1),
    "color": ("semantic", 0.0, 1.0, 1),
    "spatial_relationship": ("semantic", 0.0, 1.0, 1),
    "scene": ("semantic", 0.0, 0.8222, 1),
    "appearance_style": ("semantic", 0.0009, 0.2855, 1),
    "temporal_style": ("semantic", 0.0, 0.364, 1),
    "overall_consistency": ("semantic", 0.0, 0.364, 1),
}
I2V = {
    "camera_motion": ("i2v", 0.0, 1.0, 0.1),
    "i2v_subject": ("i2v", 0.1462, 1.0, 1),
    "i2v_background": ("i2v", 0.2615, 1.0, 1),
    **{name: row for name, row in T2V.items() if row[0] == "quality" and name != "temporal_flickering"},
}
# in percent: the dimensions of both groups in T2V's order; quality, semantic and total
PUBLISHED = {
    "CogVideoX-2B": (
        (96.78, 96.63, 98.89, 97.73, 59.86, 60.82, 61.68),
        (83.37, 62.63, 98.00, 79.41, 69.90, 51.14, 24.80, 24.36, 26.66),
        (82.18, 75.83, 80.91),
    ),
    "VideoCrafter-2.0": (
        (96.85, 98.22, 98.41, 97.73, 42.50, 63.13, 67.22),
        (92.55, 40.66, 95.00, 92.92, 35.86, 55.29, 25.13, 25.84, 28.23),
        (82.20, 73.42, 80.44),
    ),
    "LaVie": (
        (91.41, 97.47, 98.30, 96.38, 49.72, 54.94, 61.90),
        (91.82, 33.32, 96.80, 86.39, 34.09, 52.69, 23.56, 25.93, 26.41),
        (78.78, 70.31, 77.08),
    ),
}


def published(model):
    quality, semantic, _ = PUBLISHED[model]
    return dict(zip(T2V, (value / 100 for value in (*quality, *semantic)), strict=True))


COGVIDEOX = published("CogVideoX-2B")


def test_the_constants_are_vbenchs():
    for suite, rows in (("t2v", T2V), ("i2v", I2V)):
        shipped = SUITES[suite].dimensions
        assert list(shipped) == list(rows)
        assert {name: (d.group, d.min, d.max, d.weight) for name, d in shipped.items()} == rows
    assert SUITES["t2v"].groups == {"quality": 4, "semantic": 1}
    assert SUITES["i2v"].groups == {"i2v": 1, "quality": 1}
    counts = (72, 86, 75, 72, 72, 93, 93, 79, 82, 100, 85, 84, 86, 90, 100, 93)
    assert tuple(one.prompts for one in SUITES["t2v"].dimensions.values()) == counts


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_rows_are_reproduced(model):
    """To 0.02 points, the rounding of what was published."""
    *_, (quality, semantic, total) = PUBLISHED[model]
    scores = aggregate(published(model))
    assert 100 * scores.groups["quality"] == pytest.approx(quality, abs=0.02)
    assert 100 * scores.groups["semantic"] == pytest.approx(semantic, abs=0.02)
    assert 100 * scores.total == pytest.approx(total, abs=0.02)
    assert scores.missing == ()


def test_i2v_is_the_mean_of_both_groups():
    """At the bounds every normalised score is 0 or 1."""
    bounds = {name: (row[2] if row[0] == "i2v" else row[1]) for name, row in I2V.items()}
    scores = aggregate(bounds, "i2v")
    assert (scores.groups, scores.total) == ({"i2v": 1.0, "quality": 0.0}, 0.5)
    half = aggregate({**bounds, "camera_motion": 0.0}, "i2v")
    assert half.groups["i2v"] == pytest.approx(2 / 2.1)


def test_normalised_scores_are_not_clipped():
    assert aggregate({"temporal_flickering": 0.0}).normalised["temporal_flickering"] == pytest.approx(
        -0.6293 / 0.3707
    )
    assert aggregate({"temporal_style": 0.4}).normalised["temporal_style"] > 1


def test_a_missing_dimension_leaves_no_total_or_counts_as_zero():
    raw = {name: value for name, value in COGVIDEOX.items() if name != "temporal_flickering"}
    scores = aggregate(raw)
    assert scores.missing == ("temporal_flickering",)
    assert (scores.groups["quality"], scores.total) == (None, None)
    assert scores.groups["semantic"] == aggregate(COGVIDEOX).groups["semantic"]
    metrics = scores.to_dict()["metrics"]
    assert metrics["vbench-total"] == {"value": None, "better": "higher"}

    zero = aggregate(raw, missing_as_zero=True)
    assert zero.missing == ("temporal_flickering",)
    lost = (0.9889 - 0.0) / (1 - 0.6293) / 6.5
    assert zero.groups["quality"] == pytest.approx(aggregate(COGVIDEOX).groups["quality"] - lost)
    assert zero.total is not None


@pytest.mark.parametrize("value", [61.68, 1.01, -2.0, math.nan, math.inf])
def test_what_is_no_fraction_is_refused(value):
    with pytest.raises(ValueError, match="imaging_quality must be a fraction"):
        aggregate({"imaging_quality": value})


def test_dimensions_of_another_suite_are_refused():
    with pytest.raises(ValueError, match=r"i2v_subject \(of i2v\): not among VBench's dimensions for t2v"):
        aggregate({"i2v_subject": 0.9})
    with pytest.raises(ValueError, match="Physics: not among"):
        aggregate({"Physics": 0.9}, "i2v")


# -- files ---------------------------------------------------------------------------------------------------


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_results_are_read_from_vbench_s_files_and_ours(tmp_path):
    videos = [{"video_path": "a-0.mp4", "video_results": 0.5}]
    folder = tmp_path / "results"
    folder.mkdir()
    write(folder / "a_eval_results.json", {"color": [0.5, videos], "scene": [0, []]})
    write(folder / "b_eval_results.json", {"human action": [1, videos]})
    write(folder / "b_full_info.json", [{"prompt_en": "not a result"}])
    ours = {"schema": "dit-accel/eval/1", "kind": "vbench", "metrics": {"object_class": {"value": 0.25}}}
    plain = write(tmp_path / "plain.json", {"temporal_style": 0.125})
    found = read([folder, write(tmp_path / "ours.json", ours), plain])
    expected = {"color": 0.5, "scene": 0, "human_action": 1, "object_class": 0.25, "temporal_style": 0.125}
    assert found == expected


def test_bad_result_files_are_refused(tmp_path):
    bad = tmp_path / "bad.json"
    for content, reason in (
        ("", "cannot be read as VBench's results"),
        ('{"color": [0.5', "cannot be read as VBench's results"),
        ([1], "holds no VBench results"),
        ({}, "holds no VBench results"),
        ('{"color": [NaN, []]}', "cannot be read as VBench's results: NaN is no number"),
        ('{"color": [Infinity, []]}', "Infinity is no number"),
        ({"color": []}, r"must be a finite number, got \[\]"),
        ({"color": [True, []]}, "must be a finite number, got True"),
        ({"color": ["0.5", []]}, "must be a finite number, got '0.5'"),
        ({"schema": "other/1", "metrics": {}}, "its schema is 'other/1'"),
        ({"schema": "dit-accel/eval/1", "kind": "pairs", "metrics": {}}, "is of `eval pairs`"),
    ):
        with pytest.raises(ValueError, match=reason):
            read([write(bad, content)])
    with pytest.raises(ValueError, match=r"there is no file .*none\.json"):
        read([tmp_path / "none.json"])
    with pytest.raises(ValueError, match="holds no results of VBench"):
        read([tmp_path])
    one, two = (write(tmp_path / name, {"color": [0.5, []]}) for name in ("1.json", "2.json"))
    with pytest.raises(ValueError, match=r"color is in both .*1\.json and .*2\.json"):
        read([one, two])


def test_scores_are_read_back(tmp_path):
    scores = aggregate({"color": 0.5})
    content = {"schema": "dit-accel/eval/1", "kind": "vbench-scores", **scores.to_dict()}
    again = read_scores(write(tmp_path / "scores.json", json.dumps(content, allow_nan=False)))
    assert (again.normalised, again.total) == (scores.normalised, None)
    with pytest.raises(ValueError, match="give what `eval vbench aggregate` wrote"):
        read_scores(write(tmp_path / "scores.json", content | {"kind": "vbench"}))


# -- showing -------------------------------------------------------------------------------------------------


def test_the_table_is_in_percent():
    columns, rows = table(aggregate(COGVIDEOX))
    assert len(rows) == 16 + 3
    assert all(len(row) == len(columns) for row in rows)
    assert rows[0] == ["subject_consistency", "quality", "1", "96.78", "96.23"]
    assert [(row[0], row[-1]) for row in rows[-3:]] == [
        ("quality score", "82.18"),
        ("semantic score", "75.83"),
        ("total score", "80.91"),
    ]
    assert table(aggregate({}))[1][-1][-1] == "none"


def test_the_radar_shows_every_model(tmp_path):
    pytest.importorskip("matplotlib")
    partial = aggregate({"color": 0.5, "temporal_flickering": 0.5})
    path = tmp_path / "new" / "radar.png"
    figure = radar({"dense": aggregate(COGVIDEOX), "sparse": partial}, path)
    (axes,) = figure.axes
    dense, sparse = (line.get_ydata() for line in axes.lines)
    assert len(dense) == 17
    assert dense[0] == dense[-1] == pytest.approx(96.23, abs=0.01)
    assert sum(not math.isnan(value) for value in sparse) == 2
    assert axes.get_ylim()[0] == pytest.approx(min(value for value in sparse if not math.isnan(value)))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["dense: total 80.91", "sparse: no total"]
    assert min(Image.open(path).size) > 500


def test_plots_that_cannot_be_are_refused(tmp_path):
    scores = aggregate(COGVIDEOX)
    with pytest.raises(ValueError, match=r"written as \.png, \.svg, \.pdf, got the file name 'radar\.txt'"):
        radar({"a": scores}, tmp_path / "radar.txt")
    other: Scores = aggregate({}, "i2v")
    with pytest.raises(ValueError, match="one plot is of one suite, got i2v, t2v"):
        radar({"a": scores, "b": other}, tmp_path / "radar.png")
    assert not list(tmp_path.iterdir())
