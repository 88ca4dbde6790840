"""`dit-accel eval`: quality of what a model generates, or has generated."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.generation import Request, check_request, load
from dit_accel.json_files import write_json

from . import evaluate_files, scores, sweep, vbench
from . import options as opt
from . import results as res
from .errors import reported
from .output import JsonOption, note, print_json, print_table

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
    recipe: opt.RecipeOption = None,
    samples: Annotated[
        int, typer.Option("-n", "--samples", min=1, max=opt.MOST_SAMPLES, help="Prompt-seed pairs.")
    ] = 256,
    demo: Annotated[bool, typer.Option("--demo", help="At the demo size instead of the native one.")] = False,
    size: opt.SizeOption = None,
    frames: opt.FramesOption = None,
    steps: opt.StepsOption = None,
    guidance: opt.GuidanceOption = None,
    seed: Annotated[int, opt.seed_option("Seed of prompts and noise.")] = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, max=10_000, help="Samples generated at once.")] = 16,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
    out: res.OutOption = None,
    label: res.LabelOption = None,
    json: JsonOption = False,
) -> None:
    """Count how often colour, shape, position, background and motion are what the caption says.

    Captions are combinations that the bundled models never saw in training.
    """
    from dit_accel.evals.metrics.attributes import check_bundled, evaluate
    from dit_accel.recipe.recipe import resolve

    if out is not None:
        opt.check_output(out)
    opt.check_guidance(guidance)
    check_bundled(model)
    width, height = opt.parse_size(size) or (None, None)
    chosen = resolve(recipe) if recipe else None
    target = opt.pick_device(device)
    request = Request("", width, height, frames, steps, guidance)
    request = request.with_defaults(model, "demo" if demo else "native")
    pipe = load(model, opt.pick_dtype(dtype, target), target)
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
        **res.head("attributes", label),
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
def list_metrics(weights: res.WeightsOption = None, json: JsonOption = False) -> None:
    """List every metric: whether it can run here, and if not why and what to do about it."""
    from dit_accel.evals.metrics.catalogue import METRICS, by_reason

    sources = res.pick_sources(weights, download=False)
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
    from dit_accel.evals.reports import result_files as reports
    from dit_accel.files import write_text

    if out is not None:
        opt.check_output(out)
    results = reports.load_all(files)
    if out is not None:
        write_text(out, reports.markdown(results) + "\n")
    if json:
        return print_json({"schema": reports.SCHEMA, "kind": "report", "results": results})
    if md:
        return typer.echo(reports.markdown(results))
    print_table("", *reports.table(results))
    for line in reports.notes(results):
        typer.echo(line)
    return None


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    evaluate_files.register(evaluations)
    scores.register(evaluations)
    sweep.register(evaluations)
    vbench.register(evaluations)
    app.add_typer(evaluations, name="eval")
