"""The rows of a sweep as CSV, as a Markdown page, and as a plot of quality against speed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.evals.benchmarks import table
from dit_accel.evals.reports import result_files as report
from dit_accel.files import atomic, write_text
from dit_accel.json_files import write_json

from .rows import SPEED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "sweep"  # of all its files
SUFFIXES = ("json", "csv", "md", "png")
ABOUT = {  # of columns that are no metrics of their own name
    "step_seconds": "s per step",
    "step_speedup": "step speed-up",
    "seconds": "s in all",
    "speedup": "speed-up",
}
PANELS = 3  # plots in a row
MARKERS = "osD^vPX*"
MIB = 2**20


def quality(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The metrics of quality that some row has, and what is better."""
    timed = {name for pair in SPEED.values() for name in pair}
    found = {name: one["better"] for row in rows for name, one in row["metrics"].items()}
    return {name: better for name, better in found.items() if name not in timed}


def to_csv(answer: dict[str, Any]) -> str:
    """A line per setting: what it measured, and on what; empty where there is no value."""
    settings, here = answer["settings"], answer["environment"]
    names = [*(name for pair in SPEED.values() for name in pair), *quality(answer["rows"])]
    packages = here["packages"]
    where = {
        "size": _size(answer["picture"]),
        "steps": settings["steps"],
        "dtype": settings["dtype"],
        "device": settings["machine"],
        "versions": f"dit-accel {packages['dit-accel']}, torch {packages['torch']}, python {here['python']}",
        "commit": here["commit"],
    }
    lines = []
    for row in answer["rows"]:
        values = {name: row["metrics"].get(name, {}).get("value") for name in names}
        plain = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
        lines.append({"model": settings["model"], **plain, **values, **where})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in line.items()}
        for line in lines
    )
    return text.getvalue()


def columns(answer: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row of text per setting; dense has no quality relative to itself."""
    shown = quality(answer["rows"])
    headings = ["setting", *ABOUT.values(), "pattern", "run", "MiB"]
    headings += [f"{name} {report.ARROWS[better]}" for name, better in shown.items()]
    rows = []
    for row in answer["rows"]:
        step, step_speedup, whole, speedup = (row["metrics"][name]["value"] for name in ABOUT)
        cells = [row["setting"], f"{step:.3g}", f"{step_speedup:.2f}x", f"{whole:.3g}", f"{speedup:.2f}x"]
        cells += [_share(row["pattern_density"]), _share(row["run_density"])]
        cells.append("" if (peak := row["peak_memory_bytes"]) is None else f"{peak / MIB:.0f}")
        rows.append(cells + [report.cell(row["metrics"].get(name)) for name in shown])
    return headings, rows


def title(answer: dict[str, Any]) -> str:
    """What was run, and on what."""
    settings, here = answer["settings"], answer["environment"]
    prompts = len(settings["prompts"])
    guidance = "" if settings["guidance"] is None else f", guidance {settings['guidance']:g}"
    return (
        f"{prompts} prompt{'s' * (prompts > 1)}, {_size(answer['picture'])}, {settings['steps']} steps"
        f"{guidance}, {settings['dtype']}, {settings['machine']}, torch {here['packages']['torch']}, "
        f"commit {here['commit']}"
    )


def notes(answer: dict[str, Any]) -> list[str]:
    """What a reader of the rows has to know."""
    metrics = {name: one for row in answer["rows"] for name, one in row["metrics"].items()}
    return report.notes({answer["label"]: {**answer, "metrics": metrics}})


def markdown(answer: dict[str, Any]) -> str:
    """The page."""
    rows = answer["rows"]
    lines = [
        f"# {answer['label']}: speed and quality of recipes",
        "",
        f"{title(answer)}. Times are medians of {rows[0]['runs']} runs of each setting, which took turns. "
        "Pattern: share of pairs computed where attention is accelerated; run: of all pairs. "
        f"MiB: {answer['memory']}. PSNR, SSIM and LPIPS are to the dense output from the same noise, "
        "distances of sets to all dense outputs.",
        "",
        table.markdown(*columns(answer)),
    ]
    if "png" in answer["files"]:
        lines += [f"![quality against speed]({answer['files']['png']})", ""]
    lines += [f"- {line}" for line in notes(answer)]
    lines += [f"- {row['setting']}: `{json.dumps(row['recipe'])}`" for row in rows if row["recipe"]]
    lines += [f"- `{answer['command']}`"]
    return "\n".join(lines) + "\n"


def write(answer: dict[str, Any], folder: Path) -> None:
    """The files that `answer` names, the JSON last."""
    files = {suffix: folder / name for suffix, name in answer["files"].items()}
    for suffix, text in (("csv", to_csv(answer)), ("md", markdown(answer))):
        write_text(files[suffix], text)
    if "png" in files:
        plot(answer, files["png"])
    write_json(files["json"], answer)


def plot(answer: dict[str, Any], path: Path) -> Figure:
    """Draws each metric of quality against the speed-up per step, a point per setting."""
    from matplotlib.figure import Figure

    rows, shown = answer["rows"], quality(answer["rows"])
    across = min(PANELS, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(4.2 * across, 3.6 * down + 1), dpi=120, layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in panels[len(shown) :]:
        axes.axis("off")
    for axes, (name, better) in zip(panels, shown.items(), strict=False):
        for place, row in enumerate(rows):
            value = row["metrics"].get(name, {}).get("value")
            if value is not None:
                speed = row["metrics"]["step_speedup"]["value"]
                axes.plot(speed, value, ls="", ms=8, **_style(place))
        axes.axvline(1, color="grey", lw=0.8, ls=":")
        axes.set(xlabel="speed-up per step", ylabel=f"{name} ({better} is better)")
        axes.margins(0.15)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{answer['label']}\n{title(answer)}", fontsize=9, wrap=True)
    _legend(figure, rows)
    with atomic(path) as temporary:
        figure.savefig(temporary)
    return figure


def _style(place: int) -> dict[str, str]:
    return {"marker": MARKERS[place % len(MARKERS)], "color": f"C{place % 10}"}


def _legend(figure: Figure, rows: Sequence[dict[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    points = [Line2D([], [], ls="", label=row["setting"], **_style(place)) for place, row in enumerate(rows)]
    figure.legend(handles=points, loc="outside lower center", ncols=min(len(points), 4), frameon=False)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _size(picture: Sequence[int]) -> str:
    frames, height, width = picture
    return f"{width}x{height} px" + (f", {frames} frames" if frames > 1 else "")
