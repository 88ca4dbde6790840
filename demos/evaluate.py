"""The tab of results: any result file of `evals/results`, or a folder of them, as a table and a plot."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from dit_accel.evals.reports import result_files
from dit_accel.files import read_text

from .exports import Export
from .settings import Settings
from .tab import LOOK_UPS, Studio, Tab, export_area, told

ALL = "all sweeps"
SPEED = ("step_speedup", "speedup")
MOST_ROWS, LARGEST_FILE = 500, 2**22  # of a table; bytes
PALETTE = ("#0d9488", "#d97706", "#4f46e5", "#db2777", "#65a30d", "#0284c7", "#9333ea", "#dc2626")


def results(settings: Settings) -> dict[str, list[Path]]:
    """Files by what the page calls them: every result, and all sweeps together."""
    found: dict[str, list[Path]] = {}
    for path in sorted(settings.results.rglob("*")):
        if path.suffix not in (".json", ".csv") or path.stat().st_size > LARGEST_FILE:
            continue
        if path.suffix == ".csv" or _is_result(path):
            found[str(path.relative_to(settings.results))] = [path]
    sweeps = [paths[0] for name, paths in found.items() if name.endswith("sweep.json")]
    return ({ALL: sweeps} if sweeps else {}) | found


def _is_result(path: Path) -> bool:
    try:
        result_files.load(path)
    except ValueError:
        return False
    return True


def build(studio: Studio) -> None:
    """Adds the tab's components and events."""
    known = list(results(studio.settings)) or ["no results"]
    with gr.Row(equal_height=False):
        chosen = gr.Dropdown(known, value=known[0], label="Results", scale=2, elem_id="results")
        metric = gr.Dropdown([], label="Quality", scale=1, elem_id="metric")
    plot = gr.ScatterPlot(
        x="speed-up", y="quality", color="setting", height=320, title="Speed against quality",
        x_title="speed-up of a step", elem_id="plot", visible=False,
        tooltip=["setting", "speed-up", "quality"],
    )  # fmt: skip
    table = gr.Dataframe(interactive=False, wrap=True, max_height=420, elem_id="table")
    notes = gr.Markdown(elem_classes="notes", sanitize_html=True)
    export = export_area()
    look_up = {"show_progress": "hidden", "concurrency_id": LOOK_UPS, "concurrency_limit": 2}

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        return told(function, studio)

    shown = [table, metric, plot, notes, *export]
    chosen.change(bound(show), chosen, shown, api_name="results", **look_up)
    gr.context.Context.root_block.load(bound(show), chosen, shown, api_name="results_at_start", **look_up)
    metric.input(bound(plotted), [chosen, metric], plot, api_name="quality", **look_up)


def _paths(settings: Settings, label: Any) -> list[Path]:
    """Files of a label of `results`; no other file is opened."""
    known = results(settings)
    if label not in known:
        raise ValueError("Choose one of the listed results.")
    return known[label]


def show(studio: Studio, label: Any) -> list[Any]:
    """A result as a table, with the metrics that it can be plotted by and what makes the table again."""
    paths = _paths(studio.settings, label)
    export = _export(studio.settings, paths).values
    if paths[0].suffix == ".csv":
        rows = list(csv.reader(io.StringIO(read_text(paths[0]))))
        table = {"headers": rows[0], "data": rows[1 : MOST_ROWS + 1]}
        note = f"The first {MOST_ROWS} of {len(rows) - 1} rows." if len(rows) > MOST_ROWS + 1 else ""
        return [table, gr.Dropdown([], value=None), gr.ScatterPlot(None, visible=False), note, *export]
    found = result_files.load_all(paths)
    columns, rows = result_files.table(found)
    columns = [column.replace("_", " ") for column in columns]  # so that they wrap between words
    metrics = _metrics(found)
    first = metrics[0] if metrics else None
    note = "\n".join(f"- {line}" for line in result_files.notes(found))
    return [
        {"headers": columns, "data": rows},
        gr.Dropdown(metrics, value=first),
        plotted(studio, label, first),
        note,
        *export,
    ]


def _metrics(found: dict[str, dict[str, Any]]) -> list[str]:
    """What is not a time: PSNR first, as most know it."""
    names = dict.fromkeys(name for one in found.values() for name in one["metrics"])
    timed = {"step_seconds", "seconds", "step_speedup", "speedup"}
    speeds = any(name in names for name in SPEED)
    quality = [name for name in names if name not in timed] if speeds else []
    return sorted(quality, key=lambda name: (name != "psnr", quality.index(name)))


def plotted(studio: Studio, label: Any, metric: Any) -> Any:
    """Speed-up against one metric, a point for each setting that has both."""
    import pandas as pd

    paths = _paths(studio.settings, label)
    if metric is None or paths[0].suffix == ".csv":
        return gr.ScatterPlot(None, visible=False)
    found = result_files.load_all(paths)
    if metric not in _metrics(found):
        raise ValueError("Choose one of the listed metrics.")
    points = []
    for name, result in found.items():
        speed = next((result["metrics"][one]["value"] for one in SPEED if one in result["metrics"]), None)
        value = result["metrics"].get(metric, {}).get("value")
        if speed is not None and value is not None:
            points.append({"setting": _short(name), "speed-up": round(speed, 4), "quality": round(value, 5)})
    frame = pd.DataFrame(points, columns=["setting", "speed-up", "quality"])
    colours = dict(zip(frame["setting"], PALETTE * (len(points) // len(PALETTE) + 1), strict=False))
    return gr.ScatterPlot(frame, y_title=metric, color_map=colours, visible=bool(points))


def _short(name: str) -> str:
    """`tiny-flux tiny-flux-clear` without its model, which the recipe's name repeats."""
    model, _, setting = name.partition(" ")
    return setting if setting.startswith(f"{model}-") else name


def _export(settings: Settings, paths: list[Path]) -> Export:
    """What prints the same table, and the recipes of its settings."""
    if paths[0].suffix == ".csv":
        path = str(paths[0].resolve())
        python = f"import csv\n\nfor row in csv.reader(open({path!r}, newline='')):\n    print(row)\n"
        return Export("# no recipe\n", python, f"cat {shlex.quote(path)}\n")
    names = [str(path.resolve()) for path in paths]
    python = (
        "from pathlib import Path\n\nfrom dit_accel.evals.reports import result_files\n\n"
        f"results = result_files.load_all([Path(name) for name in {names!r}])\n"
        "print(result_files.markdown(results))\n"
    )
    command = f"dit-accel eval report {' '.join(map(shlex.quote, names))} --md\n"
    return Export(_recipes(paths), python, command)


def _recipes(paths: list[Path]) -> str:
    """The recipes of sweeps, one YAML document each."""
    from dit_accel.recipe.recipe import Recipe

    texts = []
    for path in paths:
        for row in result_files.load(path).get("rows", ()):
            if row.get("recipe"):
                texts.append(f"# {row['setting']}\n{Recipe.from_dict(row['recipe']).to_yaml()}")
    return "---\n".join(texts) or "# no recipe\n"


TAB = Tab("Evaluate", build)
