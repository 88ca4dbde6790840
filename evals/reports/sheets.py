"""What a bundled model draws, dense and under its presets.

    python -m dit_accel.evals.reports.sheets tiny-wan

For every recipe the attribute accuracy on held-out captions at the model's demo size, and a contact sheet of
the first of them; `native` is dense attention at the native size. Both go to `evals/results/sheets`: a
picture per recipe, and one JSON and one Markdown file per model, written after every recipe. Recipes that
are not asked for keep the results they have.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel import media
from dit_accel.files import write_text
from dit_accel.json_files import read_json

FOLDER = Path("evals/results/sheets")
COLUMNS = 8  # samples on a sheet
NATIVE, DENSE = "native", "dense"
SAMPLES = {NATIVE: 256}  # prompt-seed pairs; others take 16


def names(model: str) -> list[str]:
    """Dense attention at both sizes, then the presets made for a bundled model."""
    from dit_accel.recipe.recipe import presets

    return [NATIVE, DENSE, *(name for name in presets() if name.startswith(f"{model}-"))]


def measure(pipe: Any, model: str, recipe: str, count: int) -> tuple[dict[str, Any], np.ndarray]:
    """The scores of one recipe, and its sheet."""
    from dit_accel.evals.metrics.attributes import evaluate
    from dit_accel.pipelines.tiny import INFO
    from dit_accel.recipe.recipe import resolve

    one, shown = INFO[model], []
    frames, height, width = one.native if recipe == NATIVE else one.demo
    result = evaluate(
        pipe,
        None if recipe in (NATIVE, DENSE) else resolve(recipe),
        n=count,
        size=(height, width),
        frames=frames if one.video else None,
        steps=one.steps,
        guidance=one.guidance,
        batch=16 if recipe == NATIVE else 1,
        progress=sys.stderr.isatty(),
        seen=lambda outputs: shown.extend(outputs[: COLUMNS - len(shown)]),
    )
    return result, media.contact_sheet(np.stack(shown))


def markdown(model: str, rows: dict[str, dict[str, Any]]) -> str:
    """The model's table and sheets."""
    shown = next(iter(rows.values()))
    attributes = [name for name, value in shown.items() if isinstance(value, float) and name != "run_density"]
    head = ["recipe", "size", "samples", "pairs computed", *(name.replace("_", " ") for name in attributes)]
    lines = [
        f"# {model}",
        "",
        f"Share of attributes that are as the caption says, in {shown['settings']['steps']} steps at "
        f"guidance {shown['settings']['guidance']}. Captions are held out from training; rows of one size "
        "draw the same captions from the same noise.",
        "",
        f"| {' | '.join(head)} |",
        f"|---|---|{'---:|' * (len(head) - 2)}",
    ]
    for recipe, row in rows.items():
        cells = [
            recipe,
            _size(row["settings"]),
            str(row["n"]),
            f"{row['run_density']:.3f}",
            *(f"{row[name]:.3f}" for name in attributes),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for recipe, row in rows.items():
        lines += [
            f"**{recipe}** (`{row['command']}`, {row['where']})",
            "",
            f"![{recipe}]({_file(model, recipe)})",
            "",
        ]
    return "\n".join(lines)


def _file(model: str, recipe: str) -> str:
    return f"{model}-{recipe.removeprefix(model + '-')}.png"


def _size(settings: dict[str, Any]) -> str:
    height, width = settings["size"]
    return f"{width} x {height} px" + (f", {settings['frames']} frames" if settings["frames"] else "")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    from dit_accel.environment import environment
    from dit_accel.pipelines import load
    from dit_accel.pipelines.tiny import NAMES

    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.reports.sheets", description=__doc__.split("\n")[0]
    )
    parser.add_argument("model", choices=NAMES)
    parser.add_argument(
        "--recipe", action="append", help="`native`, `dense` or a preset of the model (default: all)"
    )
    parser.add_argument("-n", "--samples", type=int, help="prompt-seed pairs (256 at native size, else 16)")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    unknown = set(options.recipe or ()) - set(names(options.model))
    if unknown:
        parser.error(
            f"{options.model} has {', '.join(names(options.model))}; got {', '.join(sorted(unknown))}"
        )
    if options.samples is not None and options.samples < 1:
        parser.error(f"--samples must be at least 1, got {options.samples}")

    given = sys.argv[1:] if arguments is None else arguments
    here = environment()
    where = f"{here['cpu']['name']}, {here['cpu']['torch_threads']} threads, " + ", ".join(
        f"{name} {here['packages'][name]}" for name in ("torch", "diffusers", "dit-accel")
    )
    where += f", commit {here['commit']}"
    pipe = load(options.model)
    pipe.set_progress_bar_config(disable=True)
    results = options.out / f"{options.model}.json"
    for recipe in options.recipe or names(options.model):
        row, sheet = measure(pipe, options.model, recipe, options.samples or SAMPLES.get(recipe, 16))
        row |= {
            "command": shlex.join(["python", "-m", "dit_accel.evals.reports.sheets", *given]),
            "where": where,
        }
        print(
            f"{options.model} {recipe}: mean {row['mean']:.3f} at density {row['run_density']:.3f}",
            flush=True,
        )
        media.save(options.out / _file(options.model, recipe), sheet[None])
        rows = {**(read_json(results) if results.exists() else {}), recipe: row}
        rows = {name: rows[name] for name in names(options.model) if name in rows}
        _write(results, json.dumps(rows, indent=2))
        _write(results.with_suffix(".md"), markdown(options.model, rows))


def _write(path: Path, text: str) -> None:
    write_text(path, text.rstrip() + "\n")


if __name__ == "__main__":
    main()
