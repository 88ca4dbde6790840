"""`dit-accel eval`: quality of what a model generates, or has generated."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..records import write_json
from ..runs import Request, check_request, load
from . import evaluate_files, scores, sweep, vbench
from .errors import reported
from .options import (
    DeviceOption,
    DtypeOption,
    FramesOption,
    GuidanceOption,
    RecipeOption,
    SizeOption,
    StepsOption,
    check_guidance,
    check_output,
    parse_size,
    pick_device,
    pick_dtype,
)
from .output import JsonOption, note, print_json, print_table
from .results import LabelOption, OutOption, WeightsOption, head, pick_sources

LIST_SCHEMA = "dit-accel/eval-list/1"
EXAMPLE = "Example: dit-accel eval attributes --model tiny-flux -n 32 --json"

evaluations = typer.Typer(no_args_is_help=True, help="Measure the quality of what a model generates.")


@evaluations.callback()
def _group() -> None:
    """Measure the quality of what a model generates."""


@evaluations.command(epilog=EXAMPLE)
@reported
def attributes(
    model: Annotated[str, typer.Option("--model", "-m", help="A bundled model.")],
    recipe: RecipeOption = None,
    samples: Annotated[int, typer.Option("-n", "--samples", min=1, help="Prompt-seed pairs.")] = 256,
    demo: Annotated[bool, typer.Option("--demo", help="At the demo size instead of the native one.")] = False,
    size: SizeOption = None,
    frames: FramesOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of prompts and noise.")] = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples generated at once.")] = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    out: OutOption = None,
    label: LabelOption = None,
    json: JsonOption = False,
) -> None:
    """Count how often colour, shape, position, background and motion are what the caption says.

    Captions are combinations that the bundled models never saw in training.
    """
    from ..evals.attributes import check_bundled, evaluate
    from ..recipe import resolve

    if out is not None:
        check_output(out)
    check_guidance(guidance)
    check_bundled(model)
    width, height = parse_size(size) or (None, None)
    chosen = resolve(recipe) if recipe else None
    target = pick_device(device)
    request = Request("", width, height, frames, steps, guidance)
    request = request.with_defaults(model, "demo" if demo else "native")
    pipe = load(model, pick_dtype(dtype, target), target)
    check_request(pipe, request)
    note(f"{model}: {samples} held-out captions, {chosen.name or chosen.tag if chosen else 'dense'}")
    result = evaluate(
        pipe,
        chosen,
        n=samples,
        seed=seed,
        size=(request.height, request.width),
        frames=request.frames,
        steps=request.steps,
        guidance=request.guidance,
        batch=batch,
        progress=sys.stderr.isatty(),
    )
    density = result.pop("run_density")
    shares = {name: value for name, value in result.items() if isinstance(value, float)}
    settings = {"model": model, "recipe": chosen and chosen.to_dict(), "samples": samples}
    metrics = {name: {"value": value, "better": "higher"} for name, value in shares.items()}
    answer = {
        **head("attributes", label),
        **settings,
        "run_density": density,
        **result,
        "metrics": metrics,
    }
    if out is not None:
        write_json(out, answer)
    if json:
        return print_json(answer)
    rows = [(name, f"{value:.1%}") for name, value in shares.items()]
    print_table(f"{model}, {samples} samples", ("", "accuracy"), rows)
    typer.echo(f"density of the run: {density:.3f}")
    return None


@evaluations.command("list", epilog="Example: dit-accel eval list --json")
@reported
def list_metrics(weights: WeightsOption = None, json: JsonOption = False) -> None:
    """List every metric: whether it can run here, and if not why and what to do about it."""
    from ..evals.metrics import METRICS, by_reason

    sources = pick_sources(weights, download=False)
    rows = [metric.describe(sources) for metric in METRICS.values()]
    if json:
        return print_json({"schema": LIST_SCHEMA, "metrics": rows})
    table = [(r["name"], r["command"], r["description"], "yes" if r["available"] else "no") for r in rows]
    print_table("Metrics", ("metric", "eval ...", "what it is", "runs here"), table)
    for reason, names in by_reason({row["name"]: row["reason"] for row in rows if row["reason"]}).items():
        typer.echo(f"{', '.join(names)}: {reason}")
    return None


@evaluations.command(epilog="Example: dit-accel eval report clear.json neighborhood.json --md --out table.md")
@reported
def report(
    files: Annotated[list[Path], typer.Argument(help="Result files of `dit-accel eval`.")],
    md: Annotated[bool, typer.Option("--md", help="As Markdown, with the commands they are from.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Markdown file to write.")] = None,
    json: JsonOption = False,
) -> None:
    """Put several results into one table, a row each."""
    from ..evals import report as reports
    from ..evals.media import atomic

    if out is not None:
        check_output(out)
    results = reports.load_all(files)
    if out is not None:
        with atomic(out) as temporary:
            temporary.write_text(reports.markdown(results) + "\n")
    if json:
        return print_json({"schema": reports.SCHEMA, "kind": "report", "results": results})
    if md:
        return typer.echo(reports.markdown(results))
    print_table("", *reports.table(results))
    for line in reports.notes(results):
        typer.echo(line)
    return None


def register(app: typer.Typer) -> None:
    evaluate_files.register(evaluations)
    scores.register(evaluations)
    sweep.register(evaluations)
    vbench.register(evaluations)
    app.add_typer(evaluations, name="eval")
