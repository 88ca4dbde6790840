"""VBench's Quality, Semantic and Total scores from the scores of its dimensions, as a table and a radar plot.

A raw score x is normalised to (x - min) / (max - min) without clipping. A group's score is the mean of its
dimensions by weight, the total that of the groups: (4 quality + semantic) / 5 for text to video (t2v), and
(quality + i2v) / 2 for image to video (i2v). The constants are in `constants.json`.

Source: VBench (arXiv 2311.17982), VBench++ (arXiv 2411.13503); Vchitect/VBench, scripts/cal_final_score.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel import plots
from dit_accel.evals.reports import result_files as report
from dit_accel.json_files import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND, SCORES_KIND = "vbench", "vbench-scores"
RESULTS = "_eval_results.json"  # how the names of VBench's result files end


@dataclass(frozen=True)
class Dimension:
    """Bounds and weight of one dimension; `prompts` are those of the standard suite, where it is known."""

    group: str
    min: float
    max: float
    weight: float
    prompts: int | None = None

    def normalised(self, raw: float) -> float:
        return (raw - self.min) / (self.max - self.min)


@dataclass(frozen=True)
class Suite:
    """The dimensions of a benchmark, and the weight of each group of them in the total."""

    name: str
    dimensions: Mapping[str, Dimension]
    groups: Mapping[str, float]

    def check(self, names: Sequence[str]) -> None:
        """Raises ValueError for a name that is not one of its dimensions."""
        unknown = [name for name in names if name not in self.dimensions]
        if not unknown:
            return
        others = [suite for suite in SUITES.values() if all(name in suite.dimensions for name in unknown)]
        hint = f" (of {others[0].name})" if others else ""
        raise ValueError(
            f"{', '.join(unknown)}{hint}: not among VBench's dimensions for {self.name}, "
            f"{', '.join(self.dimensions)}"
        )


def _suites() -> dict[str, Suite]:
    table = read_json(Path(__file__).with_name("constants.json"))
    return {
        name: Suite(
            name,
            {key: Dimension(**values) for key, values in table[name]["dimensions"].items()},
            table[name]["groups"],
        )
        for name in ("t2v", "i2v")
    }


SUITES = _suites()


@dataclass(frozen=True)
class Scores:
    """Scores of one model; None is what lacks a dimension.

    Attributes:
        raw, normalised: by dimension, fractions; a missing dimension is None unless it counts as zero.
        groups: by group.
        total: of all groups.
        missing: dimensions without a score, whether they count as zero or not.
    """

    suite: Suite
    raw: dict[str, float | None]
    normalised: dict[str, float | None]
    groups: dict[str, float | None]
    total: float | None
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `metrics` as in every result of `dit-accel eval`."""
        summary = {f"vbench-{name}": value for name, value in {"total": self.total, **self.groups}.items()}
        dimensions = {
            name: {
                "raw": self.raw[name],
                "normalised": self.normalised[name],
                "group": one.group,
                "weight": one.weight,
            }
            for name, one in self.suite.dimensions.items()
        }
        return {
            "suite": self.suite.name,
            "metrics": {name: {"value": value, "better": "higher"} for name, value in summary.items()},
            "dimensions": dimensions,
            "missing": list(self.missing),
        }


def aggregate(raw: Mapping[str, float], suite: str = "t2v", missing_as_zero: bool = False) -> Scores:
    """Normalised, group and total scores.

    Args:
        raw: score by dimension, fractions.
        suite: "t2v" or "i2v".
        missing_as_zero: whether a dimension without a score counts as a raw score of 0, as VBench's own
            script has it (normalised it may be below 0), instead of leaving its group and the total without.

    Raises:
        ValueError: a dimension that the suite lacks, or a score that is no fraction.
    """
    chosen = SUITES[suite]
    chosen.check(list(raw))
    for name, value in raw.items():
        if not -1 <= value <= 1:  # nor if it is not a number; cosines can be negative
            raise ValueError(
                f"{name} must be a fraction of at most 1, got {value}; divide percentages by 100"
            )
    missing = tuple(name for name in chosen.dimensions if name not in raw)
    filled = {name: raw.get(name, 0.0 if missing_as_zero else None) for name in chosen.dimensions}
    normalised = {
        name: None if value is None else chosen.dimensions[name].normalised(value)
        for name, value in filled.items()
    }
    groups = {
        group: _mean(
            [(normalised[n], one.weight) for n, one in chosen.dimensions.items() if one.group == group]
        )
        for group in chosen.groups
    }
    total = _mean([(groups[group], weight) for group, weight in chosen.groups.items()])
    return Scores(chosen, filled, normalised, groups, total, missing)


def _mean(values: Sequence[tuple[float | None, float]]) -> float | None:
    """The mean by weight; None if one is None."""
    known = [value * weight for value, weight in values if value is not None]
    if len(known) < len(values):
        return None
    return math.fsum(known) / math.fsum(weight for _, weight in values)


# -- reading -------------------------------------------------------------------------------------------------


def read(paths: Sequence[Path]) -> dict[str, float]:
    """Raw scores by dimension out of result files, together those of one model.

    Takes VBench's own files, {dimension: [score, videos]}, folders of them, results of
    `dit-accel eval vbench run`, and {dimension: score}.

    Raises:
        ValueError: a file that cannot be read as one of these, a score that is not a finite number, or a
            dimension in two files.
    """
    found: dict[str, tuple[float, Path]] = {}
    for path in _files(paths):
        for name, value in _scores(path).items():
            if name in found:
                raise ValueError(
                    f"{name} is in both {found[name][1]} and {path}: give the files of one model"
                )
            found[name] = value, path
    return {name: value for name, (value, _) in found.items()}


def _files(paths: Sequence[Path]) -> list[Path]:
    files = []
    for path in paths:
        inside = sorted(path.glob(f"*{RESULTS}")) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path} holds no results of VBench (*{RESULTS})")
        files += inside
    return files


def _scores(path: Path) -> dict[str, float]:
    content = read_json(path, "VBench's results")
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no VBench results, which are {{dimension: [score, videos]}}")
    if "schema" in content:
        result = report.load(path)
        if result.get("kind") != KIND:
            raise ValueError(f"{path} is of `eval {result.get('kind')}`; give what `eval vbench run` wrote")
        content = {name: quantity["value"] for name, quantity in result["metrics"].items()}
    scores = {}
    for key, value in content.items():
        score = value[0] if isinstance(value, list) and value else value
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"{path}: the score of {key} must be a finite number, got {score!r:.60}")
        scores[key.replace(" ", "_")] = float(score)
    return scores


def read_scores(path: Path) -> Scores:
    """What `dit-accel eval vbench aggregate` wrote.

    Raises:
        ValueError: another file.
    """
    result = report.load(path)
    if result.get("kind") != SCORES_KIND:
        raise ValueError(f"{path} is of `eval {result.get('kind')}`; give what `eval vbench aggregate` wrote")
    raw = {name: one["raw"] for name, one in result["dimensions"].items() if one["raw"] is not None}
    return aggregate(raw, result["suite"])


# -- showing -------------------------------------------------------------------------------------------------


def table(scores: Scores) -> tuple[list[str], list[list[str]]]:
    """Columns and rows in percent: every dimension, then the groups and the total."""
    rows = [
        [name, one.group, f"{one.weight:g}", *map(_percent, (scores.raw[name], scores.normalised[name]))]
        for name, one in scores.suite.dimensions.items()
    ]
    for name, weight in scores.suite.groups.items():
        rows.append([f"{name} score", "total", f"{weight:g}", "", _percent(scores.groups[name])])
    rows.append(["total score", "", "", "", _percent(scores.total)])
    return ["dimension", "group", "weight", "raw %", "normalised %"], rows


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.2f}"


def radar(models: Mapping[str, Scores], path: Path) -> Figure:
    """Draws the normalised scores of models of one suite, a closed line each; what is missing is a gap.

    Args:
        models: by label, at least one.
        path: of the picture, see `check_plot`.

    Raises:
        ValueError: models of several suites; or see `check_plot`.
        UnavailableError: see `check_plot`.
    """
    plots.check_plot(path)
    from matplotlib.figure import Figure

    from dit_accel.files import atomic

    suites = {scores.suite.name for scores in models.values()}
    if len(suites) != 1:
        raise ValueError(f"one plot is of one suite, got {', '.join(sorted(suites))}")
    names = list(next(iter(models.values())).normalised)
    angles = [2 * math.pi * index / len(names) for index in range(len(names))]
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    lowest, highest = 0.0, 100.0
    for label, scores in models.items():
        values = [math.nan if value is None else 100 * value for value in scores.normalised.values()]
        known = [value for value in values if not math.isnan(value)]
        lowest, highest = min([lowest, *known]), max([highest, *known])
        total = "no total" if scores.total is None else f"total {_percent(scores.total)}"
        axes.plot(
            [*angles, angles[0]], [*values, values[0]], marker="o", markersize=3, label=f"{label}: {total}"
        )
    axes.set_ylim(lowest, highest)
    axes.set_xticks(angles, [name.replace("_", "\n") for name in names], fontsize=8)
    axes.set_title("VBench, normalised scores in %")
    figure.legend(loc="outside lower center")
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return figure
