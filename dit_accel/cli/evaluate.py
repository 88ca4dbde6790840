"""`dit-accel eval`: quality of what a model generates."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .errors import reported
from .options import (
    DeviceOption,
    DtypeOption,
    FramesOption,
    SizeOption,
    StepsOption,
    parse_size,
    pick_device,
    pick_dtype,
)
from .output import JsonOption, note, print_json, print_table
from .runs import Request, check_request, load

EXAMPLE = "Example: dit-accel eval attributes --model tiny-flux -n 32 --json"

evaluations = typer.Typer(no_args_is_help=True, help="Measure the quality of what a model generates.")


@evaluations.callback()
def _group() -> None:
    """Measure the quality of what a model generates."""


@evaluations.command(epilog=EXAMPLE)
@reported
def attributes(
    model: Annotated[str, typer.Option("--model", "-m", help="A bundled model.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="A preset's name or a recipe file; dense without.")
    ] = None,
    samples: Annotated[int, typer.Option("-n", "--samples", min=1, help="Prompt-seed pairs.")] = 256,
    demo: Annotated[bool, typer.Option("--demo", help="At the demo size instead of the native one.")] = False,
    size: SizeOption = None,
    frames: FramesOption = None,
    steps: StepsOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of prompts and noise.")] = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples generated at once.")] = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Count how often colour, shape, position, background and motion are what the caption says.

    Captions are combinations that the bundled models never saw in training.
    """
    from ..evals.attributes import check_bundled, evaluate
    from ..recipe import resolve

    check_bundled(model)
    width, height = parse_size(size) or (None, None)
    chosen = resolve(recipe) if recipe else None
    target = pick_device(device)
    request = Request("", width, height, frames, steps).with_defaults(model, "demo" if demo else "native")
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
        progress=sys.stdout.isatty() and not json,
    )
    result = {"model": model, "recipe": chosen and chosen.to_dict(), "samples": samples, **result}
    if json:
        return print_json(result)
    rows = [(name, f"{value:.1%}") for name, value in result.items() if isinstance(value, float)]
    print_table(
        f"{model}, {samples} samples", ("", "accuracy"), [row for row in rows if row[0] != "run_density"]
    )
    typer.echo(f"density of the run: {result['run_density']:.3f}")
    return None


def register(app: typer.Typer) -> None:
    app.add_typer(evaluations, name="eval")
