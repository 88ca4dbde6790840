"""`dit-accel calibrate`: what each head of a model should compute, found on a few prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.evals.metrics import prompts as prompt_file
from dit_accel.generation import Request, check_request, load
from dit_accel.seeds import LARGEST_OPTION

from . import options as opt
from .errors import reported
from .output import JsonOption, note, print_json, print_table

SCHEMA = "dit-accel/calibrate/1"
EXAMPLE = (
    "Example: dit-accel calibrate --model tiny-wan --density 0.3 --candidates reordered,static "
    "--out outputs/wan.safetensors"
)


@reported
def calibrate(
    model: opt.ModelOption,
    density: Annotated[
        float, typer.Option("--density", help="Share of the pairs of blocks that are computed, up to 1.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The calibration, a .safetensors file.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What to draw; repeat it for several. Bundled models need none."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A text file with a prompt on each line.")
    ] = None,
    candidates: Annotated[
        str,
        typer.Option(
            "--candidates",
            help="reordered: blocks along the axes (PARO); static: the toolkit's patterns; or names of "
            "patterns. Several, with commas: whichever saves the most error for what it computes.",
        ),
    ] = "reordered",
    tails: Annotated[
        bool, typer.Option("--tails/--no-tails", help="Of several candidates, try the compensated tail too.")
    ] = True,
    budget: Annotated[
        str, typer.Option("--budget", help="Of reordered alone: head, the same density for all; or global.")
    ] = "head",
    block_size: Annotated[int, typer.Option("--block-size", min=1, max=4096, help="Tokens of a block.")] = 64,
    stretches: Annotated[
        int, typer.Option("--stretches", min=1, max=1000, help="Parts of a run with blocks of their own.")
    ] = 10,
    queries: Annotated[
        int | None,
        typer.Option(
            "--queries", min=1, max=LARGEST_OPTION, help="Look at so many queries of each call, not at all."
        ),
    ] = None,
    size: opt.SizeOption = None,
    frames: opt.FramesOption = None,
    steps: opt.StepsOption = None,
    guidance: opt.GuidanceOption = None,
    seed: Annotated[int, opt.seed_option("Seed of the first prompt's noise.")] = 0,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
    state: Annotated[
        Path | None,
        typer.Option("--state", help="Folder of what was found so far; beside --out unless given."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Find what each head of a model should compute, on a few prompts, for recipes by `Calibrated`.

    --out is the calibration; beside it a recipe that names it, .yaml, and a picture of what was chosen, .png.
    Stopped, it goes on with the same command; with another --density what was measured serves again.
    """
    from dit_accel import calibrate as find
    from dit_accel.calibration.picture import draw_choices
    from dit_accel.files import atomic, write_text
    from dit_accel.recipe.yaml_text import to_yaml

    if not 0 < density <= 1:
        raise ValueError(f"`--density` must be a number above 0 and at most 1, got {density}")
    opt.check_guidance(guidance)
    if opt.check_output(out).suffix != ".safetensors":
        raise ValueError(f"`--out` must end in .safetensors, got {out.name!r}")
    width, height = opt.parse_size(size) or (None, None)
    texts = _prompts(prompt or [], prompts, model, seed)
    target = opt.pick_device(device)
    request = Request("", width, height, frames, steps, guidance).with_defaults(model, "native")
    pipe = load(model, opt.pick_dtype(dtype, target), target)
    pipe.set_progress_bar_config(disable=True)
    request = request.with_steps(pipe)
    check_request(pipe, request)
    call = {
        k: v for k, v in request.arguments(pipe).items() if k not in ("prompt", "generator", "output_type")
    }
    folder = out.with_suffix(".state") if state is None else state
    note(f"{model}: {len(texts)} prompts, {request.steps} steps; goes on from {folder} when stopped")
    found = find(
        pipe,
        texts,
        density=density,
        candidates=tuple(name.strip() for name in candidates.split(",")),
        tails=tails,
        budget=budget,
        block_size=block_size,
        stretches=stretches,
        queries=queries,
        seed=seed,
        folder=folder,
        progress=sys.stderr.isatty(),
        **call,
    )
    found.save(out)
    files = {"calibration": out, "recipe": out.with_suffix(".yaml"), "picture": out.with_suffix(".png")}
    named = {"pattern": "Calibrated", "calibration": out.name}
    write_text(files["recipe"], to_yaml({"family": found.family, "attention": named}))
    with atomic(files["picture"]) as temporary:
        draw_choices(found).save(temporary, format="PNG")
    if json:
        shape = {"layers": len(found.layers), "heads": found.heads, "chosen": found.counts()}
        told = {name: getattr(found, name) for name in ("family", "grid", "steps", "density", "about")}
        return print_json({"schema": SCHEMA, **told, **shape, "files": files})
    total = sum(found.counts().values())
    rows = [(kind, n, f"{n / total:.1%}") for kind, n in found.counts().items()]
    print_table(f"Heads of all stretches, {total}", ("choice", "heads", "share"), rows)
    for name, path in files.items():
        typer.echo(f"{name}: {path}")
    return None


def _prompts(given: list[str], file: Path | None, model: str, seed: int) -> list[str]:
    """Prompts as given, else two captions of a bundled model."""
    from dit_accel.pipelines import tiny

    texts = [*given, *([] if file is None else prompt_file.read(file))]
    if texts:
        return texts
    if model not in tiny.NAMES:
        raise ValueError("give the prompts to calibrate on, by --prompt or --prompts FILE; one or two do")
    from dit_accel.pipelines.tiny.evaluate import held_out_scenes

    info = tiny.INFO[model]
    return [tiny.caption(scene) for scene in held_out_scenes(2, seed, info.video)]


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(epilog=EXAMPLE)(calibrate)
